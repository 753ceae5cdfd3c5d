// For cores without the dot product instructions: 8-bit products added up in 16 bits while they
// fit, then in 32. A product is at most 127 * (2^bits - 1), so that 16 steps fit for 2 to 4 bits
// and 4 for 5 and 6. Codes of 7 and 8 bits are taken as code - 2^(bits - 1), so that 4 and 2 fit,
// and 2^(bits - 1) times the sum of the activations is added.
#include "kernels/arm/unpack_neon.h"
#include "kernels/gemm_packed.h"

#include <string.h>

enum {
    STEPS = 16, // of 16 rows by 4 columns in a tile
    WIDE_MAX = 3,
    CODES = FL_PACKED_CODES,
};
#define WIDE(bits) ((bits) <= 4 ? 3 : 2)

// Steps whose products fit in 16 bits.
FL_INLINE int steps_of(int bits) {
    return bits <= 4 ? 16 : bits <= 7 ? 4 : 2;
}

// Code n of block b as it is multiplied.
FL_INLINE int8x16_t signed_codes(const uint8_t *data, int bits, int b, int n) {
    const uint8x16_t c = fl_codes_neon(data, bits, b, n);
    if (bits <= 6) return vreinterpretq_s8_u8(c);
    return vreinterpretq_s8_u8(vsubq_u8(c, vdupq_n_u8((uint8_t)(1 << (bits - 1)))));
}

FL_INLINE void prepare(const uint8_t *data, int bits, uint8_t *codes) {
    for (int b = 0; b < 8; b++) {
#pragma GCC unroll 8
        for (int n = 0; n < 8; n++)
            vst1q_s8((int8_t *)codes + 16 * b + 128 * n, signed_codes(data, bits, b, n));
    }
}

// What makes up for signed codes, in every other lane: those are added in pairs.
FL_INLINE int32x4_t offset(int bits, const int8_t *x) {
    if (bits <= 6) return vdupq_n_s32(0);
    int16x8_t sum = vpaddlq_s8(vld1q_s8(x));
#pragma GCC unroll 3
    for (int i = 16; i < FL_X8_GROUP; i += 16) sum = vpadalq_s8(sum, vld1q_s8(x + i));
    const int32_t all = (int32_t)((uint32_t)vaddlvq_s16(sum) << (bits - 1));
    return vreinterpretq_s32_s64(vdupq_n_s64((int64_t)(uint32_t)all));
}

// Four bytes of a token, over and over.
FL_INLINE int8x16_t four(int8x16_t x, int lane) {
    const int32x4_t v = vreinterpretq_s32_s8(x);
    switch (lane) {
    case 0:
        return vreinterpretq_s8_s32(vdupq_laneq_s32(v, 0));
    case 1:
        return vreinterpretq_s8_s32(vdupq_laneq_s32(v, 1));
    case 2:
        return vreinterpretq_s8_s32(vdupq_laneq_s32(v, 2));
    default:
        return vreinterpretq_s8_s32(vdupq_laneq_s32(v, 3));
    }
}

// Sums of rows 4 i, 4 i + 1 and of rows 4 i + 2, 4 i + 3, four columns each.
typedef struct half_sums {
    int16x8_t low, high;
} half_sums;

FL_INLINE void first_step(half_sums *a, int8x16_t codes, int8x16_t x) {
    a->low = vmull_s8(vget_low_s8(codes), vget_low_s8(x));
    a->high = vmull_high_s8(codes, x);
}

// Written out, so that it stays where it is: gcc 12 loads all codes first, and then has too few
// registers.
FL_INLINE void step(half_sums *a, int8x16_t codes, int8x16_t x) {
    __asm__ volatile("smlal %0.8h, %1.8b, %2.8b" : "+w"(a->low) : "w"(codes), "w"(x));
    __asm__ volatile("smlal2 %0.8h, %1.16b, %2.16b" : "+w"(a->high) : "w"(codes), "w"(x));
}

FL_INLINE int32x4_t all_columns(int32x4_t low, int32x4_t high) {
    return vpaddq_s32(low, high);
}

// 16 steps fit: all rows of three tokens in registers.
FL_INLINE void dots_16(const uint8_t *codes, const int8_t *x, size_t stride, int tokens,
                       int32x4_t *dot) {
    half_sums a[4 * WIDE_MAX];
#pragma GCC unroll 12
    for (int i = 0; i < 4 * tokens; i++) a[i].low = a[i].high = vdupq_n_s16(0);
#pragma GCC unroll 1
    for (int k = 0; k < FL_X8_GROUP; k += 16) { // four steps of four columns
        int8x16_t v[WIDE_MAX];
#pragma GCC unroll 3
        for (int t = 0; t < tokens; t++) v[t] = vld1q_s8(x + (size_t)t * stride + k);
#pragma GCC unroll 4
        for (int s = 0; s < 4; s++) {
            int8x16_t f[WIDE_MAX];
            FL_STAY();
#pragma GCC unroll 3
            for (int t = 0; t < tokens; t++) f[t] = four(v[t], s);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                const int8x16_t w = vld1q_s8((const int8_t *)codes + 16 * k + 64 * s + 16 * i);
#pragma GCC unroll 3
                for (int t = 0; t < tokens; t++) step(&a[4 * t + i], w, f[t]);
            }
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < 4 * tokens; i++)
        dot[i] = all_columns(vpaddlq_s16(a[i].low), vpaddlq_s16(a[i].high));
}

// `many` steps fit: the sums of all rows of two tokens in 32 bits, four rows at a time in 16.
FL_INLINE void dots_few(const uint8_t *codes, int bits, const int8_t *x, size_t stride, int tokens,
                        int32x4_t *dot) {
    const int many = steps_of(bits);
    int32x4_t sum[8 * WIDE_MAX];
#pragma GCC unroll 2
    for (int t = 0; t < tokens; t++) {
        const int32x4_t begin = offset(bits, x + (size_t)t * stride);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) sum[8 * t + i] = begin;
    }
#pragma GCC unroll 1
    for (int s = 0; s < STEPS; s += many) {
        int8x16_t v[4 * WIDE_MAX];
#pragma GCC unroll 2
        for (int t = 0; t < tokens; t++) {
            int8_t bytes[16] = {0};
            memcpy(bytes, x + (size_t)t * stride + 4 * s, 4 * (size_t)many);
#pragma GCC unroll 4
            for (int n = 0; n < many; n++) v[many * t + n] = four(vld1q_s8(bytes), n);
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            half_sums a[WIDE_MAX];
            FL_STAY();
#pragma GCC unroll 4
            for (int n = 0; n < many; n++) {
                const int8x16_t w = vld1q_s8((const int8_t *)codes + 64 * (s + n) + 16 * i);
#pragma GCC unroll 2
                for (int t = 0; t < tokens; t++) {
                    if (n == 0)
                        first_step(&a[t], w, v[many * t]);
                    else
                        step(&a[t], w, v[many * t + n]);
                }
            }
#pragma GCC unroll 2
            for (int t = 0; t < tokens; t++) {
                int32x4_t *out = sum + 8 * t + 2 * i;
                out[0] = vpadalq_s16(out[0], a[t].low);
                out[1] = vpadalq_s16(out[1], a[t].high);
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < 4 * tokens; i++) dot[i] = all_columns(sum[2 * i], sum[2 * i + 1]);
}

FL_INLINE void dots(const uint8_t *codes, int bits, const int8_t *x, size_t stride, int tokens,
                    int32x4_t *dot) {
    if (bits <= 4)
        dots_16(codes, x, stride, tokens, dot);
    else
        dots_few(codes, bits, x, stride, tokens, dot);
}

// The even steps and then the odd ones, straight from the planes: eight sums of 16 bits or as many
// of 32 stay in registers, beside the token's eight times four columns.
FL_INLINE void dots_one(const uint8_t *data, int bits, const int8_t *x, int32x4_t *dot) {
    const int many = steps_of(bits);
    int32x4_t sum[8];
    half_sums a[4];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) sum[i] = offset(bits, x);
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; odd++) {
        int8x16_t v[8];
        FL_STAY();
#pragma GCC unroll 8
        for (int n = 0; n < 8; n++) v[n] = four(vld1q_s8(x + n / 2 * 16), n % 2 * 2 + odd);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            FL_STAY();
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++) {
                const int n =
                    bits < 4 ? j % 4 * 2 + j / 4 : j / 2 + j % 2 * 4; // as they lie in bytes
                const int8x16_t w = signed_codes(data + 64 * odd, bits, i, n);
                if (many < 16 ? j % many == 0 : odd == 0 && j == 0)
                    first_step(&a[i], w, v[n]);
                else
                    step(&a[i], w, v[n]);
                if (many == 16 || j % many != many - 1) continue;
                sum[2 * i] = vpadalq_s16(sum[2 * i], a[i].low);
                sum[2 * i + 1] = vpadalq_s16(sum[2 * i + 1], a[i].high);
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        dot[i] = many == 16 ? all_columns(vpaddlq_s16(a[i].low), vpaddlq_s16(a[i].high))
                            : all_columns(sum[2 * i], sum[2 * i + 1]);
}

#include "kernels/arm/panel_neon.h"

FL_PANEL_ENTRY(neon)
