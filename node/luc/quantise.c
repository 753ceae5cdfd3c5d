#include "node/luc/quantise.h"

#include "kernels/packed.h"

#include <math.h>
#include <string.h>

enum { GROUP = FL_PACKED_GROUP, LANES = FL_PACKED_ROWS };

// One tile, column by column, so that the sixteen rows are the lanes of every loop.
typedef struct tile {
    float w[GROUP][LANES];
    float weight[GROUP];
    uint32_t columns; // that exist; the others are padding
    float top;        // largest code
    bool keep_zeros;
} tile;

typedef struct lanes {
    float v[LANES];
} lanes;

typedef struct grid {
    uint16_t scale_bits[LANES], minimum_bits[LANES];
    lanes scale, minimum, inverse;
} grid;

// Nearest integer, ties to even, for |v| below 2^22.
static inline float nearest(float v) {
    return (v + 12582912.0f) - 12582912.0f;
}

static inline float clamp(float v, float top) {
    v = v < 0.0f ? 0.0f : v;
    return v > top ? top : v;
}

static inline float code_of(float w, float minimum, float inverse, float top) {
    return nearest(clamp((w - minimum) * inverse, top));
}

// An fp16 scale of few digits: code * scale is then an fp16 number too, for every code.
static float short_scale(float scale, float top) {
    int exponent;
    const float digits = 2048.0f / (top + 1);
    const float part = frexpf(scale, &exponent); // [0.5, 1)
    return ldexpf(ceilf(part * digits) / digits, exponent);
}

static void grid_set(grid *g, const tile *t, const lanes *scale, const lanes *minimum) {
    for (int i = 0; i < LANES; i++) {
        float s = scale->v[i], m = minimum->v[i];
        if (t->keep_zeros) {
            s = s > 0x1p-14f ? short_scale(s, t->top) : 0x1p-14f;
            m = -s * clamp(nearest(-m / s), t->top);
        }
        g->scale_bits[i] = fl_f16_from_f32(s);
        g->minimum_bits[i] = fl_f16_from_f32(m);
        s = fl_f16_to_f32(g->scale_bits[i]);
        if (!(s > 0) || !isfinite(s)) g->scale_bits[i] = 0, s = 0; // a constant group
        g->scale.v[i] = s;
        g->minimum.v[i] = fl_f16_to_f32(g->minimum_bits[i]);
        g->inverse.v[i] = s > 0 ? 1.0f / s : 0.0f;
    }
}

// Least squares over the codes that a grid gives: the scale and minimum that fit them best.
static void refine(const tile *t, const grid *g, lanes *scale, lanes *minimum) {
    float q1[LANES] = {0}, q2[LANES] = {0}, w1[LANES] = {0}, qw[LANES] = {0}, all = 0;
    for (uint32_t c = 0; c < t->columns; c++) {
        const float d = t->weight[c];
        all += d;
        for (int i = 0; i < LANES; i++) {
            const float w = t->w[c][i];
            const float q = code_of(w, g->minimum.v[i], g->inverse.v[i], t->top);
            q1[i] += d * q;
            q2[i] += d * q * q;
            w1[i] += d * w;
            qw[i] += d * q * w;
        }
    }
    for (int i = 0; i < LANES; i++) {
        const float det = all * q2[i] - q1[i] * q1[i];
        if (!(det > 1e-6f * all * q2[i])) continue; // one code only
        const float s = (all * qw[i] - q1[i] * w1[i]) / det;
        if (!(s > 0)) continue;
        scale->v[i] = s;
        minimum->v[i] = (w1[i] - s * q1[i]) / all;
    }
}

static void grid_error(const tile *t, const grid *g, float error[LANES]) {
    memset(error, 0, LANES * sizeof(*error));
    for (uint32_t c = 0; c < t->columns; c++)
        for (int i = 0; i < LANES; i++) {
            const float w = t->w[c][i];
            const float q = code_of(w, g->minimum.v[i], g->inverse.v[i], t->top);
            const float e = w - (q * g->scale.v[i] + g->minimum.v[i]);
            error[i] += t->weight[c] * e * e;
        }
}

static void range_of(const tile *t, lanes *low, lanes *high) {
    for (int i = 0; i < LANES; i++) {
        low->v[i] = high->v[i] = t->keep_zeros ? 0.0f : t->w[0][i];
    }
    for (uint32_t c = 0; c < t->columns; c++)
        for (int i = 0; i < LANES; i++) {
            const float w = t->w[c][i];
            low->v[i] = w < low->v[i] ? w : low->v[i];
            high->v[i] = w > high->v[i] ? w : high->v[i];
        }
}

// The best grid of each lane among shrunken ranges, before and after refinement.
static void search(const tile *t, grid *best) {
    static const float shrink[] = {1.0f, 0.9f, 0.8f, 0.7f};
    const uint32_t tries = t->top > 40 ? 1 : t->top > 10 ? 2 : t->top > 5 ? 3 : 4;
    lanes low, high;
    float least[LANES], error[LANES];
    range_of(t, &low, &high);
    for (uint32_t k = 0; k < tries; k++) {
        lanes scale, minimum;
        for (int i = 0; i < LANES; i++) {
            const float cut = (1.0f - shrink[k]) * 0.5f * (high.v[i] - low.v[i]);
            minimum.v[i] = low.v[i] + cut;
            scale.v[i] = (high.v[i] - low.v[i]) * shrink[k] / t->top;
        }
        for (int round = 0; round < 2; round++) {
            grid g;
            grid_set(&g, t, &scale, &minimum);
            grid_error(t, &g, error);
            for (int i = 0; i < LANES; i++) {
                if (k + (uint32_t)round != 0 && !(error[i] < least[i])) continue;
                least[i] = error[i];
                best->scale_bits[i] = g.scale_bits[i];
                best->minimum_bits[i] = g.minimum_bits[i];
                best->scale.v[i] = g.scale.v[i];
                best->minimum.v[i] = g.minimum.v[i];
                best->inverse.v[i] = g.inverse.v[i];
            }
            if (round == 0) refine(t, &g, &scale, &minimum);
        }
    }
}

static size_t blocks_of(uint32_t rows) {
    return (rows + NODE_QUANTISE_ROWS - 1) / NODE_QUANTISE_ROWS;
}

void node_quantise_bind(node_quantise *q, uint32_t rows_max, uint32_t cols_max, unsigned threads,
                        fl_arena *arena) {
    const size_t n = cols_max, rows = (size_t)threads * NODE_QUANTISE_ROWS;
    *q = (node_quantise){.threads = threads, .rows_max = rows_max, .cols_max = cols_max};
    q->error = FL_ARENA_NEW(arena, double, blocks_of(rows_max));
    q->lost = FL_ARENA_NEW(arena, float, rows *n);
    q->fed = FL_ARENA_NEW(arena, float, rows *GROUP);
    q->lower = FL_ARENA_NEW(arena, float, n *n);
    q->weight = FL_ARENA_NEW(arena, float, n);
}

typedef struct factor_run {
    node_quantise *q;
    const node_factor *f;
} factor_run;

static void copy_factor(void *ctx, size_t begin, size_t end, unsigned worker) {
    const factor_run *r = ctx;
    const size_t n = r->f->n;
    (void)worker;
    for (size_t i = begin; i < end; i++) {
        const double *row = r->f->h + i * n;
        float *out = r->q->lower + i * n;
        for (size_t j = 0; j < i; j++) out[j] = (float)(row[j] / r->f->h[j * n + j]);
        for (size_t j = i; j < n; j++) out[j] = i == j ? 1.0f : 0.0f;
        r->q->weight[i] = (float)(row[i] * row[i]);
    }
}

void node_quantise_set_factor(const node_engine *engine, node_quantise *q, const node_factor *f) {
    FL_ASSERT(f->n <= q->cols_max);
    factor_run r = {q, f};
    fl_pool_run(engine->pool, f->n, 32, copy_factor, &r);
}

typedef struct quantise_run {
    const node_engine *engine;
    node_quantise *q;
    const node_quantise_job *job;
    uint32_t groups;
    size_t tile_size;
} quantise_run;

static uint8_t *tile_at(const quantise_run *r, uint32_t row, uint32_t group) {
    return r->job->packed + ((size_t)(row / LANES) * r->groups + group) * r->tile_size;
}

// Weights of rows [row, row + 16) in a group; rows past the end are zeros.
static void tile_load(const quantise_run *r, const float *w, uint32_t row, uint32_t group,
                      const float *weight, tile *t) {
    const node_quantise_job *job = r->job;
    const uint32_t first = group * GROUP, left = job->cols - first;
    t->columns = left < GROUP ? left : GROUP;
    t->top = (float)((1u << job->bits) - 1);
    t->keep_zeros = job->keep_zeros;
    for (uint32_t c = 0; c < t->columns; c++)
        t->weight[c] = weight == NULL ? 1.0f : weight[first + c];
    for (uint32_t i = 0; i < LANES; i++)
        for (uint32_t c = 0; c < t->columns; c++)
            t->w[c][i] = row + i < job->rows ? w[(size_t)(row + i) * job->total + first + c] : 0.0f;
}

// Padding rows and columns are zero codes with zero scales.
static void tile_store(const quantise_run *r, uint32_t row, uint32_t group, grid *g,
                       uint8_t *codes) {
    for (uint32_t i = 0; i < LANES; i++)
        if (row + i >= r->job->rows) {
            g->scale_bits[i] = g->minimum_bits[i] = 0;
            memset(codes + i * GROUP, 0, GROUP);
        }
    fl_packed_tile_write(tile_at(r, row, group), r->job->bits, codes, g->scale_bits,
                         g->minimum_bits);
}

static void nearest_panels(void *ctx, size_t begin, size_t end, unsigned worker) {
    const quantise_run *r = ctx;
    (void)worker;
    for (size_t panel = begin; panel < end; panel++)
        for (uint32_t group = 0; group < r->groups; group++) {
            const uint32_t row = (uint32_t)panel * LANES;
            tile t;
            grid g;
            uint8_t codes[FL_PACKED_CODES] = {0};
            tile_load(r, r->job->w, row, group, r->job->weight, &t);
            search(&t, &g);
            for (uint32_t c = 0; c < t.columns; c++)
                for (int i = 0; i < LANES; i++)
                    codes[i * GROUP + (int)c] =
                        (uint8_t)code_of(t.w[c][i], g.minimum.v[i], g.inverse.v[i], t.top);
            tile_store(r, row, group, &g, codes);
        }
}

static quantise_run run_of(const node_engine *engine, node_quantise *q,
                           const node_quantise_job *job) {
    FL_ASSERT(job->bits >= FL_PACKED_BITS_MIN && job->bits <= FL_PACKED_BITS_MAX);
    FL_ASSERT(fl_pool_threads(engine->pool) <= q->threads);
    return (quantise_run){engine, q, job, (job->cols + GROUP - 1) / GROUP,
                          fl_packed_tile_size(job->bits)};
}

void node_quantise_nearest(const node_engine *engine, node_quantise *q,
                           const node_quantise_job *job) {
    quantise_run r = run_of(engine, q, job);
    fl_pool_run(engine->pool, (job->rows + LANES - 1) / LANES, 4, nearest_panels, &r);
}

// Rounds the columns of a tile last to first. fed[16][GROUP] is the feedback of all later groups;
// where t->w is zero under keep_zeros, the weight goes. u[GROUP][GROUP] is the group's own block of
// U. lost[16][total] gets w - w'.
static double round_tile(const quantise_run *r, const tile *t, const grid *g, uint32_t group,
                         const tile *full, const float *fed, const float *u, float *lost,
                         uint8_t *codes) {
    const size_t n = r->job->total, first = (size_t)group * GROUP;
    float e[GROUP][LANES];
    double error = 0;
    for (uint32_t c = t->columns; c-- > 0;) {
        float v[LANES], residual = 0;
        for (uint32_t i = 0; i < LANES; i++) v[i] = full->w[c][i] + fed[i * GROUP + c];
        for (uint32_t k = c + 1; k < t->columns; k++) {
            const float part = u[k * GROUP + c];
            for (int i = 0; i < LANES; i++) v[i] += part * e[k][i];
        }
        for (int i = 0; i < LANES; i++) {
            const bool gone = t->keep_zeros && t->w[c][i] == 0.0f;
            const float q = code_of(gone ? 0.0f : v[i], g->minimum.v[i], g->inverse.v[i], t->top);
            const float got = q * g->scale.v[i] + g->minimum.v[i];
            codes[i * GROUP + (int)c] = (uint8_t)q;
            e[c][i] = full->w[c][i] - got;
            lost[(size_t)i * n + first + c] = e[c][i];
            residual += (v[i] - got) * (v[i] - got);
        }
        error += (double)residual * (double)r->q->weight[first + c];
    }
    return error;
}

static void lose_removed(const quantise_run *r, const float *w, uint32_t row, uint32_t rows,
                         float *lost) {
    const node_quantise_job *job = r->job;
    for (uint32_t i = 0; i < rows; i++)
        for (size_t c = job->cols; c < job->total; c++)
            lost[i * job->total + c] = row + i < job->rows ? w[(row + i) * job->total + c] : 0.0f;
}

static double feedback_rows(const quantise_run *r, uint32_t row, uint32_t rows, unsigned worker) {
    const node_quantise_job *job = r->job;
    const size_t n = job->total;
    const float *whole = job->full == NULL ? job->w : job->full;
    float *lost = r->q->lost + (size_t)worker * NODE_QUANTISE_ROWS * r->q->cols_max;
    float *fed = r->q->fed + (size_t)worker * NODE_QUANTISE_ROWS * GROUP;
    double error = 0;
    lose_removed(r, whole, row, rows, lost);
    for (uint32_t group = r->groups; group-- > 0;) {
        const size_t first = (size_t)group * GROUP;
        const size_t columns = job->cols - first < GROUP ? job->cols - first : GROUP;
        const size_t later = first + columns;
        float u[GROUP * GROUP]; // read by every tile of these rows: close together
        for (size_t k = 0; k < columns; k++)
            memcpy(u + k * GROUP, r->q->lower + (first + k) * n + first, columns * sizeof(*u));
        memset(fed, 0, (size_t)NODE_QUANTISE_ROWS * GROUP * sizeof(*fed));
        if (later < n)
            r->engine->kern->gemm_f32->nn(rows, n - later, columns, lost + later, n,
                                          r->q->lower + later * n + first, n, fed, GROUP, false);
        for (uint32_t at = 0; at < rows; at += LANES) {
            tile t, full;
            grid g;
            uint8_t codes[FL_PACKED_CODES] = {0};
            tile_load(r, job->w, row + at, group, r->q->weight, &t);
            tile_load(r, whole, row + at, group, NULL, &full);
            for (uint32_t c = 0; c < t.columns; c++)
                for (uint32_t i = 0; i < LANES; i++)
                    if (!t.keep_zeros || t.w[c][i] != 0.0f) t.w[c][i] += fed[(at + i) * GROUP + c];
            search(&t, &g);
            error += round_tile(r, &t, &g, group, &full, fed + at * GROUP, u, lost + at * n, codes);
            tile_store(r, row + at, group, &g, codes);
        }
    }
    return error;
}

static void feedback_blocks(void *ctx, size_t begin, size_t end, unsigned worker) {
    const quantise_run *r = ctx;
    for (size_t block = begin; block < end; block++) {
        const uint32_t row = (uint32_t)block * NODE_QUANTISE_ROWS;
        const uint32_t left = (r->job->rows + LANES - 1) / LANES * LANES - row;
        r->q->error[block] =
            feedback_rows(r, row, left < NODE_QUANTISE_ROWS ? left : NODE_QUANTISE_ROWS, worker);
    }
}

// Errors are added block by block, so that the sum has the same bits with any number of threads.
static double run_blocks(quantise_run *r, fl_pool_fn fn) {
    const size_t blocks = blocks_of(r->job->rows);
    FL_ASSERT(r->job->rows <= r->q->rows_max && r->job->total <= r->q->cols_max);
    fl_pool_run(r->engine->pool, blocks, 1, fn, r);
    double sum = 0;
    for (size_t i = 0; i < blocks; i++) sum += r->q->error[i];
    return sum;
}

double node_quantise_feedback(const node_engine *engine, node_quantise *q,
                              const node_quantise_job *job) {
    quantise_run r = run_of(engine, q, job);
    return run_blocks(&r, feedback_blocks);
}

static void error_blocks(void *ctx, size_t begin, size_t end, unsigned worker) {
    const quantise_run *r = ctx;
    const node_quantise_job *job = r->job;
    const size_t n = job->total;
    const float *whole = job->full == NULL ? job->w : job->full;
    const fl_packed packed = {job->packed, job->rows, job->cols, job->bits};
    float *lost = r->q->lost + (size_t)worker * NODE_QUANTISE_ROWS * r->q->cols_max;
    float *fed = r->q->fed + (size_t)worker * NODE_QUANTISE_ROWS * GROUP;
    for (size_t block = begin; block < end; block++) {
        const size_t row = block * NODE_QUANTISE_ROWS, left = job->rows - row;
        const size_t rows = left < NODE_QUANTISE_ROWS ? left : NODE_QUANTISE_ROWS;
        double error = 0;
        for (size_t i = 0; i < rows; i++) {
            fl_packed_row(&packed, (uint32_t)(row + i), lost + i * n);
            for (size_t c = job->cols; c < n; c++) lost[i * n + c] = 0;
            for (size_t c = 0; c < n; c++)
                lost[i * n + c] = whole[(row + i) * n + c] - lost[i * n + c];
        }
        for (size_t first = 0; first < job->cols; first += GROUP) {
            const size_t columns = job->cols - first < GROUP ? job->cols - first : GROUP;
            r->engine->kern->gemm_f32->nn(rows, n - first, columns, lost + first, n,
                                          r->q->lower + first * n + first, n, fed, GROUP, false);
            for (size_t i = 0; i < rows; i++)
                for (size_t c = 0; c < columns; c++) {
                    const double e = (double)fed[i * GROUP + c];
                    error += e * e * (double)r->q->weight[first + c];
                }
        }
        r->q->error[block] = error;
    }
}

double node_quantise_error(const node_engine *engine, node_quantise *q,
                           const node_quantise_job *job) {
    quantise_run r = run_of(engine, q, job);
    return run_blocks(&r, error_blocks);
}

void node_quantise_best(const node_engine *engine, node_quantise *q, const node_quantise_job *job) {
    if (job->cols == job->total && job->full == NULL) {
        node_quantise_job sample = *job;
        if (sample.rows > NODE_QUANTISE_ROWS) sample.rows = NODE_QUANTISE_ROWS;
        node_quantise_nearest(engine, q, &sample);
        const double nearest_error = node_quantise_error(engine, q, &sample);
        if (node_quantise_feedback(engine, q, &sample) > nearest_error) {
            node_quantise_nearest(engine, q, job);
            return;
        }
    }
    (void)node_quantise_feedback(engine, q, job);
}

typedef struct removal_run {
    const node_engine *engine;
    node_quantise *q;
    const float *w;
    uint32_t rows, cols;
    double *cost;
} removal_run;

static void removal_columns(void *ctx, size_t begin, size_t end, unsigned worker) {
    const removal_run *r = ctx;
    const size_t n = r->cols;
    float *fed = r->q->fed + (size_t)worker * NODE_QUANTISE_ROWS * GROUP;
    for (size_t c = begin; c < end; c++) r->cost[c] = 0;
    for (size_t row = 0; row < r->rows; row += NODE_QUANTISE_ROWS) {
        const size_t left = r->rows - row;
        const size_t rows = left < NODE_QUANTISE_ROWS ? left : NODE_QUANTISE_ROWS;
        r->engine->kern->gemm_f32->nn(rows, n - begin, end - begin, r->w + row * n + begin, n,
                                      r->q->lower + begin * n + begin, n, fed, GROUP, false);
        for (size_t i = 0; i < rows; i++)
            for (size_t c = begin; c < end; c++) {
                const double e = (double)fed[i * GROUP + c - begin];
                r->cost[c] += e * e * (double)r->q->weight[c];
            }
    }
}

void node_quantise_removal(const node_engine *engine, node_quantise *q, const float *w,
                           uint32_t rows, uint32_t cols, double *ret_cost) {
    FL_ASSERT(cols <= q->cols_max);
    removal_run r = {engine, q, w, rows, cols, ret_cost};
    fl_pool_run(engine->pool, cols, GROUP, removal_columns, &r);
}
