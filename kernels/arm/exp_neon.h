// exp_neon.h: what the NEON variants of the float kernels share; for files of this folder only.
// Everything is static: no copy made here may become another file's.
//
// exp: |error| <= 2 ulp for results that are normal numbers; results below 2^-126 are rounded once
// more; 0 below -103.98, infinity above 88.73; NaN stays NaN.
#ifndef FL_KERNELS_ARM_EXP_NEON_H
#define FL_KERNELS_ARM_EXP_NEON_H

#include <arm_neon.h>
#include <stddef.h>
#include <stdint.h>

#define FL_INLINE static inline __attribute__((always_inline, unused))
#define FL_UNROLL _Pragma("GCC unroll 16")

// The first n of four floats, n = 1..4; the other lanes are zero.
FL_INLINE float32x4_t fl_load4(const float *p, size_t n) {
    if (n >= 4) return vld1q_f32(p);
    float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (size_t i = 0; i < n; i++) part[i] = p[i];
    return vld1q_f32(part);
}

FL_INLINE void fl_store4(float *p, size_t n, float32x4_t v) {
    if (n >= 4) {
        vst1q_f32(p, v);
        return;
    }
    float part[4];
    vst1q_f32(part, v);
    for (size_t i = 0; i < n; i++) p[i] = part[i];
}

// Sums of the lanes of four vectors; each is (0 + 1) + (2 + 3).
FL_INLINE float32x4_t fl_sum4(const float32x4_t *v) {
    return vpaddq_f32(vpaddq_f32(v[0], v[1]), vpaddq_f32(v[2], v[3]));
}

// x = i ln2 + r, |r| <= ln2 / 2; exp(r) by its series to r^7 / 7!, whose remainder is below 6e-9;
// 2^i in two factors, so that results near both ends of the range need no branch.
FL_INLINE float32x4_t fl_exp4(float32x4_t x) {
    x = vmaxq_f32(x, vdupq_n_f32(-104.0f)); // a NaN on either side gives NaN
    x = vminq_f32(x, vdupq_n_f32(89.0f));
    const float32x4_t i = vrndnq_f32(vmulq_n_f32(x, 0x1.715476p0f));
    float32x4_t r = vfmsq_n_f32(x, i, 0x1.62e4p-1f); // exact: 15 bits by 8
    r = vfmsq_n_f32(r, i, 0x1.7f7d1cp-20f);
    float32x4_t p = vdupq_n_f32(1.0f / 5040);
    p = vfmaq_f32(vdupq_n_f32(1.0f / 720), p, r);
    p = vfmaq_f32(vdupq_n_f32(1.0f / 120), p, r);
    p = vfmaq_f32(vdupq_n_f32(1.0f / 24), p, r);
    p = vfmaq_f32(vdupq_n_f32(1.0f / 6), p, r);
    p = vfmaq_f32(vdupq_n_f32(0.5f), p, r);
    p = vfmaq_f32(vdupq_n_f32(1.0f), p, r);
    p = vfmaq_f32(vdupq_n_f32(1.0f), p, r);
    const int32x4_t n = vcvtq_s32_f32(i), half = vshrq_n_s32(n, 1), bias = vdupq_n_s32(127);
    const int32x4_t a = vshlq_n_s32(vaddq_s32(half, bias), 23);
    const int32x4_t b = vshlq_n_s32(vaddq_s32(vsubq_s32(n, half), bias), 23);
    return vmulq_f32(vmulq_f32(p, vreinterpretq_f32_s32(a)), vreinterpretq_f32_s32(b));
}

#endif
