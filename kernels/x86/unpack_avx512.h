// unpack_avx512.h: reading the bit planes of packed.h, 64 codes at a time: one step of 16 rows by 4
// columns. Only for the AVX-512 variants: everything here is forced inline, so no copy of it can be
// linked into code for older machines.
#ifndef FL_KERNELS_X86_UNPACK_AVX512_H
#define FL_KERNELS_X86_UNPACK_AVX512_H

#include "kernels/packed.h"

#include <immintrin.h>

#define FL_INLINE static inline __attribute__((always_inline))

enum { FL_PACKED_STEPS = FL_PACKED_CODES / 64 };

// Shifted as a vector: compilers do not agree on the sign of the intrinsics' count.
typedef uint16_t fl_words __attribute__((vector_size(64)));

// Step `s` (a constant) from the plane of `width` bits, shifted up by `to`.
FL_INLINE __m512i fl_plane_avx512(const uint8_t *plane, int width, int s, int to) {
    const __m512i v = _mm512_loadu_si512(plane + 64 * (s % (2 * width)));
    if (width == 8) return v;
    const int right = s / (2 * width) * width - to;
    const fl_words moved = right >= 0 ? (fl_words)v >> right : (fl_words)v << -right;
    return _mm512_and_si512((__m512i)moved, _mm512_set1_epi8((char)(((1 << width) - 1) << to)));
}

// The 64 codes of step `s` of a tile whose planes begin at `data`.
FL_INLINE __m512i fl_codes_avx512(const uint8_t *data, int bits, int s) {
    if (bits == 8) return fl_plane_avx512(data, 8, s, 0);
    const int low = bits >= 4 ? 4 : 2;
    __m512i v = fl_plane_avx512(data, low, s, 0);
    data += 128 * low;
    if (bits == 6 || bits == 7) {
        v = _mm512_or_si512(v, fl_plane_avx512(data, 2, s, 4));
        data += 256;
    }
    if (bits == 3 || bits == 5 || bits == 7)
        v = _mm512_or_si512(v, fl_plane_avx512(data, 1, s, bits - 1));
    return v;
}

// Sixteen fp16 numbers as floats.
FL_INLINE __m512 fl_halves_avx512(const uint8_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p));
}

#endif
