// gemm_packed_dx: dX = dY W, the gradient of a product's input through a frozen packed matrix.
//
//   Shape     rows [row_begin, row_end) of w: row_begin a multiple of 16, row_end too or w->rows.
//             Columns [col_begin, col_end): col_begin a multiple of 64, col_end too or w->cols.
//   Input     dy[t * dy_stride + (r - row_begin)], tokens >= 1 rows of floats.
//   Output    dx[t * dx_stride + (k - col_begin)]: both pointers address the range's first element.
//             Overwritten, or added to when `accumulate`. Strides in floats. No alignment needed.
//   Scratch   FL_GEMM_PACKED_DX_SCRATCH bytes, 64-byte aligned, one for each thread: some rows by
//             64 columns of W as floats. The whole matrix never exists as floats.
//   Numerics  w = scale * code + minimum as fl_packed_row gives it. Each dx element is one chain of
//             multiply-adds over r ascending, begun at 0 or at the old value, fused or not:
//                 |got - exact| <= ((n + 2) * FLT_EPSILON + u) * sum_r |dy_tr * w_rk| for n rows
//             (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1), plus
//             FLT_EPSILON * n * |old value|. u, the variant's `rounding`, is 0 where dy and w are
//             multiplied as floats; bf16 rounds both to 8 bits first and takes what is below
//             2^-126 as zero. One variant gives the same bits whatever the tokens, the column
//             range, or a cut of the row range into ascending accumulated calls.
//   Zeros     a row of w whose dy is zero for all tokens of a register block is not multiplied,
//   nor,
//             where most are, one that is zero for the token: a sparse dy costs less.
//   Aliasing  dx overlaps nothing else.
//   Errors    none; sizes and pointers are the caller's contract. Threads: pure; split by columns.
#ifndef FL_KERNELS_GEMM_PACKED_DX_H
#define FL_KERNELS_GEMM_PACKED_DX_H

#include "kernels/cpu.h"
#include "kernels/packed.h"

enum {
    FL_GEMM_PACKED_DX_ROWS = 128,       // of the float panel; a bf16 panel has twice as many
    FL_GEMM_PACKED_DX_SCRATCH = 184320, // bytes: a panel, and dy in the order of its use
};

// The block of W to go through; see Shape.
typedef struct fl_packed_range {
    uint32_t row_begin, row_end, col_begin, col_end;
} fl_packed_range;

#define FL_GEMM_PACKED_DX_LIST(X)                                                                  \
    X(ref, FL_CPU_NONE, 0)                                                                         \
    FL_ON_X86(X(avx2, FL_CPU_AVX2 | FL_CPU_FMA | FL_CPU_F16C, 0))                                  \
    FL_ON_X86(X(bf16, FL_CPU_AVX512_VNNI | FL_CPU_AVX512_BF16, 0x1.02p-7f))                        \
    FL_ON_ARM64(X(neon, FL_CPU_NEON, 0))                                                           \
    FL_ON_ARM64(X(bf16, FL_CPU_NEON | FL_CPU_BF16, 0x1.02p-7f))

typedef void (*fl_gemm_packed_dx_fn)(const fl_packed *w, const fl_packed_range *range,
                                     uint32_t tokens, const float *dy, size_t dy_stride, float *dx,
                                     size_t dx_stride, bool accumulate, void *scratch);

#define X(tag, need, rounding)                                                                     \
    void fl_gemm_packed_dx_##tag(const fl_packed *w, const fl_packed_range *range,                 \
                                 uint32_t tokens, const float *dy, size_t dy_stride, float *dx,    \
                                 size_t dx_stride, bool accumulate, void *scratch);
FL_GEMM_PACKED_DX_LIST(X)
#undef X

typedef struct fl_gemm_packed_dx_variant {
    const char *tag;
    uint32_t need; // FL_CPU_* bits that must all be present
    fl_gemm_packed_dx_fn fn;
    float rounding; // u of the bound above
} fl_gemm_packed_dx_variant;

extern const fl_gemm_packed_dx_variant fl_gemm_packed_dx_variants[]; // ends with fn == NULL

#endif
