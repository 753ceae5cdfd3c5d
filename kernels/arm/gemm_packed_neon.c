// For cores without the dot product instructions: 8-bit products added up in 16 bits. A product is
// at most 127 * (2^bits - 1), so that 16 steps fit for 2 to 4 bits, 8 for 5, 4 for 6 and 2 for 7.
// Codes of 8 bits are taken as two nibbles, dot = low + 16 * high.
#include "kernels/arm/unpack_neon.h"
#include "kernels/gemm_packed.h"

#include <string.h>

enum {
    STEPS = 16, // of 16 rows by 4 columns in a tile
    TOKENS = 2,
    CODES = 2 * FL_PACKED_CODES,
};

FL_INLINE void prepare(const uint8_t *data, int bits, uint8_t *codes) {
    if (bits != 8) {
        fl_unpack_neon(data, bits, codes);
        return;
    }
    for (size_t i = 0; i < FL_PACKED_CODES; i += 16) {
        const uint8x16_t v = vld1q_u8(data + i);
        vst1q_u8(codes + i, vandq_u8(v, vdupq_n_u8(15)));
        vst1q_u8(codes + FL_PACKED_CODES + i, vshrq_n_u8(v, 4));
    }
}

FL_INLINE void dots_many(const uint8_t *codes, const int8_t *x, size_t stride, int tokens, int many,
                         int32x4_t *dot) {
#pragma GCC unroll 8
    for (int i = 0; i < 4 * tokens; i++) dot[i] = vdupq_n_s32(0);
#pragma GCC unroll 1
    for (int begin = 0; begin < STEPS; begin += many) {
        int16x8_t a[8 * TOKENS]; // a[8 t + i]: 2 rows by 4 columns
#pragma GCC unroll 16
        for (int i = 0; i < 8 * tokens; i++) a[i] = vdupq_n_s16(0);
#pragma GCC unroll 1
        for (int s = begin; s < begin + many; s++) {
            int8x8_t v[TOKENS];
#pragma GCC unroll 2
            for (int t = 0; t < tokens; t++) {
                int32_t four;
                memcpy(&four, x + (size_t)t * stride + 4 * s, sizeof(four));
                v[t] = vreinterpret_s8_s32(vdup_n_s32(four));
            }
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
                const int8x8_t w = vreinterpret_s8_u8(vld1_u8(codes + 64 * s + 8 * i));
#pragma GCC unroll 2
                for (int t = 0; t < tokens; t++) a[8 * t + i] = vmlal_s8(a[8 * t + i], w, v[t]);
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < 4 * tokens; i++)
            dot[i] =
                vaddq_s32(dot[i], vpaddq_s32(vpaddlq_s16(a[2 * i]), vpaddlq_s16(a[2 * i + 1])));
    }
}

FL_INLINE void dots(const uint8_t *codes, int bits, const int8_t *x, size_t stride, int tokens,
                    int32x4_t *dot) {
    const int many = bits == 5 ? 8 : bits == 6 ? 4 : bits == 7 ? 2 : 16;
    dots_many(codes, x, stride, tokens, many, dot);
    if (bits != 8) return;
    int32x4_t high[4 * TOKENS];
    dots_many(codes + FL_PACKED_CODES, x, stride, tokens, many, high);
#pragma GCC unroll 8
    for (int i = 0; i < 4 * tokens; i++) dot[i] = vaddq_s32(dot[i], vshlq_n_s32(high[i], 4));
}

#include "kernels/arm/panel_neon.h"

FL_PANEL_ENTRY(neon)
