// rmsnorm: y = x * gain / sqrt(mean(x^2) + epsilon), row by row.
//
//   Shape     x[rows][n], y[rows][n], gain[n]; contiguous rows; n >= 1, rows >= 0.
//   Forward   y may be x.
//   Backward  with r = 1 / sqrt(mean(x^2) + epsilon), computed again from x:
//             dx[i]    += r * gain[i] * dy[i] - x[i] * r^3 / n * sum_j dy[j] * gain[j] * x[j]
//             dgain[i] += sum over rows, in order, of dy[i] * x[i] * r      (skipped when NULL)
//             No aliasing.
//   Numerics  mean(x^2) has relative error below (n + 8) * FLT_EPSILON in every variant. A row's
//             bits depend on that row alone.
//   Errors    none.   Threads  pure; split by rows (backward with dgain: one caller).
//   Source    Zhang & Sennrich 2019, Root Mean Square Layer Normalization, eq. 4.
#ifndef FL_KERNELS_RMSNORM_H
#define FL_KERNELS_RMSNORM_H

#include "kernels/cpu.h"

#define FL_RMSNORM_LIST(X)                                                                         \
    X(ref, FL_CPU_NONE)                                                                            \
    FL_ON_X86(X(avx2, FL_CPU_AVX2 | FL_CPU_FMA))                                                   \
    FL_ON_ARM64(X(neon, FL_CPU_NEON))

#define FL_RMSNORM_FORWARD(tag)                                                                    \
    void fl_rmsnorm_forward_##tag(size_t rows, size_t n, float epsilon, const float *x,            \
                                  const float *gain, float *y)
#define FL_RMSNORM_BACKWARD(tag)                                                                   \
    void fl_rmsnorm_backward_##tag(size_t rows, size_t n, float epsilon, const float *x,           \
                                   const float *gain, const float *dy, float *dx, float *dgain)

#define X(tag, need)                                                                               \
    FL_RMSNORM_FORWARD(tag);                                                                       \
    FL_RMSNORM_BACKWARD(tag);
FL_RMSNORM_LIST(X)
#undef X

typedef struct fl_rmsnorm_variant {
    const char *tag; // NULL ends the list
    uint32_t need;
    void (*forward)(size_t rows, size_t n, float epsilon, const float *x, const float *gain,
                    float *y);
    void (*backward)(size_t rows, size_t n, float epsilon, const float *x, const float *gain,
                     const float *dy, float *dx, float *dgain);
} fl_rmsnorm_variant;

extern const fl_rmsnorm_variant fl_rmsnorm_variants[];

#endif
