// panel_neon.h: the loops of gemm_packed that the NEON variants share. The file that includes this
// defines first
//     CODES                          bytes that prepare() writes
//     WIDE(bits)                     tokens of a register block, at most WIDE_MAX
//     prepare(data, bits, codes)     a tile's planes as the codes that dots() reads
//     dots(codes, bits, x, stride, tokens, dot)
//                                    dot[4 t + i]: rows 4 i .. 4 i + 3 by token t, as exact int32;
//                                    tokens is WIDE(bits) or 1
//     dots_one(data, bits, x, dot)   the same of one token, straight from the planes
// and then names its entry with FL_PANEL_ENTRY(tag) of panel_table.h.
#include "kernels/arm/unpack_neon.h"
#include "kernels/gemm_packed.h"

#include <string.h>

enum { BLOCK = 64 }; // tokens for which a tile is unpacked once

// Scales and minima of a tile as floats: ret[0 .. 15], ret[16 .. 31].
FL_INLINE void head_of(const uint8_t *tile, float *ret) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const float16x8_t v = vreinterpretq_f16_u8(vld1q_u8(tile + 16 * i));
        vst1q_f32(ret + 8 * i, vcvt_f32_f16(vget_low_f16(v)));
        vst1q_f32(ret + 8 * i + 4, vcvt_high_f32_f16(v));
    }
}

// What a group adds to four rows of a token, in the order that the contract fixes. No fused
// multiply-add: the bits are part of the contract.
FL_INLINE float32x4_t add_group(float32x4_t y, int32x4_t dot, float32x4_t scale,
                                float32x4_t minimum, float x_scale, float x_sum) {
    y = vaddq_f32(y, vmulq_f32(scale, vmulq_n_f32(vcvtq_f32_s32(dot), x_scale)));
    return vaddq_f32(y, vmulq_n_f32(minimum, x_sum));
}

// Group g of `tokens` tokens from t, added to y[tokens][16].
FL_INLINE void add_tokens(const uint8_t *codes, int bits, const float *head, const fl_x8 *x,
                          size_t t, size_t g, int tokens, float *y) {
    int32x4_t dot[4 * WIDE_MAX];
    const size_t groups = x->groups, at = t * groups + g;
    const float *scales = x->scales + at, *sums = x->sums + at;
    dots(codes, bits, x->codes + at * FL_X8_GROUP, groups * FL_X8_GROUP, tokens, dot);
    FL_STAY();
    float32x4_t scale[4], minimum[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        scale[i] = vld1q_f32(head + 4 * i), minimum[i] = vld1q_f32(head + 16 + 4 * i);
#pragma GCC unroll 8
    for (int n = 0; n < tokens; n++) {
        FL_STAY();
        const float x_scale = scales[(size_t)n * groups], x_sum = sums[(size_t)n * groups];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            float *out = y + n * FL_PACKED_ROWS + 4 * i;
            vst1q_f32(out, add_group(vld1q_f32(out), dot[4 * n + i], scale[i], minimum[i], x_scale,
                                     x_sum));
        }
    }
}

// One panel of 16 rows; `rows` of them are wanted.
FL_INLINE void panel_many(const uint8_t *tiles, int bits, const fl_x8 *x, float *y, size_t y_stride,
                          size_t rows) {
    _Alignas(64) uint8_t codes[CODES];
    _Alignas(64) float sums[BLOCK * FL_PACKED_ROWS], head[2 * FL_PACKED_ROWS];
    for (size_t t0 = 0; t0 < x->tokens; t0 += BLOCK) {
        const size_t tokens = x->tokens - t0 < BLOCK ? x->tokens - t0 : BLOCK;
        memset(sums, 0, tokens * FL_PACKED_ROWS * sizeof(*sums));
        const uint8_t *tile = tiles;
        for (size_t g = 0; g < x->groups; g++, tile += FL_PACKED_HEAD + 128 * bits) {
            head_of(tile, head);
            const float *kept = head; // in memory: the registers are the sums'
            __asm__("" : "+r"(kept));
            prepare(tile + FL_PACKED_HEAD, bits, codes);
            size_t t = 0;
            for (; t + WIDE(bits) <= tokens; t += WIDE(bits))
                add_tokens(codes, bits, kept, x, t0 + t, g, WIDE(bits), sums + t * FL_PACKED_ROWS);
            for (; t < tokens; t++)
                add_tokens(codes, bits, kept, x, t0 + t, g, 1, sums + t * FL_PACKED_ROWS);
        }
        for (size_t t = 0; t < tokens; t++)
            memcpy(y + (t0 + t) * y_stride, sums + t * FL_PACKED_ROWS, rows * sizeof(*y));
    }
}

// One token: every code is read once, straight from the planes.
FL_INLINE void panel_one(const uint8_t *tile, int bits, const fl_x8 *x, float *y, size_t rows) {
    float32x4_t sum[4] = {vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0)};
    for (size_t g = 0; g < x->groups; g++, tile += FL_PACKED_HEAD + 128 * bits) {
        int32x4_t dot[4];
        dots_one(tile + FL_PACKED_HEAD, bits, x->codes + g * FL_X8_GROUP, dot);
        FL_STAY();
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            sum[i] = add_group(sum[i], dot[i], fl_halves_neon(tile + 8 * i),
                               fl_halves_neon(tile + 32 + 8 * i), x->scales[g], x->sums[g]);
    }
    float all[FL_PACKED_ROWS];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) vst1q_f32(all + 4 * i, sum[i]);
    memcpy(y, all, rows * sizeof(*y));
}

FL_INLINE void panel(const uint8_t *tiles, int bits, const fl_x8 *x, float *y, size_t y_stride,
                     size_t rows) {
    if (x->tokens == 1)
        panel_one(tiles, bits, x, y, rows);
    else
        panel_many(tiles, bits, x, y, y_stride, rows);
}

#include "kernels/panel_table.h"
