// From the tokens to their weighted sum. Every weight is read from memory once a group of rows.
#pragma once
#include "call.h"

namespace moeforge {

template <class Engine>
struct Forward {
    using T = typename Engine::T;
    static constexpr int width = Engine::panels * 16;
    const Call& c;
    int64_t x_units, h_units;  // 32-bit units of a panel of tokens, of a panel of hidden rows
    int64_t up_rows;           // 2F or F

    explicit Forward(const Call& call)
        : c(call),
          x_units(round_up(c.D, Engine::step) / Engine::per_unit),
          h_units(round_up(c.F, Engine::step) / Engine::per_unit),
          up_rows(c.gated ? 2 * c.F : c.F) {}

    // Few rows of tokens lie as rows [rows][units] where a panel [units][16] would be.
    static bool narrow(const Segment& s) { return s.rows() <= Engine::narrow; }

    void product(const Segment& s, const Rows<Engine>& weights, int64_t K, int64_t units, const float* rows, int64_t p, int v, float* tile, int ahead) const {
        if (narrow(s)) Engine::narrow_product(weights.a0, weights.a1, weights.lda, K, rows, units, s.rows(), tile, ahead);
        else Engine::product(weights.a0, weights.a1, weights.lda, round_up(K, Engine::step), rows + p * units * 16, units * 16, v, tile, 16, p ? 0 : ahead);
    }

    // act(gate) * up of 16 (or, where there is no gate, 32) neurons and one panel of rows
    void hidden_tile(const Segment& s, int64_t f0, int64_t panel, const float* tile, float* h) const {
        const int64_t neurons = c.gated ? 16 : 32, rows = std::min<int64_t>(16, s.rows() - panel * 16);
        const T* bias = c.up_bias ? (const T*)c.up_bias + s.expert * up_rows : nullptr;
        T* kept = c.hidden ? (T*)c.hidden + ((s.kept + panel) * up_rows + f0) * 16 : nullptr;
        vec made[32];
        for (int i = 0; i < neurons; ++i) {
            const bool real = f0 + i < c.F;
            vec first_row = load(tile + i * width), second_row = c.gated ? load(tile + (16 + i) * width) : set(0);
            if (bias && real) {
                first_row = _mm512_add_ps(first_row, set(widen(bias + f0 + i)));
                if (c.gated) second_row = _mm512_add_ps(second_row, set(widen(bias + c.F + f0 + i)));
            }
            if (kept && real) {
                store(kept + i * 16, first_row);
                if (c.gated) store(kept + (c.F + i) * 16, second_row);
            }
            vec value = activate(c.activation, first_row);
            if (c.gated) value = _mm512_mul_ps(value, second_row);
            made[i] = real ? value : set(0);
        }
        if (narrow(s)) {
            for (int i = 0; i < neurons; i += 16) store_columns(h + f0 + i, h_units, (const float*)(made + i), 16, rows, c.F - f0 - i);
            return;
        }
        for (int i = 0; i < neurons; i += Engine::per_unit) {
            float* to = h + (f0 + i) / Engine::per_unit * 16;
            if constexpr (Engine::per_unit == 1) {
                if (f0 + i < c.F) store(to, made[i]);
            } else {
                if (f0 + i < round_up(c.F, Engine::step)) _mm512_storeu_si512(to, interleave(made[i], made[i + 1]));
            }
        }
    }

    void up(const Segment& s, int64_t block, Rows<Engine>& weights, const float* x, float* h) const {
        const int64_t f0 = block * (c.gated ? 16 : 32);
        const T* base = (const T*)c.up + s.expert * c.up_expert + f0 * c.up_row;
        const T* second = base + (c.gated ? c.F : 16) * c.up_row;
        weights.take(base, c.F - f0, second, c.gated ? c.F - f0 : c.F - f0 - 16, c.up_row, c.D);
        alignas(64) float tile[32 * width];
        for (int64_t p = 0; p < s.panels(); p += Engine::panels) {
            int v = std::min<int64_t>(Engine::panels, s.panels() - p);
            product(s, weights, c.D, x_units, x, p, v, tile, c.gated ? 16 : 32);
            for (int i = 0; i < v; ++i) hidden_tile(s, f0, p + i, tile + i * 16, h + (p + i) * h_units * 16);
        }
    }

    void down(const Segment& s, int64_t block, Rows<Engine>& weights, const float* h) const {
        const int64_t d0 = block * 32;
        const T* base = (const T*)c.down + s.expert * c.down_expert + d0 * c.down_row;
        weights.take(base, c.D - d0, base + 16 * c.down_row, c.D - d0 - 16, c.down_row, c.F);
        const T* bias = c.down_bias ? (const T*)c.down_bias + s.expert * c.D + d0 : nullptr;
        alignas(64) float tile[32 * width];
        for (int64_t p = 0; p < s.panels(); p += Engine::panels) {
            int v = std::min<int64_t>(Engine::panels, s.panels() - p);
            product(s, weights, c.F, h_units, h, p, v, tile, 32);
            for (int half = 0; half < 2; ++half) {
                const __mmask16 columns = first(c.D - d0 - half * 16);
                const vec shift = bias ? load(bias + half * 16, columns) : set(0);
                for (int i = 0; i < v; ++i) {
                    __m512i lines[16];
                    for (int j = 0; j < 16; ++j) lines[j] = _mm512_loadu_si512(tile + (half * 16 + j) * width + i * 16);
                    transpose(lines);
                    int64_t row = s.begin + (p + i) * 16;
                    T* to = (T*)c.pairs + row * c.D + d0 + half * 16;
                    for (int64_t m = 0; m < std::min<int64_t>(16, s.end - row); ++m)
                        store(to + m * c.D, _mm512_mul_ps(_mm512_add_ps(_mm512_castsi512_ps(lines[m]), shift), set(c.weight[row + m])), columns);
                }
            }
        }
    }

    void run() const {
        const std::vector<Group> groups = cut(c, 1024, false);
        int64_t panels = 0;
        for (const Group& g : groups) panels = std::max(panels, g.panels);
        Layout layout;
        const size_t x_at = layout.add(panels * x_units * 64), h_at = layout.add(panels * h_units * 64);
        char* memory = arena.need(layout.size());
        float *x = (float*)(memory + x_at), *h = (float*)(memory + h_at);
        std::vector<int64_t> start, place;
        by_token(c, start, place);
        const int64_t up_blocks = divide_up(round_up(c.F, Engine::step), c.gated ? 16 : 32), down_blocks = divide_up(c.D, 32);

#pragma omp parallel num_threads(c.threads)
        {
            Engine::enter();
            Rows<Engine> weights;
            for (const Group& g : groups) {
                const int64_t segments = g.segments.size();
#pragma omp for schedule(dynamic, 1)
                for (int64_t at = 0; at < g.panels; ++at) {
                    auto s = std::upper_bound(g.segments.begin(), g.segments.end(), at, [](int64_t p, const Segment& q) { return p < q.panel; }) - 1;
                    int64_t row = s->begin + (at - s->panel) * 16;
                    if (narrow(*s))
                        for (int64_t m = 0; m < std::min<int64_t>(16, s->end - row); ++m) std::memcpy(x + (at * 16 + m) * x_units, (const T*)c.x + c.token[row + m] * c.x_row, c.D * sizeof(T));
                    else pack_panel((const T*)c.x, c.x_row, c.token + row, s->end - row, c.D, x_units, x + at * x_units * 16);
                }
#pragma omp for schedule(dynamic, 8)
                for (int64_t i = 0; i < segments * up_blocks; ++i) {
                    const Segment& s = g.segments[i / up_blocks];
                    up(s, i % up_blocks, weights, x + s.panel * x_units * 16, h + s.panel * h_units * 16);
                }
#pragma omp for schedule(dynamic, 8)
                for (int64_t i = 0; i < segments * down_blocks; ++i) {
                    const Segment& s = g.segments[i / down_blocks];
                    down(s, i % down_blocks, weights, h + s.panel * h_units * 16);
                }
            }
            sum_pairs((const T*)c.pairs, start.data(), place.data(), c.T, c.D, (T*)c.out);
            Engine::leave();
        }
    }
};

}  // namespace moeforge
