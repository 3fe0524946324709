// The way back: gradients of tokens, weights, biases and of the pairs' weights.
//
// With dy = grad[token] and dh = D^T dy, the gradient of a pair's weight is <dh, h> (+ <dy, bias>), so neither an expert's
// answer nor h is kept from the forward pass, only what stood before the activation; h is made again beside its gradient.
#pragma once
#include "call.h"

namespace moeforge {

template <class Engine>
struct Backward {
    using T = typename Engine::T;
    static constexpr int width = Engine::panels * 16;
    const Call& c;
    int64_t up_rows, d_step, u_step, d_panels, f_panels, f_blocks;
    int64_t d_row, u_row;  // how far rows of scratch lie apart: an odd number of cache lines, as many are read side by side

    // What a group keeps between its products, an array a segment [rows, ...]; `rows` is rounded up to 32 everywhere and
    // filled with zeros, as rows are what the weights' gradients sum over.
    struct Scratch {
        T* grad;                   // dy [rows, D]
        float* x;                  // panels of x over rows: [D / 16][units][16]
        T* before;                 // gradient before the activation [rows, 2F or F]
        float* h;                  // panels of weight * h: [F / 16][units][16]
        float *gate, *parts;       // weight [rows], summands of its gradient [rows, 1 + blocks of F]
    };

    explicit Backward(const Call& call)
        : c(call),
          up_rows(c.gated ? 2 * c.F : c.F),
          d_step(round_up(c.D, Engine::step)),
          u_step(round_up(up_rows, Engine::step)),
          d_panels(divide_up(c.D, 16)),
          f_panels(divide_up(c.F, 16)),
          f_blocks(divide_up(f_panels, Engine::panels)),
          d_row(round_up(d_step, 64) + 64 / sizeof(T)),
          u_row(round_up(u_step, 64) + 64 / sizeof(T)) {}

    static int64_t rows32(const Segment& s) { return round_up(s.rows(), 32); }
    static int64_t before_segment(const Segment& s) { return s.panel * 16; }  // first row; panels come in pairs

    Scratch scratch(char* memory, int64_t rows, Layout& layout) const {
        auto array = [&](int64_t elements, size_t size) { return memory + layout.add(elements * size); };
        Scratch s;
        s.grad = (T*)array(rows * d_row, sizeof(T));
        s.x = (float*)array(rows * d_panels * 16, sizeof(T));
        s.before = (T*)array(rows * u_row, sizeof(T));
        s.h = (float*)array(rows * f_panels * 16, sizeof(T));
        s.gate = (float*)array(rows, 4);
        s.parts = (float*)array(rows * (1 + f_blocks), 4);
        return s;
    }
    // The arrays of one segment: a row's share of each times the rows before it.
    Scratch of(const Scratch& all, const Segment& s) const {
        const int64_t row = before_segment(s), floats = row / Engine::per_unit;
        return {all.grad + row * d_row, all.x + floats * d_panels * 16, all.before + row * u_row, all.h + floats * f_panels * 16,
                all.gate + row, all.parts + row * (1 + f_blocks)};
    }

    static vec masked(const T* from, bool real, __mmask16 columns) { return load(from, real ? columns : (__mmask16)0); }

    // 16 rows x 16 columns as a place [units][16] of a panel
    static void store_panel(float* to, const vec rows[16]) {
        for (int i = 0; i < 16; i += Engine::per_unit) {
            if constexpr (Engine::per_unit == 1) store(to + i * 16, rows[i]);
            else _mm512_storeu_si512(to + i / 2 * 16, interleave(rows[i], rows[i + 1]));
        }
    }

    // rows [m0, m0 + 16) of a segment: dy and x gathered
    void gather(const Segment& s, int64_t m0, const Scratch& k) const {
        const int64_t units = rows32(s) / Engine::per_unit;
        const T* bias = c.down_bias ? (const T*)c.down_bias + s.expert * c.D : nullptr;
        auto real = [&](int i) { return m0 + i < s.rows(); };
        auto token = [&](int i) { return real(i) ? c.token[s.begin + m0 + i] : 0; };
        float shift[16] = {};
        for (int64_t d = 0; d < d_step; d += 16) {
            const __mmask16 columns = first(c.D - d), room = first(d_step - d);
            vec x[16];
            for (int i = 0; i < 16; ++i) {
                vec g = masked((const T*)c.grad + token(i) * c.grad_row + d, real(i), columns);
                store(k.grad + (m0 + i) * d_row + d, g, room);
                x[i] = masked((const T*)c.x + token(i) * c.x_row + d, real(i), columns);
                if (bias) shift[i] += _mm512_reduce_add_ps(_mm512_mul_ps(g, load(bias + d, columns)));
            }
            if (d >= c.D) continue;
            store_panel(k.x + d / 16 * units * 16 + m0 / Engine::per_unit * 16, x);
        }
        for (int i = 0; i < 16; ++i) {
            k.gate[m0 + i] = real(i) ? c.weight[s.begin + m0 + i] : 0;
            k.parts[(m0 + i) * (1 + f_blocks)] = shift[i];
            for (int64_t u = up_rows; u < u_step; ++u) k.before[(m0 + i) * u_row + u] = T{};
        }
    }

    // columns [n0, n0 + 16 v) of weights [K, N] as panels
    static void pack_columns(const T* w, int64_t row, int64_t K, int64_t k_step, int64_t N, int64_t n0, int v, float* to) {
        const int64_t units = k_step / Engine::per_unit;
        int64_t u = 0;
        if constexpr (Engine::per_unit == 2)
            if (v == 2 && N - n0 >= 32)
                for (; 2 * u + 1 < K; ++u) {
                    const T* from = w + u * 2 * row + n0;
                    _mm_prefetch(from + 24 * row, _MM_HINT_T0);
                    _mm_prefetch(from + 25 * row, _MM_HINT_T0);
                    interleave(from, from + row, to + u * 16, to + (units + u) * 16);
                }
        for (; u < units; ++u)
            for (int i = 0; i < v; ++i) {
                const __mmask16 columns = first(N - n0 - 16 * i);
                const T* from = w + u * Engine::per_unit * row + n0 + 16 * i;
                float* at = to + (i * units + u) * 16;
                _mm_prefetch(from + 24 * row, _MM_HINT_T0);
                if constexpr (Engine::per_unit == 2) _mm_prefetch(from + 25 * row, _MM_HINT_T0);
                if constexpr (Engine::per_unit == 1) store(at, load(from, columns));
                else _mm512_storeu_si512(at, interleave(masked(from, 2 * u < K, columns), masked(from + row, 2 * u + 1 < K, columns)));
            }
    }

    // act'(gate), h and their kin for 16 rows and 16 neurons: `tile` holds dh
    void before_tile(const Segment& s, int64_t m0, int64_t f, const float* tile, const Scratch& k, vec parts[16]) const {
        const int64_t units = rows32(s) / Engine::per_unit;
        const __mmask16 columns = first(c.F - f);
        const T* kept = (const T*)c.hidden + ((s.kept + m0 / 16) * up_rows + f) * 16;
        const bool any = m0 < s.rows();  // the last 16 of 32 rows may be none
        __m512i gates[16], values[16];
        for (int i = 0; i < 16; ++i) {
            gates[i] = _mm512_castps_si512(masked(kept + i * 16, any && f + i < c.F, 0xffff));
            values[i] = c.gated ? _mm512_castps_si512(masked(kept + (c.F + i) * 16, any && f + i < c.F, 0xffff)) : gates[i];
        }
        transpose(gates);
        if (c.gated) transpose(values);
        vec h[16];
        for (int i = 0; i < 16; ++i) {
            const bool real = m0 + i < s.rows();
            vec dh = _mm512_maskz_mov_ps(columns, load(tile + i * width)), slope;
            vec act = activate(c.activation, _mm512_castsi512_ps(gates[i]), &slope);
            vec value = c.gated ? _mm512_castsi512_ps(values[i]) : set(1);
            vec answer = _mm512_mul_ps(act, value), weight = set(k.gate[m0 + i]), weighted = _mm512_mul_ps(weight, dh);
            if (real) parts[i] = _mm512_fmadd_ps(dh, answer, parts[i]);
            h[i] = _mm512_maskz_mul_ps(real ? columns : (__mmask16)0, weight, answer);
            vec to_gate = real ? _mm512_mul_ps(_mm512_mul_ps(weighted, value), slope) : set(0);
            vec to_up = real ? _mm512_mul_ps(weighted, act) : set(0);
            T* to = k.before + (m0 + i) * u_row + f;
            store(to, to_gate, columns);
            if (c.gated) store(to + c.F, to_up, columns);
        }
        store_panel(k.h + f / 16 * units * 16 + m0 / Engine::per_unit * 16, h);
    }

    // 32 rows from m0 on of A[rows of the segment, K] times columns of weights [K, N]
    template <class Use>
    void times_columns(const Segment& s, int64_t m0, const T* a, int64_t a_row, int64_t k_step, const float* packed, int v, const Use& use) const {
        alignas(64) float tile[32 * width];
        const int64_t left = s.rows() - m0;
        const int half = std::min<int64_t>(16, round_up(divide_up(left, 2), Engine::half_step));
        Engine::product(a + m0 * a_row, a + (m0 + half) * a_row, a_row, k_step, packed, k_step / Engine::per_unit * 16, v, tile, half);
        if (half < 16) std::memmove(tile + half * width, tile + 16 * width, half * width * 4);
        use(tile);
    }

    void hidden(const Segment& s, int64_t block, float* packed, const Scratch& k) const {
        const int64_t f0 = block * width;
        const int v = std::min<int64_t>(Engine::panels, f_panels - block * Engine::panels);
        pack_columns((const T*)c.down + s.expert * c.down_expert, c.down_row, c.D, d_step, c.F, f0, v, packed);
        for (int64_t m0 = 0; m0 < s.rows(); m0 += 32)
            times_columns(s, m0, k.grad, d_row, d_step, packed, v, [&](const float* tile) {
                for (int64_t m = m0; m < std::min(m0 + 32, rows32(s)); m += 16) {
                    vec parts[16] = {};
                    for (int i = 0; i < v; ++i) before_tile(s, m, f0 + 16 * i, tile + (m - m0) * width + 16 * i, k, parts);
                    for (int i = 0; i < 16; ++i) k.parts[(m + i) * (1 + f_blocks) + 1 + block] = _mm512_reduce_add_ps(parts[i]);
                }
            });
    }

    // Several blocks of columns for many rows, so that rows are read from the caches as often as the packed weights leave room.
    int64_t wide(const Segment& s) const {
        const int64_t block = u_step * width * sizeof(T);
        return s.rows() < 128 ? 1 : std::clamp<int64_t>((int64_t(1) << 20) / block, 1, 4);
    }

    void tokens(const Segment& s, int64_t block, float* packed, const Scratch& k) const {
        const int64_t blocks = std::min(wide(s), divide_up(d_panels, Engine::panels) - block), size = u_step / Engine::per_unit * width;
        auto panels = [&](int64_t b) { return (int)std::min<int64_t>(Engine::panels, d_panels - (block + b) * Engine::panels); };
        for (int64_t b = 0; b < blocks; ++b)
            pack_columns((const T*)c.up + s.expert * c.up_expert, c.up_row, up_rows, u_step, c.D, (block + b) * width, panels(b), packed + b * size);
        for (int64_t m0 = 0; m0 < s.rows(); m0 += 32)
            for (int64_t b = 0; b < blocks; ++b)
                times_columns(s, m0, k.before, u_row, u_step, packed + b * size, panels(b), [&](const float* tile) {
                    for (int64_t m = m0; m < std::min(m0 + 32, s.rows()); ++m)
                        for (int i = 0; i < panels(b); ++i) {
                            const int64_t d = (block + b) * width + 16 * i;
                            store((T*)c.pairs + (s.begin + m) * c.D + d, load(tile + (m - m0) * width + 16 * i), first(c.D - d));
                        }
                });
    }

    // 32 rows of a weight's gradient [N, columns]: `a` [rows, N], N `a_row` apart, times panels over rows
    void weights(const Segment& s, const T* a, int64_t a_row, int64_t n0, int64_t N, const float* panels, int64_t columns, T* turned, T* to) const {
        const int64_t rows = rows32(s), units = rows / Engine::per_unit, sum = round_up(s.rows(), Engine::step);
        for (int64_t m = 0; m < rows; m += 16)
            for (int half = 0; half < 2; ++half) {
                alignas(64) float lines[256];
                const T* from = a + m * a_row + n0 + half * 16;
                for (int i = 0; i < 16; ++i) store(lines + i * 16, load(from + i * a_row, first(a_row - n0 - half * 16)));
                store_columns(turned + half * 16 * rows + m, rows, lines, 16, 16, 16);
            }
        alignas(64) float tile[32 * width];
        for (int64_t p = 0; p < divide_up(columns, 16); p += Engine::panels) {
            const int v = std::min<int64_t>(Engine::panels, divide_up(columns, 16) - p);
            const float* b = panels + p * units * 16;
            Engine::product(turned, turned + 16 * rows, rows, sum, b, units * 16, v, tile);
            for (int64_t n = n0; n < std::min(n0 + 32, N); ++n)
                for (int i = 0; i < v; ++i)
                    store(to + n * columns + (p + i) * 16, load(tile + (n - n0) * width + 16 * i), first(columns - (p + i) * 16));
        }
    }

    // sum over rows of 32 columns of a [rows, N], each row times its weight where given
    void bias(const Segment& s, const T* a, int64_t a_row, int64_t n0, int64_t N, const float* weight, T* to) const {
        for (int64_t n = n0; n < std::min(n0 + 32, N); n += 16) {
            const __mmask16 columns = first(N - n);
            vec sum = set(0);
            for (int64_t m = 0; m < s.rows(); ++m) sum = _mm512_fmadd_ps(load(a + m * a_row + n, columns), set(weight ? weight[m] : 1), sum);
            store(to + n, sum, columns);
        }
    }

    void run() const {
        std::vector<Group> groups = cut(c, 512, true);
        int64_t rows = 0;
        for (Group& g : groups) {  // panels come in pairs here
            g.panels = 0;
            for (Segment& s : g.segments) s.panel = g.panels, g.panels += rows32(s) / 16;
            rows = std::max(rows, g.panels * 16);
        }
        Layout layout;
        scratch(nullptr, rows, layout);
        const int64_t packed_floats = std::max(d_step, 4 * u_step) / Engine::per_unit * width;
        const size_t packed_at = layout.add(c.threads * packed_floats * 4);
        const int64_t turned_floats = rows * 32 / Engine::per_unit;  // 32 columns of a segment's rows, the other way round
        const size_t turned_at = layout.add(c.threads * turned_floats * 4);
        char* memory = arena.need(layout.size());
        Layout again;
        const Scratch all = scratch(memory, rows, again);
        std::vector<int64_t> start, place;
        by_token(c, start, place);
        const int64_t d_blocks = divide_up(d_panels, Engine::panels), up_blocks = divide_up(up_rows, 32), down_blocks = divide_up(c.D, 32);

#pragma omp parallel num_threads(c.threads)
        {
            Engine::enter();
            float* packed = (float*)(memory + packed_at) + omp_get_thread_num() * packed_floats;
            T* turned = (T*)((float*)(memory + turned_at) + omp_get_thread_num() * turned_floats);
            for (const Group& g : groups) {
                const int64_t segments = g.segments.size();
#pragma omp for schedule(dynamic, 1)
                for (int64_t at = 0; at < g.panels; ++at) {
                    auto s = std::upper_bound(g.segments.begin(), g.segments.end(), at, [](int64_t p, const Segment& q) { return p < q.panel; }) - 1;
                    gather(*s, (at - s->panel) * 16, of(all, *s));
                }
#pragma omp for schedule(dynamic, 1)
                for (int64_t i = 0; i < segments * f_blocks; ++i) {
                    const Segment& s = g.segments[i / f_blocks];
                    hidden(s, i % f_blocks, packed, of(all, s));
                }
                // the rest in one sweep: nothing in it waits for anything else in it
                const int64_t each = d_blocks + up_blocks + down_blocks + 1;
#pragma omp for schedule(dynamic, 1)
                for (int64_t i = 0; i < segments * each; ++i) {
                    const Segment& s = g.segments[i / each];
                    const Scratch k = of(all, s);
                    int64_t job = i % each;
                    if (job < d_blocks) {
                        if (c.grad_x && job % wide(s) == 0) tokens(s, job, packed, k);
                    } else if ((job -= d_blocks) < up_blocks) {
                        if (c.grad_up) weights(s, k.before, u_row, job * 32, up_rows, k.x, c.D, turned, (T*)c.grad_up + s.expert * up_rows * c.D);
                        if (c.grad_up_bias) bias(s, k.before, u_row, job * 32, up_rows, nullptr, (T*)c.grad_up_bias + s.expert * up_rows);
                    } else if ((job -= up_blocks) < down_blocks) {
                        if (c.grad_down) weights(s, k.grad, d_row, job * 32, c.D, k.h, c.F, turned, (T*)c.grad_down + s.expert * c.D * c.F);
                        if (c.grad_down_bias) bias(s, k.grad, d_row, job * 32, c.D, k.gate, (T*)c.grad_down_bias + s.expert * c.D);
                    } else if (c.grad_weight) {
                        for (int64_t m = 0; m < s.rows(); ++m) {
                            const float* parts = k.parts + m * (1 + f_blocks);
                            float sum = 0;
                            for (int64_t b = 0; b <= f_blocks; ++b) sum += parts[b];
                            c.grad_weight[s.begin + m] = sum;
                        }
                    }
                }
            }
            if (c.grad_x) sum_pairs((const T*)c.pairs, start.data(), place.data(), c.T, c.D, (T*)c.grad_x);
            Engine::leave();
        }
    }
};

}  // namespace moeforge
