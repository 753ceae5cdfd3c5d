#include "kernels/swiglu.h"

#include <math.h>

FL_SWIGLU_FORWARD(ref) {
    for (size_t i = 0; i < n; i++) act[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}

FL_SWIGLU_BACKWARD(ref) {
    for (size_t i = 0; i < n; i++) {
        const float g = gate[i], u = up[i], d = dact[i], s = 1.0f / (1.0f + expf(-g));
        dgate[i] = d * u * (s * (1.0f + g * (1.0f - s)));
        dup[i] = d * (g * s);
    }
}
