// unpack_avx2.h: reading the bit planes of packed.h, 32 codes at a time. Only for the AVX2
// variants: everything here is forced inline, so no copy of it can be linked into code for older
// machines.
#ifndef FL_KERNELS_X86_UNPACK_AVX2_H
#define FL_KERNELS_X86_UNPACK_AVX2_H

#include "kernels/packed.h"

#include <immintrin.h>

#define FL_INLINE static inline __attribute__((always_inline))

// From the plane of `width` bits: codes j + 128 n .. + 31, shifted up by `to`. j < 128 is a
// multiple of 32, n < 8. All but j are constants, so that this is a load, a shift and a mask.
FL_INLINE __m256i fl_plane_avx2(const uint8_t *plane, int width, size_t j, int n, int to) {
    const uint8_t *at = plane + j + 128 * (size_t)(n % width);
    const __m256i v = _mm256_loadu_si256((const __m256i *)(const void *)at);
    if (width == 8) return v;
    const int right = n / width * width - to;
    const __m256i moved = right >= 0 ? _mm256_srli_epi16(v, right) : _mm256_slli_epi16(v, -right);
    return _mm256_and_si256(moved, _mm256_set1_epi8((char)(((1 << width) - 1) << to)));
}

// Codes j + 128 n .. + 31 of a tile whose planes begin at `data`.
FL_INLINE __m256i fl_codes_avx2(const uint8_t *data, int bits, size_t j, int n) {
    if (bits == 8) return fl_plane_avx2(data, 8, j, n, 0);
    const int low = bits >= 4 ? 4 : 2;
    __m256i v = fl_plane_avx2(data, low, j, n, 0);
    data += 128 * low;
    if (bits == 6 || bits == 7) {
        v = _mm256_or_si256(v, fl_plane_avx2(data, 2, j, n, 4));
        data += 256;
    }
    if (bits == 3 || bits == 5 || bits == 7)
        v = _mm256_or_si256(v, fl_plane_avx2(data, 1, j, n, bits - 1));
    return v;
}

// All 1024 codes of a tile, in the canonical order. out is 32-byte aligned.
FL_INLINE void fl_unpack_avx2(const uint8_t *data, int bits, uint8_t *out) {
    for (size_t j = 0; j < 128; j += 32) {
#pragma GCC unroll 8
        for (int n = 0; n < 8; n++)
            _mm256_store_si256((__m256i *)(void *)(out + j + 128 * n),
                               fl_codes_avx2(data, bits, j, n));
    }
}

// Eight fp16 numbers as floats.
FL_INLINE __m256 fl_halves_avx2(const uint8_t *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p));
}

#endif
