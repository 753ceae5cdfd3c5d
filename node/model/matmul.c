// Products with matrices as they lie in the file. Packed ones take quantised rows; ggml's types are
// made into floats a panel at a time, in memory of the worker that needs it.
#include "kernels/ggml.h"
#include "node/model/scratch.h"

enum { PACKED_GRAIN = 32, COLS_GRAIN = 128, DX_TOKENS_MIN = 32, DX_TOKENS_BLOCK = 16 };

static fl_packed packed_view(const node_matrix *w) {
    return (fl_packed){w->data, w->rows, w->cols, w->bits};
}

static uint32_t panel_rows(uint32_t cols) {
    const uint32_t fit = NODE_PANEL_FLOATS / cols / 8 * 8;
    return fit > NODE_PANEL_ROWS       ? NODE_PANEL_ROWS
           : fit < NODE_PANEL_ROWS_MIN ? NODE_PANEL_ROWS_MIN
                                       : fit;
}

static uint32_t least(uint32_t a, uint32_t b) {
    return a < b ? a : b;
}

// Float matrices that lie aligned in the mapping need no panel.
static const float *float_rows(const node_matrix *w) {
    if (w->type != FL_GGML_F32 || (uintptr_t)w->data % _Alignof(float) != 0) return NULL;
    return (const float *)(const void *)w->data;
}

typedef struct run {
    const fl_kern *kern;
    const node_product *product;
    uint32_t count, tokens, threads;
    uint32_t pieces[NODE_PRODUCTS_MAX]; // of each product
    const float *x;
    const fl_x8 *x8;
    node_scratch *scratch;
} run;

// One token reads every weight once, as fast as memory gives it: a thread has one stretch of the
// file to itself, since memory is read fastest in long runs.
static uint32_t product_grain(const run *r, const node_product *p) {
    if (p->w->type != NODE_TYPE_PACKED) return panel_rows(p->w->cols);
    if (r->tokens != 1) return PACKED_GRAIN;
    const uint32_t share = (p->row_end - p->row_begin + r->threads - 1) / r->threads;
    return (share + FL_PACKED_ROWS - 1) / FL_PACKED_ROWS * FL_PACKED_ROWS;
}

static void float_piece(const run *r, const node_product *p, uint32_t begin, uint32_t end,
                        unsigned worker) {
    const node_matrix *w = p->w;
    const float *rows = float_rows(w);
    if (rows != NULL) {
        rows += (size_t)begin * w->cols;
    } else {
        float *panel = r->scratch->panel + worker * r->scratch->panel_stride;
        const size_t size = w->size / w->rows;
        for (uint32_t i = begin; i < end; i++)
            r->kern->ggml->row_to_f32(w->type, w->data + i * size, w->cols,
                                      panel + (size_t)(i - begin) * w->cols);
        rows = panel;
    }
    r->kern->gemm_f32->nt(r->tokens, end - begin, w->cols, r->x, w->cols, rows, w->cols,
                          p->y + (begin - p->row_begin), p->y_stride);
}

static void one_piece(const run *r, uint32_t piece, unsigned worker) {
    uint32_t i = 0;
    while (piece >= r->pieces[i]) piece -= r->pieces[i++];
    const node_product *p = &r->product[i];
    const uint32_t grain = product_grain(r, p);
    const uint32_t begin = p->row_begin + piece * grain, end = least(begin + grain, p->row_end);
    if (p->w->type != NODE_TYPE_PACKED) {
        float_piece(r, p, begin, end, worker);
        return;
    }
    const fl_packed w = packed_view(p->w);
    r->kern->gemm_packed(&w, begin, end, r->x8, p->y + (begin - p->row_begin), p->y_stride);
}

static void run_pieces(void *ctx, size_t begin, size_t end, unsigned worker) {
    for (size_t i = begin; i < end; i++) one_piece(ctx, (uint32_t)i, worker);
}

bool node_products_packed(const node_product *p, uint32_t count) {
    for (uint32_t i = 0; i < count; i++)
        if (p[i].w->type == NODE_TYPE_PACKED) return true;
    return false;
}

void node_products_run(const node_engine *engine, const node_product *p, uint32_t count,
                       uint32_t tokens, const float *x, const fl_x8 *x8, node_scratch *scratch) {
    FL_ASSERT(count <= NODE_PRODUCTS_MAX && tokens <= scratch->tokens);
    FL_ASSERT(fl_pool_threads(engine->pool) <= scratch->threads);
    if (tokens == 0) return;
    run r = {engine->kern, p, count, tokens, fl_pool_threads(engine->pool), {0}, x, x8, scratch};
    size_t pieces = 0;
    for (uint32_t i = 0; i < count; i++) {
        const uint32_t grain = product_grain(&r, &p[i]);
        r.pieces[i] = (p[i].row_end - p[i].row_begin + grain - 1) / grain;
        pieces += r.pieces[i];
    }
    fl_pool_run(engine->pool, pieces, 1, run_pieces, &r);
}

void node_product_span(const fl_kern *kern, const node_product *p, size_t begin, const fl_x8 *x8) {
    const fl_packed w = packed_view(p->w);
    kern->gemm_packed(&w, p->row_begin, p->row_end, x8, p->y + begin * p->y_stride, p->y_stride);
}

typedef struct quantise {
    const fl_kern *kern;
    const float *x;
    uint32_t cols;
    const fl_x8 *x8;
} quantise;

static void quantise_rows(void *ctx, size_t begin, size_t end, unsigned worker) {
    const quantise *q = ctx;
    (void)worker;
    for (size_t t = begin; t < end; t++)
        q->kern->quantise_x8(q->x + t * q->cols, q->cols, q->x8, (uint32_t)t);
}

void node_matmul_rows(const node_engine *engine, const node_matrix *w, uint32_t row_begin,
                      uint32_t row_end, uint32_t tokens, const float *x, float *y,
                      node_scratch *scratch) {
    FL_ASSERT(row_begin <= row_end && row_end <= w->rows && tokens <= scratch->tokens);
    FL_ASSERT(row_begin % 16 == 0 && (row_end % 16 == 0 || row_end == w->rows));
    if (tokens == 0) return;
    const node_product p = {w, row_begin, row_end, y, row_end - row_begin};
    const fl_x8 x8 = fl_x8_bind(scratch->x8, tokens, w->cols);
    if (w->type == NODE_TYPE_PACKED) {
        quantise q = {engine->kern, x, w->cols, &x8};
        fl_pool_run(engine->pool, tokens, NODE_TOKEN_GRAIN, quantise_rows, &q);
    }
    node_products_run(engine, &p, 1, tokens, x, &x8, scratch);
}

void node_matmul(const node_engine *engine, const node_matrix *w, uint32_t tokens, const float *x,
                 float *y, node_scratch *scratch) {
    node_matmul_rows(engine, w, 0, w->rows, tokens, x, y, scratch);
}

// Backward: threads split the tokens or the columns, so that every element of dx is one worker's
// sum over the rows in order.
typedef struct run_dx {
    const fl_kern *kern;
    const node_matrix *w;
    uint32_t row_begin, row_end, tokens;
    const float *dy;
    float *dx;
    bool accumulate;
    node_scratch *scratch;
} run_dx;

static uint32_t cols_grain(const node_matrix *w) {
    if (w->type == NODE_TYPE_PACKED) return FL_PACKED_GROUP;
    const uint32_t block = fl_ggml_type_find(w->type)->block_elements;
    return block > COLS_GRAIN ? block : COLS_GRAIN; // both powers of two: whole blocks
}

static void float_cols(const run_dx *r, uint32_t begin, uint32_t end, unsigned worker) {
    const node_matrix *w = r->w;
    const uint32_t n = r->row_end - r->row_begin, cols = end - begin;
    float *dx = r->dx + begin;
    const float *rows = float_rows(w);
    if (rows != NULL) {
        r->kern->gemm_f32->nn(r->tokens, n, cols, r->dy, n,
                              rows + (size_t)r->row_begin * w->cols + begin, w->cols, dx, w->cols,
                              r->accumulate);
        return;
    }
    float *panel = r->scratch->panel + worker * r->scratch->panel_stride;
    const fl_ggml_type *type = fl_ggml_type_find(w->type);
    const size_t size = w->size / w->rows;
    const size_t skip = (size_t)(begin / type->block_elements) * type->block_bytes;
    for (uint32_t j = 0; j < n; j += NODE_PANEL_ROWS) {
        const uint32_t rows_now = least(n - j, NODE_PANEL_ROWS);
        for (uint32_t i = 0; i < rows_now; i++)
            r->kern->ggml->row_to_f32(w->type, w->data + (r->row_begin + j + i) * size + skip, cols,
                                      panel + (size_t)i * cols);
        r->kern->gemm_f32->nn(r->tokens, rows_now, cols, r->dy + j, n, panel, cols, dx, w->cols,
                              r->accumulate || j != 0);
    }
}

static void packed_dx(const run_dx *r, size_t token, size_t tokens, uint32_t begin, uint32_t end,
                      unsigned worker) {
    const fl_packed w = packed_view(r->w);
    const fl_packed_range range = {r->row_begin, r->row_end, begin, end};
    const size_t n = r->row_end - r->row_begin;
    r->kern->gemm_packed_dx(&w, &range, (uint32_t)tokens, r->dy + token * n, n,
                            r->dx + token * w.cols + begin, w.cols, r->accumulate,
                            r->scratch->panel + worker * r->scratch->panel_stride);
}

static void run_cols(void *ctx, size_t begin, size_t end, unsigned worker) {
    const run_dx *r = ctx;
    if (r->w->type != NODE_TYPE_PACKED)
        float_cols(r, (uint32_t)begin, (uint32_t)end, worker);
    else
        packed_dx(r, 0, r->tokens, (uint32_t)begin, (uint32_t)end, worker);
}

static void run_tokens(void *ctx, size_t begin, size_t end, unsigned worker) {
    const run_dx *r = ctx;
    packed_dx(r, begin, end - begin, 0, r->w->cols, worker);
}

void node_matmul_rows_dx(const node_engine *engine, const node_matrix *w, uint32_t row_begin,
                         uint32_t row_end, uint32_t tokens, const float *dy, float *dx,
                         bool accumulate, node_scratch *scratch) {
    FL_ASSERT(row_begin <= row_end && row_end <= w->rows && tokens <= scratch->tokens);
    FL_ASSERT(row_begin % 16 == 0 && (row_end % 16 == 0 || row_end == w->rows));
    FL_ASSERT(fl_pool_threads(engine->pool) <= scratch->threads);
    if (tokens == 0) return;
    run_dx r = {engine->kern, w, row_begin, row_end, tokens, dy, dx, accumulate, scratch};
    // Gradients are looked through and put in order once a range of columns, weights are unpacked
    // once a range of tokens: with many tokens, the latter costs less.
    const uint32_t threads = fl_pool_threads(engine->pool);
    const uint32_t share = (tokens + threads - 1) / threads;
    if (w->type == NODE_TYPE_PACKED && share >= DX_TOKENS_MIN)
        fl_pool_run(engine->pool, tokens,
                    (share + DX_TOKENS_BLOCK - 1) / DX_TOKENS_BLOCK * DX_TOKENS_BLOCK, run_tokens,
                    &r);
    else
        fl_pool_run(engine->pool, w->cols, cols_grain(w), run_cols, &r);
}

void node_matmul_dx(const node_engine *engine, const node_matrix *w, uint32_t tokens,
                    const float *dy, float *dx, bool accumulate, node_scratch *scratch) {
    node_matmul_rows_dx(engine, w, 0, w->rows, tokens, dy, dx, accumulate, scratch);
}
