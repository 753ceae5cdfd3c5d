#include "node/luc/factor.h"

#include <math.h>

void node_factor_bind(node_factor *f, uint32_t n_max, uint32_t tokens_max, unsigned threads,
                      fl_arena *arena) {
    const size_t n = n_max;
    *f = (node_factor){.n_max = n_max, .tokens_max = tokens_max, .threads = threads};
    f->xt = FL_ARENA_NEW(arena, float, n *tokens_max);
    f->rows = FL_ARENA_NEW(arena, float, threads *NODE_FACTOR_BLOCK *n);
    f->panel = FL_ARENA_NEW(arena, float, NODE_FACTOR_BLOCK *n);
    f->solved = FL_ARENA_NEW(arena, float, n *NODE_FACTOR_BLOCK);
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
    const node_engine *engine;
    node_factor *f;
    size_t n, begin, end; // the block column that is being removed
} chol_run;

static bool diagonal_block(const chol_run *r) {
    for (size_t i = r->begin; i < r->end; i++) {
        double *row = r->f->h + i * r->n;
        for (size_t j = r->begin; j <= i; j++) {
            const double *other = r->f->h + j * r->n;
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

enum { SOLVED = 16 }; // rows that are solved side by side, as the lanes of the loops

// Rows below the diagonal block, counted from its end: solved, and copied as floats, as they are
// and transposed, for the update.
static void solve_rows(void *ctx, size_t begin, size_t end, unsigned worker) {
    const chol_run *r = ctx;
    const size_t n = r->n, size = r->end - r->begin, lanes = end - begin;
    double x[NODE_FACTOR_BLOCK][SOLVED] = {{0}};
    (void)worker;
    double *h = r->f->h + (r->end + begin) * n + r->begin;
    for (size_t i = 0; i < lanes; i++)
        for (size_t j = 0; j < size; j++) x[j][i] = h[i * n + j];
    for (size_t j = 0; j < size; j++) {
        const double *other = r->f->h + (r->begin + j) * n + r->begin;
        for (size_t k = 0; k < j; k++)
            for (int i = 0; i < SOLVED; i++) x[j][i] -= x[k][i] * other[k];
        for (int i = 0; i < SOLVED; i++) x[j][i] /= other[j];
    }
    for (size_t i = 0; i < lanes; i++) {
        const size_t row = r->end + begin + i;
        for (size_t j = 0; j < size; j++) {
            h[i * n + j] = x[j][i];
            r->f->solved[row * NODE_FACTOR_BLOCK + j] = (float)x[j][i];
            r->f->panel[j * n + row] = (float)x[j][i];
        }
    }
}

// Products of floats, summed over one block of columns in floats, over the blocks in doubles: an
// element's error is of the order of the Gram matrix's own.
static void update_rows(void *ctx, size_t begin, size_t end, unsigned worker) {
    const chol_run *r = ctx;
    const size_t n = r->n, first = r->end + begin, cols = end;
    float *rows = r->f->rows + (size_t)worker * NODE_FACTOR_BLOCK * r->f->n_max;
    r->engine->kern->gemm_f32->nn(end - begin, r->end - r->begin, cols,
                                  r->f->solved + first * NODE_FACTOR_BLOCK, NODE_FACTOR_BLOCK,
                                  r->f->panel + r->end, n, rows, cols, false);
    for (size_t i = 0; i < end - begin; i++) {
        double *restrict row = r->f->h + (first + i) * n + r->end;
        const float *restrict product = rows + i * cols;
        for (size_t j = 0; j <= begin + i; j++) row[j] -= (double)product[j];
    }
}

fl_status node_factor_cholesky(const node_engine *engine, node_factor *f, fl_err *err) {
    chol_run r = {.engine = engine, .f = f, .n = f->n};
    for (r.begin = 0; r.begin < r.n; r.begin = r.end) {
        r.end = r.begin + NODE_FACTOR_BLOCK < r.n ? r.begin + NODE_FACTOR_BLOCK : r.n;
        if (!diagonal_block(&r))
            return FL_FAIL(err, FL_EFORMAT,
                           "the Gram matrix of a layer's inputs is not positive "
                           "definite; give more calibration text");
        fl_pool_run(engine->pool, r.n - r.end, SOLVED, solve_rows, &r);
        fl_pool_run(engine->pool, r.n - r.end, NODE_FACTOR_BLOCK, update_rows, &r);
    }
    return FL_OK;
}
