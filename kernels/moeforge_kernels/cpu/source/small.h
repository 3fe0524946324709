// Products of a few rows in float32 registers, and copies of weights as those read them.
#pragma once
#include "call.h"

namespace moeforge {

// C[M][16 V] += A[M][K] B[K][16 V]. A's elements are read one by one, so either of its sides may be the longer one in memory.
template <int M, int V>
inline void few_rows(int64_t K, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row, float* c, int64_t c_row) {
    vec sum[M][V];
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[i][v] = load(c + i * c_row + 16 * v);
    for (int64_t k = 0; k < K; ++k, a += a_step, b += b_row) {
        vec row[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) row[v] = load(b + 16 * v);
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
            const vec x = set(a[i * a_row]);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) sum[i][v] = _mm512_fmadd_ps(x, row[v], sum[i][v]);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) store(c + i * c_row + 16 * v, sum[i][v]);
}

template <int M, int V>
inline void rows_of(int64_t m, int64_t K, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row, float* c, int64_t c_row) {
    for (; m >= M; m -= M, a += M * a_row, c += M * c_row) few_rows<M, V>(K, a, a_row, a_step, b, b_row, c, c_row);
    if constexpr (M > 1)
        if (m) rows_of<M / 2, V>(m, K, a, a_row, a_step, b, b_row, c, c_row);
}

// C[m][n] += A[m][K] B[K][n]; n is a multiple of 16. Sixteen registers of sums, whatever n.
inline void multiply(int64_t m, int64_t n, int64_t K, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row, float* c, int64_t c_row) {
    for (; n >= 64; n -= 64, b += 64, c += 64) rows_of<4, 4>(m, K, a, a_row, a_step, b, b_row, c, c_row);
    for (; n >= 32; n -= 32, b += 32, c += 32) rows_of<8, 2>(m, K, a, a_row, a_step, b, b_row, c, c_row);
    if (n) rows_of<16, 1>(m, K, a, a_row, a_step, b, b_row, c, c_row);
}

// A weight's matrix in either element type.
struct Matrix {
    const void* data;
    int64_t row;
    bool is_bf16;

    vec at(int64_t i, int64_t j, __mmask16 columns) const {
#ifdef __AVX512BF16__
        if (is_bf16) return load((const bf16*)data + i * row + j, columns);
#endif
        return load((const float*)data + i * row + j, columns);
    }
    // What begins so many elements further on.
    Matrix from(int64_t elements) const { return {(const char*)data + elements * (is_bf16 ? 2 : 4), row, is_bf16}; }
};

// to[i][j] = from[i][j] in float32, for i < rows and j < columns; zeros up to `all_rows` and `all_columns`, multiples of 16.
inline void copy(const Matrix& from, int64_t rows, int64_t columns, float* to, int64_t all_rows, int64_t all_columns) {
    for (int64_t i = 0; i < all_rows; ++i)
        for (int64_t j = 0; j < all_columns; j += 16) store(to + i * all_columns + j, from.at(i, j, i < rows ? first(columns - j) : (__mmask16)0));
}

// to[j][i] = from[i][j], likewise.
inline void turn(const Matrix& from, int64_t rows, int64_t columns, float* to, int64_t all_rows, int64_t all_columns) {
    for (int64_t i = 0; i < all_rows; i += 16)
        for (int64_t j = 0; j < all_columns; j += 16) {
            __m512i lines[16];
            for (int k = 0; k < 16; ++k) lines[k] = _mm512_castps_si512(from.at(i + k, j, i + k < rows ? first(columns - j) : (__mmask16)0));
            transpose(lines);
            for (int k = 0; k < 16; ++k) _mm512_storeu_si512(to + (j + k) * all_rows + i, lines[k]);
        }
}

// to[j][i] += from[i][j] for j < columns, i < rows
inline void add_turned(const float* from, int64_t from_row, int64_t rows, int64_t columns, float* to, int64_t to_row) {
    for (int64_t i = 0; i < rows; i += 16)
        for (int64_t j = 0; j < columns; j += 16) {
            __m512i lines[16];
            for (int k = 0; k < 16; ++k) lines[k] = i + k < rows ? _mm512_loadu_si512(from + (i + k) * from_row + j) : _mm512_setzero_si512();
            transpose(lines);
            for (int k = 0; k < std::min<int64_t>(16, columns - j); ++k) {
                float* at = to + (j + k) * to_row + i;
                const __mmask16 here = first(rows - i);
                store(at, _mm512_add_ps(load(at, here), _mm512_castsi512_ps(lines[k])), here);
            }
        }
}

inline void add(const float* from, int64_t from_row, int64_t rows, int64_t columns, float* to, int64_t to_row) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; j += 16) {
            const __mmask16 here = first(columns - j);
            float* at = to + i * to_row + j;
            store(at, _mm512_add_ps(load(at, here), load(from + i * from_row + j, here)), here);
        }
}

}  // namespace moeforge
