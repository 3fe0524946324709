// One product of tiles, in float32 registers (AVX-512) or in AMX tiles (bf16).
//
// C[32][16 v] = A[32][K] B[K][16 v]: A is two halves of 16 rows that lie in memory K-contiguous (weights as they are), B is v
// panels [units][16] of 32-bit units: one float, or the pair of bf16 that stand one behind the other along K. `half` rows of
// each half are wanted, a multiple of `half_step`; the others are left as they were, or hold anything.
#pragma once
#include <algorithm>

#include "vectors.h"

namespace moeforge {

// What passes need that only load and store elements, and compute in float32 whatever these are.
template <class Element>
struct Of {
    using T = Element;
};

struct Float32 {
    using T = float;
    static constexpr int panels = 3;        // at a time
    static constexpr int per_unit = 1;      // elements of K
    static constexpr int step = 1;          // K is a multiple of it in what `product` gets
    static constexpr int half_step = 4;
    static constexpr int narrow = 8;  // up to so many rows of tokens, dot products are faster than a panel that is partly empty
    static void enter() {}
    static void leave() {}

    // Four rows of weights times M of tokens [M][row]: sixteen partial sums each, into sums[4][narrow]
    template <int M>
    static void dots(const float* a, ptrdiff_t lda, int64_t K, const float* b, ptrdiff_t row, vec* sums, int ahead) {
        vec sum[4][M] = {};
        for (int64_t k = 0; k < K; k += 16) {
            const __mmask16 mask = first(K - k);
            vec w[4];
            for (int j = 0; j < 4; ++j) {
                if (ahead) _mm_prefetch(a + (ahead + j) * lda + k, _MM_HINT_T1);
                w[j] = load(a + j * lda + k, mask);
            }
            for (int m = 0; m < M; ++m) {
                vec x = load(b + m * row + k, mask);
                for (int j = 0; j < 4; ++j) sum[j][m] = _mm512_fmadd_ps(w[j], x, sum[j][m]);
            }
        }
        for (int j = 0; j < 4; ++j)
            for (int m = 0; m < M; ++m) sums[j * narrow + m] = sum[j][m];
    }

    // C[32][panels * 16] of `rows` rows of tokens that lie one after the other, sums along K, which both have side by side
    static void narrow_product(const float* a0, const float* a1, ptrdiff_t lda, int64_t K, const float* b, ptrdiff_t row, int64_t rows, float* c, int ahead) {
        constexpr int width = panels * 16;
        using Run = void (*)(const float*, ptrdiff_t, int64_t, const float*, ptrdiff_t, vec*, int);
        constexpr Run runs[] = {nullptr, dots<1>, dots<2>, dots<3>, dots<4>, dots<5>, dots<6>};
        for (int i = 0; i < 32; i += 4) {
            const float* a = i < 16 ? a0 + i * lda : a1 + (i - 16) * lda;
            vec sums[4 * narrow];
            for (int64_t m = 0; m < rows;) {
                // as even as can be: 7 rows are 4 and 3, not 6 and 1
                const int64_t now = divide_up(rows - m, divide_up(rows - m, 6));
                runs[now](a, lda, K, b + m * row, row, sums + m, m ? 0 : ahead);
                m += now;
            }
            for (int j = 0; j < 4; ++j) {
                alignas(64) float line[16] = {};
                for (int m = 0; m < rows; ++m) line[m] = _mm512_reduce_add_ps(sums[j * narrow + m]);
                store(c + (i + j) * width, load(line));
            }
        }
    }

    // `ahead`: of weights that are read from memory once, the rows so many further on are asked for before they are needed
    template <int HALF, int V>
    static void rows(const float* a0, const float* a1, ptrdiff_t lda, int64_t K, const float* b, ptrdiff_t panel, float* c0, float* c1, int ahead) {
        vec low[HALF][V], high[HALF][V];
        for (int i = 0; i < HALF; ++i)
            for (int v = 0; v < V; ++v) low[i][v] = high[i][v] = _mm512_setzero_ps();
        for (int64_t k = 0; k < K; ++k) {
            vec column[V];
            for (int v = 0; v < V; ++v) column[v] = _mm512_loadu_ps(b + v * panel + k * 16);
            if (ahead && k % 16 == 0)
                for (int i = 0; i < HALF; ++i) {
                    _mm_prefetch(a0 + (ahead + i) * lda + k, _MM_HINT_T1);
                    _mm_prefetch(a1 + (ahead + i) * lda + k, _MM_HINT_T1);
                }
            for (int i = 0; i < HALF; ++i) {
                vec p = set(a0[i * lda + k]), q = set(a1[i * lda + k]);
                for (int v = 0; v < V; ++v) {
                    low[i][v] = _mm512_fmadd_ps(p, column[v], low[i][v]);
                    high[i][v] = _mm512_fmadd_ps(q, column[v], high[i][v]);
                }
            }
        }
        for (int i = 0; i < HALF; ++i)
            for (int v = 0; v < V; ++v) {
                store(c0 + (i * panels + v) * 16, low[i][v]);
                store(c1 + (i * panels + v) * 16, high[i][v]);
            }
    }

    static void product(const float* a0, const float* a1, ptrdiff_t lda, int64_t K, const float* b, ptrdiff_t panel, int v, float* c, int half = 16, int ahead = 0) {
        constexpr int width = panels * 16;
        if (v == 1 && half % 8 == 0) {
            for (int i = 0; i < half; i += 8) rows<8, 1>(a0 + i * lda, a1 + i * lda, lda, K, b, panel, c + i * width, c + (16 + i) * width, ahead);
        } else {
            auto run = v == 1 ? rows<4, 1> : v == 2 ? rows<4, 2> : rows<4, 3>;
            for (int i = 0; i < half; i += 4) run(a0 + i * lda, a1 + i * lda, lda, K, b, panel, c + i * width, c + (16 + i) * width, ahead);
        }
    }
};

#ifdef __AMX_BF16__
struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

struct BFloat16 {
    using T = bf16;
    static constexpr int panels = 2;
    static constexpr int per_unit = 2;
    static constexpr int step = 32;
    static constexpr int half_step = 16;
    static constexpr int narrow = 0;
    static void narrow_product(const bf16*, const bf16*, ptrdiff_t, int64_t, const float*, ptrdiff_t, int64_t, float*, int) {}
    static void enter() {
        TileShapes shapes;
        for (int i = 0; i < 8; ++i) shapes.bytes[i] = 64, shapes.rows[i] = 16;
        _tile_loadconfig(&shapes);
    }
    static void leave() { _tile_release(); }

    static void product(const bf16* a0, const bf16* a1, ptrdiff_t lda, int64_t K, const float* b, ptrdiff_t panel, int v, float* c, int = 16, int ahead = 0) {
        constexpr int width = panels * 16;
        const auto prefetch = [&](int64_t k) {
            if (!ahead) return;
            for (int i = ahead; i < ahead + 16; ++i) {
                _mm_prefetch(a0 + i * lda + k, _MM_HINT_T1);
                _mm_prefetch(a1 + i * lda + k, _MM_HINT_T1);
            }
        };
        _tile_zero(0);
        _tile_zero(1);
        if (v == 1) {
            for (int64_t k = 0; k < K; k += 32) {
                prefetch(k);
                _tile_loadd(6, b + k * 8, 64);
                _tile_loadd(4, a0 + k, lda * 2);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(5, a1 + k, lda * 2);
                _tile_dpbf16ps(1, 5, 6);
            }
        } else {
            _tile_zero(2);
            _tile_zero(3);
            for (int64_t k = 0; k < K; k += 32) {
                prefetch(k);
                _tile_loadd(6, b + k * 8, 64);
                _tile_loadd(7, b + panel + k * 8, 64);
                _tile_loadd(4, a0 + k, lda * 2);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(2, 4, 7);
                _tile_loadd(5, a1 + k, lda * 2);
                _tile_dpbf16ps(1, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(2, c + 16, width * 4);
            _tile_stored(3, c + 16 * width + 16, width * 4);
        }
        _tile_stored(0, c, width * 4);
        _tile_stored(1, c + 16 * width, width * 4);
    }
};
#endif

}  // namespace moeforge
