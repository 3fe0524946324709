// What Python passes, how rows are cut into groups, and memory.
#pragma once
#include <omp.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "engines.h"

namespace moeforge {

// As moeforge_kernels.cpu.library.Call lays it out. Null where a tensor is absent.
struct Call {
    int64_t T, P, D, F, E, activation, gated, threads;
    const void* x;            // [T, D], rows `x_row` apart
    int64_t x_row;
    const int64_t* token;     // [P]
    const float* weight;      // [P]
    const int32_t* offsets;   // [E]
    const void* up;           // [E, 2F or F, D], experts `up_expert` and rows `up_row` apart
    int64_t up_expert, up_row;
    const void* down;         // [E, D, F]
    int64_t down_expert, down_row;
    const void *up_bias, *down_bias;  // [E, 2F or F], [E, D], contiguous
    void* hidden;             // [P / 16 + E, 2F or F, 16]: before the activation, by panels of an expert's rows; for the way back
    void* pairs;              // [P, D]: every pair's share, before they are summed
    void* out;                // [T, D]
    // the way back only
    const void* grad;         // [T, D], rows `grad_row` apart
    int64_t grad_row;
    void *grad_x, *grad_up, *grad_down, *grad_up_bias, *grad_down_bias;
    float* grad_weight;       // [P]
};

// Pairs [begin, end) of one expert; `panel` is the first of its panels of 16 rows within the group, `kept` within `Call.hidden`.
struct Segment {
    int64_t expert, begin, end, panel, kept;
    int64_t rows() const { return end - begin; }
    int64_t panels() const { return divide_up(rows(), 16); }
};

struct Group {
    std::vector<Segment> segments;
    int64_t panels = 0;
};

// The work in groups of at most `limit` rows, so that what a group keeps between its products stays in the caches and
// scratch never grows with T. The limit is a multiple of 16.
inline std::vector<Group> cut(const Call& c, int64_t limit, bool whole_experts) {
    std::vector<Group> groups(1);
    for (int64_t e = 0, begin = 0, kept = 0; e < c.E; kept += divide_up(c.offsets[e] - begin, 16), begin = c.offsets[e++]) {
        int64_t end = c.offsets[e];
        for (int64_t at = begin; at < end;) {
            int64_t rows = whole_experts ? end - at : std::min(limit, end - at);
            if (groups.back().panels && (groups.back().panels + divide_up(rows, 16)) * 16 > limit) groups.emplace_back();
            Segment s{e, at, at + rows, groups.back().panels, kept + (at - begin) / 16};
            groups.back().panels += s.panels();
            groups.back().segments.push_back(s);
            at += rows;
        }
    }
    return groups;
}

// Kept by the calling thread between calls: a page that the kernel has to hand out and clear costs more than reading it.
class Arena {
    char* base_ = nullptr;
    size_t size_ = 0;

   public:
    ~Arena() { std::free(base_); }
    char* need(size_t bytes) {
        constexpr size_t huge = size_t(2) << 20;
        if (bytes > size_) {
            std::free(base_);
            size_ = 0;
            size_t rounded = (bytes + huge - 1) / huge * huge;
            base_ = (char*)std::aligned_alloc(huge, rounded);
            if (!base_) throw std::bad_alloc();
            madvise(base_, rounded, MADV_HUGEPAGE);
            size_ = rounded;
        }
        return base_;
    }
};
inline thread_local Arena arena;

// Cuts one allocation into arrays that start on a cache line.
class Layout {
    size_t size_ = 0;

   public:
    size_t add(size_t bytes) {
        size_t at = size_;
        size_ += (bytes + 63) / 64 * 64;
        return at;
    }
    size_t size() const { return size_; }
};

// Sixteen rows from `row` on of a matrix [N, K], as a product wants them: in place, or copied and filled up with zeros.
template <class Engine>
class Rows {
    using T = typename Engine::T;
    std::vector<T> copy_;

   public:
    const T *a0, *a1;
    ptrdiff_t lda;

    void take(const T* first_half, int64_t valid0, const T* second_half, int64_t valid1, int64_t row, int64_t K) {
        if (valid0 >= 16 && valid1 >= 16 && K % Engine::step == 0) {
            a0 = first_half, a1 = second_half, lda = row;
            return;
        }
        lda = round_up(K, Engine::step);
        copy_.assign(32 * lda, T{});
        for (int64_t i = 0; i < std::min<int64_t>(16, valid0); ++i) std::memcpy(&copy_[i * lda], first_half + i * row, K * sizeof(T));
        for (int64_t i = 0; i < std::min<int64_t>(16, valid1); ++i) std::memcpy(&copy_[(16 + i) * lda], second_half + i * row, K * sizeof(T));
        a0 = copy_.data(), a1 = a0 + 16 * lda;
    }
};

// Rows of tokens as one panel [units][16].
template <class T>
void pack_panel(const T* x, int64_t row, const int64_t* token, int64_t rows, int64_t K, int64_t units, float* panel) {
    constexpr int64_t per_unit = 4 / sizeof(T);
    for (int64_t u = 0; u < units; u += 16) {
        __m512i lines[16];
        int64_t left = K - u * per_unit;
        for (int i = 0; i < 16; ++i) {
            if (i >= rows) {
                lines[i] = _mm512_setzero_si512();
            } else if constexpr (per_unit == 2) {
                __mmask32 mask = left >= 32 ? ~0u : left <= 0 ? 0 : (1u << left) - 1;
                lines[i] = _mm512_maskz_loadu_epi16(mask, x + token[i] * row + u * 2);
            } else {
                lines[i] = _mm512_maskz_loadu_epi32(first(left), x + token[i] * row + u);
            }
        }
        transpose(lines);
        for (int64_t i = 0; i < std::min<int64_t>(16, units - u); ++i) _mm512_storeu_si512(panel + (u + i) * 16, lines[i]);
    }
}

inline float widen(const float* from) { return *from; }
inline float widen(const bf16* from) {
    uint32_t bits = uint32_t(from->bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// to[lane i of 16][row j] of tile rows c[j * width + i]: j < 16 columns of a matrix, i its rows.
template <class T>
void store_columns(T* to, int64_t row, const float* c, int64_t width, int64_t rows, int64_t columns) {
    __m512i lines[16];
    for (int j = 0; j < 16; ++j) lines[j] = _mm512_loadu_si512(c + j * width);
    transpose(lines);
    for (int64_t i = 0; i < std::min<int64_t>(16, rows); ++i) store(to + i * row, _mm512_castsi512_ps(lines[i]), first(columns));
}

// out_t = sum of the pairs of token t, in the order of the list (by expert), whatever the number of threads. Inside a parallel region.
template <class T>
void sum_pairs(const T* pairs, const int64_t* start, const int64_t* place, int64_t T_, int64_t D, T* out) {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < T_; ++t) {
        for (int64_t d = 0; d < D; d += 64) {
            vec sum[4] = {};
            for (int64_t i = start[t]; i < start[t + 1]; ++i)
                for (int j = 0; j < 4; ++j) sum[j] = _mm512_add_ps(sum[j], load(pairs + place[i] * D + d + 16 * j, first(D - d - 16 * j)));
            for (int j = 0; j < 4; ++j) store(out + t * D + d + 16 * j, sum[j], first(D - d - 16 * j));
        }
    }
}

// Where each token's pairs stand: place[start[t]..start[t + 1]].
inline void by_token(const Call& c, std::vector<int64_t>& start, std::vector<int64_t>& place) {
    int64_t real = c.E ? c.offsets[c.E - 1] : 0;
    start.assign(c.T + 2, 0);
    place.resize(real);
    for (int64_t p = 0; p < real; ++p) ++start[c.token[p] + 2];
    for (int64_t t = 2; t < c.T + 2; ++t) start[t] += start[t - 1];
    for (int64_t p = 0; p < real; ++p) place[start[c.token[p] + 1]++] = p;
}

}  // namespace moeforge
