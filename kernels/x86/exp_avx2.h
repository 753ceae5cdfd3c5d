// exp_avx2.h: what the AVX2 variants that need an exponential share; for files of this folder only.
// Everything is static: no copy made here may become another file's.
//
// exp: |error| <= 2 ulp for results that are normal numbers; results below 2^-126 are rounded once
// more; 0 below -103.98, infinity above 88.73; NaN stays NaN.
#ifndef FL_KERNELS_X86_EXP_AVX2_H
#define FL_KERNELS_X86_EXP_AVX2_H

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#define FL_INLINE static inline __attribute__((always_inline, unused))
#define FL_UNROLL _Pragma("GCC unroll 8")

// Lanes 0 .. n-1, n = 0..8.
FL_INLINE __m256i fl_mask8(size_t n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int32_t)n), lane);
}

// A masked store costs many times a plain one: full vectors must not pay for the last one's mask.
FL_INLINE __m256 fl_load8(const float *p, const bool tail, __m256i mask) {
    return tail ? _mm256_maskload_ps(p, mask) : _mm256_loadu_ps(p);
}

FL_INLINE void fl_store8(float *p, const bool tail, __m256i mask, __m256 v) {
    if (tail)
        _mm256_maskstore_ps(p, mask, v);
    else
        _mm256_storeu_ps(p, v);
}

// x = i ln2 + r, |r| <= ln2 / 2; exp(r) by its series to r^7 / 7!, whose remainder is below 6e-9;
// 2^i in two factors, so that results near both ends of the range need no branch.
FL_INLINE __m256 fl_exp8(__m256 x) {
    x = _mm256_max_ps(_mm256_set1_ps(-104.0f), x); // max and min give a NaN that comes second
    x = _mm256_min_ps(_mm256_set1_ps(89.0f), x);
    const __m256 i = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(0x1.715476p0f)),
                                     _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(i, _mm256_set1_ps(0x1.62e4p-1f), x); // exact: 15 bits by 8
    r = _mm256_fnmadd_ps(i, _mm256_set1_ps(0x1.7f7d1cp-20f), r);
    __m256 p = _mm256_set1_ps(1.0f / 5040);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 720));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 120));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 24));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 6));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.5f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
    const __m256i n = _mm256_cvtps_epi32(i), half = _mm256_srai_epi32(n, 1);
    const __m256i bias = _mm256_set1_epi32(127);
    const __m256i a = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
    const __m256i b =
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(n, half), bias), 23);
    p = _mm256_mul_ps(p, _mm256_castsi256_ps(a));
    return _mm256_mul_ps(p, _mm256_castsi256_ps(b));
}

// Eight floats into four doubles: lane i + lane i + 4.
FL_INLINE __m256d fl_fold_pd(__m256 v) {
    return _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(v)),
                         _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
}

FL_INLINE double fl_sum_pd(__m256d v) {
    const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
}

#endif
