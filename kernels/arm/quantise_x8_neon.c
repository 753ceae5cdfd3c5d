#include "kernels/quantise_x8.h"

#include <arm_neon.h>
#include <math.h>
#include <string.h>

static void group(const float *x, int8_t *codes, float *ret_scale, float *ret_sum) {
    uint32x4_t max = vdupq_n_u32(0);
    for (int i = 0; i < FL_X8_GROUP; i += 4) {
        const uint32x4_t bits = vreinterpretq_u32_f32(vld1q_f32(x + i));
        max = vmaxq_u32(max, vandq_u32(bits, vdupq_n_u32(0x7fffffff)));
    }
    const uint32_t max_bits = vmaxvq_u32(max);
    float maxabs;
    memcpy(&maxabs, &max_bits, sizeof(maxabs));
    if (max_bits >= 0x7f800000u || maxabs < 0x1p-100f) {
        memset(codes, 0, FL_X8_GROUP);
        *ret_scale = *ret_sum = max_bits >= 0x7f800000u ? NAN : 0.0f;
        return;
    }
    const float32x4_t inverse = vdupq_n_f32(127.0f / maxabs);
    int32x4_t sum = vdupq_n_s32(0);
    for (int i = 0; i < FL_X8_GROUP; i += 16) {
        int16x4_t q[4]; // conversion rounds half to even
#pragma GCC unroll 4
        for (int n = 0; n < 4; n++) {
            const int32x4_t v = vcvtnq_s32_f32(vmulq_f32(vld1q_f32(x + i + 4 * n), inverse));
            sum = vaddq_s32(sum, v);
            q[n] = vmovn_s32(v);
        }
        vst1q_s8(codes + i, vcombine_s8(vmovn_s16(vcombine_s16(q[0], q[1])),
                                        vmovn_s16(vcombine_s16(q[2], q[3]))));
    }
    *ret_scale = maxabs / 127.0f;
    *ret_sum = *ret_scale * (float)vaddvq_s32(sum);
}

void fl_quantise_x8_neon(const float *x, uint32_t cols, const fl_x8 *ret, uint32_t token) {
    for (uint32_t g = 0; g < ret->groups; g++) {
        const size_t at = (size_t)token * ret->groups + g;
        const uint32_t left = cols - g * FL_X8_GROUP;
        float tail[FL_X8_GROUP] = {
            0}; // a last group that is not full, so that nothing is over-read
        const float *from = x + (size_t)g * FL_X8_GROUP;
        if (left < FL_X8_GROUP) from = memcpy(tail, from, left * sizeof(*tail));
        group(from, ret->codes + at * FL_X8_GROUP, ret->scales + at, ret->sums + at);
    }
}
