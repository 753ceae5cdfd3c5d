// A group of 64 is four registers; nothing is read twice.
#include "kernels/quantise_x8.h"

#include <immintrin.h>
#include <math.h>

enum { LANES = 16, VECTORS = FL_X8_GROUP / LANES };

static void group(const float *x, uint32_t count, int8_t *codes, float *ret_scale, float *ret_sum) {
    __m512 v[VECTORS];
    __m512i max = _mm512_setzero_si512();
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    const uint64_t there = count >= FL_X8_GROUP ? ~UINT64_C(0) : (UINT64_C(1) << count) - 1;
#pragma GCC unroll 4
    for (int i = 0; i < VECTORS; i++) {
        v[i] = _mm512_maskz_loadu_ps((__mmask16)(there >> LANES * i), x + LANES * i);
        max = _mm512_max_epi32(max, _mm512_and_si512(_mm512_castps_si512(v[i]), magnitude));
    }
    const int32_t max_bits = _mm512_reduce_max_epi32(max);
    const float maxabs = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(max_bits)));
    if (max_bits >= 0x7f800000 || maxabs < 0x1p-100f) {
        _mm512_storeu_si512(codes, _mm512_setzero_si512());
        *ret_scale = *ret_sum = max_bits >= 0x7f800000 ? NAN : 0.0f;
        return;
    }
    const __m512 inverse = _mm512_set1_ps(127.0f / maxabs);
    __m512i sum = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int i = 0; i < VECTORS; i++) { // conversion rounds half to even
        const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(v[i], inverse));
        sum = _mm512_add_epi32(sum, q);
        _mm_storeu_si128((__m128i *)(void *)(codes + LANES * i), _mm512_cvtsepi32_epi8(q));
    }
    *ret_scale = maxabs / 127.0f;
    *ret_sum = *ret_scale * (float)_mm512_reduce_add_epi32(sum);
}

void fl_quantise_x8_avx512(const float *x, uint32_t cols, const fl_x8 *ret, uint32_t token) {
    for (uint32_t g = 0; g < ret->groups; g++) {
        const size_t at = (size_t)token * ret->groups + g;
        group(x + (size_t)g * FL_X8_GROUP, cols - g * FL_X8_GROUP, ret->codes + at * FL_X8_GROUP,
              ret->scales + at, ret->sums + at);
    }
}
