// Products by vdpbf16ps: two rows of W times two of a token's gradients in one instruction. Both
// are rounded to bf16, the sums stay in f32. Weights are unpacked once a panel of 256 rows by 64
// columns, the gradients once for 16 tokens and such a panel, in the order in which they are used.
#include "kernels/gemm_packed_dx.h"
#include "kernels/x86/unpack_avx512.h"

#include <string.h>

enum {
    TOKENS = 16, // of a register block, by 16 columns
    STRIP = 16,
    STRIPS = FL_PACKED_GROUP / STRIP,
    ROWS = 2 * FL_GEMM_PACKED_DX_ROWS,
    PAIRS = ROWS / 2,
};

// Two rows' bf16 numbers, the lower row in the low half of a 32-bit word.
typedef uint32_t pair;

// Weights [STRIPS][PAIRS][STRIP], gradients [TOKENS][PAIRS].
typedef struct panel {
    pair w[STRIPS * PAIRS * STRIP], dy[TOKENS * PAIRS];
    uint32_t live[PAIRS + 16]; // pairs that are not zero for every token
} panel;

// Low halves from `even`, high halves from `odd`: 16 pairs.
FL_INLINE __m512i pairs_of(__m512 even, __m512 odd) {
    const __m512i e = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
    const __m512i o = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
    return _mm512_or_si512(e, _mm512_slli_epi32(o, 16));
}

FL_INLINE __m512 row_floats(__m128i codes, float scale, float minimum) {
    const __m512 v = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes));
    return _mm512_add_ps(_mm512_mul_ps(_mm512_set1_ps(scale), v), _mm512_set1_ps(minimum));
}

// One tile's 8 pairs of rows. A step holds 4 columns of each row, so that four steps are a 4 x 4
// transposition of 32-bit words in each quarter, which holds 4 rows.
FL_INLINE void unpack_tile(const uint8_t *tile, int bits, pair *out) {
    _Alignas(64) float scale[FL_PACKED_ROWS], minimum[FL_PACKED_ROWS];
    const uint8_t *data = tile + FL_PACKED_HEAD;
    _mm512_store_ps(scale, fl_halves_avx512(tile));
    _mm512_store_ps(minimum, fl_halves_avx512(tile + 32));
#pragma GCC unroll 4
    for (int strip = 0; strip < STRIPS; strip++) {
        const __m512i a = fl_codes_avx512(data, bits, 4 * strip);
        const __m512i b = fl_codes_avx512(data, bits, 4 * strip + 1);
        const __m512i c = fl_codes_avx512(data, bits, 4 * strip + 2);
        const __m512i d = fl_codes_avx512(data, bits, 4 * strip + 3);
        const __m512i ab_low = _mm512_unpacklo_epi32(a, b), ab_high = _mm512_unpackhi_epi32(a, b);
        const __m512i cd_low = _mm512_unpacklo_epi32(c, d), cd_high = _mm512_unpackhi_epi32(c, d);
        const __m512i r[4] = {
            _mm512_unpacklo_epi64(ab_low, cd_low), _mm512_unpackhi_epi64(ab_low, cd_low),
            _mm512_unpacklo_epi64(ab_high, cd_high), _mm512_unpackhi_epi64(ab_high, cd_high)};
#define ROW(quarter, i)                                                                            \
    row_floats(_mm512_extracti32x4_epi32(r[i], quarter), scale[4 * (quarter) + (i)],               \
               minimum[4 * (quarter) + (i)])
#define PAIR(quarter, i)                                                                           \
    _mm512_store_si512(out + (strip * PAIRS + 2 * (quarter) + (i) / 2) * STRIP,                    \
                       pairs_of(ROW(quarter, i), ROW(quarter, i + 1)))
        PAIR(0, 0);
        PAIR(0, 2);
        PAIR(1, 0);
        PAIR(1, 2);
        PAIR(2, 0);
        PAIR(2, 2);
        PAIR(3, 0);
        PAIR(3, 2);
#undef PAIR
#undef ROW
    }
}

static void tile_pairs(const uint8_t *tile, uint32_t bits, pair *out) {
    switch (bits) {
    case 2:
        unpack_tile(tile, 2, out);
        break;
    case 3:
        unpack_tile(tile, 3, out);
        break;
    case 4:
        unpack_tile(tile, 4, out);
        break;
    case 5:
        unpack_tile(tile, 5, out);
        break;
    case 6:
        unpack_tile(tile, 6, out);
        break;
    case 7:
        unpack_tile(tile, 7, out);
        break;
    default:
        unpack_tile(tile, 8, out);
        break;
    }
}

// Gradients of `rows` rows of up to 16 tokens, by pairs; what lies beyond either is zero. Lists the
// pairs that are not zero for every token, ascending, and returns how many they are.
static size_t pack_gradients(const float *dy, size_t dy_stride, size_t rows, uint32_t tokens,
                             panel *s) {
    size_t live = 0;
    __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (size_t r = 0; r < rows; r += 32) {
        const size_t left = rows - r < 32 ? rows - r : 32;
        const __mmask32 there = (__mmask32)((UINT64_C(1) << left) - 1);
        __m512i any = _mm512_setzero_si512();
        for (uint32_t t = 0; t < TOKENS; t++) {
            const __mmask32 load = t < tokens ? there : 0;
            const float *from = dy + t * dy_stride + r;
            const __m512 low = _mm512_maskz_loadu_ps((__mmask16)load, from);
            const __m512 high = _mm512_maskz_loadu_ps((__mmask16)(load >> 16), from + 16);
            const __m512i pairs = (__m512i)_mm512_cvtne2ps_pbh(high, low);
            _mm512_store_si512(s->dy + t * PAIRS + r / 2, pairs);
            any = _mm512_or_si512(any, pairs);
        }
        const __mmask16 mask = _mm512_test_epi32_mask(any, any);
        // In a register: compressing to memory takes Zen 4 hundreds of cycles.
        _mm512_storeu_si512(s->live + live, _mm512_maskz_compress_epi32(mask, index));
        live += (size_t)_mm_popcnt_u32(mask);
        index = _mm512_add_epi32(index, _mm512_set1_epi32(16));
    }
    return live;
}

// sum += two rows of weights by two gradients of one token. Written out because gcc 12 loads a
// broadcast into a register first, and then has too few.
FL_INLINE void dot_2(__m512 *sum, __m512i w, const pair *dy) {
    __asm__("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(*sum) : "v"(w), "m"(*dy));
}

// Adds a strip's product with 16 tokens to sum: all of its first `count` pairs, or those listed.
FL_INLINE void add_pairs(const pair *strip, const panel *s, size_t count, bool listed,
                         __m512 *sum) {
#pragma GCC unroll 1
    for (size_t i = 0; i < count; i++) {
        const size_t p = listed ? s->live[i] : i;
        const __m512i w = _mm512_load_si512(strip + p * STRIP);
#pragma GCC unroll 16
        for (int t = 0; t < TOKENS; t++) dot_2(&sum[t], w, s->dy + t * PAIRS + p);
    }
}

// dx[tokens][cols] (+)= a strip, 16 tokens by 16 columns of it.
static void block(const pair *strip, const panel *s, size_t pairs, size_t live, uint32_t tokens,
                  uint32_t cols, float *dx, size_t dx_stride, bool accumulate) {
    const __mmask16 wanted = (__mmask16)((1u << cols) - 1);
    __m512 sum[TOKENS];
#pragma GCC unroll 16
    for (uint32_t t = 0; t < TOKENS; t++) {
        const __mmask16 old = accumulate && t < tokens ? wanted : 0;
        sum[t] = _mm512_maskz_loadu_ps(old, dx + t * dx_stride);
    }
    if (live == pairs)
        add_pairs(strip, s, pairs, false, sum);
    else
        add_pairs(strip, s, live, true, sum);
#pragma GCC unroll 16
    for (uint32_t t = 0; t < TOKENS; t++)
        _mm512_mask_storeu_ps(dx + t * dx_stride, t < tokens ? wanted : 0, sum[t]);
}

void fl_gemm_packed_dx_bf16(const fl_packed *w, const fl_packed_range *range, uint32_t tokens,
                            const float *dy, size_t dy_stride, float *dx, size_t dx_stride,
                            bool accumulate, void *scratch) {
    const size_t groups = (w->cols + (size_t)FL_PACKED_GROUP - 1) / FL_PACKED_GROUP;
    const size_t tile_size = fl_packed_tile_size(w->bits);
    panel *s = scratch;
    _Static_assert(sizeof(panel) <= FL_GEMM_PACKED_DX_SCRATCH, "a panel fits");
    if (range->row_begin == range->row_end && !accumulate) { // a sum of nothing is still a result
        for (size_t t = 0; t < tokens; t++)
            memset(dx + t * dx_stride, 0, (range->col_end - range->col_begin) * sizeof(*dx));
    }
    for (uint32_t row = range->row_begin; row < range->row_end; row += ROWS) {
        const uint32_t below = range->row_end - row;
        const size_t rows = below < ROWS ? below : ROWS;
        const bool add = accumulate || row != range->row_begin;
        for (uint32_t col = range->col_begin; col < range->col_end; col += FL_PACKED_GROUP) {
            for (size_t r = 0; r < rows; r += FL_PACKED_ROWS) {
                const size_t index = (row + r) / FL_PACKED_ROWS * groups + col / FL_PACKED_GROUP;
                tile_pairs(w->data + index * tile_size, w->bits, s->w + r / 2 * STRIP);
            }
            const uint32_t left = range->col_end - col;
            const uint32_t cols = left < FL_PACKED_GROUP ? left : FL_PACKED_GROUP;
            for (uint32_t t = 0; t < tokens; t += TOKENS) {
                const uint32_t count = tokens - t < TOKENS ? tokens - t : TOKENS;
                const size_t live = pack_gradients(dy + t * dy_stride + (row - range->row_begin),
                                                   dy_stride, rows, count, s);
                for (uint32_t k = 0; k < cols; k += STRIP)
                    block(s->w + k / STRIP * PAIRS * STRIP, s, (rows + 1) / 2, live, count,
                          cols - k < STRIP ? cols - k : STRIP,
                          dx + t * dx_stride + (col - range->col_begin) + k, dx_stride, add);
            }
        }
    }
}
