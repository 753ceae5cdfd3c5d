// Integer products by vpmaddubsw: unsigned codes times signed activations, adjacent pairs added in
// 16 bits. A pair is at most 2 * 127 * (2^bits - 1), so that several steps fit in 16 bits before
// they are widened: 16 steps for 2 and 3 bits, 8 for 4, 4 for 5, 2 for 6, 1 for 7. Codes of 8 bits
// are taken as two nibbles, dot = low + 16 * high. No fused multiply-add: the bits are part of the
// contract.
#include "kernels/gemm_packed.h"
#include "kernels/x86/unpack_avx2.h"

#include <string.h>

enum {
    STEPS = 16,  // steps of 16 rows by 4 columns in a tile
    BLOCK = 32,  // tokens for which a tile is unpacked once
    NIBBLES = 2, // tiles of codes that 8 bits need
};

FL_INLINE int steps_in_16_bits(int bits) {
    return bits <= 3 ? 16 : bits == 5 ? 4 : bits == 6 ? 2 : bits == 7 ? 1 : 8;
}

FL_INLINE __m256i load(const void *p) {
    return _mm256_loadu_si256((const __m256i *)p);
}

// Four codes of one token, for every row.
FL_INLINE __m256i spread(const int8_t *x) {
    int32_t v;
    memcpy(&v, x, sizeof(v));
    return _mm256_set1_epi32(v);
}

FL_INLINE __m256i widen(__m256i pairs) {
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

// a += b in 16 bits. Written out because gcc 12 gives a loop's sums new registers, copies them all
// back and spills the last one: 37 instructions for 8 products instead of 27.
FL_INLINE void add_16(__m256i *a, __m256i b) {
    __asm__("vpaddw %1, %0, %0" : "+x"(*a) : "x"(b));
}

// dot[2 t + half]: 8 rows by one token each. `many` steps are summed in 16 bits.
FL_INLINE void dots_wide(const uint8_t *codes, const int8_t *x, size_t stride, int tokens, int many,
                         __m256i *dot) {
#pragma GCC unroll 8
    for (int i = 0; i < 2 * tokens; i++) dot[i] = _mm256_setzero_si256();
#pragma GCC unroll 1
    for (int begin = 0; begin < STEPS; begin += many) {
        __m256i a[8];
#pragma GCC unroll 8
        for (int i = 0; i < 2 * tokens; i++) a[i] = _mm256_setzero_si256();
#pragma GCC unroll 1
        for (int s = begin; s < begin + many; s++) {
            const __m256i w0 = load(codes + 64 * s), w1 = load(codes + 64 * s + 32);
#pragma GCC unroll 4
            for (int t = 0; t < tokens; t++) {
                const __m256i v = spread(x + (size_t)t * stride + 4 * s);
                add_16(&a[2 * t], _mm256_maddubs_epi16(w0, v));
                add_16(&a[2 * t + 1], _mm256_maddubs_epi16(w1, v));
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < 2 * tokens; i++) dot[i] = _mm256_add_epi32(dot[i], widen(a[i]));
    }
}

// The same when one or two steps fit: widened at once, 32-bit sums stay in registers.
FL_INLINE void dots_narrow(const uint8_t *codes, const int8_t *x, size_t stride, int tokens,
                           int many, __m256i *dot) {
    __m256i a[8];
#pragma GCC unroll 8
    for (int i = 0; i < 2 * tokens; i++) a[i] = _mm256_setzero_si256();
#pragma GCC unroll 1
    for (int s = 0; s < STEPS; s += many) {
#pragma GCC unroll 4
        for (int t = 0; t < tokens; t++) {
            const __m256i v = spread(x + (size_t)t * stride + 4 * s);
            __m256i p0 = _mm256_maddubs_epi16(load(codes + 64 * s), v);
            __m256i p1 = _mm256_maddubs_epi16(load(codes + 64 * s + 32), v);
            if (many == 2) {
                const __m256i u = spread(x + (size_t)t * stride + 4 * s + 4);
                p0 = _mm256_add_epi16(p0, _mm256_maddubs_epi16(load(codes + 64 * s + 64), u));
                p1 = _mm256_add_epi16(p1, _mm256_maddubs_epi16(load(codes + 64 * s + 96), u));
            }
            a[2 * t] = _mm256_add_epi32(a[2 * t], widen(p0));
            a[2 * t + 1] = _mm256_add_epi32(a[2 * t + 1], widen(p1));
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < 2 * tokens; i++) dot[i] = a[i];
}

FL_INLINE void dots(const uint8_t *codes, int bits, const int8_t *x, size_t stride, int tokens,
                    __m256i *dot) {
    const int many = steps_in_16_bits(bits);
    if (many <= 2) {
        dots_narrow(codes, x, stride, tokens, many, dot);
        return;
    }
    dots_wide(codes, x, stride, tokens, many, dot);
    if (bits != 8) return;
    __m256i high[8];
    dots_wide(codes + FL_PACKED_CODES, x, stride, tokens, many, high);
#pragma GCC unroll 8
    for (int i = 0; i < 2 * tokens; i++)
        dot[i] = _mm256_add_epi32(dot[i], _mm256_slli_epi32(high[i], 4));
}

// What one group adds to 8 rows of one token, in the order that the contract fixes.
FL_INLINE __m256 add_group(__m256 y, __m256i dot, __m256 scale, __m256 minimum, float x_scale,
                           float x_sum) {
    const __m256 d = _mm256_mul_ps(_mm256_set1_ps(x_scale), _mm256_cvtepi32_ps(dot));
    y = _mm256_add_ps(y, _mm256_mul_ps(scale, d));
    return _mm256_add_ps(y, _mm256_mul_ps(minimum, _mm256_set1_ps(x_sum)));
}

// Group g of `tokens` (1 to 4) tokens from t, added to y[tokens][16].
FL_INLINE void add_tokens(const uint8_t *codes, int bits, const uint8_t *tile, const fl_x8 *x,
                          size_t t, size_t g, int tokens, float *y) {
    __m256i dot[8];
    const size_t stride = (size_t)x->groups * FL_X8_GROUP, at = t * x->groups + g;
    dots(codes, bits, x->codes + at * FL_X8_GROUP, stride, tokens, dot);
    const __m256 scale0 = fl_halves_avx2(tile), scale1 = fl_halves_avx2(tile + 16);
    const __m256 min0 = fl_halves_avx2(tile + 32), min1 = fl_halves_avx2(tile + 48);
#pragma GCC unroll 4
    for (int i = 0; i < tokens; i++) {
        const size_t n = at + (size_t)i * x->groups;
        float *out = y + i * FL_PACKED_ROWS;
        const float sx = x->scales[n], sum = x->sums[n];
        _mm256_store_ps(out, add_group(_mm256_load_ps(out), dot[2 * i], scale0, min0, sx, sum));
        _mm256_store_ps(out + 8,
                        add_group(_mm256_load_ps(out + 8), dot[2 * i + 1], scale1, min1, sx, sum));
    }
}

FL_INLINE void unpack(const uint8_t *data, int bits, uint8_t *codes) {
    if (bits != 8) {
        fl_unpack_avx2(data, bits, codes);
        return;
    }
    const __m256i low = _mm256_set1_epi8(15);
    for (size_t i = 0; i < FL_PACKED_CODES; i += 32) {
        const __m256i v = load(data + i), high = _mm256_srli_epi16(v, 4);
        _mm256_store_si256((__m256i *)(void *)(codes + i), _mm256_and_si256(v, low));
        _mm256_store_si256((__m256i *)(void *)(codes + FL_PACKED_CODES + i),
                           _mm256_and_si256(high, low));
    }
}

// One panel of 16 rows; `rows` of them are wanted.
FL_INLINE void panel_many(const uint8_t *tiles, int bits, const fl_x8 *x, float *y, size_t y_stride,
                          size_t rows) {
    _Alignas(64) uint8_t codes[NIBBLES * FL_PACKED_CODES];
    _Alignas(64) float sums[BLOCK * FL_PACKED_ROWS];
    for (size_t t0 = 0; t0 < x->tokens; t0 += BLOCK) {
        const size_t tokens = x->tokens - t0 < BLOCK ? x->tokens - t0 : BLOCK;
        memset(sums, 0, tokens * FL_PACKED_ROWS * sizeof(*sums));
        const uint8_t *tile = tiles;
        for (size_t g = 0; g < x->groups; g++, tile += FL_PACKED_HEAD + 128 * bits) {
            unpack(tile + FL_PACKED_HEAD, bits, codes);
            size_t t = 0;
            for (; t + 4 <= tokens; t += 4)
                add_tokens(codes, bits, tile, x, t0 + t, g, 4, sums + t * FL_PACKED_ROWS);
            for (; t + 2 <= tokens; t += 2)
                add_tokens(codes, bits, tile, x, t0 + t, g, 2, sums + t * FL_PACKED_ROWS);
            if (t < tokens)
                add_tokens(codes, bits, tile, x, t0 + t, g, 1, sums + t * FL_PACKED_ROWS);
        }
        for (size_t t = 0; t < tokens; t++)
            memcpy(y + (t0 + t) * y_stride, sums + t * FL_PACKED_ROWS, rows * sizeof(*y));
    }
}

// One tile by one token, straight from the planes: nothing is stored and loaded again.
FL_INLINE void dots_one(const uint8_t *data, int bits, const int8_t *x, __m256i *dot) {
    const int many = bits == 8 ? 8 : steps_in_16_bits(bits) < 8 ? steps_in_16_bits(bits) : 8;
    const __m256i low = _mm256_set1_epi8(15);
    __m256i total[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (size_t j = 0; j < 128; j += 64) {
#pragma GCC unroll 2
        for (size_t half = 0; half < 2; half++) {
            __m256i sum = _mm256_setzero_si256(), high = _mm256_setzero_si256();
#pragma GCC unroll 8
            for (int n = 0; n < 8; n++) {
                const __m256i v = spread(x + j / 16 + 8 * n);
                __m256i w = fl_codes_avx2(data, bits, j + 32 * half, n);
                if (bits == 8) {
                    const __m256i h = _mm256_and_si256(_mm256_srli_epi16(w, 4), low);
                    high = _mm256_add_epi16(high, _mm256_maddubs_epi16(h, v));
                    w = _mm256_and_si256(w, low);
                }
                sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, v));
                if ((n + 1) % many != 0) continue;
                total[half] = _mm256_add_epi32(total[half], widen(sum));
                sum = _mm256_setzero_si256();
            }
            if (bits == 8)
                total[half] = _mm256_add_epi32(total[half], _mm256_slli_epi32(widen(high), 4));
        }
    }
    dot[0] = total[0], dot[1] = total[1];
}

FL_INLINE void panel_one(const uint8_t *tile, int bits, const fl_x8 *x, float *y, size_t rows) {
    __m256 y0 = _mm256_setzero_ps(), y1 = y0;
    for (size_t g = 0; g < x->groups; g++, tile += FL_PACKED_HEAD + 128 * bits) {
        __m256i dot[2];
        dots_one(tile + FL_PACKED_HEAD, bits, x->codes + g * FL_X8_GROUP, dot);
        const float sx = x->scales[g], sum = x->sums[g];
        y0 = add_group(y0, dot[0], fl_halves_avx2(tile), fl_halves_avx2(tile + 32), sx, sum);
        y1 = add_group(y1, dot[1], fl_halves_avx2(tile + 16), fl_halves_avx2(tile + 48), sx, sum);
    }
    float out[FL_PACKED_ROWS];
    _mm256_storeu_ps(out, y0);
    _mm256_storeu_ps(out + 8, y1);
    memcpy(y, out, rows * sizeof(*y));
}

FL_INLINE void panel(const uint8_t *tiles, int bits, const fl_x8 *x, float *y, size_t y_stride,
                     size_t rows) {
    if (x->tokens == 1)
        panel_one(tiles, bits, x, y, rows);
    else
        panel_many(tiles, bits, x, y, y_stride, rows);
}

#include "kernels/panel_table.h"

FL_PANEL_ENTRY(avx2)
