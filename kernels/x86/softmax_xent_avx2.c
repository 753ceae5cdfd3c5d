#include "kernels/softmax_xent.h"

#include "kernels/x86/exp_avx2.h"

#include <math.h>

// Lanes past the row's end become -infinity: probability zero.
FL_INLINE __m256 load_logits(size_t left, const float *p, __m256 scale) {
    if (left >= 8) return _mm256_mul_ps(_mm256_loadu_ps(p), scale);
    const __m256i mask = fl_mask8(left);
    const __m256 v = _mm256_mul_ps(_mm256_maskload_ps(p, mask), scale);
    return _mm256_blendv_ps(_mm256_set1_ps(-INFINITY), v, _mm256_castsi256_ps(mask));
}

static float max_of(size_t n, const float *logits, __m256 scale) {
    __m256 top = _mm256_set1_ps(-INFINITY);
    for (size_t j = 0; j < n; j += 8)
        top = _mm256_max_ps(top, load_logits(n - j, logits + j, scale));
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(top), _mm256_extractf128_ps(top, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

FL_XENT_UPDATE(avx2) {
    const __m256 sv = _mm256_set1_ps(scale);
    for (size_t t = 0; t < tokens; t++, logits += ld) {
        const float max = max_of(n, logits, sv);
        fl_lse *s = &state[t];
        if (max == -INFINITY) { // nothing is possible, or what max overlooks: NaN
            fl_xent_update_ref(1, n, scale, logits, ld, s);
            continue;
        }
        const __m256 top = _mm256_set1_ps(max);
        __m256d lanes = _mm256_setzero_pd();
        for (size_t j = 0; j < n; j += 8) {
            const __m256 l = load_logits(n - j, logits + j, sv);
            lanes = _mm256_add_pd(lanes, fl_fold_pd(fl_exp8(_mm256_sub_ps(l, top))));
        }
        const double sum = fl_sum_pd(lanes);
        if ((double)max > s->max) {
            s->sum = s->sum * exp(s->max - (double)max) + sum;
            s->max = (double)max;
        } else {
            s->sum += sum * exp((double)max - s->max);
        }
    }
}

// Eight probabilities, of which those below `least` become it or zero; see fl_xent_chance.
FL_INLINE __m256 thin(__m256 p, float least, uint32_t draw) {
    const __m256 top = _mm256_set1_ps(least);
    __m256i h = _mm256_add_epi32(_mm256_set1_epi32((int32_t)draw),
                                 _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    h = _mm256_mullo_epi32(_mm256_xor_si256(h, _mm256_srli_epi32(h, 16)),
                           _mm256_set1_epi32(0x7feb352d));
    h = _mm256_mullo_epi32(_mm256_xor_si256(h, _mm256_srli_epi32(h, 15)),
                           _mm256_set1_epi32((int32_t)0x846ca68b));
    h = _mm256_srli_epi32(_mm256_xor_si256(h, _mm256_srli_epi32(h, 16)), 8);
    const __m256 unit = _mm256_mul_ps(_mm256_cvtepi32_ps(h), _mm256_set1_ps(0x1p-24f));
    const __m256 taken = _mm256_cmp_ps(_mm256_mul_ps(unit, top), p, _CMP_LT_OQ);
    const __m256 below = _mm256_cmp_ps(p, top, _CMP_LT_OQ); // a NaN is not below
    return _mm256_blendv_ps(p, _mm256_and_ps(top, taken), below);
}

FL_XENT_GRAD(avx2) {
    for (size_t t = 0; t < tokens; t++, logits += ld, dlogits += ldd) {
        const __m256 level = _mm256_set1_ps(lse[t]), wv = _mm256_set1_ps(weight[t]);
        if (weight[t] == 0.0f) {
            for (size_t j = 0; j < n; j++) dlogits[j] = 0.0f;
            continue;
        }
        // The target's own logit is read before dlogits, which may be logits, is written.
        const size_t hit = target[t] < 0 ? SIZE_MAX : (size_t)target[t] - first; // may wrap: no hit
        const float own = hit < n ? logits[hit] : 0.0f;
        for (size_t j = 0; j < n; j += 8) {
            const bool tail = n - j < 8;
            const __m256i mask = fl_mask8(tail ? n - j : 8);
            __m256 p = fl_exp8(_mm256_sub_ps(fl_load8(logits + j, tail, mask), level));
            if (least > 0) p = thin(p, least, draw[t] + (uint32_t)(first + j));
            fl_store8(dlogits + j, tail, mask, _mm256_mul_ps(p, wv));
        }
        if (hit < n) dlogits[hit] = (expf(own - lse[t]) - 1.0f) * weight[t];
    }
}
