#include "kernels/adamw.h"

#include <math.h>

void fl_adamw_step(const fl_adamw *opts, size_t n, float *param, const float *grad, float *m,
                   float *v) {
    const float b1 = opts->beta1, b2 = opts->beta2, c1 = 1.0f - b1, c2 = 1.0f - b2;
    const float fix1 = (float)(1.0 / (1.0 - pow((double)b1, (double)opts->step)));
    const float fix2 = (float)(1.0 / (1.0 - pow((double)b2, (double)opts->step)));
    for (size_t i = 0; i < n; i++) {
        const float g = grad[i];
        m[i] = b1 * m[i] + c1 * g;
        v[i] = b2 * v[i] + c2 * (g * g);
        const float update = m[i] * fix1 / (sqrtf(v[i] * fix2) + opts->epsilon);
        param[i] -= opts->lr * (update + opts->decay * param[i]);
    }
}
