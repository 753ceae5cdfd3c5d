#include "kernels/dx_loop.h"

#include <string.h>

enum { BLOCKS = 16 }; // of tokens that share a strip

// A block that has fewer than 16 columns goes by way of a copy.
static void block_part(const fl_dx_ops *ops, uint32_t tokens, const float *strip,
                       const fl_dx_rows *rows, const float *dy, size_t dy_stride, float *dx,
                       size_t dx_stride, bool accumulate, size_t cols) {
    float copy[FL_DX_TOKENS_MAX * FL_DX_STRIP] = {0};
    for (size_t t = 0; t < tokens && accumulate; t++)
        memcpy(copy + t * FL_DX_STRIP, dx + t * dx_stride, cols * sizeof(*dx));
    ops->block(tokens, strip, rows, dy, dy_stride, copy, FL_DX_STRIP, accumulate);
    for (size_t t = 0; t < tokens; t++)
        memcpy(dx + t * dx_stride, copy + t * FL_DX_STRIP, cols * sizeof(*dx));
}

static bool has_zero(size_t rows, const float *dy) {
    uint32_t zeros = 0;
    for (size_t r = 0; r < rows; r++) zeros += dy[r] == 0.0f;
    return zeros != 0;
}

// The head's gradient is almost all zeros. Others have none: seen at once from the first token.
static void live_rows(uint32_t tokens, size_t rows, const float *dy, size_t dy_stride,
                      fl_dx_rows *ret) {
    bool any[FL_GEMM_PACKED_DX_ROWS] = {false};
    ret->all = !has_zero(rows, dy);
    ret->count = ret->all ? (uint32_t)rows : 0;
    if (ret->all) return;
    for (uint32_t t = 0; t < tokens; t++, dy += dy_stride)
        for (size_t r = 0; r < rows; r++) any[r] |= dy[r] != 0.0f;
    for (size_t r = 0; r < rows; r++) {
        ret->row[ret->count] = (uint8_t)r;
        ret->count += any[r];
    }
}

// A strip meets some blocks of tokens while it is in the first cache.
static void panel_product(const fl_dx_ops *ops, const float *panel, size_t rows, size_t cols,
                          uint32_t tokens, const float *dy, size_t dy_stride, float *dx,
                          size_t dx_stride, bool accumulate) {
    fl_dx_rows live[BLOCKS];
    const uint32_t most = BLOCKS * ops->tokens_max;
    for (uint32_t first = 0; first < tokens; first += most) {
        const uint32_t end = tokens - first < most ? tokens : first + most;
        for (uint32_t t = first; t < end; t += ops->tokens_max) {
            const uint32_t count = end - t < ops->tokens_max ? end - t : ops->tokens_max;
            live_rows(count, rows, dy + t * dy_stride, dy_stride,
                      &live[(t - first) / ops->tokens_max]);
        }
        for (size_t k = 0; k < cols; k += FL_DX_STRIP) {
            const float *strip = panel + k / FL_DX_STRIP * FL_DX_STRIP_SIZE;
            const fl_dx_rows *list = live;
            for (uint32_t t = first; t < end; t += ops->tokens_max, list++) {
                const uint32_t count = end - t < ops->tokens_max ? end - t : ops->tokens_max;
                const float *d = dy + t * dy_stride;
                float *out = dx + t * dx_stride + k;
                if (cols - k >= FL_DX_STRIP)
                    ops->block(count, strip, list, d, dy_stride, out, dx_stride, accumulate);
                else
                    block_part(ops, count, strip, list, d, dy_stride, out, dx_stride, accumulate,
                               cols - k);
            }
        }
    }
}

void fl_dx_loop(const fl_dx_ops *ops, const fl_packed *w, const fl_packed_range *range,
                uint32_t tokens, const float *dy, size_t dy_stride, float *dx, size_t dx_stride,
                bool accumulate, void *scratch) {
    const size_t groups = (w->cols + (size_t)FL_PACKED_GROUP - 1) / FL_PACKED_GROUP;
    const size_t tile_size = fl_packed_tile_size(w->bits);
    float *panel = scratch;
    if (range->row_begin == range->row_end && !accumulate) { // a sum of nothing is still a result
        for (size_t t = 0; t < tokens; t++)
            memset(dx + t * dx_stride, 0, (range->col_end - range->col_begin) * sizeof(*dx));
    }
    for (uint32_t row = range->row_begin; row < range->row_end; row += FL_GEMM_PACKED_DX_ROWS) {
        const uint32_t below = range->row_end - row;
        const size_t rows = below < FL_GEMM_PACKED_DX_ROWS ? below : FL_GEMM_PACKED_DX_ROWS;
        const bool add = accumulate || row != range->row_begin;
        for (uint32_t col = range->col_begin; col < range->col_end; col += FL_PACKED_GROUP) {
            const uint32_t left = range->col_end - col;
            const size_t cols = left < FL_PACKED_GROUP ? left : FL_PACKED_GROUP;
            for (size_t r = 0; r < rows; r += FL_PACKED_ROWS) {
                const size_t index = (row + r) / FL_PACKED_ROWS * groups + col / FL_PACKED_GROUP;
                ops->tile(w->data + index * tile_size, w->bits, panel + r * FL_DX_STRIP);
            }
            panel_product(ops, panel, rows, cols, tokens, dy + (row - range->row_begin), dy_stride,
                          dx + (col - range->col_begin), dx_stride, add);
        }
    }
}
