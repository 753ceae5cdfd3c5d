// dx_loop.h: the loops of gemm_packed_dx that are the same in every vector variant. Built without
// any -m flag; the variant's own two functions do the arithmetic.
#ifndef FL_KERNELS_DX_LOOP_H
#define FL_KERNELS_DX_LOOP_H

#include "kernels/gemm_packed_dx.h"

// The float panel is [4 strips][128 rows][16 columns]: a strip stays in the first cache.
enum {
    FL_DX_STRIP = 16,
    FL_DX_STRIP_SIZE = FL_GEMM_PACKED_DX_ROWS * FL_DX_STRIP, // floats
    FL_DX_TOKENS_MAX = 8,
};

// Rows of a panel whose gradients are not zero for every token of a block, ascending.
typedef struct fl_dx_rows {
    uint32_t count;
    bool all; // the first `count` rows; `row` is not written then
    uint8_t row[FL_GEMM_PACKED_DX_ROWS];
} fl_dx_rows;

typedef struct fl_dx_ops {
    uint32_t tokens_max; // of one block, at most FL_DX_TOKENS_MAX
    // One tile's 16 rows as floats: column k of row r at panel[k / 16 * FL_DX_STRIP_SIZE + r * 16 +
    // k % 16]. panel is 64-byte aligned.
    void (*tile)(const uint8_t *tile, uint32_t bits, float *panel);
    // dx[tokens][16] (+)= dy[tokens][r] * strip[r][16] over the rows r that are listed,
    // 1 <= tokens <= tokens_max; one chain of fused multiply-adds for each element.
    void (*block)(uint32_t tokens, const float *strip, const fl_dx_rows *rows, const float *dy,
                  size_t dy_stride, float *dx, size_t dx_stride, bool accumulate);
} fl_dx_ops;

// The other arguments are those of gemm_packed_dx.
void fl_dx_loop(const fl_dx_ops *ops, const fl_packed *w, const fl_packed_range *range,
                uint32_t tokens, const float *dy, size_t dy_stride, float *dx, size_t dx_stride,
                bool accumulate, void *scratch);

#endif
