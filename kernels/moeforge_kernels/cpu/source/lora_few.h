// LoRA experts for a few pairs, as a decoding step has them: each pair reads the rows of its own A and B once, in place, and nothing is
// laid out for it first. Every sum is taken by one thread in one order, so the bits do not depend on how many there are.
#pragma once
#include <cmath>

#include "lora_forward.h"

namespace moeforge {

// One linear map's deltas: x -> low = A x of each pair -> out = the weighted sum of B low over a token's pairs.
// As moeforge_kernels.cpu.library.LoraFew lays it out. Null where a side is not asked for.
struct LoraFew {
    int64_t T, P, D, O, E, r, threads;  // O: D', the outputs
    const int64_t* token;    // [P]
    const float* weight;     // [P]
    const int32_t* offsets;  // [E]
    const float* scale;      // [E]
    const void* x;           // [T, D], rows `x_row` apart; of one type with a and b
    int64_t x_row;
    const void* a;  // [E or 1, r, D], experts `a_expert` (0: one for all) and rows `a_row` apart
    int64_t a_expert, a_row;
    const void* b;  // [E, D', r]
    int64_t b_expert, b_row;
    float* low;  // [P, r]; rows of empty pairs are left alone
    float* out;  // [T, D']
};

// All that LoRA experts around a shared network do but for its frozen maps: what they read comes from `x`, through an A before each of
// the maps ahead, and what the map behind got leaves through a B.
struct LoraNetwork {
    int64_t rest;  // whether the frozen network counts for what a token's weights leave
    int64_t D, O;
    const void* x;  // [T, D], rows `x_row` apart
    int64_t x_row;
    const void* a_gate;  // [E, r, D]; null where absent, or the same as the other one, which then leaves its rows for both
    int64_t a_gate_expert, a_gate_row;
    const void* a_up;
    int64_t a_up_expert, a_up_row;
    const void* b_down;  // [E, D', r]
    int64_t b_down_expert, b_down_row;
    float* delta;      // [T, D']
    LoraCall between;  // `rest` is filled here
};

constexpr int64_t worth_threads = 1 << 15;  // multiply-adds for which waking them pays

template <class T>
float dot(const T* a, const T* b, int64_t n) {
    vec sum[4] = {};
    int64_t i = 0;
    for (; i + 64 <= n; i += 64)
        for (int v = 0; v < 4; ++v) sum[v] = _mm512_fmadd_ps(load(a + i + 16 * v), load(b + i + 16 * v), sum[v]);
    for (; i < n; i += 16) sum[0] = _mm512_fmadd_ps(load(a + i, first(n - i)), load(b + i, first(n - i)), sum[0]);
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])));
}

struct Owned {
    int64_t pairs;
    std::vector<int64_t> expert;  // of each real pair
    Owned(int64_t experts, const int32_t* offsets) : pairs(experts ? offsets[experts - 1] : 0), expert(pairs) {
        for (int64_t e = 0, p = 0; e < experts; ++e)
            for (; p < offsets[e]; ++p) expert[p] = e;
    }
};

template <class T>
void shrink(const LoraFew& c, const Owned& own) {
    if (!c.a) return;
    const int64_t rows = own.pairs * c.r;
#pragma omp parallel for schedule(static) num_threads(c.threads) if (rows * c.D > worth_threads)
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t p = i / c.r, j = i % c.r;
        c.low[i] = dot((const T*)c.a + own.expert[p] * c.a_expert + j * c.a_row, (const T*)c.x + c.token[p] * c.x_row, c.D);
    }
}

template <class T>
void expand(const LoraFew& c, const Owned& own) {
    if (!c.b) return;
    const int64_t blocks = divide_up(c.O, 16);
#pragma omp parallel for schedule(static) num_threads(c.threads) if (own.pairs * c.r * c.O > worth_threads)
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t at = 16 * block, rows = std::min<int64_t>(16, c.O - at);
        for (int64_t t = 0; t < c.T; ++t) store(c.out + t * c.O + at, set(0), first(rows));
        for (int64_t p = 0; p < own.pairs; ++p) {
            const int64_t e = own.expert[p];
            const T* b = (const T*)c.b + e * c.b_expert + at * c.b_row;
            const float* low = c.low + p * c.r;
            __m512i lines[16];
            for (int i = 0; i < 16; ++i) {
                vec sum = set(0);
                if (i < rows)
                    for (int64_t j = 0; j < c.r; j += 16) sum = _mm512_fmadd_ps(load(b + i * c.b_row + j, first(c.r - j)), load(low + j, first(c.r - j)), sum);
                lines[i] = _mm512_castps_si512(sum);
            }
            transpose(lines);
            vec made = _mm512_castsi512_ps(lines[0]);
            for (int i = 1; i < 16; ++i) made = _mm512_add_ps(made, _mm512_castsi512_ps(lines[i]));
            float* out = c.out + c.token[p] * c.O + at;
            store(out, _mm512_fmadd_ps(set(c.weight[p] * c.scale[e]), made, load(out, first(rows))), first(rows));
        }
    }
}

template <class T>
void few_experts(const LoraFew& c) {
    const Owned own(c.E, c.offsets);
    shrink<T>(c, own);
    expand<T>(c, own);
}

template <class T>
void few_network(const LoraNetwork& c) {
    LoraCall between = c.between;
    const Owned own(between.E, between.offsets);
    LoraFew few{between.T, between.P, c.D, c.O, between.E, between.r, between.threads, between.token, between.weight, between.offsets, between.scale, c.x, c.x_row};
    few.a = c.a_gate, few.a_expert = c.a_gate_expert, few.a_row = c.a_gate_row, few.low = (float*)between.gate.low;
    shrink<T>(few, own);
    few.a = c.a_up, few.a_expert = c.a_up_expert, few.a_row = c.a_up_row, few.low = (float*)between.up.low;
    shrink<T>(few, own);
    std::vector<float> share(c.rest ? between.T : 0, 1.0f);
    if (c.rest) {
        constexpr float exact = 1e-6f;  // moeforge_kernels.lora_ffn.share.EXACT
        for (int64_t p = 0; p < own.pairs; ++p) share[between.token[p]] -= between.weight[p];
        for (float& left : share) left = std::abs(left) <= exact ? 0 : left;
        between.rest = share.data();
    }
    LoraForward<Of<T>>(between).run();
    few.b = c.b_down, few.b_expert = c.b_down_expert, few.b_row = c.b_down_row, few.low = between.low_down, few.out = c.delta;
    expand<T>(few, own);
}

}  // namespace moeforge
