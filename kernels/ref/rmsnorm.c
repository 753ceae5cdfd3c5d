// The definition. The sum of squares is made in double, so that it is as good as exact.
#include "kernels/rmsnorm.h"

#include <math.h>

static float inverse_rms(size_t n, float epsilon, const float *x) {
    double sum = 0.0;
    for (size_t i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
    return (float)(1.0 / sqrt(sum / (double)n + (double)epsilon));
}

FL_RMSNORM_FORWARD(ref) {
    for (size_t t = 0; t < rows; t++, x += n, y += n) {
        const float r = inverse_rms(n, epsilon, x);
        for (size_t i = 0; i < n; i++) y[i] = x[i] * r * gain[i];
    }
}

FL_RMSNORM_BACKWARD(ref) {
    for (size_t t = 0; t < rows; t++, x += n, dy += n, dx += n) {
        const float r = inverse_rms(n, epsilon, x);
        double dot = 0.0;
        for (size_t i = 0; i < n; i++) dot += (double)dy[i] * (double)gain[i] * (double)x[i];
        const float c = (float)(dot * (double)r * (double)r * (double)r / (double)n);
        for (size_t i = 0; i < n; i++) {
            const float g = dy[i];
            if (dgain != NULL) dgain[i] += g * x[i] * r;
            dx[i] += r * gain[i] * g - c * x[i];
        }
    }
}
