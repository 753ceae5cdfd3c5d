// panel_neon.h: the loops of gemm_packed that both NEON variants share. The file that includes this
// defines first
//     TOKENS                         tokens of a register block (2 or 4)
//     CODES                          bytes that prepare() writes
//     prepare(data, bits, codes)     a tile's planes as the codes that dots() reads
//     dots(codes, bits, x, stride, tokens, dot)
//                                    dot[4 t + i]: rows 4 i .. 4 i + 3 by token t, as exact int32
// and then names its entry with FL_PANEL_ENTRY(tag) of panel_table.h.
#include "kernels/arm/unpack_neon.h"
#include "kernels/gemm_packed.h"

#include <string.h>

enum { BLOCK = 32 }; // tokens for which a tile is unpacked once

// Group g of `tokens` tokens from t, added to y[tokens][16] in the order that the contract fixes.
// No fused multiply-add: the bits are part of the contract.
FL_INLINE void add_tokens(const uint8_t *codes, int bits, const uint8_t *tile, const fl_x8 *x,
                          size_t t, size_t g, int tokens, float *y) {
    int32x4_t dot[4 * TOKENS];
    const size_t stride = (size_t)x->groups * FL_X8_GROUP, at = t * x->groups + g;
    dots(codes, bits, x->codes + at * FL_X8_GROUP, stride, tokens, dot);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const float32x4_t scale = fl_halves_neon(tile + 8 * i);
        const float32x4_t minimum = fl_halves_neon(tile + 32 + 8 * i);
#pragma GCC unroll 4
        for (int n = 0; n < tokens; n++) {
            const size_t from = at + (size_t)n * x->groups;
            float *out = y + n * FL_PACKED_ROWS + 4 * i;
            const float32x4_t d = vmulq_n_f32(vcvtq_f32_s32(dot[4 * n + i]), x->scales[from]);
            const float32x4_t sum = vaddq_f32(vld1q_f32(out), vmulq_f32(scale, d));
            vst1q_f32(out, vaddq_f32(sum, vmulq_n_f32(minimum, x->sums[from])));
        }
    }
}

// One panel of 16 rows; `rows` of them are wanted.
FL_INLINE void panel(const uint8_t *tiles, int bits, const fl_x8 *x, float *y, size_t y_stride,
                     size_t rows) {
    _Alignas(64) uint8_t codes[CODES];
    _Alignas(64) float sums[BLOCK * FL_PACKED_ROWS];
    for (size_t t0 = 0; t0 < x->tokens; t0 += BLOCK) {
        const size_t tokens = x->tokens - t0 < BLOCK ? x->tokens - t0 : BLOCK;
        memset(sums, 0, tokens * FL_PACKED_ROWS * sizeof(*sums));
        const uint8_t *tile = tiles;
        for (size_t g = 0; g < x->groups; g++, tile += FL_PACKED_HEAD + 128 * bits) {
            prepare(tile + FL_PACKED_HEAD, bits, codes);
            size_t t = 0;
            for (; t + TOKENS <= tokens; t += TOKENS)
                add_tokens(codes, bits, tile, x, t0 + t, g, TOKENS, sums + t * FL_PACKED_ROWS);
            for (; t < tokens; t++)
                add_tokens(codes, bits, tile, x, t0 + t, g, 1, sums + t * FL_PACKED_ROWS);
        }
        for (size_t t = 0; t < tokens; t++)
            memcpy(y + (t0 + t) * y_stride, sums + t * FL_PACKED_ROWS, rows * sizeof(*y));
    }
}

#include "kernels/panel_table.h"
