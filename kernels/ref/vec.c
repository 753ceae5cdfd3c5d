#include "kernels/vec.h"

#include <math.h>

void fl_vec_fill(size_t n, float value, float *y) {
    for (size_t i = 0; i < n; i++) y[i] = value;
}

void fl_vec_add(size_t n, const float *x, float *y) {
    for (size_t i = 0; i < n; i++) y[i] += x[i];
}

void fl_vec_scale(size_t n, float a, float *y) {
    for (size_t i = 0; i < n; i++) y[i] *= a;
}

void fl_vec_axpy(size_t n, float a, const float *x, float *y) {
    for (size_t i = 0; i < n; i++) y[i] += a * x[i];
}

double fl_vec_dot(size_t n, const float *x, const float *y) {
    double lane[4] = {0.0, 0.0, 0.0, 0.0};
    for (size_t i = 0; i < n; i++) lane[i % 4] += (double)x[i] * (double)y[i];
    return (lane[0] + lane[2]) + (lane[1] + lane[3]);
}

double fl_vec_sumsq(size_t n, const float *x) {
    return fl_vec_dot(n, x, x);
}

bool fl_vec_finite(size_t n, const float *x) {
    bool ok = true;
    for (size_t i = 0; i < n; i++) ok = ok && isfinite(x[i]);
    return ok;
}
