// The types that whole models are published in; the others are read by the definition. Products and
// sums are rounded one by one, as there.
#include "kernels/ggml.h"

#include <immintrin.h>

static float half_at(const uint8_t *p) {
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(p[0] | p[1] << 8)));
}

static __m128i load16(const uint8_t *p) {
    return _mm_loadu_si128((const __m128i *)(const void *)p);
}

static __m128i low_nibbles(__m128i q) {
    return _mm_and_si128(q, _mm_set1_epi8(15));
}

static __m128i high_nibbles(__m128i q) {
    return _mm_and_si128(_mm_srli_epi16(q, 4), _mm_set1_epi8(15));
}

// out[16] = d * q + m, the q signed bytes.
static void affine16(__m128i q, __m256 d, __m256 m, float *out) {
    const __m256 a = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(q));
    const __m256 b = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(q, 8)));
    _mm256_storeu_ps(out, _mm256_add_ps(_mm256_mul_ps(d, a), m));
    _mm256_storeu_ps(out + 8, _mm256_add_ps(_mm256_mul_ps(d, b), m));
}

// out[16] = d * q: adding a zero instead would lose the sign of -0.
static void scale16(__m128i q, __m256 d, float *out) {
    const __m256 a = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(q));
    const __m256 b = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(q, 8)));
    _mm256_storeu_ps(out, _mm256_mul_ps(d, a));
    _mm256_storeu_ps(out + 8, _mm256_mul_ps(d, b));
}

static void f16(const uint8_t *src, size_t n, float *out) {
    size_t i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, _mm256_cvtph_ps(load16(src + 2 * i)));
    for (; i < n; i++) out[i] = half_at(src + 2 * i);
}

static void q4_0(const uint8_t *src, size_t blocks, float *out) {
    for (; blocks > 0; blocks--, src += 18, out += 32) {
        const __m256 d = _mm256_set1_ps(half_at(src));
        const __m128i q = load16(src + 2), eight = _mm_set1_epi8(8);
        scale16(_mm_sub_epi8(low_nibbles(q), eight), d, out);
        scale16(_mm_sub_epi8(high_nibbles(q), eight), d, out + 16);
    }
}

static void q4_1(const uint8_t *src, size_t blocks, float *out) {
    for (; blocks > 0; blocks--, src += 20, out += 32) {
        const __m256 d = _mm256_set1_ps(half_at(src)), m = _mm256_set1_ps(half_at(src + 2));
        const __m128i q = load16(src + 4);
        affine16(low_nibbles(q), d, m, out);
        affine16(high_nibbles(q), d, m, out + 16);
    }
}

static void q8_0(const uint8_t *src, size_t blocks, float *out) {
    for (; blocks > 0; blocks--, src += 34, out += 32) {
        const __m256 d = _mm256_set1_ps(half_at(src));
        scale16(load16(src + 2), d, out);
        scale16(load16(src + 18), d, out + 16);
    }
}

static void q4_k(const uint8_t *src, size_t blocks, float *out) {
    for (; blocks > 0; blocks--, src += 144, out += 256) {
        const uint8_t *c = src + 4, *qs = src + 16;
        const float d = half_at(src), dmin = half_at(src + 2);
        for (int s = 0; s < 8; s++) {
            const int scale = s < 4 ? c[s] & 63 : (c[s + 4] & 15) | (c[s - 4] >> 6) << 4;
            const int min = s < 4 ? c[s + 4] & 63 : c[s + 4] >> 4 | (c[s] >> 6) << 4;
            const __m256 ds = _mm256_set1_ps(d * (float)scale);
            const __m256 m = _mm256_set1_ps(-(dmin * (float)min)); // x + -m is x - m
            const __m128i a = load16(qs + 32 * (s / 2)), b = load16(qs + 32 * (s / 2) + 16);
            affine16(s % 2 ? high_nibbles(a) : low_nibbles(a), ds, m, out + 32 * s);
            affine16(s % 2 ? high_nibbles(b) : low_nibbles(b), ds, m, out + 32 * s + 16);
        }
    }
}

static void q6_k(const uint8_t *src, size_t blocks, float *out) {
    for (; blocks > 0; blocks--, src += 210, out += 256) {
        const float d = half_at(src + 208);
        for (int s = 0; s < 16; s++) { // 16 weights under one scale
            const int h = s / 8, j = s / 2 % 4, l = s % 2 * 16;
            const __m128i ql = load16(src + 64 * h + 32 * (j % 2) + l);
            const __m128i qh = load16(src + 128 + 32 * h + l), shift = _mm_cvtsi32_si128(2 * j);
            const __m128i two = _mm_and_si128(_mm_srl_epi16(qh, shift), _mm_set1_epi8(3));
            const __m128i high = _mm_slli_epi16(two, 4);
            const __m128i q = _mm_or_si128(j < 2 ? low_nibbles(ql) : high_nibbles(ql), high);
            const float scale = d * (float)(int8_t)src[192 + s];
            scale16(_mm_sub_epi8(q, _mm_set1_epi8(32)), _mm256_set1_ps(scale), out + 16 * s);
        }
    }
}

void fl_ggml_row_to_f32_avx2(uint32_t id, const uint8_t *src, size_t n, float *out) {
    switch (id) {
    case FL_GGML_F16: f16(src, n, out); break;
    case FL_GGML_Q4_0: q4_0(src, n / 32, out); break;
    case FL_GGML_Q4_1: q4_1(src, n / 32, out); break;
    case FL_GGML_Q8_0: q8_0(src, n / 32, out); break;
    case FL_GGML_Q4_K: q4_k(src, n / 256, out); break;
    case FL_GGML_Q6_K: q6_k(src, n / 256, out); break;
    default: fl_ggml_row_to_f32_ref(id, src, n, out); break;
    }
}
