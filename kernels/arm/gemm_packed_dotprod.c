// With SDOT: signed codes times signed activations into 32 bits. Codes of 8 bits are taken as code
// - 128, and 128 times the sum of the activations is added.
#include "kernels/arm/unpack_neon.h"
#include "kernels/gemm_packed.h"

enum {
    WIDE_MAX = 4,
    CODES = FL_PACKED_CODES,
};
#define WIDE(bits) WIDE_MAX

// Written out, so that it stays where it is: gcc 12 copies the sum that its intrinsic adds to,
// loads all codes first, and then has too few registers.
#define DOT_4(lane)                                                                                \
    __asm__ volatile("sdot %0.4s, %1.16b, %2.4b[" #lane "]" : "+w"(sum) : "w"(codes), "w"(x));     \
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

#include "kernels/arm/one_token_neon.h"

FL_INLINE void prepare(const uint8_t *data, int bits, uint8_t *codes) {
    if (bits != 8) {
        fl_unpack_neon(data, bits, codes);
        return;
    }
    for (size_t i = 0; i < FL_PACKED_CODES; i += 16)
        vst1q_u8(codes + i, veorq_u8(vld1q_u8(data + i), vdupq_n_u8(0x80)));
}

// 128 times the sum of a group's activations.
FL_INLINE int32_t offset(const int8_t *x) {
    int32x4_t sum = vdupq_n_s32(0);
#pragma GCC unroll 4
    for (int i = 0; i < FL_X8_GROUP; i += 16) sum = vdotq_s32(sum, vdupq_n_s8(1), vld1q_s8(x + i));
    return 128 * vaddvq_s32(sum);
}

FL_INLINE void dots_one(const uint8_t *data, int bits, const int8_t *x, int32x4_t *dot) {
    dots_planes(data, bits, x, bits == 8 ? offset(x) : 0, bits == 8 ? 0x80 : 0, dot);
}

FL_INLINE void dots(const uint8_t *codes, int bits, const int8_t *x, size_t stride, int tokens,
                    int32x4_t *dot) {
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t++) {
        const int32_t begin = bits == 8 ? offset(x + (size_t)t * stride) : 0;
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) dot[4 * t + i] = vdupq_n_s32(begin);
    }
#pragma GCC unroll 1
    for (int k = 0; k < FL_X8_GROUP; k += 16) { // four steps of four columns
        int8x16_t v[WIDE_MAX];
#pragma GCC unroll 4
        for (int t = 0; t < tokens; t++) v[t] = vld1q_s8(x + (size_t)t * stride + k);
#pragma GCC unroll 4
        for (int s = 0; s < 4; s++) {
            uint8x16_t w[4];
            FL_STAY();
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) w[i] = vld1q_u8(codes + 16 * k + 64 * s + 16 * i);
#pragma GCC unroll 16
            for (int i = 0; i < 4 * tokens; i++) dot[i] = dot_4(dot[i], w[i % 4], v[i / 4], s);
        }
    }
}

#include "kernels/arm/panel_neon.h"

FL_PANEL_ENTRY(dotprod)
