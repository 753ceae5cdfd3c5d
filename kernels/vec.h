// vec: helpers over float vectors. One definition each, the same bits on every machine.
//
//   Shape     x[n], y[n], n >= 0. x and y may be the same array.
//   Numerics  element functions round each product and each sum. dot and sumsq add doubles in four
//             fixed lanes: relative to the sum of |terms| the error is below n * DBL_EPSILON.
//   Errors    none.   Threads  pure.
#ifndef FL_KERNELS_VEC_H
#define FL_KERNELS_VEC_H

#include "kernels/cpu.h"

void fl_vec_fill(size_t n, float value, float *y);
void fl_vec_add(size_t n, const float *x, float *y);           // y += x
void fl_vec_scale(size_t n, float a, float *y);                // y *= a
void fl_vec_axpy(size_t n, float a, const float *x, float *y); // y += a * x
double fl_vec_dot(size_t n, const float *x, const float *y);
double fl_vec_sumsq(size_t n, const float *x);
bool fl_vec_finite(size_t n, const float *x); // no NaN, no infinity

// The largest magnitude as the bits of a float, which order as the magnitudes do, NaN above
// infinity; 0 for n = 0.
uint32_t fl_vec_most_bits(size_t n, const float *x);
// h = fp16(a * x) and y = a * float(h): the bits of fl_f16_from_f32 and fl_f16_to_f32 (packed.h),
// without a branch, for whole rows.
void fl_vec_to_f16(size_t n, float a, const float *x, uint16_t *h);
void fl_vec_from_f16(size_t n, float a, const uint16_t *h, float *y);

#endif
