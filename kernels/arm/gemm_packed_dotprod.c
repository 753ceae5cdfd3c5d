// With SDOT: signed codes times signed activations into 32 bits. Codes of 8 bits are taken as code
// - 128, and 128 times the sum of the activations is added.
#include "kernels/arm/unpack_neon.h"
#include "kernels/gemm_packed.h"

#include <string.h>

enum {
    TOKENS = 4,
    CODES = FL_PACKED_CODES,
};

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
    for (int i = 0; i < FL_X8_GROUP; i += 16) sum = vdotq_s32(sum, vdupq_n_s8(1), vld1q_s8(x + i));
    return 128 * vaddvq_s32(sum);
}

FL_INLINE void dots(const uint8_t *codes, int bits, const int8_t *x, size_t stride, int tokens,
                    int32x4_t *dot) {
    int32x4_t a[4 * TOKENS];
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t++) {
        const int32_t begin = bits == 8 ? offset(x + (size_t)t * stride) : 0;
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) a[4 * t + i] = vdupq_n_s32(begin);
    }
#pragma GCC unroll 1
    for (int k = 0; k < FL_X8_GROUP; k += 16) { // four steps of four columns
        int8x16_t v[TOKENS];
#pragma GCC unroll 4
        for (int t = 0; t < tokens; t++) v[t] = vld1q_s8(x + (size_t)t * stride + k);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const int8_t *at = (const int8_t *)codes + 16 * k + 16 * i;
            const int8x16_t w0 = vld1q_s8(at), w1 = vld1q_s8(at + 64);
            const int8x16_t w2 = vld1q_s8(at + 128), w3 = vld1q_s8(at + 192);
#pragma GCC unroll 4
            for (int t = 0; t < tokens; t++) {
                int32x4_t sum = vdotq_laneq_s32(a[4 * t + i], w0, v[t], 0);
                sum = vdotq_laneq_s32(sum, w1, v[t], 1);
                sum = vdotq_laneq_s32(sum, w2, v[t], 2);
                a[4 * t + i] = vdotq_laneq_s32(sum, w3, v[t], 3);
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < 4 * tokens; i++) dot[i] = a[i];
}

#include "kernels/arm/panel_neon.h"

FL_PANEL_ENTRY(dotprod)
