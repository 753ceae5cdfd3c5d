// The types that whole models are published in; the others are read by the definition. Products and
// sums are rounded one by one, as there.
#include "kernels/ggml.h"

#include <arm_neon.h>

static float32x4_t halves_at(const uint8_t *p) {
    return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p)));
}

static float half_at(const uint8_t *p) {
    const uint16_t bits = (uint16_t)(p[0] | p[1] << 8);
    return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(bits))), 0);
}

// Sixteen signed bytes as floats.
static float32x4x4_t floats_of(int8x16_t q) {
    const int16x8_t low = vmovl_s8(vget_low_s8(q)), high = vmovl_high_s8(q);
    return (float32x4x4_t){{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))),
                            vcvtq_f32_s32(vmovl_high_s16(low)),
                            vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
                            vcvtq_f32_s32(vmovl_high_s16(high))}};
}

// out[16] = d * q + m
static void affine16(int8x16_t q, float d, float m, float *out) {
    const float32x4x4_t v = floats_of(q);
    for (int i = 0; i < 4; i++)
        vst1q_f32(out + 4 * i, vaddq_f32(vmulq_n_f32(v.val[i], d), vdupq_n_f32(m)));
}

// out[16] = d * q: adding a zero instead would lose the sign of -0.
static void scale16(int8x16_t q, float d, float *out) {
    const float32x4x4_t v = floats_of(q);
    for (int i = 0; i < 4; i++) vst1q_f32(out + 4 * i, vmulq_n_f32(v.val[i], d));
}

static int8x16_t low_nibbles(uint8x16_t q) {
    return vreinterpretq_s8_u8(vandq_u8(q, vdupq_n_u8(15)));
}

static int8x16_t high_nibbles(uint8x16_t q) {
    return vreinterpretq_s8_u8(vshrq_n_u8(q, 4));
}

static void f16(const uint8_t *src, size_t n, float *out) {
    size_t i = 0;
    for (; i + 4 <= n; i += 4) vst1q_f32(out + i, halves_at(src + 2 * i));
    for (; i < n; i++) out[i] = half_at(src + 2 * i);
}

static void q4_0(const uint8_t *src, size_t blocks, float *out) {
    for (; blocks > 0; blocks--, src += 18, out += 32) {
        const float d = half_at(src);
        const uint8x16_t q = vld1q_u8(src + 2);
        scale16(vsubq_s8(low_nibbles(q), vdupq_n_s8(8)), d, out);
        scale16(vsubq_s8(high_nibbles(q), vdupq_n_s8(8)), d, out + 16);
    }
}

static void q4_1(const uint8_t *src, size_t blocks, float *out) {
    for (; blocks > 0; blocks--, src += 20, out += 32) {
        const float d = half_at(src), m = half_at(src + 2);
        const uint8x16_t q = vld1q_u8(src + 4);
        affine16(low_nibbles(q), d, m, out);
        affine16(high_nibbles(q), d, m, out + 16);
    }
}

static void q8_0(const uint8_t *src, size_t blocks, float *out) {
    for (; blocks > 0; blocks--, src += 34, out += 32) {
        const float d = half_at(src);
        scale16(vreinterpretq_s8_u8(vld1q_u8(src + 2)), d, out);
        scale16(vreinterpretq_s8_u8(vld1q_u8(src + 18)), d, out + 16);
    }
}

static void q6_k(const uint8_t *src, size_t blocks, float *out) {
    for (; blocks > 0; blocks--, src += 210, out += 256) {
        const float d = half_at(src + 208);
        for (int s = 0; s < 16; s++) { // 16 weights under one scale
            const int h = s / 8, j = s / 2 % 4, l = s % 2 * 16;
            const uint8x16_t ql = vld1q_u8(src + 64 * h + 32 * (j % 2) + l);
            const uint8x16_t qh = vshlq_u8(vld1q_u8(src + 128 + 32 * h + l),
                                           vdupq_n_s8((int8_t)(-2 * j)));
            const uint8x16_t high = vshlq_n_u8(vandq_u8(qh, vdupq_n_u8(3)), 4);
            const int8x16_t low = j < 2 ? low_nibbles(ql) : high_nibbles(ql);
            const int8x16_t q = vorrq_s8(low, vreinterpretq_s8_u8(high));
            scale16(vsubq_s8(q, vdupq_n_s8(32)), d * (float)(int8_t)src[192 + s], out + 16 * s);
        }
    }
}

void fl_ggml_row_to_f32_neon(uint32_t id, const uint8_t *src, size_t n, float *out) {
    switch (id) {
    case FL_GGML_F16: f16(src, n, out); break;
    case FL_GGML_Q4_0: q4_0(src, n / 32, out); break;
    case FL_GGML_Q4_1: q4_1(src, n / 32, out); break;
    case FL_GGML_Q8_0: q8_0(src, n / 32, out); break;
    case FL_GGML_Q6_K: q6_k(src, n / 256, out); break;
    default: fl_ggml_row_to_f32_ref(id, src, n, out); break;
    }
}
