// Sixteen floats at a time: loads and stores of both element types, transposition, activations.
#pragma once
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace moeforge {

using vec = __m512;
struct bf16 {
    uint16_t bits;
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

inline __mmask16 first(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1); }

inline vec load(const float* from, __mmask16 mask = 0xffff) { return _mm512_maskz_loadu_ps(mask, from); }
inline void store(float* to, vec value, __mmask16 mask = 0xffff) { _mm512_mask_storeu_ps(to, mask, value); }

#ifdef __AVX512BF16__
inline vec load(const bf16* from, __mmask16 mask = 0xffff) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}
inline __m256i narrow(vec value) { return (__m256i)_mm512_cvtneps_pbh(value); }
inline void store(bf16* to, vec value, __mmask16 mask = 0xffff) { _mm256_mask_storeu_epi16(to, mask, narrow(value)); }
// Two rows of sixteen as pairs (a0 b0 a1 b1 ...): what a product of bf16 pairs wants along the summed dimension.
inline __m512i interleave(vec a, vec b) {
    __m512i low = _mm512_cvtepu16_epi32(narrow(a)), high = _mm512_cvtepu16_epi32(narrow(b));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
// The same of two rows of 32 as they lie in memory: the first and the last sixteen pairs.
inline void interleave(const bf16* a, const bf16* b, float* low, float* high) {
    alignas(64) static constexpr struct Order {
        uint16_t of[64];
        constexpr Order() : of() {
            for (int i = 0; i < 32; ++i) of[2 * i] = i, of[2 * i + 1] = 32 + i;
        }
    } order;
    const __m512i x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
    _mm512_storeu_si512(low, _mm512_permutex2var_epi16(x, _mm512_load_si512(order.of), y));
    _mm512_storeu_si512(high, _mm512_permutex2var_epi16(x, _mm512_load_si512(order.of + 32), y));
}
#endif

// rows[i] lane j <-> rows[j] lane i
inline void transpose(__m512i rows[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        rows[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        rows[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        rows[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        rows[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
        rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

inline vec set(float value) { return _mm512_set1_ps(value); }

// e^x to about 1 ulp: 2^n times a polynomial on |r| <= ln 2 / 2 (Cephes' coefficients).
inline vec exponential(vec x) {
    x = _mm512_min_ps(_mm512_max_ps(x, set(-104.0f)), set(88.72283f));
    vec n = _mm512_roundscale_ps(_mm512_mul_ps(x, set(1.44269504088896341f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    vec r = _mm512_fnmadd_ps(n, set(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, set(-2.12194440e-4f), r);
    vec p = set(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, set(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, set(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, set(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, set(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, set(5.0000001201e-1f));
    p = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), set(1.0f));
    return _mm512_scalef_ps(p, n);
}

inline vec logistic(vec x) { return _mm512_div_ps(set(1.0f), _mm512_add_ps(set(1.0f), exponential(_mm512_sub_ps(set(0.0f), x)))); }

inline vec tangent(vec x) {  // tanh; a series near 0, where 1 - 2 / (e^2x + 1) would cancel
    vec far = _mm512_sub_ps(set(1.0f), _mm512_div_ps(set(2.0f), _mm512_add_ps(exponential(_mm512_add_ps(x, x)), set(1.0f))));
    vec s = _mm512_mul_ps(x, x), p = set(-1382.0f / 155925.0f);
    p = _mm512_fmadd_ps(p, s, set(62.0f / 2835.0f));
    p = _mm512_fmadd_ps(p, s, set(-17.0f / 315.0f));
    p = _mm512_fmadd_ps(p, s, set(2.0f / 15.0f));
    p = _mm512_fmadd_ps(p, s, set(-1.0f / 3.0f));
    vec near = _mm512_fmadd_ps(_mm512_mul_ps(p, s), x, x);
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(_mm512_abs_ps(x), set(0.35f), _CMP_LT_OQ), far, near);
}

inline vec error_function(vec x) {  // Abramowitz and Stegun 7.1.26: within 2e-7 of erf; only ever used as 1 + erf
    vec a = _mm512_abs_ps(x), t = _mm512_div_ps(set(1.0f), _mm512_fmadd_ps(a, set(0.3275911f), set(1.0f)));
    vec p = set(1.061405429f);
    p = _mm512_fmadd_ps(p, t, set(-1.453152027f));
    p = _mm512_fmadd_ps(p, t, set(1.421413741f));
    p = _mm512_fmadd_ps(p, t, set(-0.284496736f));
    p = _mm512_fmadd_ps(p, t, set(0.254829592f));
    vec e = _mm512_fnmadd_ps(_mm512_mul_ps(p, t), exponential(_mm512_sub_ps(set(0.0f), _mm512_mul_ps(a, a))), set(1.0f));
    return _mm512_mask_sub_ps(e, _mm512_cmp_ps_mask(x, set(0.0f), _CMP_LT_OQ), set(0.0f), e);
}

// In the order of moeforge_kernels.cpu.ACTIVATIONS.
enum Activation { SILU, GELU, GELU_TANH, QUICK_GELU, RELU, RELU2, SIGMOID, TANH, IDENTITY };

// f(x), and f'(x) where `slope` is given. Inlined, as a call would have every register saved around it.
[[gnu::always_inline]] inline vec activate(int kind, vec x, vec* slope = nullptr) {
    const vec one = set(1.0f), half = set(0.5f), zero = set(0.0f);
    switch (kind) {
        case SILU:
        case QUICK_GELU: {
            vec c = set(kind == SILU ? 1.0f : 1.702f), s = logistic(_mm512_mul_ps(c, x));
            if (slope) *slope = _mm512_mul_ps(s, _mm512_fmadd_ps(_mm512_mul_ps(c, x), _mm512_sub_ps(one, s), one));
            return _mm512_mul_ps(x, s);
        }
        case GELU: {
            vec cdf = _mm512_mul_ps(half, _mm512_add_ps(one, error_function(_mm512_mul_ps(x, set(0.70710678118654752f)))));
            if (slope) {
                vec density = _mm512_mul_ps(exponential(_mm512_mul_ps(_mm512_mul_ps(x, x), set(-0.5f))), set(0.39894228040143268f));
                *slope = _mm512_fmadd_ps(x, density, cdf);
            }
            return _mm512_mul_ps(x, cdf);
        }
        case GELU_TANH: {
            const vec c = set(0.79788456080286536f), k = set(0.044715f);
            vec square = _mm512_mul_ps(x, x);
            vec t = tangent(_mm512_mul_ps(_mm512_mul_ps(c, x), _mm512_fmadd_ps(k, square, one)));
            if (slope) {
                vec inner = _mm512_mul_ps(c, _mm512_fmadd_ps(_mm512_mul_ps(set(3.0f), k), square, one));
                vec bend = _mm512_mul_ps(_mm512_mul_ps(half, x), _mm512_mul_ps(_mm512_fnmadd_ps(t, t, one), inner));
                *slope = _mm512_fmadd_ps(half, _mm512_add_ps(one, t), bend);
            }
            return _mm512_mul_ps(_mm512_mul_ps(half, x), _mm512_add_ps(one, t));
        }
        case RELU:
            if (slope) *slope = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, zero, _CMP_GT_OQ), one);
            return _mm512_max_ps(zero, x);  // in this order a NaN stays one
        case RELU2: {
            vec r = _mm512_max_ps(zero, x);
            if (slope) *slope = _mm512_add_ps(r, r);
            return _mm512_mul_ps(r, r);
        }
        case SIGMOID: {
            vec s = logistic(x);
            if (slope) *slope = _mm512_mul_ps(s, _mm512_sub_ps(one, s));
            return s;
        }
        case TANH: {
            vec t = tangent(x);
            if (slope) *slope = _mm512_fnmadd_ps(t, t, one);
            return t;
        }
        default:
            if (slope) *slope = one;
            return x;
    }
}

}  // namespace moeforge
