// With USMMLA, which multiplies two rows of codes by two tokens, eight columns of each, and USDOT
// for a token alone: codes of every width are unsigned bytes here.
#include "kernels/arm/unpack_neon.h"
#include "kernels/gemm_packed.h"

enum {
    WIDE_MAX = 4,
    CODES = FL_PACKED_CODES,
};
#define WIDE(bits) WIDE_MAX

// Written out, so that it stays where it is: gcc 12 copies the sum that its intrinsics add to,
// loads all codes first, and then has too few registers.
#define DOT_4(lane)                                                                                \
    __asm__ volatile("usdot %0.4s, %1.16b, %2.4b[" #lane "]" : "+w"(sum) : "w"(codes), "w"(x));    \
    return sum
FL_INLINE int32x4_t dot_4(int32x4_t sum, uint8x16_t codes, int8x16_t x, int lane) {
    switch (lane) {
    case 0:
        DOT_4(0);
    case 1:
        DOT_4(1);
    case 2:
        DOT_4(2);
    default:
        DOT_4(3);
    }
}

// sum[2 r + t] += eight codes of row r times eight columns of token t.
FL_INLINE int32x4_t dot_2_by_2(int32x4_t sum, uint8x16_t codes, int8x16_t x) {
    __asm__ volatile("usmmla %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(codes), "w"(x));
    return sum;
}

#include "kernels/arm/one_token_neon.h"

FL_INLINE void dots_one(const uint8_t *data, int bits, const int8_t *x, int32x4_t *dot) {
    dots_planes(data, bits, x, 0, 0, dot);
}

FL_INLINE uint8x16_t zip_words(uint8x16_t a, uint8x16_t b, bool high) {
    const uint32x4_t x = vreinterpretq_u32_u8(a), y = vreinterpretq_u32_u8(b);
    return vreinterpretq_u8_u32(high ? vzip2q_u32(x, y) : vzip1q_u32(x, y));
}

// Two steps n side by side: codes[n][8 pairs of rows][2 rows][8 columns].
FL_INLINE void prepare(const uint8_t *data, int bits, uint8_t *codes) {
    for (int i = 0; i < 4; i++) {
#pragma GCC unroll 8
        for (int n = 0; n < 8; n++) {
            const uint8x16_t a = fl_codes_neon(data, bits, i, n);
            const uint8x16_t b = fl_codes_neon(data, bits, i + 4, n);
            vst1q_u8(codes + 128 * n + 32 * i, zip_words(a, b, false));
            vst1q_u8(codes + 128 * n + 32 * i + 16, zip_words(a, b, true));
        }
    }
}

// x8[p]: columns k .. k + 7 of tokens 2 p and 2 p + 1, from their columns k .. k + 15 or those
// after.
FL_INLINE int8x16_t two_tokens(int8x16_t a, int8x16_t b, int half) {
    const int64x2_t x = vreinterpretq_s64_s8(a), y = vreinterpretq_s64_s8(b);
    return vreinterpretq_s8_s64(half == 0 ? vzip1q_s64(x, y) : vzip2q_s64(x, y));
}

FL_INLINE void dots(const uint8_t *codes, int bits, const int8_t *x, size_t stride, int tokens,
                    int32x4_t *dot) {
    (void)bits;
    const int pairs = (tokens + 1) / 2; // one token is a pair of twins
    int32x4_t sum[4 * WIDE_MAX];        // [pairs][8 pairs of rows]: 2 rows by 2 tokens
#pragma GCC unroll 16
    for (int i = 0; i < 8 * pairs; i++) sum[i] = vdupq_n_s32(0);
#pragma GCC unroll 1
    for (int k = 0; k < FL_X8_GROUP; k += 16) {
        int8x16_t v[WIDE_MAX];
#pragma GCC unroll 4
        for (int t = 0; t < tokens; t++) v[t] = vld1q_s8(x + (size_t)t * stride + k);
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            const uint8_t *at = codes + 16 * (k + 8 * half);
            int8x16_t xx[WIDE_MAX / 2];
#pragma GCC unroll 2
            for (int p = 0; p < pairs; p++)
                xx[p] = two_tokens(v[2 * p], v[tokens == 1 ? 0 : 2 * p + 1], half);
#pragma GCC unroll 2
            for (int r = 0; r < 8; r += 4) {
                uint8x16_t w[4];
                FL_STAY();
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) w[i] = vld1q_u8(at + 16 * (r + i));
#pragma GCC unroll 8
                for (int i = 0; i < 4 * pairs; i++) {
                    int32x4_t *to = &sum[i / 4 * 8 + r + i % 4];
                    *to = dot_2_by_2(*to, w[i % 4], xx[i / 4]);
                }
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < 4 * tokens; i++) {
        const int32x4_t *s = sum + i / 8 * 8 + 2 * (i % 4);
        dot[i] = i / 4 % 2 == 0 ? vuzp1q_s32(s[0], s[1]) : vuzp2q_s32(s[0], s[1]);
    }
}

#include "kernels/arm/panel_neon.h"

FL_PANEL_ENTRY(i8mm)
