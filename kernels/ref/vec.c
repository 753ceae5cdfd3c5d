#include "kernels/vec.h"

#include <math.h>
#include <string.h>

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

static uint32_t bits_of(float v) {
    uint32_t u;
    memcpy(&u, &v, sizeof(u));
    return u;
}

static float of_bits(uint32_t u) {
    float v;
    memcpy(&v, &u, sizeof(v));
    return v;
}

uint32_t fl_vec_most_bits(size_t n, const float *x) {
    int32_t most = 0; // magnitudes have no sign bit, and vectors of int32 have a maximum everywhere
    for (size_t i = 0; i < n; i++) {
        const int32_t mag = (int32_t)(bits_of(x[i]) & 0x7fffffffu);
        most = mag > most ? mag : most;
    }
    return (uint32_t)most;
}

// All three cases are computed and one is taken by masks: with a branch about a float operation the
// compiler does one at a time.
static uint32_t choose(bool yes, uint32_t a, uint32_t b) {
    return b ^ ((a ^ b) & (0u - (uint32_t)yes));
}

static uint16_t half_of(float v) {
    const uint32_t u = bits_of(v), mag = u & 0x7fffffffu;
    // A tie goes to the even one; a carry into the exponent is right, up to infinity.
    const uint32_t normal = ((mag + 0xfffu + (mag >> 13 & 1u)) >> 13) - (112u << 10);
    // Beside 0.5 a float's last bit is 2^-24, a half's least subnormal: the sum rounds as wanted.
    const uint32_t small = bits_of(of_bits(mag) + 0.5f) - 0x3f000000u;
    const uint32_t nan = 0x7e00u | (mag >> 13 & 0x1ffu);
    const uint32_t special = choose(mag > 0x7f800000u, nan, 0x7c00u);
    const uint32_t finite = choose(mag < 0x38800000u, small, normal);
    return (uint16_t)((u >> 16 & 0x8000u) | choose(mag < 0x47800000u, finite, special));
}

static float float_of(uint16_t h) {
    const uint32_t mag = h & 0x7fffu;
    const uint32_t normal = (mag << 13) + 0x38000000u;
    const uint32_t small = bits_of((float)(int32_t)mag * 0x1p-24f); // exact
    const uint32_t quiet = choose(mag > 0x7c00u, 0x400000u, 0u);
    const uint32_t special = 0x7f800000u | (mag & 0x3ffu) << 13 | quiet;
    const uint32_t finite = choose(mag < 0x400u, small, normal);
    return of_bits((uint32_t)(h & 0x8000u) << 16 | choose(mag < 0x7c00u, finite, special));
}

void fl_vec_to_f16(size_t n, float a, const float *x, uint16_t *h) {
    for (size_t i = 0; i < n; i++) h[i] = half_of(a * x[i]);
}

void fl_vec_from_f16(size_t n, float a, const uint16_t *h, float *y) {
    for (size_t i = 0; i < n; i++) y[i] = a * float_of(h[i]);
}
