// Products by vdpbf16ps: two rows of W times two of a token's gradients in one instruction. Both
// are rounded to bf16, the sums stay in f32. For a panel of 256 rows the gradients of up to 256
// tokens are packed once, in the order in which they are used; then 64 columns of weights after the
// other are unpacked and meet them all. Pairs of gradients that are zero are left out: block by
// block where there are few of them, token by token where there are many. Either gives the same
// bits.
#include "kernels/gemm_packed_dx.h"
#include "kernels/x86/unpack_avx512.h"

#include <string.h>

enum {
    TOKENS = 16, // of a register block, by 16 columns
    BLOCKS = 16, // of tokens that are packed together
    STRIP = 16,
    STRIPS = FL_PACKED_GROUP / STRIP,
    ROWS = 2 * FL_GEMM_PACKED_DX_ROWS,
    PAIRS = ROWS / 2,
    LISTED = PAIRS / 4, // most pairs of a token that are worth a list of its own
};

// Two rows' bf16 numbers, the lower row in the low half of a 32-bit word.
typedef uint32_t pair;

// What a block of tokens has in a panel of rows.
typedef struct gradients {
    _Alignas(64) pair dy[PAIRS * TOKENS]; // a pair of every token, then the next pair
    uint32_t live[PAIRS + 16];            // pairs that are not zero for every token, ascending
    uint32_t count;                       // of them
    bool alone;             // token by token is cheaper, and the lists below are there
    uint8_t counts[TOKENS]; // of pairs that are not zero, of each token
    uint8_t list[TOKENS][LISTED];
} gradients;

typedef struct panel {
    pair w[STRIPS * PAIRS * STRIP];
    gradients block[BLOCKS];
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

static void tile_pairs(const uint8_t *tile, uint32_t bits, pair *out){
#define UNPACK(width) unpack_tile(tile, width, out)
    FL_PACKED_WITH_BITS(bits, UNPACK)
#undef UNPACK
}

// Adds the pairs first + i for which bit i is set; false when there is no room for them.
FL_INLINE bool list_pairs(uint32_t bits, size_t first, uint8_t *list, uint8_t *count) {
    for (; bits != 0; bits &= bits - 1) {
        if (*count == LISTED) return false;
        list[(*count)++] = (uint8_t)(first + (size_t)__builtin_ctz(bits));
    }
    return true;
}

// ret[p][t] = rows[t][p] for 16 by 16 pairs.
static void turn_pairs(const pair *rows, pair *ret) {
#pragma GCC unroll 4
    for (int p = 0; p < TOKENS; p += 4) {
        __m512i z[4]; // quarter q of z[i]: pairs p .. p + 3 of token 4 q + i
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const __m128i *at = (const __m128i *)(const void *)(rows + i * TOKENS + p);
            z[i] = _mm512_castsi128_si512(_mm_load_si128(at));
            z[i] = _mm512_inserti32x4(z[i], _mm_load_si128(at + TOKENS), 1);
            z[i] = _mm512_inserti32x4(z[i], _mm_load_si128(at + 2 * TOKENS), 2);
            z[i] = _mm512_inserti32x4(z[i], _mm_load_si128(at + 3 * TOKENS), 3);
        }
        const __m512i a = _mm512_unpacklo_epi32(z[0], z[1]), b = _mm512_unpackhi_epi32(z[0], z[1]);
        const __m512i c = _mm512_unpacklo_epi32(z[2], z[3]), d = _mm512_unpackhi_epi32(z[2], z[3]);
        _mm512_store_si512(ret + p * TOKENS, _mm512_unpacklo_epi64(a, c));
        _mm512_store_si512(ret + (p + 1) * TOKENS, _mm512_unpackhi_epi64(a, c));
        _mm512_store_si512(ret + (p + 2) * TOKENS, _mm512_unpacklo_epi64(b, d));
        _mm512_store_si512(ret + (p + 3) * TOKENS, _mm512_unpackhi_epi64(b, d));
    }
}

// Gradients of `rows` rows of up to 16 tokens, by pairs; what lies beyond either is zero.
static void pack_gradients(const float *dy, size_t dy_stride, size_t rows, uint32_t tokens,
                           gradients *g) {
    const __m512i ascending =
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    _Alignas(64) pair step[TOKENS * TOKENS];
    bool listed = true;
    g->count = 0;
    memset(g->counts, 0, sizeof(g->counts));
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
            _mm512_store_si512(step + t * TOKENS, pairs);
            any = _mm512_or_si512(any, pairs);
            if (listed)
                listed = list_pairs(_mm512_test_epi32_mask(pairs, pairs), r / 2, g->list[t],
                                    &g->counts[t]);
        }
        turn_pairs(step, g->dy + r / 2 * TOKENS);
        const __mmask16 mask = _mm512_test_epi32_mask(any, any);
        const __m512i index = _mm512_add_epi32(ascending, _mm512_set1_epi32((int)(r / 2)));
        // In a register: compressing to memory takes Zen 4 hundreds of cycles.
        _mm512_storeu_si512(g->live + g->count, _mm512_maskz_compress_epi32(mask, index));
        g->count += (uint32_t)_mm_popcnt_u32(mask);
    }
    uint32_t sum = 0;
    for (int t = 0; t < TOKENS; t++) sum += g->counts[t];
    g->alone = listed && 3 * sum < TOKENS * g->count; // a pair on its own costs about 3 in a block
}

// sum += two rows of weights by two gradients of one token. Written out because gcc 12 loads a
// broadcast into a register first, and then has too few.
FL_INLINE void dot_2(__m512 *sum, __m512i w, const pair *dy) {
    __asm__("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(*sum) : "v"(w), "m"(*dy));
}

// Adds a strip's product with 16 tokens to sum: all of its first `count` pairs, or those listed.
FL_INLINE void add_pairs(const pair *strip, const gradients *g, size_t count, bool listed,
                         __m512 *sum) {
#pragma GCC unroll 1
    for (size_t i = 0; i < count; i++) {
        const size_t p = listed ? g->live[i] : i;
        const __m512i w = _mm512_load_si512(strip + p * STRIP);
#pragma GCC unroll 16
        for (int t = 0; t < TOKENS; t++) dot_2(&sum[t], w, g->dy + p * TOKENS + (size_t)t);
    }
}

// dx[tokens][cols] (+)= a strip, 16 tokens by 16 columns of it.
static void block(const pair *strip, const gradients *g, size_t pairs, uint32_t tokens,
                  uint32_t cols, float *dx, size_t dx_stride, bool accumulate) {
    const __mmask16 wanted = (__mmask16)((1u << cols) - 1);
    __m512 sum[TOKENS];
#pragma GCC unroll 16
    for (uint32_t t = 0; t < TOKENS; t++) {
        const __mmask16 old = accumulate && t < tokens ? wanted : 0;
        sum[t] = _mm512_maskz_loadu_ps(old, dx + t * dx_stride);
    }
    if (g->count == pairs)
        add_pairs(strip, g, pairs, false, sum);
    else
        add_pairs(strip, g, g->count, true, sum);
#pragma GCC unroll 16
    for (uint32_t t = 0; t < TOKENS; t++)
        _mm512_mask_storeu_ps(dx + t * dx_stride, t < tokens ? wanted : 0, sum[t]);
}

// The same for all columns of a group, token by token from their lists.
static void block_alone(const pair *w, const gradients *g, uint32_t tokens, uint32_t cols,
                        float *dx, size_t dx_stride, bool accumulate) {
    const __mmask64 wanted = cols == FL_PACKED_GROUP ? ~UINT64_C(0) : (UINT64_C(1) << cols) - 1;
    for (uint32_t t = 0; t < tokens; t++, dx += dx_stride) {
        __m512 sum[STRIPS];
#pragma GCC unroll 4
        for (uint32_t k = 0; k < STRIPS; k++) {
            const __mmask16 old = (__mmask16)(accumulate ? wanted >> STRIP * k : 0);
            sum[k] = _mm512_maskz_loadu_ps(old, dx + STRIP * k);
        }
        for (uint32_t i = 0; i < g->counts[t]; i++) {
            const size_t p = g->list[t][i];
#pragma GCC unroll 4
            for (uint32_t k = 0; k < STRIPS; k++)
                dot_2(&sum[k], _mm512_load_si512(w + (k * PAIRS + p) * STRIP),
                      g->dy + p * TOKENS + t);
        }
#pragma GCC unroll 4
        for (uint32_t k = 0; k < STRIPS; k++)
            _mm512_mask_storeu_ps(dx + STRIP * k, (__mmask16)(wanted >> STRIP * k), sum[k]);
    }
}

// One group's columns for all packed tokens. A strip stays in the first cache while it meets them.
static void group(const panel *s, size_t pairs, uint32_t tokens, uint32_t cols, float *dx,
                  size_t dx_stride, bool accumulate) {
    for (uint32_t k = 0; k < cols; k += STRIP) {
        const gradients *g = s->block;
        for (uint32_t t = 0; t < tokens; t += TOKENS, g++)
            if (!g->alone)
                block(s->w + k * PAIRS, g, pairs, tokens - t < TOKENS ? tokens - t : TOKENS,
                      cols - k < STRIP ? cols - k : STRIP, dx + t * dx_stride + k, dx_stride,
                      accumulate);
    }
    const gradients *g = s->block;
    for (uint32_t t = 0; t < tokens; t += TOKENS, g++)
        if (g->alone)
            block_alone(s->w, g, tokens - t < TOKENS ? tokens - t : TOKENS, cols,
                        dx + t * dx_stride, dx_stride, accumulate);
}

// Rows [row, row + rows) of the panel for up to BLOCKS * TOKENS tokens.
static void panel_product(const fl_packed *w, const fl_packed_range *range, uint32_t row,
                          size_t rows, uint32_t tokens, const float *dy, size_t dy_stride,
                          float *dx, size_t dx_stride, bool accumulate, panel *s) {
    const size_t groups = (w->cols + (size_t)FL_PACKED_GROUP - 1) / FL_PACKED_GROUP;
    const size_t tile_size = fl_packed_tile_size(w->bits);
    for (uint32_t t = 0; t < tokens; t += TOKENS)
        pack_gradients(dy + t * dy_stride, dy_stride, rows,
                       tokens - t < TOKENS ? tokens - t : TOKENS, &s->block[t / TOKENS]);
    for (uint32_t col = range->col_begin; col < range->col_end; col += FL_PACKED_GROUP) {
        for (size_t r = 0; r < rows; r += FL_PACKED_ROWS) {
            const size_t index = (row + r) / FL_PACKED_ROWS * groups + col / FL_PACKED_GROUP;
            tile_pairs(w->data + index * tile_size, w->bits, s->w + r / 2 * STRIP);
        }
        const uint32_t left = range->col_end - col;
        group(s, (rows + 1) / 2, tokens, left < FL_PACKED_GROUP ? left : FL_PACKED_GROUP,
              dx + (col - range->col_begin), dx_stride, accumulate);
    }
}

void fl_gemm_packed_dx_bf16(const fl_packed *w, const fl_packed_range *range, uint32_t tokens,
                            const float *dy, size_t dy_stride, float *dx, size_t dx_stride,
                            bool accumulate, void *scratch) {
    panel *s = scratch;
    _Static_assert(sizeof(panel) <= FL_GEMM_PACKED_DX_SCRATCH, "a panel fits");
    if (range->row_begin == range->row_end && !accumulate) { // a sum of nothing is still a result
        for (size_t t = 0; t < tokens; t++)
            memset(dx + t * dx_stride, 0, (range->col_end - range->col_begin) * sizeof(*dx));
    }
    for (uint32_t row = range->row_begin; row < range->row_end; row += ROWS) {
        const uint32_t below = range->row_end - row;
        const bool add = accumulate || row != range->row_begin;
        for (uint32_t t = 0; t < tokens; t += BLOCKS * TOKENS)
            panel_product(w, range, row, below < ROWS ? below : ROWS,
                          tokens - t < BLOCKS * TOKENS ? tokens - t : BLOCKS * TOKENS,
                          dy + t * dy_stride + (row - range->row_begin), dy_stride,
                          dx + t * dx_stride, dx_stride, add, s);
    }
}
