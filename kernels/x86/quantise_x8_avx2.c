#include "kernels/quantise_x8.h"

#include <immintrin.h>
#include <math.h>
#include <string.h>

static void group(const float *x, int8_t *codes, float *ret_scale, float *ret_sum) {
    __m256i max = _mm256_setzero_si256();
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    for (int i = 0; i < FL_X8_GROUP; i += 8) {
        const __m256i bits = _mm256_loadu_si256((const __m256i *)(const void *)(x + i));
        max = _mm256_max_epi32(max, _mm256_and_si256(bits, magnitude));
    }
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(max), _mm256_extracti128_si256(max, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
    const int32_t max_bits = _mm_cvtsi128_si32(m);
    const float maxabs = _mm_cvtss_f32(_mm_castsi128_ps(m));
    if (max_bits >= 0x7f800000 || maxabs < 0x1p-100f) {
        memset(codes, 0, FL_X8_GROUP);
        *ret_scale = *ret_sum = max_bits >= 0x7f800000 ? NAN : 0.0f;
        return;
    }
    const __m256 inverse = _mm256_set1_ps(127.0f / maxabs);
    __m256i sum = _mm256_setzero_si256();
    for (int i = 0; i < FL_X8_GROUP; i += 32) {
        __m256i q[4]; // conversion rounds half to even; no product exceeds 127 by enough to matter
#pragma GCC unroll 4
        for (int n = 0; n < 4; n++) {
            q[n] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8 * n), inverse));
            sum = _mm256_add_epi32(sum, q[n]);
        }
        const __m256i bytes =
            _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
        // Packing works inside 128-bit halves: put the groups of four back in order.
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        _mm256_storeu_si256((__m256i *)(void *)(codes + i),
                            _mm256_permutevar8x32_epi32(bytes, order));
    }
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
    *ret_scale = maxabs / 127.0f;
    *ret_sum = *ret_scale * (float)_mm_cvtsi128_si32(s);
}

void fl_quantise_x8_avx2(const float *x, uint32_t cols, const fl_x8 *ret, uint32_t token) {
    for (uint32_t g = 0; g < ret->groups; g++) {
        const size_t at = (size_t)token * ret->groups + g;
        const uint32_t left = cols - g * FL_X8_GROUP;
        float tail[FL_X8_GROUP] = {
            0}; // a last group that is not full, so that nothing is over-read
        const float *from = x + (size_t)g * FL_X8_GROUP;
        if (left < FL_X8_GROUP) from = memcpy(tail, from, left * sizeof(*tail));
        group(from, ret->codes + at * FL_X8_GROUP, ret->scales + at, ret->sums + at);
    }
}
