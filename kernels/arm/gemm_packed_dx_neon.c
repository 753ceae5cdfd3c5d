// A register block of 4 tokens by 16 columns runs down a strip of the float panel.
#include "kernels/arm/unpack_neon.h"
#include "kernels/dx_loop.h"

enum { TOKENS = 4, STRIP = FL_DX_STRIP };

FL_INLINE void four_floats(uint16x4_t codes, float32x4_t scale, float32x4_t minimum, float *out) {
    const float32x4_t c = vcvtq_f32_u32(vmovl_u16(codes));
    vst1q_f32(out, vaddq_f32(vmulq_f32(scale, c), minimum));
}

// One tile's 16 rows of the panel. A step's 64 bytes hold 4 columns of each row: four steps read as
// four interleaved streams of 32-bit words give a row's 16 columns.
static void dequantise(const uint8_t *tile, const uint8_t *codes, float *panel) {
    float scale[FL_PACKED_ROWS], minimum[FL_PACKED_ROWS];
    for (int i = 0; i < FL_PACKED_ROWS; i += 4) {
        vst1q_f32(scale + i, fl_halves_neon(tile + 2 * i));
        vst1q_f32(minimum + i, fl_halves_neon(tile + 32 + 2 * i));
    }
    for (size_t strip = 0; strip < FL_PACKED_GROUP / STRIP; strip++) {
        for (size_t row = 0; row < FL_PACKED_ROWS; row++) {
            const float32x4_t s = vdupq_n_f32(scale[row]), m = vdupq_n_f32(minimum[row]);
            float *out = panel + strip * FL_DX_STRIP_SIZE + row * STRIP;
            for (size_t step = 0; step < 4; step += 2) {
                const uint8_t *at = codes + 64 * (4 * strip + step) + 4 * row;
                uint32x2_t words =
                    vld1_lane_u32((const uint32_t *)(const void *)at, vdup_n_u32(0), 0);
                words = vld1_lane_u32((const uint32_t *)(const void *)(at + 64), words, 1);
                const uint16x8_t v = vmovl_u8(vreinterpret_u8_u32(words));
                four_floats(vget_low_u16(v), s, m, out + 4 * step);
                four_floats(vget_high_u16(v), s, m, out + 4 * step + 4);
            }
        }
    }
}

static void tile_floats(const uint8_t *tile, uint32_t bits, float *panel) {
    _Alignas(64) uint8_t codes[FL_PACKED_CODES];
    const uint8_t *data = tile + FL_PACKED_HEAD;
#define UNPACK(width) fl_unpack_neon(data, width, codes)
    FL_PACKED_WITH_BITS(bits, UNPACK)
#undef UNPACK
    dequantise(tile, codes, panel);
}

FL_INLINE float32x4_t add_lane(float32x4_t sum, float32x4_t w, float32x4_t d, int lane) {
    switch (lane) {
    case 0:
        return vfmaq_laneq_f32(sum, w, d, 0);
    case 1:
        return vfmaq_laneq_f32(sum, w, d, 1);
    case 2:
        return vfmaq_laneq_f32(sum, w, d, 2);
    default:
        return vfmaq_laneq_f32(sum, w, d, 3);
    }
}

// sum[tokens][4] += four rows of dy[tokens] times as many of a strip, one row after the other.
FL_INLINE void add_four(int tokens, const float *strip, const float *dy, size_t dy_stride,
                        float32x4_t *sum) {
    float32x4_t d[TOKENS];
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t++) d[t] = vld1q_f32(dy + (size_t)t * dy_stride);
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
        float32x4_t w[4];
        FL_STAY();
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) w[i] = vld1q_f32(strip + r * STRIP + 4 * i);
#pragma GCC unroll 16
        for (int i = 0; i < 4 * tokens; i++) sum[i] = add_lane(sum[i], w[i % 4], d[i / 4], r);
    }
}

// sum[tokens][4] += dy[tokens] of the rows times a strip: of its first rows, or of those listed.
FL_INLINE void add_rows(int tokens, const float *strip, const fl_dx_rows *rows, bool listed,
                        const float *dy, size_t dy_stride, float32x4_t *sum) {
    size_t n = 0;
    for (; !listed && n + 4 <= rows->count; n += 4)
        add_four(tokens, strip + n * STRIP, dy + n, dy_stride, sum);
#pragma GCC unroll 1
    for (; n < rows->count; n++) {
        const size_t r = listed ? rows->row[n] : n;
        float32x4_t w[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) w[i] = vld1q_f32(strip + r * STRIP + 4 * i);
#pragma GCC unroll 4
        for (int t = 0; t < tokens; t++) {
            const float d = dy[(size_t)t * dy_stride + r];
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) sum[4 * t + i] = vfmaq_n_f32(sum[4 * t + i], w[i], d);
        }
    }
}

// dx[tokens][16] (+)= dy[tokens][rows] times a strip.
FL_INLINE void block(int tokens, const float *strip, const fl_dx_rows *rows, const float *dy,
                     size_t dy_stride, float *dx, size_t dx_stride, bool accumulate) {
    float32x4_t sum[4 * TOKENS];
#pragma GCC unroll 16
    for (int i = 0; i < 4 * tokens; i++) {
        const float *old = dx + (size_t)(i / 4) * dx_stride + 4 * (i % 4);
        sum[i] = accumulate ? vld1q_f32(old) : vdupq_n_f32(0.0f);
    }
    if (rows->all)
        add_rows(tokens, strip, rows, false, dy, dy_stride, sum);
    else
        add_rows(tokens, strip, rows, true, dy, dy_stride, sum);
#pragma GCC unroll 16
    for (int i = 0; i < 4 * tokens; i++)
        vst1q_f32(dx + (size_t)(i / 4) * dx_stride + 4 * (i % 4), sum[i]);
}

static void block_any(uint32_t tokens, const float *strip, const fl_dx_rows *rows, const float *dy,
                      size_t dy_stride, float *dx, size_t dx_stride, bool accumulate) {
    switch (tokens) {
    case 1:
        block(1, strip, rows, dy, dy_stride, dx, dx_stride, accumulate);
        break;
    case 2:
        block(2, strip, rows, dy, dy_stride, dx, dx_stride, accumulate);
        break;
    case 3:
        block(3, strip, rows, dy, dy_stride, dx, dx_stride, accumulate);
        break;
    default:
        block(4, strip, rows, dy, dy_stride, dx, dx_stride, accumulate);
        break;
    }
}

void fl_gemm_packed_dx_neon(const fl_packed *w, const fl_packed_range *range, uint32_t tokens,
                            const float *dy, size_t dy_stride, float *dx, size_t dx_stride,
                            bool accumulate, void *scratch) {
    static const fl_dx_ops ops = {.tokens_max = TOKENS, .tile = tile_floats, .block = block_any};
    fl_dx_loop(&ops, w, range, tokens, dy, dy_stride, dx, dx_stride, accumulate, scratch);
}
