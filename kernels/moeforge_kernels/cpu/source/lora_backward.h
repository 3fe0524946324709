// The way back. What stood before the activation is made again from what the frozen maps gave, so nothing of the forward pass is kept.
#pragma once
#include "lora.h"

namespace moeforge {

template <class Engine>
struct LoraBackward : LoraPass<Engine> {
    using Base = LoraPass<Engine>;
    using Few = typename Base::Few;
    using Tile = typename Base::Tile;
    using T = typename Base::T;
    using Base::a, Base::b, Base::bent, Base::block, Base::c, Base::gated, Base::parts, Base::ranks, Base::straight, Base::tile, Base::vecs;
    using Base::Base;

    // A map's share of the scratch.
    struct Side {
        // of all threads
        float* low;       // [pairs][ranks], times the scale
        float* grad_low;  // [parts][pairs][ranks]
        // of each
        float* sum;             // [tokens][tile] gradient of what the frozen map gave
        float* rows;            // [block][tile] what the activation got, then its gradient
        float *turned, *b;      // [ranks][tile], [tile][ranks]
        float* grad_b;          // [ranks][tile]
    };
    struct Scratch {
        Side bent, straight;
        float* grad_low_down;      // [pairs][ranks]
        float *dots, *alone;       // [parts][pairs], [parts][tokens]: <grad, h>, of a pair and of the frozen network
        float* hidden;             // [block][tile] h's gradient, then h
        float *a, *grad_a;         // [ranks][tile]
    };

    Scratch scratch(char* memory, Layout& layout) const {
        auto array = [&](int64_t floats) { return (float*)(memory + layout.add(floats * 4)); };
        const int64_t all = this->pairs * ranks;
        Scratch k{};
        k.grad_low_down = array(all), k.dots = array(parts * this->pairs), k.alone = array(parts * this->tokens);
        for (Side* side : {&k.bent, &k.straight}) side->low = array(all), side->grad_low = array(parts * all);
        for (int64_t i = 0; i < (memory ? omp_get_thread_num() + 1 : c.threads); ++i) {
            for (Side* side : {&k.bent, &k.straight}) {
                side->sum = array(this->tokens * tile), side->rows = array(block * tile);
                side->turned = array(ranks * tile), side->b = array(ranks * tile), side->grad_b = array(ranks * tile);
            }
            k.hidden = array(block * tile), k.a = array(ranks * tile), k.grad_a = array(ranks * tile);
        }
        return k;
    }

    // The frozen network's own share, and <grad, h> of it, which every weight's gradient lacks.
    void start(const LoraGroup& g, int64_t part, const Tile& tile_, const Scratch& k) const {
        constexpr int64_t soon = 8;
        const int64_t x_row = bent.base_row, y_row = straight.base_row, grad_row = c.grad_row;
        const T *x = (const T*)bent.base + g.begin * x_row + tile_.at, *y = (const T*)straight.base + g.begin * y_row + tile_.at;
        const T* grad = (const T*)c.grad + g.begin * grad_row + tile_.at;
        float *to_x = k.bent.sum, *to_y = k.straight.sum, *alone = k.alone + part * this->tokens;
        for (int64_t t = g.begin; t < g.end; ++t, x += x_row, y += y_row, grad += grad_row, to_x += tile, to_y += tile, ++alone) {
            if (t + soon < g.end) {
                this->prefetch(x + soon * x_row), this->prefetch(grad + soon * grad_row);
                if (gated) this->prefetch(y + soon * y_row);
            }
            const float share = c.rest ? c.rest[t] : 0;
            if (share == 0 && !(c.rest && c.grad_weight)) {
                std::memset(to_x, 0, tile * 4), std::memset(to_y, 0, tile * 4);
                continue;
            }
            vec dot = set(0);
            for (int v = 0; v < vecs; ++v) {
                const __mmask16 here = tile_.mask[v];
                const vec got = load(grad + 16 * v, here), value = gated ? load(y + 16 * v, here) : set(1);
                vec slope, act = activate(c.activation, load(x + 16 * v, here), &slope);
                dot = _mm512_fmadd_ps(got, _mm512_mul_ps(act, value), dot);
                const vec weighted = _mm512_mul_ps(set(share), got);
                store(to_x + 16 * v, _mm512_mul_ps(weighted, _mm512_mul_ps(slope, value)));
                store(to_y + 16 * v, _mm512_mul_ps(weighted, act));
            }
            *alone += _mm512_reduce_add_ps(dot);
        }
    }

    void few(const Few& f, int64_t part, const Scratch& k) const {
        this->ahead(f, bent, k.bent.low, k.bent.turned, k.bent.rows);
        if (gated) this->ahead(f, straight, k.straight.low, k.straight.turned, k.straight.rows);
        for (int64_t i = 0; i < f.rows; ++i) {
            const T* grad = (const T*)c.grad + c.token[f.pair(i)] * c.grad_row + f.tile.at;
            const vec weight = set(c.weight[f.pair(i)]);
            for (int v = 0; v < vecs; ++v) store(k.hidden + i * tile + 16 * v, _mm512_mul_ps(weight, load(grad + 16 * v, f.tile.mask[v])));
        }
        const float* low = k.grad_low_down + f.place() * ranks;
        if (c.a_down) multiply(f.rows, tile, c.r, low, ranks, 1, k.a, tile, k.hidden, tile);
        for (int64_t i = 0; i < f.rows; ++i) through(f, i, part, k);
        map_back(f, part, bent, k.bent);
        if (gated) map_back(f, part, straight, k.straight);
        if (c.grad_a) multiply(c.r, tile, f.rows, low, 1, ranks, k.hidden, tile, k.grad_a, tile);
    }

    // One pair, through the activation.
    void through(const Few& f, int64_t i, int64_t part, const Scratch& k) const {
        const int64_t token = c.token[f.pair(i)], at = (token - f.g.begin) * tile;
        const T* grad = (const T*)c.grad + token * c.grad_row + f.tile.at;
        float *x = k.bent.rows + i * tile, *y = k.straight.rows + i * tile, *hidden = k.hidden + i * tile;
        float *x_sum = k.bent.sum + at, *y_sum = k.straight.sum + at;
        const int kind = c.activation;
        const bool two = gated;
        vec dot = set(0);
        for (int v = 0; v < tile; v += 16) {
            vec slope, act = activate(kind, load(x + v), &slope);
            const vec value = two ? load(y + v) : set(1), h = _mm512_mul_ps(act, value), back = load(hidden + v);
            dot = _mm512_fmadd_ps(load(grad + v, f.tile.mask[v / 16]), h, dot);
            store(hidden + v, h);
            const vec to_x = _mm512_mul_ps(back, _mm512_mul_ps(slope, value));
            store(x + v, to_x);
            store(x_sum + v, _mm512_add_ps(load(x_sum + v), to_x));
            if (!two) continue;
            const vec to_y = _mm512_mul_ps(back, act);
            store(y + v, to_y);
            store(y_sum + v, _mm512_add_ps(load(y_sum + v), to_y));
        }
        k.dots[part * this->pairs + f.place() + i] += _mm512_reduce_add_ps(dot);
    }

    void map_back(const Few& f, int64_t part, const LoraMap& map, const Side& side) const {
        if (map.grad_low) multiply(f.rows, ranks, tile, side.rows, tile, 1, side.b, ranks, side.grad_low + (part * this->pairs + f.place()) * ranks, ranks);
        if (map.grad_b) multiply(c.r, tile, f.rows, side.low + f.place() * ranks, 1, ranks, side.rows, tile, side.grad_b, tile);
    }

    void begin_map(int64_t e, const Tile& t, const LoraMap& map, const Side& side) const {
        if (!map.low) return;
        turn(b(map, e, t.at), t.columns, c.r, side.turned, tile, ranks);
        copy(b(map, e, t.at), t.columns, c.r, side.b, tile, ranks);
        std::memset(side.grad_b, 0, ranks * tile * 4);
    }

    void end_map(int64_t e, const Tile& t, const LoraMap& map, const Side& side) const {
        if (map.grad_b) add_turned(side.grad_b, tile, c.r, t.columns, map.grad_b + (e * c.F + t.at) * c.r, c.r);
    }

    void columns_of(const LoraGroup& g, int64_t part, const Tile& t, const Scratch& k) const {
        start(g, part, t, k);
        for (int64_t e = 0; e < c.E; ++e) {
            if (!g.count[e]) continue;
            begin_map(e, t, bent, k.bent);
            if (gated) begin_map(e, t, straight, k.straight);
            if (c.a_down) copy(a(e, t.at), c.r, t.columns, k.a, ranks, tile);
            std::memset(k.grad_a, 0, ranks * tile * 4);
            this->each_few(g, t, e, [&](const Few& f) { few(f, part, k); });
            end_map(e, t, bent, k.bent);
            if (gated) end_map(e, t, straight, k.straight);
            if (c.grad_a) add(k.grad_a, tile, c.r, t.columns, c.grad_a + e * c.r * c.F + t.at, c.F);
        }
        if (bent.grad_base) this->write(g, t, k.bent.sum, bent.grad_base);
        if (gated && straight.grad_base) this->write(g, t, k.straight.sum, straight.grad_base);
    }

    // The gradients of weights: what a pair's expert gave, less what the frozen network would have. Inside a parallel region.
    void weights(const LoraGroup& g, const Scratch& k) const {
        for (int64_t e = 0; e < c.E && c.grad_weight; ++e)
#pragma omp for schedule(static) nowait
            for (int64_t i = 0; i < g.count[e]; ++i) {
                const int64_t pair = g.first[e] + i;
                float sum = 0;
                for (int64_t part = 0; part < parts; ++part) {
                    sum += k.dots[part * this->pairs + g.place[e] + i];
                    if (c.rest) sum -= k.alone[part * this->tokens + c.token[pair] - g.begin];
                }
                c.grad_weight[pair] = sum;
            }
    }

    void run() const {
        Layout layout;
        scratch(nullptr, layout);
        char* memory = arena.need(layout.size());
#pragma omp parallel num_threads(c.threads)
        {
            Layout again;
            const Scratch k = scratch(memory, again);
            for (const LoraGroup& g : this->groups) {
                this->gather(g, bent.low, true, k.bent.low);
                if (gated) this->gather(g, straight.low, true, k.straight.low);
                this->gather(g, c.a_down ? c.grad_low_down : nullptr, false, k.grad_low_down);
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
                for (int64_t part = 0; part < parts; ++part) {
                    for (const Side* side : {&k.bent, &k.straight}) std::memset(side->grad_low + part * this->pairs * ranks, 0, g.pairs * ranks * 4);
                    std::memset(k.dots + part * this->pairs, 0, g.pairs * 4);
                    std::memset(k.alone + part * this->tokens, 0, (g.end - g.begin) * 4);
                    for (int64_t at = part * this->wide; at < std::min((part + 1) * this->wide, c.F); at += tile) columns_of(g, part, this->tile_at(at), k);
                }
                this->scatter(g, k.bent.grad_low, true, bent.grad_low);
                if (gated) this->scatter(g, k.straight.grad_low, true, straight.grad_low);
                weights(g, k);
#pragma omp barrier
            }
        }
    }
};

}  // namespace moeforge
