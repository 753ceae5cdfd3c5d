#include "node/tune/backward.h"

#include <string.h>

#include "kernels/rope.h"
#include "kernels/vec.h"
#include "node/model/resident.h"

enum { BACK_GRAIN = 8, COLUMN_GRAIN = 64 };

static uint32_t most(uint32_t a, uint32_t b) {
    return a > b ? a : b;
}

void node_back_bind(node_back *back, const node_model *model, uint32_t tokens, uint32_t rank,
                    fl_arena *arena) {
    uint32_t wide = 0, kv = 0;
    for (uint32_t l = 0; l < model->layers; l++) {
        wide = most(wide, most(model->layer[l].ffn, model->layer[l].heads * model->head_size));
        kv = most(kv, model->layer[l].kv_heads * model->head_size);
    }
    *back = (node_back){.tokens = tokens};
    back->wide1 = fl_arena_alloc(arena, (size_t)tokens * wide, sizeof(float), 64);
    back->wide2 = fl_arena_alloc(arena, (size_t)tokens * wide, sizeof(float), 64);
    back->dk = fl_arena_alloc(arena, (size_t)tokens * kv, sizeof(float), 64);
    back->dv = fl_arena_alloc(arena, (size_t)tokens * kv, sizeof(float), 64);
    back->dnorm = fl_arena_alloc(arena, (size_t)tokens * model->hidden, sizeof(float), 64);
    back->dlow = fl_arena_alloc(arena, (size_t)tokens * rank, sizeof(float), 64);
    back->low = fl_arena_alloc(arena, (size_t)tokens * rank, sizeof(float), 64);
}

// One adapter's backward pass, cut over tokens and then over rows of B.
typedef struct lora_ctx {
    const fl_kern *kern;
    const node_matrix *w;
    const float *a, *b;
    const float *low; // A x of the forward pass
    const float *dy;
    float *dx; // NULL: not wanted
    float *db;
    node_back *back;
    uint32_t rank, tokens;
    float scale;
} lora_ctx;

static void lora_tokens(void *ctx, size_t begin, size_t end, unsigned worker) {
    const lora_ctx *c = ctx;
    const size_t n = end - begin, rank = c->rank, rows = c->w->rows, cols = c->w->cols;
    float *low = c->back->low + begin * rank, *dlow = c->back->dlow + begin * rank;
    (void)worker;
    memcpy(low, c->low + begin * rank, n * rank * sizeof(float));
    fl_vec_scale(n * rank, c->scale, low);
    if (c->dx == NULL) return;
    c->kern->gemm_f32->nn(n, rows, rank, c->dy + begin * rows, rows, c->b, rank, dlow, rank, false);
    fl_vec_scale(n * rank, c->scale, dlow);
    c->kern->gemm_f32->nn(n, rank, cols, dlow, rank, c->a, cols, c->dx + begin * cols, cols, true);
}

static void lora_columns(void *ctx, size_t begin, size_t end, unsigned worker) {
    const lora_ctx *c = ctx;
    (void)worker;
    c->kern->gemm_f32->tn(c->tokens, end - begin, c->rank, c->dy + begin, c->w->rows, c->back->low,
                          c->rank, c->db + begin * c->rank, c->rank);
}

// dx (+)= gradient through module m, frozen matrix and adapter; db of the module.
static void module_backward(const node_engine *engine, const node_layer_job *job, node_module m,
                            const float *dy, float *dx, bool accumulate, node_back *back,
                            node_scratch *scratch) {
    const node_layer *l = &job->model->layer[job->layer];
    const node_lora_layer *adapter = &job->lora->layer[job->layer];
    const node_matrix *w = &l->linear[m];
    const uint32_t tokens = job->batch->tokens;
    if (dx != NULL) node_matmul_dx(engine, w, tokens, dy, dx, accumulate, scratch);
    if (adapter->a[m] == NULL) return;
    float *db = job->db;
    for (int i = 0; i < (int)m; i++) db += (size_t)l->linear[i].rows * job->lora->rank;
    lora_ctx c = {.kern = engine->kern,
                  .w = w,
                  .a = adapter->a[m],
                  .b = adapter->b[m],
                  .low = job->acts->low[m],
                  .dy = dy,
                  .dx = dx,
                  .db = db,
                  .back = back,
                  .rank = job->lora->rank,
                  .tokens = tokens,
                  .scale = job->lora->scale};
    fl_pool_run(engine->pool, tokens, BACK_GRAIN, lora_tokens, &c);
    fl_pool_run(engine->pool, w->rows, COLUMN_GRAIN, lora_columns, &c);
}

typedef struct rows_ctx {
    const node_engine *engine;
    const node_layer_job *job;
    node_back *back;
    const float *rope;
} rows_ctx;

static void swiglu_rows(void *ctx, size_t begin, size_t end, unsigned worker) {
    const rows_ctx *c = ctx;
    const size_t ffn = c->job->model->layer[c->job->layer].ffn, at = begin * ffn;
    (void)worker;
    c->engine->kern->swiglu->backward((end - begin) * ffn, c->job->acts->gate + at,
                                      c->job->acts->up + at, c->back->wide1 + at,
                                      c->back->wide1 + at, c->back->wide2 + at);
}

// dy += gradient of the norm before a block; x is what was normalised.
static void norm_rows(const rows_ctx *c, const float *x, const float *gain, size_t begin,
                      size_t end) {
    const size_t d = c->job->model->hidden;
    c->engine->kern->rmsnorm->backward(end - begin, d, c->job->model->norm_epsilon, x + begin * d,
                                       gain, c->back->dnorm + begin * d, c->job->dy + begin * d,
                                       NULL);
}

static void norm2_rows(void *ctx, size_t begin, size_t end, unsigned worker) {
    const rows_ctx *c = ctx;
    (void)worker;
    norm_rows(c, c->job->acts->mid, c->job->model->layer[c->job->layer].ffn_norm, begin, end);
}

static void norm1_rows(void *ctx, size_t begin, size_t end, unsigned worker) {
    const rows_ctx *c = ctx;
    (void)worker;
    norm_rows(c, c->job->x, c->job->model->layer[c->job->layer].attn_norm, begin, end);
}

static void attention_heads(void *ctx, size_t begin, size_t end, unsigned worker) {
    const rows_ctx *c = ctx;
    const node_model *m = c->job->model;
    const node_layer *l = &m->layer[c->job->layer];
    const node_acts *acts = c->job->acts;
    const fl_attention a = {.heads = l->heads,
                            .kv_heads = l->kv_heads,
                            .head_size = m->head_size,
                            .kv_begin = c->job->batch->kv_begin,
                            .kv_row = c->job->batch->kv_row,
                            .q = acts->q,
                            .k = acts->k,
                            .v = acts->v,
                            .out = acts->attn,
                            .lse = acts->lse,
                            .q_stride = (size_t)l->heads * m->head_size,
                            .kv_stride = (size_t)l->kv_heads * m->head_size};
    const fl_attention_grad g = {
        .dout = c->back->wide1, .dq = c->back->wide2, .dk = c->back->dk, .dv = c->back->dv};
    (void)worker;
    c->engine->kern->attention->backward(&a, &g, c->job->batch->tokens, (uint32_t)begin,
                                         (uint32_t)end);
}

static void unrotate_rows(void *ctx, size_t begin, size_t end, unsigned worker) {
    const rows_ctx *c = ctx;
    const node_model *m = c->job->model;
    const node_layer *l = &m->layer[c->job->layer];
    const size_t q = (size_t)l->heads * m->head_size, kv = (size_t)l->kv_heads * m->head_size;
    (void)worker;
    for (size_t t = begin; t < end; t++) {
        const float *turn = c->rope + t * m->rope_size;
        fl_rope_apply(l->heads, m->head_size, m->rope_size, m->rope_half, true, turn,
                      c->back->wide2 + t * q);
        fl_rope_apply(l->kv_heads, m->head_size, m->rope_size, m->rope_half, true, turn,
                      c->back->dk + t * kv);
    }
}

static void ffn_backward(const node_engine *engine, const node_layer_job *job, node_back *back,
                         node_scratch *scratch, rows_ctx *rows) {
    const uint32_t tokens = job->batch->tokens;
    module_backward(engine, job, NODE_DOWN, job->dy, back->wide1, false, back, scratch);
    fl_pool_run(engine->pool, tokens, BACK_GRAIN, swiglu_rows, rows);
    module_backward(engine, job, NODE_GATE, back->wide1, back->dnorm, false, back, scratch);
    module_backward(engine, job, NODE_UP, back->wide2, back->dnorm, true, back, scratch);
    fl_pool_run(engine->pool, tokens, BACK_GRAIN, norm2_rows, rows);
}

static void attention_backward(const node_engine *engine, const node_layer_job *job,
                               node_back *back, node_scratch *scratch, rows_ctx *rows) {
    const uint32_t tokens = job->batch->tokens;
    const node_layer *l = &job->model->layer[job->layer];
    const size_t q = (size_t)l->heads * job->model->head_size;
    const size_t kv = (size_t)l->kv_heads * job->model->head_size;
    float *dnorm = job->last ? NULL : back->dnorm;
    module_backward(engine, job, NODE_O, job->dy, back->wide1, false, back, scratch);
    memset(back->wide2, 0, tokens * q * sizeof(float));
    memset(back->dk, 0, tokens * kv * sizeof(float));
    memset(back->dv, 0, tokens * kv * sizeof(float));
    fl_pool_run(engine->pool, l->kv_heads, 1, attention_heads, rows);
    fl_pool_run(engine->pool, tokens, BACK_GRAIN, unrotate_rows, rows);
    module_backward(engine, job, NODE_Q, back->wide2, dnorm, false, back, scratch);
    module_backward(engine, job, NODE_K, back->dk, dnorm, true, back, scratch);
    module_backward(engine, job, NODE_V, back->dv, dnorm, true, back, scratch);
    if (!job->last) fl_pool_run(engine->pool, tokens, BACK_GRAIN, norm1_rows, rows);
}

void node_layer_backward(const node_engine *engine, const node_layer_job *job, node_back *back,
                         node_scratch *scratch) {
    FL_ASSERT(job->batch->tokens <= back->tokens);
    node_resident_layer(job->model, job->layer);
    rows_ctx rows = {.engine = engine,
                     .job = job,
                     .back = back,
                     .rope = node_scratch_rope(scratch, job->model, job->batch)};
    ffn_backward(engine, job, back, scratch, &rows);
    attention_backward(engine, job, back, scratch, &rows);
}
