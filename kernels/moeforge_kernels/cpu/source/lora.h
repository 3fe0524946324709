// LoRA experts between the two products of a shared network: what Python passes, how the work is cut, what both ways share.
//
// Columns of F are cut into parts, and a part belongs to one thread: what has F columns is summed in the order of the list, and what
// is summed over F gets one summand a part. How F is cut does not depend on the threads, so neither do the bits.
#pragma once
#include "small.h"

namespace moeforge {

// One of the maps ahead of the activation. Null where it, its deltas or a gradient is absent.
struct LoraMap {
    const void* base;  // [T, F] what the frozen map gave, rows `base_row` apart
    int64_t base_row;
    const float* low;  // [P, r]
    const void* b;     // [E, F, r], experts `b_expert` and rows `b_row` apart
    int64_t b_expert, b_row;
    void* grad_base;  // [T, F]
    float* grad_low;  // [P, r]
    float* grad_b;    // [E, F, r], zeros before
};

// As moeforge_kernels.cpu.library.LoraCall lays it out.
struct LoraCall {
    int64_t T, P, F, E, r, activation, threads, bf16_weights;
    const int64_t* token;    // [P]
    const float* weight;     // [P]
    const int32_t* offsets;  // [E]
    const float* scale;      // [E]
    const float* rest;       // [T] the frozen network's own share, or null
    LoraMap gate, up;
    const void* a_down;  // [E, r, F]
    int64_t a_expert, a_row;
    void* mixed;      // [T, F]
    float* low_down;  // [P, r]
    // the way back only
    const void* grad;  // [T, F], rows `grad_row` apart
    int64_t grad_row;
    const float* grad_low_down;  // [P, r]
    float* grad_a;               // [E, r, F], zeros before
    float* grad_weight;          // [P]
};

// Tokens [begin, end) and their pairs: those of expert e are [first[e], first[e] + count[e]) of the list, and place[e] pairs of the
// group stand before them.
struct LoraGroup {
    int64_t begin, end, pairs = 0;
    std::vector<int64_t> first, count, place;
};

template <class Engine>
struct LoraPass {
    using T = typename Engine::T;
    static constexpr int64_t tile = 128;  // columns that are worked on at once
    static constexpr int64_t block = 16;  // pairs, likewise
    static constexpr int64_t vecs = tile / 16;
    const LoraCall& c;
    const LoraMap &bent, &straight;  // the map that the activation is for, and the other where there is one
    const bool gated;
    const int64_t ranks;  // r up to the next 16
    const int64_t wide, parts;
    std::vector<LoraGroup> groups;
    int64_t pairs = 0, tokens = 0;  // of the largest group

    explicit LoraPass(const LoraCall& call)
        : c(call),
          bent(call.gate.base ? call.gate : call.up),
          straight(call.up),
          gated(call.gate.base),
          ranks(round_up(c.r, 16)),
          wide(std::max<int64_t>(1, divide_up(divide_up(c.F, tile), 32)) * tile),
          parts(divide_up(c.F, wide)) {
        // so many tokens at once that what they need of a tile stays in a second-level cache
        const int64_t limit = std::clamp<int64_t>(c.P ? 1024 * c.T / c.P : c.T, 64, 1024);
        for (int64_t t = 0; t < c.T; t += limit) {
            LoraGroup g{t, std::min(t + limit, c.T)};
            for (int64_t e = 0; e < c.E; ++e) {
                // an expert's tokens ascend
                const int64_t *begin = c.token + (e ? c.offsets[e - 1] : 0), *end = c.token + c.offsets[e];
                const int64_t *low = std::lower_bound(begin, end, g.begin), *high = std::lower_bound(low, end, g.end);
                g.first.push_back(low - c.token), g.count.push_back(high - low), g.place.push_back(g.pairs);
                g.pairs += high - low;
            }
            pairs = std::max(pairs, g.pairs), tokens = std::max(tokens, g.end - g.begin);
            groups.push_back(std::move(g));
        }
    }

    // The columns [at, at + tile) of F, as far as there are any.
    struct Tile {
        int64_t at, columns;
        __mmask16 mask[vecs];
    };
    Tile tile_at(int64_t column) const {
        Tile made{column, std::min(tile, c.F - column), {}};
        for (int v = 0; v < vecs; ++v) made.mask[v] = first(made.columns - 16 * v);
        return made;
    }

    // A few pairs of one expert in a tile.
    struct Few {
        const LoraGroup& g;
        const Tile& tile;
        int64_t expert, at, rows;
        int64_t pair(int64_t i) const { return g.first[expert] + at + i; }
        int64_t place() const { return g.place[expert] + at; }
    };

    template <class F>
    void each_few(const LoraGroup& g, const Tile& tile, int64_t e, F&& run) const {
        for (int64_t at = 0; at < g.count[e]; at += block) run(Few{g, tile, e, at, std::min(block, g.count[e] - at)});
    }

    // Rows lie far apart in memory, so each asks for one that comes later.
    static void prefetch(const T* from) {
        for (size_t line = 0; line < tile * sizeof(T); line += 64) _mm_prefetch((const char*)from + line, _MM_HINT_T0);
    }

    // Rows [P, r] of a group's pairs, one expert after the other, filled up to `ranks`. Inside a parallel region, which waits at the end.
    void gather(const LoraGroup& g, const float* from, bool scaled, float* to) const {
        for (int64_t e = 0; e < c.E && from; ++e) {
            const vec scale = set(scaled ? c.scale[e] : 1);
#pragma omp for schedule(static) nowait
            for (int64_t i = 0; i < g.count[e]; ++i)
                for (int64_t j = 0; j < ranks; j += 16)
                    store(to + (g.place[e] + i) * ranks + j, _mm512_mul_ps(scale, load(from + (g.first[e] + i) * c.r + j, first(c.r - j))));
        }
    }

    // The sum over parts of [parts][pairs of the group][ranks], back into rows [P, r]. Likewise.
    void scatter(const LoraGroup& g, const float* from, bool scaled, float* to) const {
        for (int64_t e = 0; e < c.E && to; ++e) {
            const vec scale = set(scaled ? c.scale[e] : 1);
#pragma omp for schedule(static) nowait
            for (int64_t i = 0; i < g.count[e]; ++i)
                for (int64_t j = 0; j < c.r; j += 16) {
                    vec sum = set(0);
                    for (int64_t p = 0; p < parts; ++p) sum = _mm512_add_ps(sum, load(from + (p * pairs + g.place[e] + i) * ranks + j));
                    store(to + (g.first[e] + i) * c.r + j, _mm512_mul_ps(scale, sum), first(c.r - j));
                }
        }
    }

    // [rows][tile] what the activation gets; `low` as gathered, `b` turned: [ranks][tile].
    void ahead(const Few& few, const LoraMap& map, const float* low, const float* b, float* to) const {
        const int64_t* token = c.token + few.pair(0);
        const int64_t left = few.g.count[few.expert] - few.at, row = map.base_row;
        const T* base = (const T*)map.base + few.tile.at;
        for (int64_t i = 0; i < few.rows; ++i) {
            if (i + block < left) prefetch(base + token[i + block] * row);
            for (int v = 0; v < vecs; ++v) store(to + i * tile + 16 * v, load(base + token[i] * row + 16 * v, few.tile.mask[v]));
        }
        if (map.low) multiply(few.rows, tile, c.r, low + few.place() * ranks, ranks, 1, b, tile, to, tile);
    }

    // Rows of sums into columns of a matrix [T, F].
    void write(const LoraGroup& g, const Tile& t, const float* sums, void* matrix) const {
        T* to = (T*)matrix + g.begin * c.F + t.at;
        for (int64_t i = 0; i < g.end - g.begin; ++i, to += c.F, sums += tile)
            for (int v = 0; v < vecs; ++v) store(to + 16 * v, load(sums + 16 * v), t.mask[v]);
    }

    Matrix b(const LoraMap& map, int64_t e, int64_t column) const {
        return Matrix{map.b, map.b_row, bool(c.bf16_weights)}.from(e * map.b_expert + column * map.b_row);
    }
    Matrix a(int64_t e, int64_t column) const { return Matrix{c.a_down, c.a_row, bool(c.bf16_weights)}.from(e * c.a_expert + column); }
};

}  // namespace moeforge
