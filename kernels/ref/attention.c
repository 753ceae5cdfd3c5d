// The definition: one query at a time, one row at a time, blocks as the contract says.
#include "kernels/attention.h"

#include <math.h>

static float dot(uint32_t n, const float *x, const float *y) {
    float sum = 0.0f;
    for (uint32_t i = 0; i < n; i++) sum += x[i] * y[i];
    return sum;
}

// One block of `count` rows into the running (max, sum, out).
static void forward_block(uint32_t size, uint32_t count, size_t stride, float scale, const float *q,
                          const float *k, const float *v, float *max, float *sum, float *out) {
    float p[FL_ATTENTION_BLOCK], top = *max;
    for (uint32_t j = 0; j < count; j++) {
        p[j] = dot(size, q, k + j * stride) * scale;
        top = fmaxf(top, p[j]);
    }
    const float shrink = expf(*max - top);
    *max = top;
    *sum *= shrink;
    for (uint32_t i = 0; i < size; i++) out[i] *= shrink;
    for (uint32_t j = 0; j < count; j++) {
        p[j] = expf(p[j] - top);
        *sum += p[j];
        for (uint32_t i = 0; i < size; i++) out[i] += p[j] * v[j * stride + i];
    }
}

FL_ATTENTION_FORWARD(ref) {
    const uint32_t size = a->head_size, group = a->heads / a->kv_heads;
    const float scale = 1.0f / sqrtf((float)size);
    for (uint32_t t = token_begin; t < token_end; t++) {
        for (uint32_t h = head_begin; h < head_end; h++) {
            const size_t at = t * a->q_stride + (size_t)h * size;
            const size_t column = (size_t)(h / group) * size;
            float *out = a->out + at, max = -INFINITY, sum = 0.0f;
            for (uint32_t i = 0; i < size; i++) out[i] = 0.0f;
            const uint32_t end = a->kv_row[t] + 1;
            for (uint32_t row = a->kv_begin[t]; row < end; row += FL_ATTENTION_BLOCK) {
                const uint32_t left = end - row;
                const uint32_t count = left < FL_ATTENTION_BLOCK ? left : FL_ATTENTION_BLOCK;
                const size_t kv = row * a->kv_stride + column;
                forward_block(size, count, a->kv_stride, scale, a->q + at, a->k + kv, a->v + kv,
                              &max, &sum, out);
            }
            for (uint32_t i = 0; i < size; i++) out[i] /= sum;
            if (a->lse != NULL) a->lse[(size_t)t * a->heads + h] = max + logf(sum);
        }
    }
}

// Query head h of token t against the rows that it sees.
static void backward_query(const fl_attention *a, const fl_attention_grad *g, uint32_t t,
                           uint32_t h) {
    const uint32_t size = a->head_size, group = a->heads / a->kv_heads;
    const float scale = 1.0f / sqrtf((float)size);
    const size_t at = t * a->q_stride + (size_t)h * size;
    const float *q = a->q + at, *dout = g->dout + at, lse = a->lse[(size_t)t * a->heads + h];
    const float delta = dot(size, dout, a->out + at);
    for (uint32_t row = a->kv_begin[t]; row <= a->kv_row[t]; row++) {
        const size_t kv = row * a->kv_stride + (size_t)(h / group) * size;
        const float p = expf(dot(size, q, a->k + kv) * scale - lse);
        const float ds = p * (dot(size, dout, a->v + kv) - delta) * scale;
        for (uint32_t i = 0; i < size; i++) {
            g->dq[at + i] += ds * a->k[kv + i];
            g->dk[kv + i] += ds * q[i];
            g->dv[kv + i] += p * dout[i];
        }
    }
}

FL_ATTENTION_BACKWARD(ref) {
    const uint32_t group = a->heads / a->kv_heads;
    for (uint32_t t = 0; t < tokens; t++)
        for (uint32_t h = kv_head_begin * group; h < kv_head_end * group; h++)
            backward_query(a, g, t, h);
}
