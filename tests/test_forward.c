// Goal: a layer computes what its formulas say, in every storage; and what a token's output is does
// not depend, in any bit, on the batch around it, on how the text was cut, or on threads.
// Method: a plain double-precision layer written from the formulas, fed at every stage with the
// floats that the real one left (so tolerances stay those of one stage), and end to end in F32;
// then the same text in pieces of several sizes by several threads, compared as bytes.
#include "kernels/ggml.h"
#include "node/model/forward.h"
#include "tests/check.h"
#include "tests/model_fixtures.h"

enum { TOKENS = 21, RANK = 5 };

static fl_kern kern_best, kern_ref;

__attribute__((constructor)) static void select_kernels(void) {
    fl_kern_select(&kern_best, fl_cpu_detect());
    fl_kern_select(&kern_ref, 0);
}

// Three packed sequences of 9, 1 and 11 tokens.
typedef struct text {
    int32_t id[TOKENS];
    uint32_t pos[TOKENS], kv_begin[TOKENS], kv_row[TOKENS];
} text;

static text make_text(const node_model *m) {
    static const uint32_t begin[] = {0, 9, 10, TOKENS};
    text x;
    for (uint32_t s = 0; s < 3; s++)
        for (uint32_t t = begin[s]; t < begin[s + 1]; t++) {
            x.id[t] = (int32_t)(t_rand() % m->vocabulary);
            x.pos[t] = t - begin[s];
            x.kv_begin[t] = begin[s];
            x.kv_row[t] = t;
        }
    return x;
}

static node_batch piece_of(const text *x, uint32_t begin, uint32_t end) {
    return (node_batch){end - begin, x->id + begin, x->pos + begin, x->kv_begin + begin,
                        x->kv_row + begin};
}

// An adapter of random A and B on every map of every layer.
typedef struct adapter {
    node_lora lora;
    node_lora_layer layer[NODE_LAYERS_MAX];
    float *memory;
} adapter;

static void adapter_make(adapter *a, const node_model *m) {
    size_t count = 0;
    for (uint32_t l = 0; l < m->layers; l++)
        for (node_module i = 0; i < NODE_MODULES; i++)
            count += (size_t)RANK * (m->layer[l].linear[i].rows + m->layer[l].linear[i].cols);
    a->memory = calloc(count, sizeof(float));
    a->lora = (node_lora){.rank = RANK, .scale = 2.0f, .layers = m->layers, .layer = a->layer};
    float *p = a->memory;
    for (uint32_t l = 0; l < m->layers; l++)
        for (node_module i = 0; i < NODE_MODULES; i++) {
            const node_matrix *w = &m->layer[l].linear[i];
            node_lora_draw_a(7, l, i, RANK, w->cols, p);
            a->layer[l].a[i] = p;
            p += (size_t)RANK * w->cols;
            a->layer[l].b[i] = p;
            for (uint32_t j = 0; j < w->rows * RANK; j++) *p++ = 0.1f * t_randf();
        }
}

// --- the reference -------------------------------------------------------------------------------

// Rows [T][width] in double of every stage of a layer.
typedef struct stages {
    double *norm1, *q, *k, *v, *attn, *mid, *norm2, *gate, *up, *act, *out;
} stages;

static double *rows(uint32_t width) {
    return calloc((size_t)TOKENS * width, sizeof(double));
}

static stages stages_new(const node_model *m, const node_layer *l) {
    const uint32_t q = l->heads * m->head_size, kv = l->kv_heads * m->head_size;
    return (stages){rows(m->hidden), rows(q),         rows(kv),        rows(kv),
                    rows(q),         rows(m->hidden), rows(m->hidden), rows(l->ffn),
                    rows(l->ffn),    rows(l->ffn),    rows(m->hidden)};
}

static void stages_free(stages *s) {
    double **all[] = {&s->norm1, &s->q,    &s->k,  &s->v,   &s->attn, &s->mid,
                      &s->norm2, &s->gate, &s->up, &s->act, &s->out};
    for (size_t i = 0; i < FL_COUNT(all); i++) free(*all[i]);
}

// What a packed product reads: groups of 64, codes of 8 bits (quantise_x8.h).
static void quantise(const double *x, uint32_t n, double *out) {
    for (uint32_t g = 0; g < n; g += 64) {
        const uint32_t end = n - g < 64 ? n : g + 64;
        float most = 0;
        for (uint32_t i = g; i < end; i++) most = fmaxf(most, fabsf((float)x[i]));
        for (uint32_t i = g; i < end; i++)
            out[i] =
                most == 0 ? 0 : (double)(most / 127) * (double)rintf((float)x[i] * (127 / most));
    }
}

static void ref_linear(const node_model *m, uint32_t layer, node_module module,
                       const node_lora *lora, const double *x, double *y) {
    const node_matrix *w = &m->layer[layer].linear[module];
    float *row = calloc(w->cols, sizeof(float));
    double *xq = calloc(w->cols, sizeof(double));
    for (uint32_t t = 0; t < TOKENS; t++, x += w->cols, y += w->rows) {
        memcpy(xq, x, w->cols * sizeof(double));
        if (w->type == NODE_TYPE_PACKED) quantise(x, w->cols, xq);
        double low[RANK] = {0};
        for (uint32_t r = 0; lora != NULL && r < RANK; r++)
            for (uint32_t c = 0; c < w->cols; c++)
                low[r] += (double)lora->layer[layer].a[module][r * w->cols + c] * x[c];
        for (uint32_t r = 0; r < w->rows; r++) {
            node_matrix_row(w, r, row);
            y[r] = 0;
            for (uint32_t c = 0; c < w->cols; c++) y[r] += (double)row[c] * xq[c];
            for (uint32_t i = 0; lora != NULL && i < RANK; i++)
                y[r] += (double)lora->scale * (double)lora->layer[layer].b[module][r * RANK + i] *
                        low[i];
            if (module <= NODE_V && m->layer[layer].bias[module] != NULL)
                y[r] += (double)m->layer[layer].bias[module][r];
        }
    }
    free(row);
    free(xq);
}

static void ref_norm(const node_model *m, const float *gain, const double *x, double *y) {
    for (uint32_t t = 0; t < TOKENS; t++, x += m->hidden, y += m->hidden) {
        double sum = 0;
        for (uint32_t i = 0; i < m->hidden; i++) sum += x[i] * x[i];
        const double r = 1 / sqrt(sum / m->hidden + (double)m->norm_epsilon);
        for (uint32_t i = 0; i < m->hidden; i++) y[i] = x[i] * r * (double)gain[i];
    }
}

static void ref_rope(const node_model *m, const text *x, uint32_t heads, double *q) {
    for (uint32_t t = 0; t < TOKENS; t++)
        for (uint32_t h = 0; h < heads; h++, q += m->head_size)
            for (uint32_t i = 0; i < m->rope_size / 2; i++) {
                const double factor = m->rope_factors == NULL ? 1 : (double)m->rope_factors[i];
                const double angle =
                    x->pos[t] * pow((double)m->rope_base, -2.0 * i / m->rope_size) / factor;
                double *a = q + (m->rope_half ? i : 2 * i);
                double *b = m->rope_half ? a + m->rope_size / 2 : a + 1;
                const double a0 = *a, b0 = *b;
                *a = a0 * cos(angle) - b0 * sin(angle);
                *b = a0 * sin(angle) + b0 * cos(angle);
            }
}

static void ref_attention(const node_model *m, const node_layer *l, const text *x, const double *q,
                          const double *k, const double *v, double *out) {
    const uint32_t size = m->head_size, group = l->heads / l->kv_heads;
    for (uint32_t t = 0; t < TOKENS; t++)
        for (uint32_t h = 0; h < l->heads; h++) {
            double p[TOKENS], sum = 0, most = -INFINITY;
            const double *qh = q + (t * l->heads + h) * size;
            for (uint32_t j = x->kv_begin[t]; j <= x->kv_row[t]; j++) {
                p[j] = 0;
                for (uint32_t i = 0; i < size; i++)
                    p[j] += qh[i] * k[(j * l->kv_heads + h / group) * size + i];
                p[j] /= sqrt(size);
                most = fmax(most, p[j]);
            }
            double *o = out + (t * l->heads + h) * size;
            for (uint32_t i = 0; i < size; i++) o[i] = 0;
            for (uint32_t j = x->kv_begin[t]; j <= x->kv_row[t]; j++) sum += exp(p[j] - most);
            for (uint32_t j = x->kv_begin[t]; j <= x->kv_row[t]; j++)
                for (uint32_t i = 0; i < size; i++)
                    o[i] += exp(p[j] - most) / sum * v[(j * l->kv_heads + h / group) * size + i];
        }
}

// Every stage reads its inputs from `in`: the reference's own rows, or another computation's.
static void ref_layer(const node_model *m, uint32_t layer, const node_lora *lora, const text *x,
                      const double *hidden, const stages *in, stages *out) {
    const node_layer *l = &m->layer[layer];
    ref_norm(m, l->attn_norm, hidden, out->norm1);
    ref_linear(m, layer, NODE_Q, lora, in->norm1, out->q);
    ref_linear(m, layer, NODE_K, lora, in->norm1, out->k);
    ref_linear(m, layer, NODE_V, lora, in->norm1, out->v);
    ref_rope(m, x, l->heads, out->q);
    ref_rope(m, x, l->kv_heads, out->k);
    ref_attention(m, l, x, in->q, in->k, in->v, out->attn);
    ref_linear(m, layer, NODE_O, lora, in->attn, out->mid);
    for (uint32_t i = 0; i < TOKENS * m->hidden; i++) out->mid[i] += hidden[i];
    ref_norm(m, l->ffn_norm, in->mid, out->norm2);
    ref_linear(m, layer, NODE_GATE, lora, in->norm2, out->gate);
    ref_linear(m, layer, NODE_UP, lora, in->norm2, out->up);
    for (uint32_t i = 0; i < TOKENS * l->ffn; i++)
        out->act[i] = in->gate[i] / (1 + exp(-in->gate[i])) * in->up[i];
    ref_linear(m, layer, NODE_DOWN, lora, in->act, out->out);
    for (uint32_t i = 0; i < TOKENS * m->hidden; i++) out->out[i] += in->mid[i];
}

// --- the real one --------------------------------------------------------------------------------

// Memory for runs over `tokens` tokens at a time with keys and values of all TOKENS rows.
typedef struct runner {
    void *block;
    node_acts acts;
    node_scratch *scratch;
    float *x;
    size_t kv_floats; // of one layer, keys or values
    float *cache;     // [layers][2][kv_floats]
} runner;

static void runner_take(runner *r, const node_model *m, uint32_t tokens, fl_arena *arena) {
    node_acts_bind(&r->acts, m, tokens, 0, RANK, arena);
    r->scratch = node_scratch_bind(m, tokens, 3, arena);
    r->x = FL_ARENA_NEW(arena, float, (size_t)TOKENS * m->hidden);
    r->kv_floats = (size_t)TOKENS * m->kv_heads * m->head_size;
    r->cache = FL_ARENA_NEW(arena, float, r->kv_floats * 2 * m->layers);
}

static runner runner_open(const node_model *m, uint32_t tokens) {
    runner r;
    fl_arena arena;
    fl_arena_init_counting(&arena);
    runner_take(&r, m, tokens, &arena);
    const size_t size = arena.peak;
    r.block = aligned_alloc(64, (size + 63) / 64 * 64);
    fl_arena_init(&arena, r.block, size);
    runner_take(&r, m, tokens, &arena);
    T_EQ(arena.peak, size);
    return r;
}

// The hidden state after all layers, r->x, the text taken in pieces of `step` tokens.
static void run(runner *r, const node_engine *e, const node_model *m, const node_lora *lora,
                const text *x, uint32_t step) {
    for (uint32_t begin = 0; begin < TOKENS; begin += step) {
        const uint32_t end = TOKENS - begin < step ? TOKENS : begin + step;
        const node_batch batch = piece_of(x, begin, end);
        float *rows_x = r->x + (size_t)begin * m->hidden;
        node_embed(e, m, &batch, rows_x);
        for (uint32_t l = 0; l < m->layers; l++) {
            r->acts.k = r->cache + r->kv_floats * 2 * l;
            r->acts.v = r->acts.k + r->kv_floats;
            node_layer_forward(e, m, l, lora, &batch, &r->acts, r->scratch, rows_x);
        }
    }
}

static double *to_double(const float *x, size_t n) {
    double *d = calloc(n, sizeof(double));
    for (size_t i = 0; i < n; i++) d[i] = (double)x[i];
    return d;
}

static stages stages_of(const node_model *m, const node_layer *l, const node_acts *a,
                        const float *out) {
    const size_t q = (size_t)l->heads * m->head_size * TOKENS, h = (size_t)m->hidden * TOKENS;
    const size_t kv = (size_t)l->kv_heads * m->head_size * TOKENS, f = (size_t)l->ffn * TOKENS;
    return (stages){to_double(a->norm1, h), to_double(a->q, q),    to_double(a->k, kv),
                    to_double(a->v, kv),    to_double(a->attn, q), to_double(a->mid, h),
                    to_double(a->norm2, h), to_double(a->gate, f), to_double(a->up, f),
                    to_double(a->act, f),   to_double(out, h)};
}

static void near_rows(const char *what, const double *got, const double *want, size_t n,
                      double tolerance) {
    double most = 0, worst = 0;
    for (size_t i = 0; i < n; i++) {
        const double e = fabs(got[i] - want[i]);
        most = fmax(most, fabs(want[i]));
        worst = e > worst || isnan(e) ? e : worst;
    }
    T_CHECK(worst <= tolerance * most, "%s: off by %.3g of %.3g", what, worst, most);
}

// Sums of at most 288 terms in float: 288 * FLT_EPSILON of the largest.
static const double STAGE_TOLERANCE = 3.5e-5;

static void check_stages(const node_engine *e, const t_model_opts *o, bool with_adapter) {
    node_model *m = t_model_make(o);
    runner r = runner_open(m, TOKENS);
    adapter a;
    adapter_make(&a, m);
    const node_lora *lora = with_adapter ? &a.lora : NULL;
    const text x = make_text(m);
    const node_batch batch = piece_of(&x, 0, TOKENS);
    node_embed(e, m, &batch, r.x);
    for (uint32_t l = 0; l < m->layers; l++) {
        const node_layer *layer = &m->layer[l];
        double *hidden = to_double(r.x, (size_t)TOKENS * m->hidden);
        r.acts.k = r.cache;
        r.acts.v = r.cache + r.kv_floats;
        node_layer_forward(e, m, l, lora, &batch, &r.acts, r.scratch, r.x);
        stages got = stages_of(m, layer, &r.acts, r.x), want = stages_new(m, layer);
        ref_layer(m, l, lora, &x, hidden, &got, &want);
        const size_t h = (size_t)TOKENS * m->hidden, f = (size_t)TOKENS * layer->ffn;
        const size_t q = (size_t)TOKENS * layer->linear[NODE_Q].rows;
        const size_t kv = (size_t)TOKENS * layer->linear[NODE_K].rows;
        near_rows("norm1", got.norm1, want.norm1, h, STAGE_TOLERANCE);
        near_rows("q", got.q, want.q, q, STAGE_TOLERANCE);
        near_rows("k", got.k, want.k, kv, STAGE_TOLERANCE);
        near_rows("v", got.v, want.v, kv, STAGE_TOLERANCE);
        near_rows("attn", got.attn, want.attn, q, STAGE_TOLERANCE);
        near_rows("mid", got.mid, want.mid, h, STAGE_TOLERANCE);
        near_rows("norm2", got.norm2, want.norm2, h, STAGE_TOLERANCE);
        near_rows("gate", got.gate, want.gate, f, STAGE_TOLERANCE);
        near_rows("up", got.up, want.up, f, STAGE_TOLERANCE);
        near_rows("act", got.act, want.act, f, STAGE_TOLERANCE);
        near_rows("out", got.out, want.out, h, STAGE_TOLERANCE);
        stages_free(&got);
        stages_free(&want);
        free(hidden);
    }
    free(a.memory);
    free(r.block);
    node_model_close(m);
}

// Every storage and structure that a model may have.
static size_t variants(t_model_opts *out) {
    size_t n = 0;
    const t_model_opts odd = t_model_odd();
    t_model_opts even = t_model_even();
    even.layers = 2, even.hidden = 160, even.ffn = 288; // more columns than a backward piece has
    out[n++] = odd;
    out[n] = odd, out[n].architecture = "qwen2", out[n].biases = true, out[n++].untied = true;
    out[n] = odd, out[n++].rope_factors = true;
    out[n] = odd, out[n++].type = FL_GGML_F16;
    out[n] = even, out[n++].type = FL_GGML_Q8_0;
    out[n] = even, out[n++].type = FL_GGML_Q4_1;
    for (uint32_t bits = 2; bits <= 8; bits++)
        out[n] = odd, out[n].pruned = bits % 2 == 0, out[n++].bits = bits;
    return n;
}

static void test_every_stage_is_its_formula(void) {
    t_model_opts o[16];
    const size_t n = variants(o);
    const node_engine best = {&kern_best, NULL}, ref = {&kern_ref, NULL};
    for (size_t i = 0; i < n; i++) {
        check_stages(&best, &o[i], i % 2 == 0);
        check_stages(&ref, &o[i], i % 2 == 1);
    }
}

static void test_end_to_end_in_float(void) {
    const node_engine e = {&kern_best, NULL};
    const t_model_opts o = t_model_odd();
    node_model *m = t_model_make(&o);
    runner r = runner_open(m, TOKENS);
    const text x = make_text(m);
    run(&r, &e, m, NULL, &x, TOKENS);
    const node_batch batch = piece_of(&x, 0, TOKENS);
    float *embedded = calloc((size_t)TOKENS * m->hidden, sizeof(float));
    node_embed(&e, m, &batch, embedded);
    double *hidden = to_double(embedded, (size_t)TOKENS * m->hidden);
    for (uint32_t l = 0; l < m->layers; l++) {
        stages s = stages_new(m, &m->layer[l]);
        ref_layer(m, l, NULL, &x, hidden, &s, &s);
        memcpy(hidden, s.out, (size_t)TOKENS * m->hidden * sizeof(double));
        stages_free(&s);
    }
    double *got = to_double(r.x, (size_t)TOKENS * m->hidden);
    near_rows("hidden", got, hidden, (size_t)TOKENS * m->hidden, 1e-4);
    free(got);
    free(hidden);
    free(embedded);
    free(r.block);
    node_model_close(m);
}

// Bytes of the last hidden state and of all keys and values.
static void same_bits(const runner *a, const runner *b, const node_model *m, const char *what) {
    T_CHECK(memcmp(a->x, b->x, (size_t)TOKENS * m->hidden * sizeof(float)) == 0, "%s: hidden",
            what);
    T_CHECK(memcmp(a->cache, b->cache, a->kv_floats * 2 * m->layers * sizeof(float)) == 0,
            "%s: keys and values", what);
}

static void test_bits_do_not_depend_on_batch_or_threads(void) {
    static const uint32_t steps[] = {1, 3, 10, TOKENS};
    t_model_opts o[16];
    const size_t n = variants(o);
    for (size_t i = 0; i < n; i++) {
        node_model *m = t_model_make(&o[i]);
        const text x = make_text(m);
        adapter a;
        adapter_make(&a, m);
        const node_engine alone = {&kern_best, NULL};
        runner want = runner_open(m, TOKENS);
        run(&want, &alone, m, &a.lora, &x, TOKENS);
        for (unsigned threads = 1; threads <= 3; threads++) {
            fl_pool *pool = NULL;
            fl_err err;
            T_OK(fl_pool_open(threads, &pool, &err), err);
            const node_engine e = {&kern_best, pool};
            for (size_t s = 0; s < FL_COUNT(steps); s++) {
                char what[64];
                snprintf(what, sizeof(what), "model %zu, %u threads, %u tokens at a time", i,
                         threads, steps[s]);
                runner got = runner_open(m, steps[s]);
                run(&got, &e, m, &a.lora, &x, steps[s]);
                same_bits(&got, &want, m, what);
                free(got.block);
            }
            fl_pool_close(pool);
        }
        free(want.block);
        free(a.memory);
        node_model_close(m);
    }
}

static void test_other_sequences_do_not_matter(void) {
    const node_engine e = {&kern_best, NULL};
    t_model_opts o = t_model_odd();
    o.bits = 4;
    node_model *m = t_model_make(&o);
    text x = make_text(m);
    runner a = runner_open(m, TOKENS), b = runner_open(m, TOKENS);
    run(&a, &e, m, NULL, &x, TOKENS);
    for (uint32_t t = 0; t < 10; t++) x.id[t] = (x.id[t] + 1) % (int32_t)m->vocabulary;
    run(&b, &e, m, NULL, &x, TOKENS);
    const size_t third = (size_t)10 * m->hidden;
    T_CHECK(memcmp(a.x + third, b.x + third, (TOKENS - 10) * m->hidden * sizeof(float)) == 0,
            "the third sequence does not see the first two");
    T_CHECK(memcmp(a.x, b.x, m->hidden * sizeof(float)) != 0, "the first one changed");
    free(a.block);
    free(b.block);
    node_model_close(m);
}

// --- products ------------------------------------------------------------------------------------

typedef struct product_case {
    const node_matrix *w;
    float *x, *y, *dy, *dx, *dx2;
    runner r;
} product_case;

static float *random_rows(size_t n) {
    float *p = calloc(n, sizeof(float));
    for (size_t i = 0; i < n; i++) p[i] = t_randf();
    return p;
}

static product_case product_open(const node_model *m, const node_matrix *w) {
    return (product_case){w,
                          random_rows((size_t)TOKENS * w->cols),
                          random_rows((size_t)TOKENS * w->rows),
                          random_rows((size_t)TOKENS * w->rows),
                          random_rows((size_t)TOKENS * w->cols),
                          random_rows((size_t)TOKENS * w->cols),
                          runner_open(m, TOKENS)};
}

static void product_close(product_case *c) {
    float *all[] = {c->x, c->y, c->dy, c->dx, c->dx2};
    for (size_t i = 0; i < FL_COUNT(all); i++) free(all[i]);
    free(c->r.block);
}

// What the kernel in use may lose by rounding its operands.
static double dx_rounding(void) {
    const fl_gemm_packed_dx_variant *v = fl_gemm_packed_dx_variants;
    while (v->fn != kern_best.gemm_packed_dx) v++;
    return (double)v->rounding;
}

static void check_dx(const node_engine *e, product_case *c, bool accumulate) {
    const node_matrix *w = c->w;
    const size_t n = (size_t)TOKENS * w->cols;
    double *want = calloc(n, sizeof(double)), *scale = calloc(n, sizeof(double));
    float *row = calloc(w->cols, sizeof(float));
    memcpy(c->dx2, c->dx, n * sizeof(float));
    for (size_t i = 0; accumulate && i < n; i++) want[i] = (double)c->dx[i];
    for (uint32_t r = 0; r < w->rows; r++) {
        node_matrix_row(w, r, row);
        for (uint32_t t = 0; t < TOKENS; t++)
            for (uint32_t k = 0; k < w->cols; k++) {
                const double term = (double)c->dy[t * w->rows + r] * (double)row[k];
                want[t * w->cols + k] += term;
                scale[t * w->cols + k] += fabs(term);
            }
    }
    node_matmul_dx(e, w, TOKENS, c->dy, c->dx, accumulate, c->r.scratch);
    const double u = w->type == NODE_TYPE_PACKED ? dx_rounding() : 0;
    for (size_t i = 0; i < n; i++) // Higham 3.1: n rounded terms
        T_NEAR((double)c->dx[i], want[i], (w->rows + 2.0) * 1.2e-7 * (scale[i] + 1) + u * scale[i],
               "dx %zu", i);
    // In two pieces of rows, the second added to the first: the same bits.
    const uint32_t cut = w->rows / 2 / 16 * 16;
    float *part = calloc((size_t)TOKENS * w->rows, sizeof(float));
    for (uint32_t t = 0; t < TOKENS; t++)
        memcpy(part + t * cut, c->dy + t * w->rows, cut * sizeof(float));
    node_matmul_rows_dx(e, w, 0, cut, TOKENS, part, c->dx2, accumulate, c->r.scratch);
    const uint32_t rest = w->rows - cut;
    for (uint32_t t = 0; t < TOKENS; t++)
        memcpy(part + t * rest, c->dy + t * w->rows + cut, rest * sizeof(float));
    node_matmul_rows_dx(e, w, cut, w->rows, TOKENS, part, c->dx2, accumulate || cut != 0,
                        c->r.scratch);
    T_CHECK(memcmp(c->dx, c->dx2, n * sizeof(float)) == 0, "cut at row %u", cut);
    free(part);
    free(row);
    free(scale);
    free(want);
}

static void check_row_chunks(const node_engine *e, product_case *c) {
    const node_matrix *w = c->w;
    node_matmul(e, w, TOKENS, c->x, c->y, c->r.scratch);
    float *chunk = calloc((size_t)TOKENS * w->rows, sizeof(float));
    for (uint32_t begin = 0; begin < w->rows; begin += 48) {
        const uint32_t end = w->rows - begin < 48 ? w->rows : begin + 48;
        node_matmul_rows(e, w, begin, end, TOKENS, c->x, chunk, c->r.scratch);
        for (uint32_t t = 0; t < TOKENS; t++)
            T_CHECK(memcmp(chunk + t * (end - begin), c->y + t * w->rows + begin,
                           (end - begin) * sizeof(float)) == 0,
                    "rows %u..%u of token %u", begin, end, t);
    }
    free(chunk);
}

static void test_products_in_both_directions(void) {
    t_model_opts o[16];
    const size_t n = variants(o);
    for (unsigned threads = 1; threads <= 3; threads += 2) {
        fl_pool *pool = NULL;
        fl_err err;
        T_OK(fl_pool_open(threads, &pool, &err), err);
        const node_engine e = {&kern_best, pool};
        for (size_t i = 0; i < n; i++) {
            node_model *m = t_model_make(&o[i]);
            const node_matrix *all[] = {&m->head, &m->layer[1].linear[NODE_DOWN],
                                        &m->layer[1].linear[NODE_K]};
            for (size_t j = 0; j < FL_COUNT(all); j++) {
                product_case c = product_open(m, all[j]);
                check_row_chunks(&e, &c);
                check_dx(&e, &c, false);
                check_dx(&e, &c, true);
                product_close(&c);
            }
            node_model_close(m);
        }
        fl_pool_close(pool);
    }
}

static void test_drawn_a_is_a_function_of_its_key(void) {
    float a[4 * 75], b[4 * 75];
    node_lora_draw_a(1, 2, NODE_K, 4, 75, a);
    node_lora_draw_a(1, 2, NODE_K, 2, 75, b);
    T_CHECK(memcmp(a, b, 2 * 75 * sizeof(float)) == 0, "a smaller rank is a prefix");
    double mean = 0, var = 0;
    for (size_t i = 0; i < FL_COUNT(a); i++) {
        T_CHECK(fabs((double)a[i]) <= sqrt(3.0 / 75) * 1.000001, "%g", (double)a[i]);
        mean += (double)a[i] / FL_COUNT(a);
        var += (double)a[i] * (double)a[i] / FL_COUNT(a);
    }
    T_NEAR(mean, 0, 5 * sqrt(1.0 / 75 / FL_COUNT(a)), "mean");
    T_NEAR(var, 1.0 / 75, 5 * 0.9 / 75 / sqrt(FL_COUNT(a)), "variance");
    node_lora_draw_a(1, 3, NODE_K, 4, 75, b);
    T_CHECK(memcmp(a, b, sizeof(a)) != 0, "another layer");
    node_lora_draw_a(1, 2, NODE_V, 4, 75, b);
    T_CHECK(memcmp(a, b, sizeof(a)) != 0, "another module");
}

T_MAIN({"every_stage_is_its_formula", test_every_stage_is_its_formula},
       {"end_to_end_in_float", test_end_to_end_in_float},
       {"bits_do_not_depend_on_batch_or_threads", test_bits_do_not_depend_on_batch_or_threads},
       {"other_sequences_do_not_matter", test_other_sequences_do_not_matter},
       {"products_in_both_directions", test_products_in_both_directions},
       {"drawn_a_is_a_function_of_its_key", test_drawn_a_is_a_function_of_its_key}, )
