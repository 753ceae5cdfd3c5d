// For cores without the dot product instructions: 8-bit products added up in 16 bits while they
// fit, then in 32. A product is at most 127 * (2^bits - 1), so that 16 steps fit for 2 to 4 bits
// and 4 for 5 and 6. Codes of 7 and 8 bits are taken as code - 2^(bits - 1), so that 4 and 2 fit,
// and 2^(bits - 1) times the sum of the activations is added.
#include "kernels/arm/unpack_neon.h"
#include "kernels/gemm_packed.h"

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
FL_INLINE int8x16_t four(const int8_t *x) {
    return vreinterpretq_s8_s32(vld1q_dup_s32((const int32_t *)(const void *)x));
}

// Sums of rows 4 i, 4 i + 1 and of rows 4 i + 2, 4 i + 3, four columns each.
typedef struct half_sums {
    int16x8_t low, high;
} half_sums;

FL_INLINE void step(half_sums *a, bool first, int8x16_t codes, int8x16_t x) {
    if (first) {
        a->low = vmull_s8(vget_low_s8(codes), vget_low_s8(x));
        a->high = vmull_high_s8(codes, x);
    } else {
        a->low = vmlal_s8(a->low, vget_low_s8(codes), vget_low_s8(x));
        a->high = vmlal_high_s8(a->high, codes, x);
    }
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
    for (int s = 0; s < STEPS; s += 2) {
#pragma GCC unroll 2
        for (int n = s; n < s + 2; n++) {
            int8x16_t v[WIDE_MAX];
#pragma GCC unroll 3
            for (int t = 0; t < tokens; t++) v[t] = four(x + (size_t)t * stride + 4 * n);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                const int8x16_t w = vld1q_s8((const int8_t *)codes + 64 * n + 16 * i);
#pragma GCC unroll 3
                for (int t = 0; t < tokens; t++) step(&a[4 * t + i], false, w, v[t]);
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
#pragma GCC unroll 8
        for (int i = 0; i < many * tokens; i++)
            v[i] = four(x + (size_t)(i / many) * stride + 4 * (s + i % many));
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            half_sums a[WIDE_MAX];
#pragma GCC unroll 4
            for (int n = 0; n < many; n++) {
                const int8x16_t w = vld1q_s8((const int8_t *)codes + 64 * (s + n) + 16 * i);
#pragma GCC unroll 2
                for (int t = 0; t < tokens; t++) step(&a[t], n == 0, w, v[many * t + n]);
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

FL_INLINE void dots_one(const uint8_t *data, int bits, const int8_t *x, int32x4_t *dot) {
    const int many = steps_of(bits);
    const int32x4_t begin = offset(bits, x);
    int8x16_t v[STEPS];
#pragma GCC unroll 16
    for (int s = 0; s < STEPS; s++) v[s] = four(x + 4 * s);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        half_sums a;
        int32x4_t low = begin, high = begin;
#pragma GCC unroll 16
        for (int j = 0; j < STEPS; j++) {
            const int b = i + j / 8 * 4, n = j % 8;
            step(&a, j % many == 0, signed_codes(data, bits, b, n), v[b / 4 + 2 * n]);
            if (j % many != many - 1) continue;
            low = vpadalq_s16(low, a.low), high = vpadalq_s16(high, a.high);
        }
        dot[i] = all_columns(low, high);
    }
}

#include "kernels/arm/panel_neon.h"

FL_PANEL_ENTRY(neon)
