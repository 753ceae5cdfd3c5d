#include "node/luc/factor.h"

#include <math.h>

void node_factor_bind(node_factor *f, uint32_t n_max, uint32_t tokens_max, unsigned threads,
                      fl_arena *arena) {
    const size_t n = n_max;
    *f = (node_factor){.n_max = n_max, .tokens_max = tokens_max, .threads = threads};
    f->xt = FL_ARENA_NEW(arena, float, n *tokens_max);
    f->rows = FL_ARENA_NEW(arena, float, threads *NODE_FACTOR_BLOCK *n);
    f->panel = FL_ARENA_NEW(arena, double, NODE_FACTOR_BLOCK *n);
    f->h = FL_ARENA_NEW(arena, double, n *n);
}

typedef struct gram_run {
    const node_engine *engine;
    node_factor *f;
    const float *x;
    size_t stride;
    uint32_t tokens;
    const uint32_t *order;
} gram_run;

static void transpose(void *ctx, size_t begin, size_t end, unsigned worker) {
    const gram_run *r = ctx;
    (void)worker;
    for (size_t i = begin; i < end; i++) {
        const size_t column = r->order == NULL ? i : r->order[i];
        float *out = r->f->xt + i * r->tokens;
        for (size_t t = 0; t < r->tokens; t++) out[t] = r->x[t * r->stride + column];
    }
}

static void gram_rows(void *ctx, size_t begin, size_t end, unsigned worker) {
    const gram_run *r = ctx;
    const size_t n = r->f->n, t = r->tokens;
    float *rows = r->f->rows + (size_t)worker * NODE_FACTOR_BLOCK * r->f->n_max;
    r->engine->kern->gemm_f32->nt(end - begin, end, t, r->f->xt + begin * t, t, r->f->xt, t, rows,
                                  end);
    for (size_t i = begin; i < end; i++)
        for (size_t j = 0; j <= i; j++) r->f->h[i * n + j] = (double)rows[(i - begin) * end + j];
}

fl_status node_factor_gram(const node_engine *engine, node_factor *f, const float *x,
                           uint32_t tokens, size_t stride, const uint32_t *order, uint32_t n,
                           double damping, fl_err *err) {
    FL_ASSERT(n <= f->n_max && tokens <= f->tokens_max);
    FL_ASSERT(fl_pool_threads(engine->pool) <= f->threads);
    f->n = n;
    gram_run r = {engine, f, x, stride, tokens, order};
    fl_pool_run(engine->pool, n, NODE_FACTOR_BLOCK, transpose, &r);
    fl_pool_run(engine->pool, n, NODE_FACTOR_BLOCK, gram_rows, &r);
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += f->h[i * n + i];
    if (!isfinite(sum) || sum <= 0)
        return FL_FAIL(err, FL_EFORMAT,
                       "a layer's inputs are %s over the calibration text: the model is damaged",
                       isfinite(sum) ? "all zero" : "not finite");
    for (size_t i = 0; i < n; i++) f->h[i * n + i] += damping * sum / n;
    return FL_OK;
}

typedef struct chol_run {
    double *h, *panel;
    size_t n, begin, end; // the block column that is being removed
} chol_run;

static bool diagonal_block(const chol_run *r) {
    for (size_t i = r->begin; i < r->end; i++) {
        double *row = r->h + i * r->n;
        for (size_t j = r->begin; j <= i; j++) {
            const double *other = r->h + j * r->n;
            double s = row[j];
            for (size_t k = r->begin; k < j; k++) s -= row[k] * other[k];
            if (j < i) {
                row[j] = s / other[j];
            } else {
                if (!(s > 0) || !isfinite(s)) return false;
                row[j] = sqrt(s);
            }
        }
    }
    return true;
}

// Rows below the diagonal block, counted from its end: solved, and copied to the panel transposed,
// where the update reads them along the columns.
static void solve_rows(void *ctx, size_t begin, size_t end, unsigned worker) {
    const chol_run *r = ctx;
    (void)worker;
    for (size_t i = r->end + begin; i < r->end + end; i++) {
        double *row = r->h + i * r->n;
        for (size_t j = r->begin; j < r->end; j++) {
            const double *other = r->h + j * r->n;
            double s = row[j];
            for (size_t k = r->begin; k < j; k++) s -= row[k] * other[k];
            row[j] = s / other[j];
            r->panel[(j - r->begin) * r->n + i] = row[j];
        }
    }
}

static void update_rows(void *ctx, size_t begin, size_t end, unsigned worker) {
    const chol_run *r = ctx;
    const size_t n = r->n;
    (void)worker;
    for (size_t i = r->end + begin; i < r->end + end; i++) {
        double *restrict row = r->h + i * n;
        size_t k = r->begin;
        for (; k + 4 <= r->end; k += 4) {
            const double a = row[k], b = row[k + 1], c = row[k + 2], d = row[k + 3];
            const double *restrict p = r->panel + (k - r->begin) * n;
            for (size_t j = r->end; j <= i; j++)
                row[j] -= a * p[j] + b * p[n + j] + (c * p[2 * n + j] + d * p[3 * n + j]);
        }
        for (; k < r->end; k++)
            for (size_t j = r->end; j <= i; j++)
                row[j] -= row[k] * r->panel[(k - r->begin) * n + j];
    }
}

fl_status node_factor_cholesky(const node_engine *engine, node_factor *f, fl_err *err) {
    chol_run r = {.h = f->h, .panel = f->panel, .n = f->n};
    for (r.begin = 0; r.begin < r.n; r.begin = r.end) {
        r.end = r.begin + NODE_FACTOR_BLOCK < r.n ? r.begin + NODE_FACTOR_BLOCK : r.n;
        if (!diagonal_block(&r))
            return FL_FAIL(err, FL_EFORMAT,
                           "the Gram matrix of a layer's inputs is not positive "
                           "definite; give more calibration text");
        fl_pool_run(engine->pool, r.n - r.end, 16, solve_rows, &r);
        fl_pool_run(engine->pool, r.n - r.end, 16, update_rows, &r);
    }
    return FL_OK;
}
