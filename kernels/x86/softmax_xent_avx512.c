// The steps of the AVX2 variant with sixteen lanes; masks make the end of a row an ordinary vector.
#include "kernels/softmax_xent.h"

#include "kernels/x86/exp_avx512.h"

#include <math.h>

// Lanes past the row's end are -infinity: probability zero.
FL_INLINE __m512 load_logits(size_t left, const float *p, __m512 scale) {
    const __mmask16 there = left >= 16 ? 0xffff : fl_mask16(left);
    const __m512 v = _mm512_maskz_loadu_ps(there, p);
    return _mm512_mask_mul_ps(_mm512_set1_ps(-INFINITY), there, v, scale);
}

static float max_of(size_t n, const float *logits, __m512 scale) {
    __m512 a = _mm512_set1_ps(-INFINITY), b = a;
    size_t j = 0;
    for (; j + 32 <= n; j += 32) {
        a = _mm512_max_ps(a, _mm512_mul_ps(_mm512_loadu_ps(logits + j), scale));
        b = _mm512_max_ps(b, _mm512_mul_ps(_mm512_loadu_ps(logits + j + 16), scale));
    }
    for (; j < n; j += 16) a = _mm512_max_ps(a, load_logits(n - j, logits + j, scale));
    return _mm512_reduce_max_ps(_mm512_max_ps(a, b));
}

FL_XENT_UPDATE(avx512) {
    const __m512 sv = _mm512_set1_ps(scale);
    for (size_t t = 0; t < tokens; t++, logits += ld) {
        const float max = max_of(n, logits, sv);
        fl_lse *s = &state[t];
        if (max == -INFINITY) { // nothing is possible, or what max overlooks: NaN
            fl_xent_update_ref(1, n, scale, logits, ld, s);
            continue;
        }
        const __m512 top = _mm512_set1_ps(max);
        __m512d low = _mm512_setzero_pd(), high = low;
        for (size_t j = 0; j < n; j += 16) {
            const __m512 e = fl_exp16(_mm512_sub_ps(load_logits(n - j, logits + j, sv), top));
            low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(e)));
            high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm256_castpd_ps(
                                           _mm512_extractf64x4_pd(_mm512_castps_pd(e), 1))));
        }
        const double sum = _mm512_reduce_add_pd(_mm512_add_pd(low, high));
        if ((double)max > s->max) {
            s->sum = s->sum * exp(s->max - (double)max) + sum;
            s->max = (double)max;
        } else {
            s->sum += sum * exp((double)max - s->max);
        }
    }
}

// Sixteen probabilities, of which those below `least` become it or zero; see fl_xent_chance.
FL_INLINE __m512 thin(__m512 p, float least, uint32_t draw) {
    const __m512 top = _mm512_set1_ps(least);
    const __mmask16 below = _mm512_cmp_ps_mask(p, top, _CMP_LT_OQ); // a NaN is not below
    __m512i h =
        _mm512_add_epi32(_mm512_set1_epi32((int32_t)draw),
                         _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    h = _mm512_mullo_epi32(_mm512_xor_si512(h, _mm512_srli_epi32(h, 16)),
                           _mm512_set1_epi32(0x7feb352d));
    h = _mm512_mullo_epi32(_mm512_xor_si512(h, _mm512_srli_epi32(h, 15)),
                           _mm512_set1_epi32((int32_t)0x846ca68b));
    h = _mm512_srli_epi32(_mm512_xor_si512(h, _mm512_srli_epi32(h, 16)), 8);
    const __m512 unit = _mm512_mul_ps(_mm512_cvtepi32_ps(h), _mm512_set1_ps(0x1p-24f));
    const __mmask16 taken = _mm512_cmp_ps_mask(_mm512_mul_ps(unit, top), p, _CMP_LT_OQ);
    return _mm512_mask_mov_ps(p, below, _mm512_maskz_mov_ps(taken, top));
}

FL_XENT_GRAD(avx512) {
    for (size_t t = 0; t < tokens; t++, logits += ld, dlogits += ldd) {
        const __m512 level = _mm512_set1_ps(lse[t]), wv = _mm512_set1_ps(weight[t]);
        if (weight[t] == 0.0f) {
            for (size_t j = 0; j < n; j++) dlogits[j] = 0.0f;
            continue;
        }
        // The target's own logit is read before dlogits, which may be logits, is written.
        const size_t hit = target[t] < 0 ? SIZE_MAX : (size_t)target[t] - first; // may wrap: no hit
        const float own = hit < n ? logits[hit] : 0.0f;
        for (size_t j = 0; j < n; j += 16) {
            const __mmask16 there = n - j >= 16 ? 0xffff : fl_mask16(n - j);
            const __m512 l = _mm512_maskz_loadu_ps(there, logits + j);
            __m512 p = fl_exp16(_mm512_sub_ps(l, level));
            if (least > 0) p = thin(p, least, draw[t] + (uint32_t)(first + j));
            p = _mm512_mul_ps(p, wv);
            if (there == 0xffff) // a masked store costs more than a plain one
                _mm512_storeu_ps(dlogits + j, p);
            else
                _mm512_mask_storeu_ps(dlogits + j, there, p);
        }
        if (hit < n) dlogits[hit] = (expf(own - lse[t]) - 1.0f) * weight[t];
    }
}
