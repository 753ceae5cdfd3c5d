// Queries go in blocks of up to TOKENS against blocks of FL_ATTENTION_BLOCK rows, so that rows come
// from the first-level cache. The order of a query's own arithmetic does not know of its
// neighbours.
#include "kernels/attention_run.h"

#include "kernels/x86/exp_avx2.h"

#include <math.h>

enum { TOKENS = 16, ROWS = FL_ATTENTION_BLOCK };

// Sums of the lanes of eight vectors; each is ((0+1) + (2+3)) + ((4+5) + (6+7)).
FL_INLINE __m256 sum8(const __m256 *v) {
    const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

// Inner products of x[size] with `count` rows, 1 <= count <= 8; the other lanes repeat the last.
FL_INLINE __m256 dot8(const size_t size, const float *x, const float *rows, size_t stride,
                      size_t count) {
    __m256 acc[8];
    const float *row[8];
    FL_UNROLL for (size_t j = 0; j < 8; j++) {
        acc[j] = _mm256_setzero_ps();
        row[j] = rows + (j < count ? j : count - 1) * stride;
    }
    size_t i = 0;
    for (; i + 8 <= size; i += 8) {
        const __m256 xv = _mm256_loadu_ps(x + i);
        FL_UNROLL for (size_t j = 0; j < 8; j++)
            acc[j] = _mm256_fmadd_ps(xv, _mm256_loadu_ps(row[j] + i), acc[j]);
    }
    if (i < size) {
        const __m256i mask = fl_mask8(size - i);
        const __m256 xv = _mm256_maskload_ps(x + i, mask);
        FL_UNROLL for (size_t j = 0; j < 8; j++)
            acc[j] = _mm256_fmadd_ps(xv, _mm256_maskload_ps(row[j] + i, mask), acc[j]);
    }
    return sum8(acc);
}

// to = to * shrink + sum_j coef[j * step] * rows[j], nv vectors wide, the last masked when `tail`.
FL_INLINE void weigh_vectors(const size_t nv, const bool tail, __m256i mask, float *to,
                             float shrink, const float *coef, size_t step, const float *rows,
                             size_t stride, size_t count) {
    __m256 acc[8];
    const __m256 sv = _mm256_set1_ps(shrink);
    FL_UNROLL for (size_t b = 0; b < nv; b++)
        acc[b] = _mm256_mul_ps(fl_load8(to + 8 * b, tail, mask), sv);
    for (size_t j = 0; j < count; j++, rows += stride) {
        const __m256 c = _mm256_broadcast_ss(coef + j * step);
        FL_UNROLL for (size_t b = 0; b < nv; b++)
            acc[b] = _mm256_fmadd_ps(c, fl_load8(rows + 8 * b, tail, mask), acc[b]);
    }
    FL_UNROLL for (size_t b = 0; b < nv; b++) fl_store8(to + 8 * b, tail, mask, acc[b]);
}

FL_INLINE void weigh(const size_t size, float *to, float shrink, const float *coef, size_t step,
                     const float *rows, size_t stride, size_t count) {
    const __m256i mask = fl_mask8(size % 8);
    size_t i = 0;
    for (; i + 64 <= size; i += 64)
        weigh_vectors(8, false, mask, to + i, shrink, coef, step, rows + i, stride, count);
    for (; i + 32 <= size; i += 32)
        weigh_vectors(4, false, mask, to + i, shrink, coef, step, rows + i, stride, count);
    for (; i + 8 <= size; i += 8)
        weigh_vectors(1, false, mask, to + i, shrink, coef, step, rows + i, stride, count);
    if (i < size)
        weigh_vectors(1, true, mask, to + i, shrink, coef, step, rows + i, stride, count);
}

static float max_lane(__m256 v) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

static float sum_lane(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

static float exp1(float x) {
    return _mm256_cvtss_f32(fl_exp8(_mm256_set1_ps(x)));
}

// One query against one block of rows: into the running maximum, sum and output.
FL_INLINE void forward_block(const size_t size, const float *q, const float *k, const float *v,
                             size_t stride, size_t count, float scale, float *max, float *sum,
                             float *out) {
    const size_t groups = (count + 7) / 8;
    __m256 s[ROWS / 8], top = _mm256_set1_ps(-INFINITY), total = _mm256_setzero_ps();
    for (size_t g = 0; g < groups; g++) {
        const size_t left = count - 8 * g < 8 ? count - 8 * g : 8;
        const __m256 d = dot8(size, q, k + 8 * g * stride, stride, left);
        s[g] = _mm256_blendv_ps(_mm256_set1_ps(-INFINITY), _mm256_mul_ps(d, _mm256_set1_ps(scale)),
                                _mm256_castsi256_ps(fl_mask8(left)));
        top = _mm256_max_ps(top, s[g]);
    }
    const float block_max = max_lane(top), new_max = *max > block_max ? *max : block_max;
    float p[ROWS];
    for (size_t g = 0; g < groups; g++) {
        s[g] = fl_exp8(_mm256_sub_ps(s[g], _mm256_set1_ps(new_max)));
        total = _mm256_add_ps(total, s[g]);
        _mm256_storeu_ps(p + 8 * g, s[g]);
    }
    const float shrink = exp1(*max - new_max);
    *max = new_max;
    *sum = *sum * shrink + sum_lane(total);
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

FL_ATTENTION_FORWARD(avx2) {
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
    for (size_t j = 0; j < count; j += 8) {
        const size_t left = count - j < 8 ? count - j : 8;
        const __m256 s = _mm256_mul_ps(dot8(size, q, k + j * stride, stride, left),
                                       _mm256_set1_ps(scale));
        const __m256 pv = fl_exp8(_mm256_sub_ps(s, _mm256_set1_ps(lse)));
        const __m256 dp = dot8(size, dout, v + j * stride, stride, left);
        const __m256 dv = _mm256_mul_ps(_mm256_sub_ps(dp, _mm256_set1_ps(delta)),
                                        _mm256_set1_ps(scale));
        _mm256_storeu_ps(p + j, pv);
        _mm256_storeu_ps(ds + j, _mm256_mul_ps(pv, dv));
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
        delta[i] = _mm256_cvtss_f32(dot8(size, g->dout + at, a->out + at, 0, 1));
    }
    for (uint32_t row = a->kv_begin[t]; row <= a->kv_row[t + count - 1]; row += ROWS)
        backward_block(size, a, g, t, count, h, row, delta);
}

FL_ATTENTION_BACKWARD(avx2) {
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
