// What the maps gave and the low-rank rows -> the weighted sum of hidden rows, and the low-rank rows of the map behind.
#pragma once
#include "lora.h"

namespace moeforge {

template <class Engine>
struct LoraForward : LoraPass<Engine> {
    using Base = LoraPass<Engine>;
    using Few = typename Base::Few;
    using Tile = typename Base::Tile;
    using T = typename Base::T;
    using Base::a, Base::b, Base::bent, Base::block, Base::c, Base::gated, Base::parts, Base::ranks, Base::straight, Base::tile, Base::vecs;
    using Base::Base;

    struct Scratch {
        // of all threads
        float *low_bent, *low_straight;  // [pairs][ranks], times the scale
        float* low_down;                 // [parts][pairs][ranks]
        // of each
        float* sum;                 // [tokens][tile]
        float *x, *y;               // [block][tile]
        float *b_bent, *b_straight;  // [ranks][tile]
        float* a;                   // [tile][ranks]
    };

    Scratch scratch(char* memory, Layout& layout) const {
        auto array = [&](int64_t floats) { return (float*)(memory + layout.add(floats * 4)); };
        const int64_t all = this->pairs * ranks;
        Scratch k{};
        k.low_bent = array(all), k.low_straight = array(all), k.low_down = array(c.a_down ? parts * all : 0);
        for (int64_t i = 0; i < (memory ? omp_get_thread_num() + 1 : c.threads); ++i) {
            k.sum = array(this->tokens * tile);
            k.x = array(block * tile), k.y = array(block * tile);
            k.b_bent = array(ranks * tile), k.b_straight = array(ranks * tile), k.a = array(ranks * tile);
        }
        return k;
    }

    // What the frozen network alone adds.
    void start(const LoraGroup& g, const Tile& tile_, const Scratch& k) const {
        constexpr int64_t soon = 8;
        const int64_t x_row = bent.base_row, y_row = straight.base_row;
        const T *x = (const T*)bent.base + g.begin * x_row + tile_.at, *y = (const T*)straight.base + g.begin * y_row + tile_.at;
        float* sum = k.sum;
        for (int64_t t = g.begin; t < g.end; ++t, x += x_row, y += y_row, sum += tile) {
            const float share = c.rest ? c.rest[t] : 0;
            if (t + soon < g.end) {
                this->prefetch(x + soon * x_row);
                if (gated) this->prefetch(y + soon * y_row);
            }
            for (int v = 0; v < vecs; ++v) {
                vec made = set(0);
                if (share != 0) {
                    made = activate(c.activation, load(x + 16 * v, tile_.mask[v]));
                    if (gated) made = _mm512_mul_ps(made, load(y + 16 * v, tile_.mask[v]));
                    made = _mm512_mul_ps(made, set(share));
                }
                store(sum + 16 * v, made);
            }
        }
    }

    void few(const Few& f, int64_t part, const Scratch& k) const {
        this->ahead(f, bent, k.low_bent, k.b_bent, k.x);
        if (gated) this->ahead(f, straight, k.low_straight, k.b_straight, k.y);
        const int kind = c.activation;
        for (int64_t i = 0; i < f.rows; ++i) {
            float *sum = k.sum + (c.token[f.pair(i)] - f.g.begin) * tile, *x = k.x + i * tile, *y = k.y + i * tile;
            const vec weight = set(c.weight[f.pair(i)]);
            for (int v = 0; v < tile; v += 16) {
                vec h = activate(kind, load(x + v));
                if (gated) h = _mm512_mul_ps(h, load(y + v));
                store(x + v, h);
                store(sum + v, _mm512_fmadd_ps(weight, h, load(sum + v)));
            }
        }
        if (c.a_down) multiply(f.rows, ranks, tile, k.x, tile, 1, k.a, ranks, k.low_down + (part * this->pairs + f.place()) * ranks, ranks);
    }

    void columns_of(const LoraGroup& g, int64_t part, const Tile& t, const Scratch& k) const {
        start(g, t, k);
        for (int64_t e = 0; e < c.E; ++e) {
            if (!g.count[e]) continue;
            if (bent.low) turn(b(bent, e, t.at), t.columns, c.r, k.b_bent, tile, ranks);
            if (gated && straight.low) turn(b(straight, e, t.at), t.columns, c.r, k.b_straight, tile, ranks);
            if (c.a_down) turn(a(e, t.at), c.r, t.columns, k.a, ranks, tile);
            this->each_few(g, t, e, [&](const Few& f) { few(f, part, k); });
        }
        this->write(g, t, k.sum, c.mixed);
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
                this->gather(g, bent.low, true, k.low_bent);
                if (gated) this->gather(g, straight.low, true, k.low_straight);
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
                for (int64_t part = 0; part < parts; ++part) {
                    if (c.a_down) std::memset(k.low_down + part * this->pairs * ranks, 0, g.pairs * ranks * 4);
                    for (int64_t at = part * this->wide; at < std::min((part + 1) * this->wide, c.F); at += tile) columns_of(g, part, this->tile_at(at), k);
                }
                if (c.a_down) this->scatter(g, k.low_down, false, c.low_down);
#pragma omp barrier
            }
        }
    }
};

}  // namespace moeforge
