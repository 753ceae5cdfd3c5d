#include "kernels/rope.h"

#include <math.h>

void fl_rope_freq(uint32_t size, double base, const float *factors, double *freq) {
    for (uint32_t i = 0; i < size / 2; i++) {
        freq[i] = pow(base, -2.0 * (double)i / (double)size);
        if (factors != NULL) freq[i] /= (double)factors[i];
    }
}

void fl_rope_row(uint32_t pos, uint32_t size, const double *freq, float *cos_sin) {
    const uint32_t pairs = size / 2;
    for (uint32_t i = 0; i < pairs; i++) {
        const double angle = (double)pos * freq[i];
        cos_sin[i] = (float)cos(angle);
        cos_sin[pairs + i] = (float)sin(angle);
    }
}

void fl_rope_apply(uint32_t heads, uint32_t head_size, uint32_t size, bool half, bool inverse,
                   const float *cos_sin, float *x) {
    const uint32_t pairs = size / 2;
    const size_t step = half ? 1 : 2, distance = half ? pairs : 1;
    const float sign = inverse ? -1.0f : 1.0f;
    for (uint32_t h = 0; h < heads; h++, x += head_size) {
        for (uint32_t i = 0; i < pairs; i++) {
            float *p = x + i * step, *q = p + distance;
            const float c = cos_sin[i], s = sign * cos_sin[pairs + i], a = *p, b = *q;
            *p = a * c - b * s;
            *q = a * s + b * c;
        }
    }
}
