#include "kernels/softmax_xent.h"

#include "kernels/arm/exp_neon.h"

#include <math.h>

// Lanes past the row's end become -infinity: probability zero.
FL_INLINE float32x4_t load_logits(size_t left, const float *p, float scale) {
    if (left >= 4) return vmulq_n_f32(vld1q_f32(p), scale);
    float part[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
    for (size_t i = 0; i < left; i++) part[i] = p[i] * scale;
    return vld1q_f32(part);
}

FL_XENT_UPDATE(neon) {
    for (size_t t = 0; t < tokens; t++, logits += ld) {
        float32x4_t top = vdupq_n_f32(-INFINITY);
        for (size_t j = 0; j < n; j += 4)
            top = vmaxq_f32(top, load_logits(n - j, logits + j, scale));
        const float max = vmaxvq_f32(top); // NaN if a logit is
        fl_lse *s = &state[t];
        if (max == -INFINITY) continue; // nothing is possible
        float64x2_t lanes = vdupq_n_f64(0.0);
        for (size_t j = 0; j < n; j += 4) {
            const float32x4_t l = load_logits(n - j, logits + j, scale);
            const float32x4_t p = fl_exp4(vsubq_f32(l, vdupq_n_f32(max)));
            lanes = vaddq_f64(lanes, vcvt_f64_f32(vget_low_f32(p)));
            lanes = vaddq_f64(lanes, vcvt_high_f64_f32(p));
        }
        const double sum = vaddvq_f64(lanes);
        if ((double)max > s->max) {
            s->sum = s->sum * exp(s->max - (double)max) + sum;
            s->max = (double)max;
        } else {
            s->sum += sum * exp((double)max - s->max);
        }
    }
}

// Four probabilities, of which those below `least` become it or zero; see fl_xent_chance.
static float32x4_t thin(float32x4_t p, float least, uint32_t draw) {
    static const uint32_t lanes[4] = {0, 1, 2, 3};
    const float32x4_t top = vdupq_n_f32(least);
    uint32x4_t h = vaddq_u32(vdupq_n_u32(draw), vld1q_u32(lanes));
    h = vmulq_u32(veorq_u32(h, vshrq_n_u32(h, 16)), vdupq_n_u32(0x7feb352d));
    h = vmulq_u32(veorq_u32(h, vshrq_n_u32(h, 15)), vdupq_n_u32(0x846ca68b));
    h = vshrq_n_u32(veorq_u32(h, vshrq_n_u32(h, 16)), 8);
    const float32x4_t chance = vmulq_n_f32(vmulq_n_f32(vcvtq_f32_u32(h), 0x1p-24f), least);
    const uint32x4_t taken = vcltq_f32(chance, p), below = vcltq_f32(p, top); // a NaN is not below
    const uint32x4_t thinned = vandq_u32(vreinterpretq_u32_f32(top), taken);
    return vbslq_f32(below, vreinterpretq_f32_u32(thinned), p);
}

FL_XENT_GRAD(neon) {
    for (size_t t = 0; t < tokens; t++, logits += ld, dlogits += ldd) {
        if (weight[t] == 0.0f) {
            for (size_t j = 0; j < n; j++) dlogits[j] = 0.0f;
            continue;
        }
        // The target's own logit is read before dlogits, which may be logits, is written.
        const size_t hit = target[t] < 0 ? SIZE_MAX : (size_t)target[t] - first; // may wrap: no hit
        const float own = hit < n ? logits[hit] : 0.0f;
        for (size_t j = 0; j < n; j += 4) {
            const float32x4_t l = fl_load4(logits + j, n - j);
            float32x4_t p = fl_exp4(vsubq_f32(l, vdupq_n_f32(lse[t])));
            if (least > 0) p = thin(p, least, draw[t] + (uint32_t)(first + j));
            fl_store4(dlogits + j, n - j, vmulq_n_f32(p, weight[t]));
        }
        if (hit < n) dlogits[hit] = (expf(own - lse[t]) - 1.0f) * weight[t];
    }
}
