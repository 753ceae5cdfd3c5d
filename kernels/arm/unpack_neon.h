// unpack_neon.h: reading the bit planes of packed.h, 16 codes at a time. Forced inline, so that
// each variant's copy is built with that variant's flags.
//
// Block b < 8 of a tile is the 16 codes 16 b + 128 n .. + 15 for n < 8: rows 4 (b % 4) .. + 3 by
// the four columns of step b / 4 + 2 n. Every plane keeps a block's codes in the same bytes.
#ifndef FL_KERNELS_ARM_UNPACK_NEON_H
#define FL_KERNELS_ARM_UNPACK_NEON_H

#include "kernels/packed.h"

#include <arm_neon.h>

#define FL_INLINE static inline __attribute__((always_inline))

// Nothing is loaded before this that is written after it: what comes early holds a register, and
// sums need almost all.
#define FL_STAY() __asm__ volatile("" ::: "memory")

// Bits `from` .. of each byte moved to `to` ..; what else is in the byte moves along. Written with
// the operators because the intrinsic for either direction takes its shift in a register.
FL_INLINE uint8x16_t fl_moved_neon(uint8x16_t v, int from, int to) {
    return from > to ? v >> (uint8_t)(from - to) : from < to ? v << (uint8_t)(to - from) : v;
}

// The bytes of a plane of `width` bits that hold code n of block b.
FL_INLINE uint8x16_t fl_plane_neon(const uint8_t *plane, int width, int b, int n) {
    return vld1q_u8(plane + 16 * b + 128 * (n % width));
}

// v with the bits of code n of block b in a plane of `width` bits inserted at `to`.
FL_INLINE uint8x16_t fl_insert_neon(uint8x16_t v, const uint8_t *plane, int width, int b, int n,
                                    int to) {
    const uint8x16_t bits = fl_plane_neon(plane, width, b, n);
    return vbslq_u8(vdupq_n_u8((uint8_t)(((1 << width) - 1) << to)),
                    fl_moved_neon(bits, n / width * width, to), v);
}

// Code n of block b of a tile whose planes begin at `data`.
FL_INLINE uint8x16_t fl_codes_neon(const uint8_t *data, int bits, int b, int n) {
    if (bits == 8) return vld1q_u8(data + 16 * b + 128 * n);
    const int low = bits >= 4 ? 4 : 2, from = n / low * low;
    uint8x16_t v = fl_moved_neon(fl_plane_neon(data, low, b, n), from, 0);
    if (from + low != 8) v = vandq_u8(v, vdupq_n_u8((uint8_t)((1 << low) - 1)));
    data += 128 * low;
    if (bits == 6 || bits == 7) {
        v = fl_insert_neon(v, data, 2, b, n, 4);
        data += 256;
    }
    if (bits == 3 || bits == 5 || bits == 7) v = fl_insert_neon(v, data, 1, b, n, bits - 1);
    return v;
}

// All 1024 codes of a tile, in the canonical order.
FL_INLINE void fl_unpack_neon(const uint8_t *data, int bits, uint8_t *out) {
    for (int b = 0; b < 8; b++) {
#pragma GCC unroll 8
        for (int n = 0; n < 8; n++)
            vst1q_u8(out + 16 * b + 128 * n, fl_codes_neon(data, bits, b, n));
    }
}

// Four fp16 numbers as floats.
FL_INLINE float32x4_t fl_halves_neon(const uint8_t *p) {
    return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p)));
}

#endif
