// gemm_packed: Y = X W^T for a packed W and quantised X; the forward product of every linear layer.
//
//   Shape     rows [row_begin, row_end) of w: row_begin a multiple of 16; row_end too, or w->rows.
//             All x->tokens (>= 1) rows of x; x->groups = ceil(w->cols / 64).
//   Output    y[t * y_stride + (r - row_begin)], overwritten: y addresses the range's first row, so
//             that a thread passes y + row_begin. Nothing else is written. y_stride in floats.
//   Layout    w as in packed.h, x as in quantise_x8.h. y needs no alignment.
//   Numerics  over the groups g in order, starting from 0, in f32 with one rounding an operation
//             (no fused multiply-add):
//                 y += scale_rg * (x_scale_tg * (float)dot_rtg)      dot: the codes' exact int32
//                 sum y += minimum_rg * x_sum_tg
//             Every variant gives these bits, whatever the tokens, the row range or the machine.
//   Aliasing  y overlaps neither x nor w.
//   Errors    none; sizes and pointers are the caller's contract. Threads: pure; the work is split
//   by
//             row ranges, or by tokens with fl_x8_slice.
#ifndef FL_KERNELS_GEMM_PACKED_H
#define FL_KERNELS_GEMM_PACKED_H

#include "kernels/packed.h"
#include "kernels/quantise_x8.h"

#define FL_GEMM_PACKED_LIST(X)                                                                     \
    X(ref, FL_CPU_NONE)                                                                            \
    FL_ON_X86(X(avx2, FL_CPU_AVX2 | FL_CPU_F16C))                                                  \
    FL_ON_X86(X(vnni, FL_CPU_AVX512_VNNI))                                                         \
    FL_ON_ARM64(X(neon, FL_CPU_NEON))                                                              \
    FL_ON_ARM64(X(dotprod, FL_CPU_NEON | FL_CPU_DOTPROD))                                          \
    FL_ON_ARM64(X(i8mm, FL_CPU_NEON | FL_CPU_DOTPROD | FL_CPU_I8MM))

typedef void (*fl_gemm_packed_fn)(const fl_packed *w, uint32_t row_begin, uint32_t row_end,
                                  const fl_x8 *x, float *y, size_t y_stride);

#define X(tag, need)                                                                               \
    void fl_gemm_packed_##tag(const fl_packed *w, uint32_t row_begin, uint32_t row_end,            \
                              const fl_x8 *x, float *y, size_t y_stride);
FL_GEMM_PACKED_LIST(X)
#undef X

typedef struct fl_gemm_packed_variant {
    const char *tag;
    uint32_t need; // FL_CPU_* bits that must all be present
    fl_gemm_packed_fn fn;
} fl_gemm_packed_variant;

extern const fl_gemm_packed_variant fl_gemm_packed_variants[]; // ends with fn == NULL

#endif
