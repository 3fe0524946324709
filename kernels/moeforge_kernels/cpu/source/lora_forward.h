// What the maps gave and the low-rank rows -> the weighted sum of hidden rows, and the low-rank rows of the map behind.
#pragma once
#include "lora.h"

namespace moeforge {

template <class Engine>
struct LoraForward : LoraPass<Engine> {
    using Base = LoraPass<Engine>;
    using Few = typename Base::Few;
    using T = typename Base::T;
    using Base::a, Base::b, Base::bent, Base::block, Base::c, Base::columns, Base::gated, Base::here, Base::parts, Base::ranks, Base::straight, Base::tile, Base::vecs;
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
    void start(const LoraGroup& g, int64_t column, const Scratch& k) const {
        for (int64_t t = g.begin; t < g.end; ++t) {
            float* sum = k.sum + (t - g.begin) * tile;
            const float share = c.rest ? c.rest[t] : 0;
            for (int v = 0; v < vecs; ++v) {
                vec made = set(0);
                if (share != 0) {
                    const int64_t at = column + 16 * v;
                    made = activate(c.activation, load((const T*)bent.base + t * bent.base_row + at, here(column, v)));
                    if (gated) made = _mm512_mul_ps(made, load((const T*)straight.base + t * straight.base_row + at, here(column, v)));
                    made = _mm512_mul_ps(made, set(share));
                }
                store(sum + 16 * v, made);
            }
        }
    }

    void few(const Few& f, int64_t part, const Scratch& k) const {
        this->ahead(f, bent, k.low_bent, k.b_bent, k.x);
        if (gated) this->ahead(f, straight, k.low_straight, k.b_straight, k.y);
        for (int64_t i = 0; i < f.rows; ++i) {
            const int64_t pair = f.pair(i);
            float* sum = k.sum + (c.token[pair] - f.g.begin) * tile;
            const vec weight = set(c.weight[pair]);
            for (int v = 0; v < vecs; ++v) {
                float* x = k.x + i * tile + 16 * v;
                vec h = activate(c.activation, load(x));
                if (gated) h = _mm512_mul_ps(h, load(k.y + i * tile + 16 * v));
                store(x, h);
                store(sum + 16 * v, _mm512_fmadd_ps(weight, h, load(sum + 16 * v)));
            }
        }
        if (c.a_down) multiply(f.rows, ranks, tile, k.x, tile, 1, k.a, ranks, k.low_down + (part * this->pairs + f.place()) * ranks, ranks);
    }

    void columns_of(const LoraGroup& g, int64_t part, int64_t column, const Scratch& k) const {
        start(g, column, k);
        for (int64_t e = 0; e < c.E; ++e) {
            if (!g.count[e]) continue;
            if (bent.low) turn(b(bent, e, column), columns(column), c.r, k.b_bent, tile, ranks);
            if (gated && straight.low) turn(b(straight, e, column), columns(column), c.r, k.b_straight, tile, ranks);
            if (c.a_down) turn(a(e, column), c.r, columns(column), k.a, ranks, tile);
            this->each_few(g, e, column, [&](const Few& f) { few(f, part, k); });
        }
        for (int64_t t = g.begin; t < g.end; ++t)
            for (int v = 0; v < vecs; ++v) store((T*)c.mixed + t * c.F + column + 16 * v, load(k.sum + (t - g.begin) * tile + 16 * v), here(column, v));
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
                    for (int64_t at = part * this->wide; at < std::min((part + 1) * this->wide, c.F); at += tile) columns_of(g, part, at, k);
                }
                if (c.a_down) this->scatter(g, k.low_down, false, c.low_down);
#pragma omp barrier
            }
        }
    }
};

}  // namespace moeforge
