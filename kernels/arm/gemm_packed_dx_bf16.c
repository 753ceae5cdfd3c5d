// Products by BFMMLA: four rows of W, two columns of each, times two tokens' gradients in one
// instruction. Both are rounded to bf16, the sums stay in f32. Weights are unpacked once a panel of
// 256 rows by 64 columns, the gradients once for 8 tokens and such a panel, in the order in which
// they are used.
#include "kernels/arm/unpack_neon.h"
#include "kernels/gemm_packed_dx.h"

#include <string.h>

enum {
    TOKENS = 8, // of a register block
    COLS = 8,   // by so many columns
    BLOCKS = FL_PACKED_GROUP / COLS,
    ROWS = 2 * FL_GEMM_PACKED_DX_ROWS,
    QUADS = ROWS / 4,
    QUAD = 4 * COLS, // numbers of four rows and a block; as many of four rows and the tokens
};

typedef struct panel {
    bfloat16_t
        w[BLOCKS * QUADS * QUAD]; // [block][quad of rows][pair of columns][2 columns][4 rows]
    bfloat16_t dy[QUADS * QUAD];  // [quad of rows][pair of tokens][2 tokens][4 rows]
    uint8_t live[QUADS];          // quads that are not zero for every token
} panel;

FL_INLINE bfloat16x8_t rounded(float32x4_t low, float32x4_t high) {
    return vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(low), high);
}

// Column c of four rows, whose codes lie row after row.
FL_INLINE float32x4_t column(uint8x16_t codes, uint8x16_t pick, float32x4_t scale,
                             float32x4_t minimum) {
    const uint32x4_t c = vreinterpretq_u32_u8(vqtbl1q_u8(codes, pick));
    return vaddq_f32(vmulq_f32(scale, vcvtq_f32_u32(c)), minimum);
}

// One tile's four quads of rows.
FL_INLINE void unpack_tile(const uint8_t *tile, int bits, bfloat16_t *out) {
    uint8x16_t pick[4]; // bytes c, c + 4, c + 8, c + 12 as 32-bit words; 255 picks a zero
#pragma GCC unroll 4
    for (uint32_t c = 0; c < 4; c++) {
        const uint32x4_t rows = {c, c + 4, c + 8, c + 12};
        pick[c] = vreinterpretq_u8_u32(vorrq_u32(rows, vdupq_n_u32(0xffffff00)));
    }
    for (int b = 0; b < 8; b++) {
        const int i = b % 4; // four rows, the columns of steps b / 4 + 2 n
        const float32x4_t scale = fl_halves_neon(tile + 8 * i);
        const float32x4_t minimum = fl_halves_neon(tile + 32 + 8 * i);
        bfloat16_t *at = out + i * QUAD + b / 4 * 16;
#pragma GCC unroll 8
        for (int n = 0; n < 8; n++, at += QUADS * QUAD) {
            const uint8x16_t codes = fl_codes_neon(tile + FL_PACKED_HEAD, bits, b, n);
            vst1q_bf16(at, rounded(column(codes, pick[0], scale, minimum),
                                   column(codes, pick[1], scale, minimum)));
            vst1q_bf16(at + 8, rounded(column(codes, pick[2], scale, minimum),
                                       column(codes, pick[3], scale, minimum)));
        }
    }
}

static void tile_quads(const uint8_t *tile, uint32_t bits, bfloat16_t *out){
#define UNPACK(width) unpack_tile(tile, width, out)
    FL_PACKED_WITH_BITS(bits, UNPACK)
#undef UNPACK
}

// Four gradients of a token, zeros for rows or tokens that are not there.
FL_INLINE float32x4_t four_rows(const float *dy, size_t rows) {
    float some[4] = {0};
    if (rows >= 4) return vld1q_f32(dy);
    memcpy(some, dy, rows * sizeof(*dy));
    return vld1q_f32(some);
}

// Gradients of `rows` rows of up to 8 tokens, by quads; what lies beyond either is zero. Lists the
// quads that are not zero for every token, ascending, and returns how many they are.
static size_t pack_gradients(const float *dy, size_t dy_stride, size_t rows, uint32_t tokens,
                             panel *s) {
    size_t live = 0;
    for (size_t r = 0; r < rows; r += 4) {
        const size_t left = rows - r;
        uint16x8_t any = vdupq_n_u16(0);
#pragma GCC unroll 4
        for (uint32_t t = 0; t < TOKENS; t += 2) {
            const float *from = dy + t * dy_stride + r;
            const float32x4_t a = four_rows(from, t < tokens ? left : 0);
            const float32x4_t b = four_rows(from + dy_stride, t + 1 < tokens ? left : 0);
            const bfloat16x8_t both = rounded(a, b);
            vst1q_bf16(s->dy + r / 4 * QUAD + 4 * t, both);
            any = vorrq_u16(any, vreinterpretq_u16_bf16(both));
        }
        s->live[live] = (uint8_t)(r / 4);
        live += vmaxvq_u16(any) != 0;
    }
    return live;
}

// sum[2 t + c] += four rows of token t by four rows of column c. Written out, so that it stays
// where it is: gcc 12 loads all weights first and then has too few registers.
FL_INLINE float32x4_t dot_4(float32x4_t sum, bfloat16x8_t dy, bfloat16x8_t w) {
    __asm__ volatile("bfmmla %0.4s, %1.8h, %2.8h" : "+w"(sum) : "w"(dy), "w"(w));
    return sum;
}

// Adds a block's product with 8 tokens to sum: all of its first `count` quads, or those listed.
FL_INLINE void add_quads(const bfloat16_t *w, const panel *s, size_t count, bool listed,
                         float32x4_t *sum) {
#pragma GCC unroll 1
    for (size_t n = 0; n < count; n++) {
        const size_t q = listed ? s->live[n] : n;
        const bfloat16_t *at = w + q * QUAD, *dy = s->dy + q * QUAD;
        bfloat16x8_t v[4], d[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) v[i] = vld1q_bf16(at + 8 * i), d[i] = vld1q_bf16(dy + 8 * i);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) sum[i] = dot_4(sum[i], d[i / 4], v[i % 4]);
    }
}

// dx[8][8] (+)= a block.
static void block(const bfloat16_t *w, const panel *s, size_t quads, size_t live, float *dx,
                  size_t dx_stride, bool accumulate) {
    float32x4_t sum[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
        const float *a = dx + (size_t)(i / 4 * 2) * dx_stride + 2 * (i % 4), *b = a + dx_stride;
        sum[i] = accumulate ? vcombine_f32(vld1_f32(a), vld1_f32(b)) : vdupq_n_f32(0);
    }
    if (live == quads)
        add_quads(w, s, quads, false, sum);
    else
        add_quads(w, s, live, true, sum);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
        float *a = dx + (size_t)(i / 4 * 2) * dx_stride + 2 * (i % 4), *b = a + dx_stride;
        vst1_f32(a, vget_low_f32(sum[i]));
        vst1_f32(b, vget_high_f32(sum[i]));
    }
}

// A block that has fewer tokens or columns goes by way of a copy.
static void block_part(const bfloat16_t *w, const panel *s, size_t quads, size_t live,
                       uint32_t tokens, uint32_t cols, float *dx, size_t dx_stride,
                       bool accumulate) {
    float copy[TOKENS * COLS] = {0};
    for (size_t t = 0; t < tokens && accumulate; t++)
        memcpy(copy + t * COLS, dx + t * dx_stride, cols * sizeof(*dx));
    block(w, s, quads, live, copy, COLS, accumulate);
    for (size_t t = 0; t < tokens; t++)
        memcpy(dx + t * dx_stride, copy + t * COLS, cols * sizeof(*dx));
}

// A panel of `rows` rows by `cols` columns times all tokens.
static void panel_product(panel *s, size_t rows, uint32_t cols, uint32_t tokens, const float *dy,
                          size_t dy_stride, float *dx, size_t dx_stride, bool accumulate) {
    const size_t quads = (rows + 3) / 4;
    for (uint32_t t = 0; t < tokens; t += TOKENS) {
        const uint32_t count = tokens - t < TOKENS ? tokens - t : TOKENS;
        const size_t live = pack_gradients(dy + t * dy_stride, dy_stride, rows, count, s);
        for (uint32_t k = 0; k < cols; k += COLS) {
            const bfloat16_t *w = s->w + k / COLS * QUADS * QUAD;
            float *out = dx + t * dx_stride + k;
            if (count == TOKENS && cols - k >= COLS)
                block(w, s, quads, live, out, dx_stride, accumulate);
            else
                block_part(w, s, quads, live, count, cols - k < COLS ? cols - k : COLS, out,
                           dx_stride, accumulate);
        }
    }
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
            const uint32_t left = range->col_end - col;
            for (size_t r = 0; r < rows; r += FL_PACKED_ROWS) {
                const size_t index = (row + r) / FL_PACKED_ROWS * groups + col / FL_PACKED_GROUP;
                tile_quads(w->data + index * tile_size, w->bits, s->w + r / 4 * QUAD);
            }
            panel_product(s, rows, left < FL_PACKED_GROUP ? left : FL_PACKED_GROUP, tokens,
                          dy + (row - range->row_begin), dy_stride, dx + (col - range->col_begin),
                          dx_stride, add);
        }
    }
}
