// Queries go in blocks of up to TOKENS against blocks of FL_ATTENTION_BLOCK rows, so that rows come
// from the first-level cache. The order of a query's own arithmetic does not know of its
// neighbours.
#include "kernels/attention_run.h"

#include "kernels/arm/exp_neon.h"

#include <math.h>

enum { TOKENS = 16, ROWS = FL_ATTENTION_BLOCK };

// Inner products of x[size] with `count` rows, 1 <= count <= 4; the other lanes repeat the last.
FL_INLINE float32x4_t dot4(const size_t size, const float *x, const float *rows, size_t stride,
                           size_t count) {
    float32x4_t acc[4], more[4]; // two chains a row: latency
    const float *row[4];
    FL_UNROLL for (size_t j = 0; j < 4; j++) {
        acc[j] = more[j] = vdupq_n_f32(0.0f);
        row[j] = rows + (j < count ? j : count - 1) * stride;
    }
    size_t i = 0;
    for (; i + 8 <= size; i += 8) {
        const float32x4_t a = vld1q_f32(x + i), b = vld1q_f32(x + i + 4);
        FL_UNROLL for (size_t j = 0; j < 4; j++) {
            acc[j] = vfmaq_f32(acc[j], a, vld1q_f32(row[j] + i));
            more[j] = vfmaq_f32(more[j], b, vld1q_f32(row[j] + i + 4));
        }
    }
    for (; i < size; i += 4) {
        const float32x4_t a = fl_load4(x + i, size - i);
        FL_UNROLL for (size_t j = 0; j < 4; j++)
            acc[j] = vfmaq_f32(acc[j], a, fl_load4(row[j] + i, size - i));
    }
    FL_UNROLL for (size_t j = 0; j < 4; j++) acc[j] = vaddq_f32(acc[j], more[j]);
    return fl_sum4(acc);
}

// to = to * shrink + sum_j coef[j * step] * rows[j], nv vectors wide, the last of `last` lanes.
FL_INLINE void weigh_vectors(const size_t nv, const size_t last, float *to, float shrink,
                             const float *coef, size_t step, const float *rows, size_t stride,
                             size_t count) {
    float32x4_t acc[16];
    FL_UNROLL for (size_t b = 0; b < nv; b++)
        acc[b] = vmulq_n_f32(fl_load4(to + 4 * b, b + 1 < nv ? 4 : last), shrink);
    for (size_t j = 0; j < count; j++, rows += stride) {
        const float c = coef[j * step];
        FL_UNROLL for (size_t b = 0; b < nv; b++)
            acc[b] = vfmaq_n_f32(acc[b], fl_load4(rows + 4 * b, b + 1 < nv ? 4 : last), c);
    }
    FL_UNROLL for (size_t b = 0; b < nv; b++)
        fl_store4(to + 4 * b, b + 1 < nv ? 4 : last, acc[b]);
}

FL_INLINE void weigh(const size_t size, float *to, float shrink, const float *coef, size_t step,
                     const float *rows, size_t stride, size_t count) {
    size_t i = 0;
    for (; i + 64 <= size; i += 64)
        weigh_vectors(16, 4, to + i, shrink, coef, step, rows + i, stride, count);
    for (; i + 16 <= size; i += 16)
        weigh_vectors(4, 4, to + i, shrink, coef, step, rows + i, stride, count);
    for (; i + 4 <= size; i += 4)
        weigh_vectors(1, 4, to + i, shrink, coef, step, rows + i, stride, count);
    if (i < size)
        weigh_vectors(1, size - i, to + i, shrink, coef, step, rows + i, stride, count);
}

static float exp1(float x) {
    return vgetq_lane_f32(fl_exp4(vdupq_n_f32(x)), 0);
}

// One query against one block of rows: into the running maximum, sum and output.
FL_INLINE void forward_block(const size_t size, const float *q, const float *k, const float *v,
                             size_t stride, size_t count, float scale, float *max, float *sum,
                             float *out) {
    static const uint32_t lanes[4] = {0, 1, 2, 3};
    const size_t groups = (count + 3) / 4;
    float32x4_t s[ROWS / 4], top = vdupq_n_f32(-INFINITY), total = vdupq_n_f32(0.0f);
    for (size_t g = 0; g < groups; g++) {
        const size_t left = count - 4 * g < 4 ? count - 4 * g : 4;
        const uint32x4_t seen = vcltq_u32(vld1q_u32(lanes), vdupq_n_u32((uint32_t)left));
        const float32x4_t d = dot4(size, q, k + 4 * g * stride, stride, left);
        s[g] = vbslq_f32(seen, vmulq_n_f32(d, scale), vdupq_n_f32(-INFINITY));
        top = vmaxq_f32(top, s[g]);
    }
    const float block_max = vmaxvq_f32(top), new_max = *max > block_max ? *max : block_max;
    float p[ROWS];
    for (size_t g = 0; g < groups; g++) {
        s[g] = fl_exp4(vsubq_f32(s[g], vdupq_n_f32(new_max)));
        total = vaddq_f32(total, s[g]);
        vst1q_f32(p + 4 * g, s[g]);
    }
    const float shrink = exp1(*max - new_max);
    *max = new_max;
    *sum = *sum * shrink + vaddvq_f32(total);
    weigh(size, out, shrink, p, 1, v, stride, count);
}

// Tokens [t, t + count) of one run, one head.
FL_INLINE void forward_run(const size_t size, const fl_attention *a, uint32_t t, uint32_t count,
                           uint32_t h) {
    const float scale = 1.0f / sqrtf((float)size);
    const size_t column = h / (a->heads / a->kv_heads) * size;
    const uint32_t begin = a->kv_begin[t], end = a->kv_row[t + count - 1] + 1;
    float max[TOKENS], sum[TOKENS];
    for (uint32_t i = 0; i < count; i++) {
        float *out = a->out + (t + i) * a->q_stride + h * size;
        max[i] = -INFINITY, sum[i] = 0.0f;
        for (size_t d = 0; d < size; d++) out[d] = 0.0f;
    }
    for (uint32_t row = begin; row < end; row += ROWS) {
        const size_t kv = row * a->kv_stride + column;
        for (uint32_t i = 0; i < count; i++) {
            const uint32_t last = a->kv_row[t + i];
            if (last < row) continue;
            const size_t seen = last - row + 1 < ROWS ? last - row + 1 : ROWS;
            const size_t at = (t + i) * a->q_stride + h * size;
            forward_block(size, a->q + at, a->k + kv, a->v + kv, a->kv_stride, seen, scale, &max[i],
                          &sum[i], a->out + at);
        }
    }
    for (uint32_t i = 0; i < count; i++) {
        float *out = a->out + (t + i) * a->q_stride + h * size;
        for (size_t d = 0; d < size; d++) out[d] /= sum[i];
        if (a->lse != NULL) a->lse[(size_t)(t + i) * a->heads + h] = max[i] + logf(sum[i]);
    }
}

FL_ATTENTION_FORWARD(neon) {
    for (uint32_t t = token_begin; t < token_end;) {
        const uint32_t count = fl_attention_run(a, t, token_end, TOKENS);
        for (uint32_t h = head_begin; h < head_end; h++) {
            if (a->head_size == 64)
                forward_run(64, a, t, count, h);
            else
                forward_run(a->head_size, a, t, count, h);
        }
        t += count;
    }
}

// What one block of tokens and rows leaves between the two halves of the backward pass.
typedef struct square {
    float p[TOKENS][ROWS], ds[TOKENS][ROWS];
} square;

// p and ds of one query against `count` rows.
FL_INLINE void backward_row(const size_t size, const float *q, const float *dout, const float *k,
                            const float *v, size_t stride, size_t count, float scale, float lse,
                            float delta, float *p, float *ds) {
    for (size_t j = 0; j < count; j += 4) {
        const size_t left = count - j < 4 ? count - j : 4;
        const float32x4_t s = vmulq_n_f32(dot4(size, q, k + j * stride, stride, left), scale);
        const float32x4_t pv = fl_exp4(vsubq_f32(s, vdupq_n_f32(lse)));
        const float32x4_t dp = dot4(size, dout, v + j * stride, stride, left);
        vst1q_f32(p + j, pv);
        vst1q_f32(ds + j, vmulq_f32(pv, vmulq_n_f32(vsubq_f32(dp, vdupq_n_f32(delta)), scale)));
    }
}

// Tokens [t, t + count) of one run, one query head, rows [row, row + ROWS) or to the run's end.
FL_INLINE void backward_block(const size_t size, const fl_attention *a, const fl_attention_grad *g,
                              uint32_t t, uint32_t count, uint32_t h, uint32_t row,
                              const float *delta) {
    const float scale = 1.0f / sqrtf((float)size);
    const size_t kv = row * a->kv_stride + h / (a->heads / a->kv_heads) * size;
    const uint32_t first_row = a->kv_row[t], last_row = a->kv_row[t + count - 1];
    square sq;
    for (uint32_t i = 0; i < count; i++) {
        if (first_row + i < row) continue;
        const size_t seen = first_row + i - row + 1 < ROWS ? first_row + i - row + 1 : ROWS;
        const size_t at = (t + i) * a->q_stride + h * size;
        backward_row(size, a->q + at, g->dout + at, a->k + kv, a->v + kv, a->kv_stride, seen, scale,
                     a->lse[(size_t)(t + i) * a->heads + h], delta[i], sq.p[i], sq.ds[i]);
        weigh(size, g->dq + at, 1.0f, sq.ds[i], 1, a->k + kv, a->kv_stride, seen);
    }
    const uint32_t rows = last_row - row + 1 < ROWS ? last_row - row + 1 : ROWS;
    for (uint32_t j = 0; j < rows; j++) {
        // Tokens from `from` on see row row + j.
        const uint32_t from = row + j > first_row ? row + j - first_row : 0;
        const size_t at = (t + from) * a->q_stride + h * size, to = kv + j * a->kv_stride;
        const size_t left = count - from;
        weigh(size, g->dk + to, 1.0f, &sq.ds[from][j], ROWS, a->q + at, a->q_stride, left);
        weigh(size, g->dv + to, 1.0f, &sq.p[from][j], ROWS, g->dout + at, a->q_stride, left);
    }
}

FL_INLINE void backward_run(const size_t size, const fl_attention *a, const fl_attention_grad *g,
                            uint32_t t, uint32_t count, uint32_t h) {
    float delta[TOKENS];
    for (uint32_t i = 0; i < count; i++) {
        const size_t at = (t + i) * a->q_stride + h * size;
        delta[i] = vgetq_lane_f32(dot4(size, g->dout + at, a->out + at, 0, 1), 0);
    }
    for (uint32_t row = a->kv_begin[t]; row <= a->kv_row[t + count - 1]; row += ROWS)
        backward_block(size, a, g, t, count, h, row, delta);
}

FL_ATTENTION_BACKWARD(neon) {
    const uint32_t group = a->heads / a->kv_heads;
    for (uint32_t t = 0; t < tokens;) {
        const uint32_t count = fl_attention_run(a, t, tokens, TOKENS);
        for (uint32_t h = kv_head_begin * group; h < kv_head_end * group; h++) {
            if (a->head_size == 64)
                backward_run(64, a, g, t, count, h);
            else
                backward_run(a->head_size, a, g, t, count, h);
        }
        t += count;
    }
}
