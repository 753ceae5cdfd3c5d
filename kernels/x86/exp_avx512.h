// exp_avx512.h: the exponential of the AVX-512 variants; for files of this folder only. Everything
// is static: no copy made here may become another file's.
//
// exp: |error| <= 2 ulp for results that are normal numbers; results below 2^-126 are rounded once
// more; 0 below -103.98, infinity above 88.73; NaN stays NaN.
#ifndef FL_KERNELS_X86_EXP_AVX512_H
#define FL_KERNELS_X86_EXP_AVX512_H

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#define FL_INLINE static inline __attribute__((always_inline, unused))

// Lanes 0 .. n-1, n = 0..16.
FL_INLINE __mmask16 fl_mask16(size_t n) {
    return (__mmask16)((1u << n) - 1);
}

// The steps of fl_exp8 (exp_avx2.h); the power of two is one instruction here.
FL_INLINE __m512 fl_exp16(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-104.0f), x); // max and min give a NaN that comes second
    x = _mm512_min_ps(_mm512_set1_ps(89.0f), x);
    const __m512 i = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(0x1.715476p0f)),
                                          _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(i, _mm512_set1_ps(0x1.62e4p-1f), x); // exact: 15 bits by 8
    r = _mm512_fnmadd_ps(i, _mm512_set1_ps(0x1.7f7d1cp-20f), r);
    __m512 p = _mm512_set1_ps(1.0f / 5040);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 720));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, i);
}

#endif
