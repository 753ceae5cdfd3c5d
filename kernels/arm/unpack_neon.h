// unpack_neon.h: reading the bit planes of packed.h, 16 codes at a time. Forced inline, so that
// each variant's copy is built with that variant's flags.
#ifndef FL_KERNELS_ARM_UNPACK_NEON_H
#define FL_KERNELS_ARM_UNPACK_NEON_H

#include "kernels/packed.h"

#include <arm_neon.h>

#define FL_INLINE static inline __attribute__((always_inline))

// From the plane of `width` bits: codes j + 128 n .. + 15, shifted up by `to`. j < 128 is a
// multiple of 16, n < 8.
FL_INLINE uint8x16_t fl_plane_neon(const uint8_t *plane, int width, size_t j, int n, int to) {
    const uint8x16_t v = vld1q_u8(plane + j + 128 * (size_t)(n % width));
    const int8_t left = (int8_t)(to - n / width * width); // negative: to the right
    const uint8_t mask = (uint8_t)(((1 << width) - 1) << to);
    return vandq_u8(vshlq_u8(v, vdupq_n_s8(left)), vdupq_n_u8(mask));
}

// Codes j + 128 n .. + 15 of a tile whose planes begin at `data`.
FL_INLINE uint8x16_t fl_codes_neon(const uint8_t *data, int bits, size_t j, int n) {
    if (bits == 8) return vld1q_u8(data + j + 128 * (size_t)n);
    const int low = bits >= 4 ? 4 : 2;
    uint8x16_t v = fl_plane_neon(data, low, j, n, 0);
    data += 128 * low;
    if (bits == 6 || bits == 7) {
        v = vorrq_u8(v, fl_plane_neon(data, 2, j, n, 4));
        data += 256;
    }
    if (bits == 3 || bits == 5 || bits == 7)
        v = vorrq_u8(v, fl_plane_neon(data, 1, j, n, bits - 1));
    return v;
}

// All 1024 codes of a tile, in the canonical order.
FL_INLINE void fl_unpack_neon(const uint8_t *data, int bits, uint8_t *out) {
    for (size_t j = 0; j < 128; j += 16) {
#pragma GCC unroll 8
        for (int n = 0; n < 8; n++) vst1q_u8(out + j + 128 * n, fl_codes_neon(data, bits, j, n));
    }
}

// Four fp16 numbers as floats.
FL_INLINE float32x4_t fl_halves_neon(const uint8_t *p) {
    return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p)));
}

#endif
