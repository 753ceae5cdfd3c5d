// A block of FL_ATTENTION_BLOCK rows of keys is turned once, rows across the lanes, and serves
// every query of up to TOKENS tokens and of all heads that share it. The order of a query's own
// arithmetic does not know of its neighbours.
#include "kernels/attention_run.h"

#include "kernels/x86/exp_avx512.h"

#include <math.h>

enum {
    TOKENS = 16,
    ROWS = FL_ATTENTION_BLOCK,
    LANES = 16,
    HALVES = ROWS / LANES,
    HEADS = 4, // that share a key/value head and are taken together
    MANY = 8,  // queries whose inner products are in registers at once
};

// Four rows by four columns of each quarter: column c + i of rows 0..15 to ret[i * ROWS].
static void turn_4(const float *const *row, size_t c, float *ret) {
    __m512 z[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        z[i] = _mm512_castps128_ps512(_mm_loadu_ps(row[i] + c));
        z[i] = _mm512_insertf32x4(z[i], _mm_loadu_ps(row[4 + i] + c), 1);
        z[i] = _mm512_insertf32x4(z[i], _mm_loadu_ps(row[8 + i] + c), 2);
        z[i] = _mm512_insertf32x4(z[i], _mm_loadu_ps(row[12 + i] + c), 3);
    }
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(z[0], z[1]));
    const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(z[0], z[1]));
    const __m512d x = _mm512_castps_pd(_mm512_unpacklo_ps(z[2], z[3]));
    const __m512d y = _mm512_castps_pd(_mm512_unpackhi_ps(z[2], z[3]));
    _mm512_store_pd(ret, _mm512_unpacklo_pd(a, x));
    _mm512_store_pd(ret + ROWS, _mm512_unpackhi_pd(a, x));
    _mm512_store_pd(ret + 2 * ROWS, _mm512_unpacklo_pd(b, y));
    _mm512_store_pd(ret + 3 * ROWS, _mm512_unpackhi_pd(b, y));
}

// ret[size][ROWS] = the transpose of `count` rows; the other lanes are zero.
static void turn(size_t size, const float *rows, size_t stride, size_t count, float *ret) {
    static const float zeros[FL_HEAD_SIZE_MAX];
    const float *row[ROWS];
    for (size_t j = 0; j < ROWS; j++) row[j] = j < count ? rows + j * stride : zeros;
    size_t c = 0;
    for (; c + 4 <= size; c += 4) {
        turn_4(row, c, ret + c * ROWS);
        turn_4(row + LANES, c, ret + c * ROWS + LANES);
    }
    for (size_t i = 0; i < size % 4; i++)
        for (size_t j = 0; j < ROWS; j++) ret[(c + i) * ROWS + j] = row[j][c + i];
}

// dot[i] = the inner products of query q[i] with all rows that were turned, i < n.
FL_INLINE void dots(int n, size_t size, const float *const *q, const float *turned,
                    __m512 (*dot)[HALVES]) {
    const float *at[MANY]; // in registers: nothing written here may be what q points to
    __m512 sum[MANY][HALVES];
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) at[i] = q[i];
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
#pragma GCC unroll 1
    for (size_t c = 0; c < size; c++) {
        const __m512 low = _mm512_load_ps(turned + c * ROWS);
        const __m512 high = _mm512_load_ps(turned + c * ROWS + LANES);
#pragma GCC unroll 8
        for (int i = 0; i < n; i++) {
            const __m512 x = _mm512_set1_ps(at[i][c]);
            sum[i][0] = _mm512_fmadd_ps(x, low, sum[i][0]);
            sum[i][1] = _mm512_fmadd_ps(x, high, sum[i][1]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) dot[i][0] = sum[i][0], dot[i][1] = sum[i][1];
}

static void dots_any(int n, size_t size, const float *const *q, const float *turned,
                     __m512 (*dot)[HALVES]) {
    if (n == MANY) {
        dots(MANY, size, q, turned, dot);
        return;
    }
    if (n >= 4) {
        dots(4, size, q, turned, dot);
        n -= 4, q += 4, dot += 4;
    }
    if (n == 3) dots(3, size, q, turned, dot);
    if (n == 2) dots(2, size, q, turned, dot);
    if (n == 1) dots(1, size, q, turned, dot);
}

// Up to MANY targets: to[i] = to[i] * shrink[i] + sum_j c_ij * rows[j], c_ij = coef[i * ROWS + j],
// or coef[j * ROWS + i] when `across`.
typedef struct blend {
    float *to[MANY];
    float shrink[MANY];
    const float *coef;
} blend;

// Columns [c, c + 16 * vectors) of n targets from i; the last vector masked.
FL_INLINE void weigh_columns(int n, int vectors, __mmask16 mask, bool across, const blend *b, int i,
                             size_t c, const float *rows, size_t stride, size_t count) {
    __m512 sum[4][4];
    const float *coef = b->coef + (across ? i : i * ROWS);
#pragma GCC unroll 4
    for (int k = 0; k < n; k++) {
        const __m512 shrink = _mm512_set1_ps(b->shrink[i + k]);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            sum[k][v] =
                _mm512_mul_ps(shrink, _mm512_maskz_loadu_ps(v + 1 < vectors ? 0xffff : mask,
                                                            b->to[i + k] + c + (size_t)v * LANES));
    }
    rows += c;
#pragma GCC unroll 1
    for (size_t j = 0; j < count; j++, rows += stride, coef += across ? ROWS : 1) {
        __m512 x[4];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            x[v] = _mm512_maskz_loadu_ps(v + 1 < vectors ? 0xffff : mask, rows + (size_t)v * LANES);
#pragma GCC unroll 4
        for (int k = 0; k < n; k++) {
            const __m512 by = _mm512_set1_ps(coef[across ? k : k * ROWS]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) sum[k][v] = _mm512_fmadd_ps(by, x[v], sum[k][v]);
        }
    }
#pragma GCC unroll 4
    for (int k = 0; k < n; k++) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            _mm512_mask_storeu_ps(b->to[i + k] + c + (size_t)v * LANES,
                                  v + 1 < vectors ? 0xffff : mask, sum[k][v]);
    }
}

FL_INLINE void weigh_some(int n, size_t size, bool across, const blend *b, int i, const float *rows,
                          size_t stride, size_t count) {
    size_t c = 0;
    for (; c + 4 * LANES <= size; c += 4 * LANES)
        weigh_columns(n, 4, 0xffff, across, b, i, c, rows, stride, count);
    for (; c < size; c += LANES)
        weigh_columns(n, 1, fl_mask16(size - c < LANES ? size - c : LANES), across, b, i, c, rows,
                      stride, count);
}

FL_INLINE void weigh(int n, size_t size, bool across, const blend *b, const float *rows,
                     size_t stride, size_t count) {
    int i = 0;
    for (; i + 4 <= n; i += 4) weigh_some(4, size, across, b, i, rows, stride, count);
    for (; i < n; i++) weigh_some(1, size, across, b, i, rows, stride, count);
}

// Some queries of one run: token t + i / heads, head h + i % heads.
typedef struct queries {
    const fl_attention *a;
    uint32_t t, h, heads, count; // count: tokens by heads
    float max[TOKENS * HEADS], sum[TOKENS * HEADS];
} queries;

static size_t query_at(const queries *q, uint32_t i) {
    return (q->t + i / q->heads) * q->a->q_stride + (q->h + i % q->heads) * (size_t)q->a->head_size;
}

// The rows of x, q or dout, that belong to queries [i, i + n).
FL_INLINE void rows_of(const queries *q, const float *x, uint32_t i, int n, const float **ret) {
    for (int k = 0; k < n; k++) ret[k] = x + query_at(q, i + (uint32_t)k);
}

// Rows of a block from `row` that query i sees.
static size_t rows_seen(const queries *q, uint32_t i, uint32_t row) {
    const uint32_t end = q->a->kv_row[q->t + i / q->heads] + 1;
    return end <= row ? 0 : end - row < ROWS ? end - row : ROWS;
}

// Scores of query i to probabilities under a running maximum: p[ROWS], zero past `seen`.
FL_INLINE float softmax_block(const __m512 *dot, size_t seen, float scale, queries *q, uint32_t i,
                              float *p) {
    const __m512 none = _mm512_set1_ps(-INFINITY), by = _mm512_set1_ps(scale);
    const __mmask16 low = fl_mask16(seen < LANES ? seen : LANES);
    const __mmask16 high = fl_mask16(seen < LANES ? 0 : seen - LANES);
    const __m512 s0 = _mm512_mask_mul_ps(none, low, dot[0], by);
    const __m512 s1 = _mm512_mask_mul_ps(none, high, dot[1], by);
    const float top = _mm512_reduce_max_ps(_mm512_max_ps(s0, s1)), old = q->max[i];
    const float max = old > top ? old : top;
    const __m512 e0 = fl_exp16(_mm512_sub_ps(s0, _mm512_set1_ps(max)));
    const __m512 e1 = fl_exp16(_mm512_sub_ps(s1, _mm512_set1_ps(max)));
    _mm512_store_ps(p, e0);
    _mm512_store_ps(p + LANES, e1);
    // Mostly the maximum stays, and exp(0) is exactly 1.
    const float shrink = old == max ? 1.0f : _mm512_cvtss_f32(fl_exp16(_mm512_set1_ps(old - max)));
    q->max[i] = max;
    q->sum[i] = q->sum[i] * shrink + _mm512_reduce_add_ps(_mm512_add_ps(e0, e1));
    return shrink;
}

// Queries [i, i + n) against one block of rows.
FL_INLINE void forward_some(size_t size, queries *q, uint32_t i, int n, uint32_t row, size_t kv,
                            float scale, const float *turned) {
    __m512 dot[MANY][HALVES];
    _Alignas(64) float p[MANY * ROWS];
    blend b = {.coef = p};
    const float *v = q->a->v + kv, *rows[MANY];
    bool same = true;
    rows_of(q, q->a->q, i, n, rows);
    dots_any(n, size, rows, turned, dot);
    for (int k = 0; k < n; k++) {
        const uint32_t at = i + (uint32_t)k;
        const size_t seen = rows_seen(q, at, row);
        same = same && seen == rows_seen(q, i, row);
        b.shrink[k] = seen == 0 ? 1 : softmax_block(dot[k], seen, scale, q, at, p + k * ROWS);
        b.to[k] = q->a->out + query_at(q, at);
    }
    if (same) {
        weigh(n, size, false, &b, v, q->a->kv_stride, rows_seen(q, i, row));
        return;
    }
    for (int k = 0; k < n; k++)
        weigh_some(1, size, false, &b, k, v, q->a->kv_stride, rows_seen(q, i + (uint32_t)k, row));
}

static void forward_begin(size_t size, queries *q) {
    for (uint32_t i = 0; i < q->count; i++) {
        float *out = q->a->out + query_at(q, i);
        q->max[i] = -INFINITY, q->sum[i] = 0.0f;
        for (size_t d = 0; d < size; d++) out[d] = 0.0f;
    }
}

static void forward_end(size_t size, const queries *q) {
    const fl_attention *a = q->a;
    for (uint32_t i = 0; i < q->count; i++) {
        float *out = a->out + query_at(q, i);
        for (size_t d = 0; d < size; d++) out[d] /= q->sum[i];
        const size_t at = (size_t)(q->t + i / q->heads) * a->heads + q->h + i % q->heads;
        if (a->lse != NULL) a->lse[at] = q->max[i] + logf(q->sum[i]);
    }
}

// Sends for the rows of the next block: with few queries they would be waited for.
static void fetch(size_t size, const fl_attention *a, size_t kv, uint32_t row, uint32_t end) {
    for (uint32_t next = row + ROWS; next < end && next < row + 2 * ROWS; next++) {
        const size_t at = kv + (next - row) * a->kv_stride;
        for (size_t c = 0; c < size; c += LANES) {
            _mm_prefetch((const char *)(a->k + at + c), _MM_HINT_T0);
            _mm_prefetch((const char *)(a->v + at + c), _MM_HINT_T0);
        }
    }
}

// Tokens of one run, heads that share a key/value head.
FL_INLINE void forward_run(const size_t size, queries *q) {
    _Alignas(64) float turned[FL_HEAD_SIZE_MAX * ROWS];
    const fl_attention *a = q->a;
    const float scale = 1.0f / sqrtf((float)size);
    const uint32_t tokens = q->count / q->heads;
    const uint32_t begin = a->kv_begin[q->t], end = a->kv_row[q->t + tokens - 1] + 1;
    forward_begin(size, q);
    for (uint32_t row = begin; row < end; row += ROWS) {
        const size_t kv = row * a->kv_stride + q->h / (a->heads / a->kv_heads) * size;
        if (q->count <= MANY) fetch(size, a, kv, row, end);
        turn(size, a->k + kv, a->kv_stride, end - row < ROWS ? end - row : ROWS, turned);
        for (uint32_t i = 0; i < q->count; i += MANY) {
            const uint32_t left = q->count - i;
            forward_some(size, q, i, left < MANY ? (int)left : MANY, row, kv, scale, turned);
        }
    }
    forward_end(size, q);
}

// The heads from h that share its key/value head, at most HEADS of them.
static uint32_t heads_of(const fl_attention *a, uint32_t h, uint32_t end) {
    const uint32_t group = a->heads / a->kv_heads, shared = (h / group + 1) * group;
    const uint32_t left = (shared < end ? shared : end) - h;
    return left < HEADS ? left : HEADS;
}

FL_ATTENTION_FORWARD(avx512) {
    for (uint32_t t = token_begin; t < token_end;) {
        const uint32_t count = fl_attention_run(a, t, token_end, TOKENS);
        for (uint32_t h = head_begin, heads; h < head_end; h += heads) {
            heads = heads_of(a, h, head_end);
            queries q = {.a = a, .t = t, .h = h, .heads = heads, .count = count * heads};
            if (a->head_size == 64)
                forward_run(64, &q);
            else
                forward_run(a->head_size, &q);
        }
        t += count;
    }
}

// What one block of tokens and rows leaves between the two halves of the backward pass.
typedef struct square {
    _Alignas(64) float p[TOKENS][ROWS], ds[TOKENS][ROWS];
} square;

// Keys and values of one block of rows, turned.
typedef struct block_rows {
    uint32_t row;
    size_t kv; // of the block's first row, in floats
    const float *k, *v;
} block_rows;

static float inner(size_t size, const float *x, const float *y) {
    __m512 sum = _mm512_setzero_ps();
    for (size_t i = 0; i < size; i += LANES) {
        const __mmask16 mask = fl_mask16(size - i < LANES ? size - i : LANES);
        sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, x + i),
                              _mm512_maskz_loadu_ps(mask, y + i), sum);
    }
    return _mm512_reduce_add_ps(sum);
}

// p and ds of tokens [i, i + n).
static void square_rows(size_t size, const fl_attention_grad *g, const queries *q,
                        const float *deltas, uint32_t i, int n, const block_rows *rows,
                        square *sq) {
    const __m512 scale = _mm512_set1_ps(1.0f / sqrtf((float)size));
    __m512 s[MANY][HALVES], dp[MANY][HALVES];
    const float *of[MANY] = {0};
    rows_of(q, q->a->q, i, n, of);
    dots_any(n, size, of, rows->k, s);
    rows_of(q, g->dout, i, n, of);
    dots_any(n, size, of, rows->v, dp);
    for (int k = 0; k < n; k++) {
        const uint32_t at = i + (uint32_t)k;
        const __m512 lse = _mm512_set1_ps(q->a->lse[(size_t)(q->t + at) * q->a->heads + q->h]);
        const __m512 delta = _mm512_set1_ps(deltas[at]);
        for (int half = 0; half < HALVES; half++) {
            const __m512 p = fl_exp16(_mm512_sub_ps(_mm512_mul_ps(s[k][half], scale), lse));
            const __m512 d = _mm512_mul_ps(_mm512_sub_ps(dp[k][half], delta), scale);
            _mm512_store_ps(sq->p[at] + half * LANES, p);
            _mm512_store_ps(sq->ds[at] + half * LANES, _mm512_mul_ps(p, d));
        }
    }
}

FL_INLINE void add_queries(size_t size, const fl_attention_grad *g, const queries *q,
                           const block_rows *rows, const square *sq) {
    const fl_attention *a = q->a;
    for (uint32_t i = 0; i < q->count;) {
        blend b = {.coef = sq->ds[i]};
        int n = 0;
        const size_t seen = rows_seen(q, i, rows->row);
        for (; i < q->count && n < MANY && rows_seen(q, i, rows->row) == seen; i++, n++) {
            b.to[n] = g->dq + query_at(q, i);
            b.shrink[n] = 1;
        }
        weigh(n, size, false, &b, a->k + rows->kv, a->kv_stride, seen);
    }
}

// dk += ds' q and dv += p' dout, where coef is ds or p and x is q or dout.
FL_INLINE void add_rows(size_t size, const queries *q, const block_rows *rows,
                        const float (*coef)[ROWS], const float *x, float *d) {
    const fl_attention *a = q->a;
    const uint32_t first = a->kv_row[q->t], last = a->kv_row[q->t + q->count - 1];
    const uint32_t count = last - rows->row + 1 < ROWS ? last - rows->row + 1 : ROWS;
    for (uint32_t j = 0; j < count;) {
        // Tokens from `from` on see row j of the block.
        const uint32_t from = rows->row + j > first ? rows->row + j - first : 0;
        blend b = {.coef = &coef[from][j]};
        int n = 0;
        for (; j < count && n < MANY && (n == 0 || rows->row + j <= first); j++, n++) {
            b.to[n] = d + rows->kv + j * a->kv_stride;
            b.shrink[n] = 1;
        }
        weigh(n, size, true, &b, x + query_at(q, from), a->q_stride, q->count - from);
    }
}

// Tokens of one run, one query head.
FL_INLINE void backward_run(const size_t size, const fl_attention_grad *g, const queries *q) {
    _Alignas(64) float k[FL_HEAD_SIZE_MAX * ROWS], v[FL_HEAD_SIZE_MAX * ROWS];
    const fl_attention *a = q->a;
    const uint32_t end = a->kv_row[q->t + q->count - 1] + 1;
    float delta[TOKENS];
    square sq;
    for (uint32_t i = 0; i < q->count; i++) {
        const size_t at = query_at(q, i);
        delta[i] = inner(size, g->dout + at, a->out + at);
    }
    for (uint32_t row = a->kv_begin[q->t]; row < end; row += ROWS) {
        const size_t kv = row * a->kv_stride + q->h / (a->heads / a->kv_heads) * size;
        const block_rows rows = {row, kv, k, v};
        const size_t there = end - row < ROWS ? end - row : ROWS;
        turn(size, a->k + kv, a->kv_stride, there, k);
        turn(size, a->v + kv, a->kv_stride, there, v);
        for (uint32_t i = 0; i < q->count; i += MANY) {
            const uint32_t left = q->count - i;
            square_rows(size, g, q, delta, i, left < MANY ? (int)left : MANY, &rows, &sq);
        }
        add_queries(size, g, q, &rows, &sq);
        add_rows(size, q, &rows, sq.ds, a->q, g->dk);
        add_rows(size, q, &rows, sq.p, g->dout, g->dv);
    }
}

FL_ATTENTION_BACKWARD(avx512) {
    const uint32_t group = a->heads / a->kv_heads;
    for (uint32_t t = 0; t < tokens;) {
        const uint32_t count = fl_attention_run(a, t, tokens, TOKENS);
        for (uint32_t h = kv_head_begin * group; h < kv_head_end * group; h++) {
            const queries q = {.a = a, .t = t, .h = h, .heads = 1, .count = count};
            if (a->head_size == 64)
                backward_run(64, g, &q);
            else
                backward_run(a->head_size, g, &q);
        }
        t += count;
    }
}
