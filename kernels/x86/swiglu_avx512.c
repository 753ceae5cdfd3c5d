#include "kernels/swiglu.h"

#include "kernels/x86/exp_avx512.h"

FL_INLINE __m512 exp_minus(__m512 g) {
    const __m512i sign = _mm512_set1_epi32(INT32_MIN);
    return fl_exp16(_mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(g), sign)));
}

FL_INLINE void store(float *p, __mmask16 there, __m512 v) {
    if (there == 0xffff) // a masked store costs more than a plain one
        _mm512_storeu_ps(p, v);
    else
        _mm512_mask_storeu_ps(p, there, v);
}

FL_SWIGLU_FORWARD(avx512) {
    const __m512 one = _mm512_set1_ps(1.0f);
    for (size_t i = 0; i < n; i += 16) {
        const __mmask16 there = n - i >= 16 ? 0xffff : fl_mask16(n - i);
        const __m512 g = _mm512_maskz_loadu_ps(there, gate + i);
        const __m512 u = _mm512_maskz_loadu_ps(there, up + i);
        const __m512 silu = _mm512_div_ps(g, _mm512_add_ps(one, exp_minus(g)));
        store(act + i, there, _mm512_mul_ps(silu, u));
    }
}

FL_SWIGLU_BACKWARD(avx512) {
    const __m512 one = _mm512_set1_ps(1.0f);
    for (size_t i = 0; i < n; i += 16) {
        const __mmask16 there = n - i >= 16 ? 0xffff : fl_mask16(n - i);
        const __m512 g = _mm512_maskz_loadu_ps(there, gate + i);
        const __m512 u = _mm512_maskz_loadu_ps(there, up + i);
        const __m512 d = _mm512_maskz_loadu_ps(there, dact + i);
        const __m512 s = _mm512_div_ps(one, _mm512_add_ps(one, exp_minus(g)));
        const __m512 slope =
            _mm512_mul_ps(s, _mm512_fmadd_ps(g, _mm512_sub_ps(one, s), one)); // s (1 + g (1 - s))
        store(dgate + i, there, _mm512_mul_ps(_mm512_mul_ps(d, u), slope));
        store(dup + i, there, _mm512_mul_ps(d, _mm512_mul_ps(g, s)));
    }
}
