// Sums are made in double, as in the definition: a row's bits differ from it rarely, and little.
#include "kernels/rmsnorm.h"

#include "kernels/arm/exp_neon.h"

#include <math.h>

static float inverse_rms(size_t n, float epsilon, const float *x) {
    float64x2_t a = vdupq_n_f64(0.0), b = a;
    for (size_t i = 0; i < n; i += 4) {
        const float32x4_t v = fl_load4(x + i, n - i);
        const float64x2_t low = vcvt_f64_f32(vget_low_f32(v)), high = vcvt_high_f64_f32(v);
        a = vfmaq_f64(a, low, low);
        b = vfmaq_f64(b, high, high);
    }
    return (float)(1.0 / sqrt(vaddvq_f64(vaddq_f64(a, b)) / (double)n + (double)epsilon));
}

FL_RMSNORM_FORWARD(neon) {
    for (size_t t = 0; t < rows; t++, x += n, y += n) {
        const float r = inverse_rms(n, epsilon, x);
        for (size_t i = 0; i < n; i += 4) {
            const float32x4_t v = vmulq_n_f32(fl_load4(x + i, n - i), r);
            fl_store4(y + i, n - i, vmulq_f32(v, fl_load4(gain + i, n - i)));
        }
    }
}

// sum_i dy[i] * gain[i] * x[i]
static double dot3(size_t n, const float *dy, const float *gain, const float *x) {
    float64x2_t a = vdupq_n_f64(0.0), b = a;
    for (size_t i = 0; i < n; i += 4) {
        const float32x4_t d = fl_load4(dy + i, n - i), g = fl_load4(gain + i, n - i);
        const float32x4_t v = fl_load4(x + i, n - i);
        const float64x2_t low = vmulq_f64(vcvt_f64_f32(vget_low_f32(d)),
                                          vcvt_f64_f32(vget_low_f32(g)));
        const float64x2_t high = vmulq_f64(vcvt_high_f64_f32(d), vcvt_high_f64_f32(g));
        a = vfmaq_f64(a, low, vcvt_f64_f32(vget_low_f32(v)));
        b = vfmaq_f64(b, high, vcvt_high_f64_f32(v));
    }
    return vaddvq_f64(vaddq_f64(a, b));
}

FL_RMSNORM_BACKWARD(neon) {
    for (size_t t = 0; t < rows; t++, x += n, dy += n, dx += n) {
        const float r = inverse_rms(n, epsilon, x);
        const double rd = (double)r;
        const float c = (float)(dot3(n, dy, gain, x) * rd * rd * rd / (double)n);
        for (size_t i = 0; i < n; i += 4) {
            const size_t left = n - i;
            const float32x4_t g = fl_load4(dy + i, left), v = fl_load4(x + i, left);
            if (dgain != NULL) {
                const float32x4_t part = vmulq_n_f32(vmulq_f32(g, v), r);
                fl_store4(dgain + i, left, vaddq_f32(fl_load4(dgain + i, left), part));
            }
            const float32x4_t along = vmulq_f32(vmulq_n_f32(fl_load4(gain + i, left), r), g);
            const float32x4_t all = vsubq_f32(along, vmulq_n_f32(v, c));
            fl_store4(dx + i, left, vaddq_f32(fl_load4(dx + i, left), all));
        }
    }
}
