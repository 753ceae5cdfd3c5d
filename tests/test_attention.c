// Goal: every variant of attention computes causal grouped-query attention and its gradient within
// the bounds of its header; a token's bits depend on its own query and visible rows alone; nothing
// past a row is touched; NaN is kept.
// Method: the formulas in double are the yardstick (softmax in two passes, gradient in closed
// form); the closed form is itself compared with central differences. Packed sequences, lengths
// around the block, head sizes with every kind of tail, caches with gaps, buffers that end at a
// guard page.
#include "kernels/dispatch.h"
#include "tests/check.h"

#include <float.h>

#define EPS ((double)FLT_EPSILON)
#define EACH(v)                                                                                    \
    for (const fl_attention_variant *v = fl_attention_variants; v->tag != NULL; v++)               \
        if (!runs(v)) {                                                                            \
        } else

static bool runs(const fl_attention_variant *v) {
    if ((v->need & fl_cpu_detect()) == v->need) return true;
    T_SKIP_PART("attention %s: not on this CPU", v->tag);
    return false;
}

enum { TOKENS_MAX = 150, FLOATS_MAX = TOKENS_MAX * 600 };

typedef struct shape {
    uint32_t heads, kv_heads, head_size;
    uint32_t skip;      // first rows of a sequence that no token of the batch writes
    uint32_t length[4]; // of the packed sequences; 0 ends
} shape;

static const shape shapes[] = {
    {1, 1, 2, 0, {1}}, {1, 1, 4, 0, {3, 1}}, {3, 1, 6, 0, {33, 2}}, {2, 2, 8, 0, {31, 32, 1}},
    {4, 2, 10, 0, {65}}, {8, 4, 8, 0, {20, 13}}, {8, 4, 16, 0, {40}}, {9, 3, 64, 0, {70, 5}},
    {2, 1, 66, 0, {9, 30, 1}}, {5, 1, 34, 0, {35}}, {1, 1, 256, 0, {36}},
    {2, 1, 128, 0, {17, 18}}, {6, 2, 24, 0, {64, 64, 3}}, {3, 3, 14, 0, {8, 8, 8, 8}},
    {2, 2, 62, 0, {1, 1, 34}}, {2, 1, 64, 29, {60, 50}}, {3, 1, 12, 33, {34, 70}},
    {1, 1, 16, 27, {100}},
};

// A batch in guarded memory. The float rows have the shape's width exactly.
typedef struct batch {
    fl_attention a;
    fl_attention_grad g;
    uint32_t tokens, rows;
    uint32_t begin[TOKENS_MAX], row[TOKENS_MAX];
    size_t q_count, kv_count;
} batch;

static float *guarded(size_t n) {
    float *p = t_guarded(n * sizeof(*p));
    for (size_t i = 0; i < n; i++) p[i] = t_randf();
    return p;
}

static void batch_init(batch *b, const shape *s) {
    memset(b, 0, sizeof(*b));
    for (size_t i = 0; i < FL_COUNT(s->length) && s->length[i] != 0; i++) {
        const uint32_t first = b->rows;
        for (uint32_t k = s->skip; k < s->length[i]; k++, b->tokens++) {
            b->begin[b->tokens] = first;
            b->row[b->tokens] = first + k;
        }
        b->rows += s->length[i];
    }
    const size_t width = (size_t)s->heads * s->head_size, kv = (size_t)s->kv_heads * s->head_size;
    b->q_count = b->tokens * width;
    b->kv_count = b->rows * kv;
    float *q = guarded(b->q_count);
    for (size_t i = 0; i < b->q_count; i++) q[i] *= 4.0f; // scores that matter
    b->a = (fl_attention){.heads = s->heads, .kv_heads = s->kv_heads, .head_size = s->head_size,
                          .kv_begin = b->begin, .kv_row = b->row, .q = q,
                          .k = guarded(b->kv_count), .v = guarded(b->kv_count),
                          .out = guarded(b->q_count),
                          .lse = guarded((size_t)b->tokens * s->heads),
                          .q_stride = width, .kv_stride = kv};
    b->g = (fl_attention_grad){.dout = guarded(b->q_count), .dq = guarded(b->q_count),
                               .dk = guarded(b->kv_count), .dv = guarded(b->kv_count)};
}

static void drop(const float *p, size_t n) {
    t_guarded_free((void *)(uintptr_t)p, n * sizeof(*p));
}

static void batch_done(batch *b) {
    drop(b->a.q, b->q_count), drop(b->a.out, b->q_count), drop(b->g.dout, b->q_count);
    drop(b->g.dq, b->q_count), drop(b->a.k, b->kv_count), drop(b->a.v, b->kv_count);
    drop(b->g.dk, b->kv_count), drop(b->g.dv, b->kv_count);
    drop(b->a.lse, (size_t)b->tokens * b->a.heads);
}

// ---- the yardstick, in double

typedef struct exact {
    double q[FLOATS_MAX], k[FLOATS_MAX], v[FLOATS_MAX], dout[FLOATS_MAX];
    double out[FLOATS_MAX], lse[TOKENS_MAX * 16];
    double dq[FLOATS_MAX], dk[FLOATS_MAX], dv[FLOATS_MAX];
    double mag_q[FLOATS_MAX], mag_k[FLOATS_MAX], mag_v[FLOATS_MAX]; // sums of |terms|
    double score_max, value_max;
} exact;

static exact e;

static void exact_load(const batch *b) {
    memset(&e, 0, sizeof(e));
    for (size_t i = 0; i < b->q_count; i++) {
        e.q[i] = (double)b->a.q[i], e.dout[i] = (double)b->g.dout[i];
        e.dq[i] = (double)b->g.dq[i], e.mag_q[i] = fabs(e.dq[i]);
    }
    for (size_t i = 0; i < b->kv_count; i++) {
        e.k[i] = (double)b->a.k[i], e.v[i] = (double)b->a.v[i];
        e.dk[i] = (double)b->g.dk[i], e.mag_k[i] = fabs(e.dk[i]);
        e.dv[i] = (double)b->g.dv[i], e.mag_v[i] = fabs(e.dv[i]);
    }
}

// Probabilities of head h of token t over its rows; also out and lse.
static void exact_row(const batch *b, uint32_t t, uint32_t h, double *p) {
    const uint32_t size = b->a.head_size, group = b->a.heads / b->a.kv_heads;
    const size_t at = t * b->a.q_stride + (size_t)h * size;
    double max = -INFINITY, sum = 0;
    for (uint32_t r = b->begin[t]; r <= b->row[t]; r++) {
        const double *k = e.k + r * b->a.kv_stride + (size_t)(h / group) * size;
        double s = 0, mag = 0;
        for (uint32_t i = 0; i < size; i++) {
            s += e.q[at + i] * k[i] / sqrt(size);
            mag += fabs(e.q[at + i] * k[i]) / sqrt(size);
        }
        p[r] = s;
        max = fmax(max, s);
        e.score_max = fmax(e.score_max, mag);
    }
    for (uint32_t r = b->begin[t]; r <= b->row[t]; r++) sum += p[r] = exp(p[r] - max);
    for (uint32_t i = 0; i < size; i++) e.out[at + i] = 0;
    for (uint32_t r = b->begin[t]; r <= b->row[t]; r++) {
        const double *v = e.v + r * b->a.kv_stride + (size_t)(h / group) * size;
        p[r] /= sum;
        for (uint32_t i = 0; i < size; i++) {
            e.out[at + i] += p[r] * v[i];
            e.value_max = fmax(e.value_max, fabs(v[i]));
        }
    }
    e.lse[(size_t)t * b->a.heads + h] = max + log(sum);
}

static void exact_backward_row(const batch *b, uint32_t t, uint32_t h, const double *p) {
    const uint32_t size = b->a.head_size, group = b->a.heads / b->a.kv_heads;
    const size_t at = t * b->a.q_stride + (size_t)h * size;
    double delta = 0, delta_mag = 0;
    for (uint32_t i = 0; i < size; i++) {
        delta += e.dout[at + i] * e.out[at + i];
        delta_mag += fabs(e.dout[at + i] * e.out[at + i]);
    }
    for (uint32_t r = b->begin[t]; r <= b->row[t]; r++) {
        const size_t kv = r * b->a.kv_stride + (size_t)(h / group) * size;
        double dp = 0, mag = delta_mag;
        for (uint32_t i = 0; i < size; i++) {
            dp += e.dout[at + i] * e.v[kv + i];
            mag += fabs(e.dout[at + i] * e.v[kv + i]);
        }
        const double ds = p[r] * (dp - delta) / sqrt(size), dm = p[r] * mag / sqrt(size);
        for (uint32_t i = 0; i < size; i++) {
            e.dq[at + i] += ds * e.k[kv + i], e.mag_q[at + i] += dm * fabs(e.k[kv + i]);
            e.dk[kv + i] += ds * e.q[at + i], e.mag_k[kv + i] += dm * fabs(e.q[at + i]);
            e.dv[kv + i] += p[r] * e.dout[at + i];
            e.mag_v[kv + i] += p[r] * fabs(e.dout[at + i]);
        }
    }
}

static double exact_run(const batch *b, bool backward) {
    double p[TOKENS_MAX], loss = 0;
    for (uint32_t t = 0; t < b->tokens; t++) {
        for (uint32_t h = 0; h < b->a.heads; h++) {
            exact_row(b, t, h, p);
            if (backward) exact_backward_row(b, t, h, p);
        }
    }
    for (size_t i = 0; i < b->q_count; i++) loss += e.dout[i] * e.out[i];
    return loss;
}

// ---- cases

static void check_shape(const fl_attention_variant *v, const shape *s) {
    static batch b;
    batch_init(&b, s);
    exact_load(&b);
    v->forward(&b.a, 0, b.tokens, 0, s->heads);
    (void)exact_run(&b, true);
    v->backward(&b.a, &b.g, b.tokens, 0, s->kv_heads);
    const double terms = (double)s->head_size + 32, score = fmax(1, e.score_max);
    for (size_t i = 0; i < b.q_count; i++)
        T_NEAR((double)b.a.out[i], e.out[i], 4 * terms * EPS * score * e.value_max,
               "%s out[%zu] head_size=%u", v->tag, i, s->head_size);
    for (size_t i = 0; i < (size_t)b.tokens * s->heads; i++)
        T_NEAR((double)b.a.lse[i], e.lse[i], 2 * terms * EPS * score, "%s lse head_size=%u", v->tag,
               s->head_size);
    const double bound = 4 * (terms + (double)b.tokens) * EPS * score;
    for (size_t i = 0; i < b.q_count; i++)
        T_NEAR((double)b.g.dq[i], e.dq[i], bound * e.mag_q[i], "%s dq[%zu] head_size=%u", v->tag, i,
               s->head_size);
    for (size_t i = 0; i < b.kv_count; i++) {
        T_NEAR((double)b.g.dk[i], e.dk[i], bound * e.mag_k[i], "%s dk[%zu] head_size=%u", v->tag, i,
               s->head_size);
        T_NEAR((double)b.g.dv[i], e.dv[i], bound * e.mag_v[i], "%s dv[%zu] head_size=%u", v->tag, i,
               s->head_size);
    }
    batch_done(&b);
}

static void test_shapes(void) {
    EACH(v) {
        for (size_t i = 0; i < FL_COUNT(shapes); i++) check_shape(v, &shapes[i]);
    }
}

// The closed form that judges the variants is itself the slope of the loss.
static void test_yardstick_is_a_gradient(void) {
    static batch b;
    batch_init(&b, &(shape){4, 2, 6, 0, {5, 3}});
    memset(b.g.dq, 0, b.q_count * sizeof(float));
    memset(b.g.dk, 0, b.kv_count * sizeof(float));
    memset(b.g.dv, 0, b.kv_count * sizeof(float));
    exact_load(&b);
    (void)exact_run(&b, true);
    double *at[] = {e.q, e.k, e.v}, *slope[] = {e.dq, e.dk, e.dv};
    for (size_t which = 0; which < 3; which++) {
        for (size_t i = 0; i < (which == 0 ? b.q_count : b.kv_count); i++) {
            const double keep = at[which][i], h = 1e-5;
            at[which][i] = keep + h;
            const double up = exact_run(&b, false);
            at[which][i] = keep - h;
            const double down = exact_run(&b, false);
            at[which][i] = keep;
            T_NEAR(slope[which][i], (up - down) / (2 * h), 1e-7, "operand %zu, %zu", which, i);
        }
    }
    batch_done(&b);
}

// One token and one head at a time, its rows moved to other places of a wider cache: same bits.
static void check_alone(const fl_attention_variant *v, const shape *s) {
    static batch b;
    static float k[TOKENS_MAX * 270], rows[TOKENS_MAX * 270], out[260 * 16], lse[16];
    batch_init(&b, s);
    v->forward(&b.a, 0, b.tokens, 0, s->heads);
    const size_t wide = b.a.kv_stride + 7, width = b.a.q_stride * sizeof(float);
    for (uint32_t t = 0; t < b.tokens; t += 1 + t / 5) {
        const uint32_t first = b.begin[t], zero = t % 3, last = b.row[t] - first + zero;
        for (uint32_t r = first; r <= b.row[t]; r++) {
            memcpy(k + (r - first + zero) * wide, b.a.k + r * b.a.kv_stride,
                   b.a.kv_stride * sizeof(float));
            memcpy(rows + (r - first + zero) * wide, b.a.v + r * b.a.kv_stride,
                   b.a.kv_stride * sizeof(float));
        }
        fl_attention one = b.a;
        one.kv_begin = &zero, one.kv_row = &last;
        one.q = b.a.q + t * b.a.q_stride, one.out = out, one.lse = lse;
        one.k = k, one.v = rows, one.kv_stride = wide;
        for (uint32_t h = 0; h < s->heads; h++) v->forward(&one, 0, 1, h, h + 1);
        T_CHECK(memcmp(out, b.a.out + t * b.a.q_stride, width) == 0, "%s out of token %u", v->tag,
                t);
        T_CHECK(memcmp(lse, b.a.lse + (size_t)t * s->heads, s->heads * sizeof(float)) == 0,
                "%s lse of token %u", v->tag, t);
        one.lse = NULL; // not wanted
        v->forward(&one, 0, 1, 0, s->heads);
        T_CHECK(memcmp(out, b.a.out + t * b.a.q_stride, width) == 0, "%s without lse", v->tag);
    }
    batch_done(&b);
}

static void test_a_token_depends_on_itself(void) {
    EACH(v) {
        for (size_t i = 0; i < FL_COUNT(shapes); i++) check_alone(v, &shapes[i]);
    }
}

// Cut into ranges of tokens, as threads cut it: same bits.
static void test_ranges_of_tokens(void) {
    EACH(v) {
        for (size_t i = 0; i < FL_COUNT(shapes); i++) {
            static batch b;
            static float out[FLOATS_MAX];
            const shape *s = &shapes[i];
            batch_init(&b, s);
            v->forward(&b.a, 0, b.tokens, 0, s->heads);
            fl_attention cut = b.a;
            cut.out = out;
            for (uint32_t grain = 1; grain < 30; grain += 1 + grain / 2) {
                for (uint32_t t = 0; t < b.tokens;) {
                    const uint32_t end = t + grain < b.tokens ? t + grain : b.tokens;
                    v->forward(&cut, t, end, 0, s->heads);
                    t = end;
                }
                T_CHECK(memcmp(out, b.a.out, b.q_count * sizeof(float)) == 0, "%s shape %zu by %u",
                        v->tag, i, grain);
            }
            batch_done(&b);
        }
    }
}

// Threads take key/value heads: head by head gives the bits of all at once.
static void test_backward_by_heads(void) {
    EACH(v) {
        static batch b;
        const shape s = {6, 3, 16, 0, {45, 20}};
        batch_init(&b, &s);
        v->forward(&b.a, 0, b.tokens, 0, s.heads);
        fl_attention_grad g = b.g;
        g.dq = guarded(b.q_count), g.dk = guarded(b.kv_count), g.dv = guarded(b.kv_count);
        memcpy(g.dq, b.g.dq, b.q_count * sizeof(float));
        memcpy(g.dk, b.g.dk, b.kv_count * sizeof(float));
        memcpy(g.dv, b.g.dv, b.kv_count * sizeof(float));
        v->backward(&b.a, &b.g, b.tokens, 0, s.kv_heads);
        for (uint32_t h = s.kv_heads; h-- > 0;) v->backward(&b.a, &g, b.tokens, h, h + 1);
        T_CHECK(memcmp(g.dq, b.g.dq, b.q_count * sizeof(float)) == 0, "%s dq", v->tag);
        T_CHECK(memcmp(g.dk, b.g.dk, b.kv_count * sizeof(float)) == 0, "%s dk", v->tag);
        T_CHECK(memcmp(g.dv, b.g.dv, b.kv_count * sizeof(float)) == 0, "%s dv", v->tag);
        drop(g.dq, b.q_count), drop(g.dk, b.kv_count), drop(g.dv, b.kv_count);
        batch_done(&b);
    }
}

static void test_nan_is_not_lost(void) {
    EACH(v) {
        for (uint32_t r = 0; r < 40; r++) {
            static batch b;
            batch_init(&b, &(shape){2, 1, 8, 0, {40}});
            float *k = (float *)(uintptr_t)b.a.k;
            k[r * 8 + r % 8] = NAN;
            v->forward(&b.a, 0, 40, 0, 2);
            for (uint32_t t = 0; t < 40; t++)
                T_CHECK((isnan(b.a.out[t * 16]) != 0) == (t >= r), "%s row %u token %u", v->tag, r,
                        t);
            batch_done(&b);
        }
    }
}

T_MAIN({"shapes", test_shapes}, {"yardstick_is_a_gradient", test_yardstick_is_a_gradient},
       {"a_token_depends_on_itself", test_a_token_depends_on_itself},
       {"ranges_of_tokens", test_ranges_of_tokens}, {"backward_by_heads", test_backward_by_heads},
       {"nan_is_not_lost", test_nan_is_not_lost})
