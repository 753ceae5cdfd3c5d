// Integer products by vpdpbusd: one instruction multiplies 16 rows by 4 columns with one token. A
// tile's sixteen steps stay in registers while the tokens pass by. No fused multiply-add: the bits
// are part of the contract.
#include "kernels/gemm_packed.h"
#include "kernels/x86/unpack_avx512.h"

#include <string.h>

enum {
    STEPS = FL_PACKED_STEPS,
    BLOCK = 64, // tokens for which a tile is unpacked once
    WIDE = 8,   // tokens whose sums are in registers at once
};

// sum += four codes of each row times four of the token. Written out because gcc 12 makes the
// intrinsic copy its sum, and then spills the copies.
FL_INLINE void dot_4(__m512i *sum, __m512i codes, const int8_t *x) {
    typedef int8_t four[4];
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(*sum) : "v"(codes), "m"(*(const four *)x));
}

// What one group adds to 16 rows of one token, in the order that the contract fixes.
FL_INLINE __m512 add_group(__m512 y, __m512i dot, __m512 scale, __m512 minimum, float x_scale,
                           float x_sum) {
    const __m512 d = _mm512_mul_ps(_mm512_set1_ps(x_scale), _mm512_cvtepi32_ps(dot));
    y = _mm512_add_ps(y, _mm512_mul_ps(scale, d));
    return _mm512_add_ps(y, _mm512_mul_ps(minimum, _mm512_set1_ps(x_sum)));
}

typedef struct tile {
    __m512i codes[STEPS];
    __m512 scale, minimum;
} tile;

// Group g of `tokens` tokens from t, added to y[tokens][16].
FL_INLINE void add_tokens(const tile *w, const fl_x8 *x, size_t t, size_t g, int tokens, float *y) {
    const size_t at = t * x->groups + g, stride = (size_t)x->groups * FL_X8_GROUP;
    const int8_t *codes = x->codes + at * FL_X8_GROUP;
    __m512i dot[WIDE];
#pragma GCC unroll 8
    for (int i = 0; i < tokens; i++) dot[i] = _mm512_setzero_si512();
#pragma GCC unroll 16
    for (int s = 0; s < STEPS; s++) {
#pragma GCC unroll 8
        for (int i = 0; i < tokens; i++)
            dot_4(&dot[i], w->codes[s], codes + (size_t)i * stride + 4 * s);
    }
#pragma GCC unroll 8
    for (int i = 0; i < tokens; i++) {
        const size_t n = at + (size_t)i * x->groups;
        float *out = y + i * FL_PACKED_ROWS;
        _mm512_store_ps(out, add_group(_mm512_load_ps(out), dot[i], w->scale, w->minimum,
                                       x->scales[n], x->sums[n]));
    }
}

// One panel of 16 rows; `rows` of them are wanted.
FL_INLINE void panel_many(const uint8_t *tiles, int bits, const fl_x8 *x, float *y, size_t y_stride,
                          size_t rows) {
    _Alignas(64) float sums[BLOCK * FL_PACKED_ROWS];
    for (size_t t0 = 0; t0 < x->tokens; t0 += BLOCK) {
        const size_t tokens = x->tokens - t0 < BLOCK ? x->tokens - t0 : BLOCK;
        memset(sums, 0, tokens * FL_PACKED_ROWS * sizeof(*sums));
        const uint8_t *at = tiles;
        for (size_t g = 0; g < x->groups; g++, at += FL_PACKED_HEAD + 128 * bits) {
            tile w;
#pragma GCC unroll 16
            for (int s = 0; s < STEPS; s++)
                w.codes[s] = fl_codes_avx512(at + FL_PACKED_HEAD, bits, s);
            w.scale = fl_halves_avx512(at), w.minimum = fl_halves_avx512(at + 32);
            size_t t = 0;
            for (; t + WIDE <= tokens; t += WIDE)
                add_tokens(&w, x, t0 + t, g, WIDE, sums + t * FL_PACKED_ROWS);
            if (tokens - t >= 4) {
                add_tokens(&w, x, t0 + t, g, 4, sums + t * FL_PACKED_ROWS);
                t += 4;
            }
            for (; t < tokens; t++) add_tokens(&w, x, t0 + t, g, 1, sums + t * FL_PACKED_ROWS);
        }
        const __mmask16 wanted = (__mmask16)((1u << rows) - 1);
        for (size_t t = 0; t < tokens; t++)
            _mm512_mask_storeu_ps(y + (t0 + t) * y_stride, wanted,
                                  _mm512_load_ps(sums + t * FL_PACKED_ROWS));
    }
}

// One token: every code is read once, straight from the planes, in the order in which it lies. The
// processor's own read-ahead does better than prefetching by hand, by a tenth.
FL_INLINE void panel_one(const uint8_t *at, int bits, const fl_x8 *x, float *y, size_t rows) {
    const size_t size = FL_PACKED_HEAD + 128 * (size_t)bits;
    __m512 sum = _mm512_setzero_ps();
    for (size_t g = 0; g < x->groups; g++, at += size) {
        const int8_t *codes = x->codes + g * FL_X8_GROUP;
        __m512i dot[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) dot[i] = _mm512_setzero_si512();
#pragma GCC unroll 16
        for (int s = 0; s < STEPS; s++)
            dot_4(&dot[s % 4], fl_codes_avx512(at + FL_PACKED_HEAD, bits, s), codes + 4 * s);
        const __m512i all =
            _mm512_add_epi32(_mm512_add_epi32(dot[0], dot[1]), _mm512_add_epi32(dot[2], dot[3]));
        sum = add_group(sum, all, fl_halves_avx512(at), fl_halves_avx512(at + 32), x->scales[g],
                        x->sums[g]);
    }
    _mm512_mask_storeu_ps(y, (__mmask16)((1u << rows) - 1), sum);
}

FL_INLINE void panel(const uint8_t *tiles, int bits, const fl_x8 *x, float *y, size_t y_stride,
                     size_t rows) {
    if (x->tokens == 1)
        panel_one(tiles, bits, x, y, rows);
    else
        panel_many(tiles, bits, x, y, y_stride, rows);
}

#include "kernels/panel_table.h"

FL_PANEL_ENTRY(vnni)
