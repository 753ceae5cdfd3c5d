// The types of 256 elements a block: sub-blocks with integer scales under one half-precision scale.
#include "kernels/ggml.h"
#include "kernels/packed.h"

static float half_at(const uint8_t *p) {
    return fl_f16_to_f32((uint16_t)(p[0] | p[1] << 8));
}

// Two bits of weight i, as Q2_K and Q3_K store them.
static int two_bits(const uint8_t *qs, int i) {
    return qs[32 * (i / 128) + i % 32] >> 2 * (i / 32 % 4) & 3;
}

void fl_ggml_Q2_K_to_f32(const uint8_t *src, size_t blocks, float *out) {
    for (; blocks > 0; blocks--, src += 84, out += 256) {
        const uint8_t *scales = src, *qs = src + 16;
        const float d = half_at(src + 80), dmin = half_at(src + 82);
        for (int i = 0; i < 256; i++) {
            const int s = scales[i / 16];
            out[i] = d * (float)(s & 15) * (float)two_bits(qs, i) - dmin * (float)(s >> 4);
        }
    }
}

void fl_ggml_Q3_K_to_f32(const uint8_t *src, size_t blocks, float *out) {
    for (; blocks > 0; blocks--, src += 110, out += 256) {
        const uint8_t *hmask = src, *qs = src + 32, *scales = src + 96;
        const float d = half_at(src + 108);
        for (int i = 0; i < 256; i++) {
            const int s = i / 16;
            const int low = s < 8 ? scales[s] & 15 : scales[s - 8] >> 4;
            const int scale = low | (scales[8 + s % 4] >> 2 * (s / 4) & 3) << 4;
            const int q = two_bits(qs, i) - (hmask[i % 32] >> i / 32 & 1 ? 0 : 4);
            out[i] = d * (float)(scale - 32) * (float)q;
        }
    }
}

// The s-th scale and minimum of Q4_K and Q5_K, 6 bits each.
static void scale_min(const uint8_t *scales, int s, int *scale, int *min) {
    if (s < 4) {
        *scale = scales[s] & 63;
        *min = scales[s + 4] & 63;
    } else {
        *scale = (scales[s + 4] & 15) | (scales[s - 4] >> 6) << 4;
        *min = scales[s + 4] >> 4 | (scales[s] >> 6) << 4;
    }
}

void fl_ggml_Q4_K_to_f32(const uint8_t *src, size_t blocks, float *out) {
    for (; blocks > 0; blocks--, src += 144, out += 256) {
        const uint8_t *qs = src + 16;
        const float d = half_at(src), dmin = half_at(src + 2);
        for (int s = 0; s < 8; s++) {
            int scale, min;
            scale_min(src + 4, s, &scale, &min);
            const float ds = d * (float)scale, m = dmin * (float)min;
            for (int i = 0; i < 32; i++)
                out[32 * s + i] = ds * (float)(qs[32 * (s / 2) + i] >> 4 * (s % 2) & 15) - m;
        }
    }
}

void fl_ggml_Q5_K_to_f32(const uint8_t *src, size_t blocks, float *out) {
    for (; blocks > 0; blocks--, src += 176, out += 256) {
        const uint8_t *qh = src + 16, *qs = src + 48;
        const float d = half_at(src), dmin = half_at(src + 2);
        for (int s = 0; s < 8; s++) {
            int scale, min;
            scale_min(src + 4, s, &scale, &min);
            const float ds = d * (float)scale, m = dmin * (float)min;
            for (int i = 0; i < 32; i++) {
                const int q = qs[32 * (s / 2) + i] >> 4 * (s % 2) & 15;
                out[32 * s + i] = ds * (float)(q | (qh[i] >> s & 1) << 4) - m;
            }
        }
    }
}

void fl_ggml_Q6_K_to_f32(const uint8_t *src, size_t blocks, float *out) {
    for (; blocks > 0; blocks--, src += 210, out += 256) {
        const uint8_t *ql = src, *qh = src + 128, *scales = src + 192;
        const float d = half_at(src + 208);
        for (int i = 0; i < 256; i++) {
            const int h = i / 128, j = i / 32 % 4, l = i % 32;
            const int low = ql[64 * h + l + 32 * (j % 2)] >> 4 * (j / 2) & 15;
            const int q = low | (qh[32 * h + l] >> 2 * j & 3) << 4;
            out[i] = d * (float)(int8_t)scales[i / 16] * (float)(q - 32);
        }
    }
}
