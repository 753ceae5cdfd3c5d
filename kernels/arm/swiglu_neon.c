#include "kernels/swiglu.h"

#include "kernels/arm/exp_neon.h"

FL_SWIGLU_FORWARD(neon) {
    const float32x4_t one = vdupq_n_f32(1.0f);
    for (size_t i = 0; i < n; i += 4) {
        const size_t left = n - i;
        const float32x4_t g = fl_load4(gate + i, left), u = fl_load4(up + i, left);
        const float32x4_t silu = vdivq_f32(g, vaddq_f32(one, fl_exp4(vnegq_f32(g))));
        fl_store4(act + i, left, vmulq_f32(silu, u));
    }
}

FL_SWIGLU_BACKWARD(neon) {
    const float32x4_t one = vdupq_n_f32(1.0f);
    for (size_t i = 0; i < n; i += 4) {
        const size_t left = n - i;
        const float32x4_t g = fl_load4(gate + i, left), u = fl_load4(up + i, left);
        const float32x4_t d = fl_load4(dact + i, left);
        const float32x4_t s = vdivq_f32(one, vaddq_f32(one, fl_exp4(vnegq_f32(g))));
        const float32x4_t slope = vmulq_f32(s, vfmaq_f32(one, g, vsubq_f32(one, s)));
        fl_store4(dgate + i, left, vmulq_f32(vmulq_f32(d, u), slope)); // s (1 + g (1 - s))
        fl_store4(dup + i, left, vmulq_f32(d, vmulq_f32(g, s)));
    }
}
