#include "node/model/forward.h"

#include <string.h>

#include "kernels/rope.h"
#include "kernels/vec.h"
#include "node/model/resident.h"
#include "node/model/scratch.h"

typedef struct widths {
    uint32_t q, kv, ffn; // the largest of any layer
} widths;

static uint32_t most(uint32_t a, uint32_t b) {
    return a > b ? a : b;
}

static widths widths_of(const node_model *m) {
    widths w = {0, 0, 0};
    for (uint32_t i = 0; i < m->layers; i++) {
        w.q = most(w.q, m->layer[i].heads * m->head_size);
        w.kv = most(w.kv, m->layer[i].kv_heads * m->head_size);
        w.ffn = most(w.ffn, m->layer[i].ffn);
    }
    return w;
}

// T rows of `width` floats; a product that wraps asks for everything, so that no plan accepts it.
static float *rows_of(fl_arena *arena, size_t tokens, size_t width) {
    size_t count;
    if (!fl_mul_size(tokens, width, &count)) count = SIZE_MAX;
    return fl_arena_alloc(arena, count, sizeof(float), 64);
}

void node_acts_bind_passing(node_acts *acts, const node_model *model, uint32_t tokens,
                            fl_arena *arena) {
    acts->norm1 = rows_of(arena, tokens, model->hidden);
    acts->norm2 = rows_of(arena, tokens, model->hidden);
    acts->act = rows_of(arena, tokens, widths_of(model).ffn);
}

void node_acts_bind_lasting(node_acts *acts, const node_model *model, uint32_t tokens,
                            uint32_t kv_rows, uint32_t rank, fl_arena *arena) {
    const widths w = widths_of(model);
    acts->q = rows_of(arena, tokens, w.q);
    if (kv_rows != 0) {
        acts->k = rows_of(arena, kv_rows, w.kv);
        acts->v = rows_of(arena, kv_rows, w.kv);
    }
    acts->attn = rows_of(arena, tokens, w.q);
    acts->lse = rows_of(arena, tokens, model->heads);
    acts->mid = rows_of(arena, tokens, model->hidden);
    acts->gate = rows_of(arena, tokens, w.ffn);
    acts->up = rows_of(arena, tokens, w.ffn);
    for (uint32_t i = 0; rank != 0 && i < NODE_MODULES; i++)
        acts->low[i] = rows_of(arena, tokens, rank);
}

void node_acts_bind(node_acts *acts, const node_model *model, uint32_t tokens, uint32_t kv_rows,
                    uint32_t rank, fl_arena *arena) {
    *acts = (node_acts){0};
    node_acts_bind_lasting(acts, model, tokens, kv_rows, rank, arena);
    node_acts_bind_passing(acts, model, tokens, arena);
}

node_scratch *node_scratch_bind(const node_model *model, uint32_t tokens, uint32_t threads,
                                fl_arena *arena) {
    const widths w = widths_of(model);
    const uint32_t cols = most(most(model->hidden, w.q), w.ffn);
    const size_t panel = most(most(NODE_PANEL_FLOATS, FL_GEMM_PACKED_DX_SCRATCH / sizeof(float)),
                              NODE_PANEL_ROWS_MIN * cols);
    // One set of codes for all tokens, or one of a span's for each thread.
    const uint32_t span = tokens < NODE_SPAN_TOKENS ? tokens : NODE_SPAN_TOKENS;
    size_t x8, x8_span, x8_spans;
    if (!fl_x8_size(tokens, cols, &x8)) x8 = SIZE_MAX;
    if (!fl_x8_size(span, cols, &x8_span) || !fl_mul_size(threads, x8_span, &x8_spans))
        x8_spans = SIZE_MAX;
    if (x8_spans > x8) x8 = x8_spans;
    node_scratch *s = fl_arena_alloc(arena, 1, sizeof(*s), 64);
    void *codes = fl_arena_alloc(arena, x8, 1, 64);
    float *panels = rows_of(arena, threads, panel);
    float *rope = rows_of(arena, tokens, model->rope_size);
    uint64_t *rope_pos = FL_ARENA_NEW(arena, uint64_t, tokens);
    float *out = rows_of(arena, tokens, most(model->hidden, 2 * w.kv));
    FL_ASSERT(panel * sizeof(float) >= FL_GEMM_PACKED_DX_SCRATCH);
    if (s == NULL) return NULL; // counting
    *s = (node_scratch){tokens, threads, codes, x8_span, panels, panel, rope, rope_pos, out};
    return s;
}

typedef struct embed_run {
    const node_model *model;
    const node_batch *batch;
    float *x;
} embed_run;

static void embed_rows(void *ctx, size_t begin, size_t end, unsigned worker) {
    const embed_run *r = ctx;
    (void)worker;
    for (size_t t = begin; t < end; t++)
        node_resident_row(r->model, &r->model->embedding, (uint32_t)r->batch->id[t],
                          r->x + t * r->model->hidden);
}

void node_embed(const node_engine *engine, const node_model *model, const node_batch *batch,
                float *x) {
    embed_run r = {model, batch, x};
    fl_pool_run(engine->pool, batch->tokens, NODE_TOKEN_GRAIN, embed_rows, &r);
}

// One layer over one batch: the stages below run one after the other, each over token rows.
typedef struct layer_run {
    const fl_kern *kern;
    const node_model *model;
    const node_layer *layer;
    const node_lora_layer *adapter; // NULL: none
    uint32_t rank;
    float scale;
    const node_batch *batch;
    node_acts *acts;
    node_scratch *scratch;
    float *x;             // [T][hidden]
    const fl_x8 *x8;      // where the stage puts quantised rows; NULL: nobody reads them
    size_t x8_first;      // token of its row 0
    uint32_t q, kv;       // widths of this layer
    uint32_t span, spans; // tokens that a thread takes through many stages, and how often
    node_product qkv[3], o, ffn[2], down;
} layer_run;

// acts->low = A x, rows [begin, end) of x.
static void lora_down(const layer_run *r, node_module module, const float *x, size_t begin,
                      size_t end) {
    if (r->adapter == NULL || r->adapter->a[module] == NULL) return;
    const size_t cols = r->layer->linear[module].cols;
    r->kern->gemm_f32->nt(end - begin, r->rank, cols, x + begin * cols, cols, r->adapter->a[module],
                          cols, r->acts->low[module] + begin * r->rank, r->rank);
}

// y += scale * B low, rows [begin, end); y addresses row `begin`.
static void lora_up(const layer_run *r, node_module module, size_t begin, size_t end, float *y,
                    size_t y_stride) {
    if (r->adapter == NULL || r->adapter->a[module] == NULL) return;
    r->kern->gemm_f32->rank_up(end - begin, r->layer->linear[module].rows, r->rank, r->scale,
                               r->acts->low[module] + begin * r->rank, r->rank,
                               r->adapter->b[module], r->rank, y, y_stride);
}

static void quantise(const layer_run *r, const float *x, uint32_t cols, size_t begin, size_t end) {
    if (r->x8 == NULL) return;
    for (size_t t = begin; t < end; t++)
        r->kern->quantise_x8(x + t * cols, cols, r->x8, (uint32_t)(t - r->x8_first));
}

static void stage_norm1(void *ctx, size_t begin, size_t end, unsigned worker) {
    const layer_run *r = ctx;
    const uint32_t n = r->model->hidden;
    (void)worker;
    r->kern->rmsnorm->forward(end - begin, n, r->model->norm_epsilon, r->x + begin * n,
                              r->layer->attn_norm, r->acts->norm1 + begin * n);
    for (node_module i = NODE_Q; i <= NODE_V; i++) lora_down(r, i, r->acts->norm1, begin, end);
    quantise(r, r->acts->norm1, n, begin, end);
}

// The batch's cosines and sines are the same in every layer: made once per position.
static const float *rope_row(const layer_run *r, size_t t) {
    const uint32_t size = r->model->rope_size, pos = r->batch->pos[t];
    float *row = r->scratch->rope + t * size;
    if (r->scratch->rope_pos[t] != (uint64_t)pos + 1) {
        fl_rope_row(pos, size, r->model->rope_freq, row);
        r->scratch->rope_pos[t] = (uint64_t)pos + 1;
    }
    return row;
}

static void add_bias(const layer_run *r, node_module module, uint32_t width, float *y) {
    const float *bias = r->layer->bias[module];
    if (bias != NULL) fl_vec_add(width, bias, y);
}

// Adapters and biases of q, k, v; rotation; keys and values to their rows.
static void stage_rotate(void *ctx, size_t begin, size_t end, unsigned worker) {
    const layer_run *r = ctx;
    const node_model *m = r->model;
    float *q = r->acts->q + begin * r->q, *k = r->scratch->out + begin * r->kv * 2;
    float *v = k + r->kv;
    (void)worker;
    lora_up(r, NODE_Q, begin, end, q, r->q);
    lora_up(r, NODE_K, begin, end, k, (size_t)r->kv * 2);
    lora_up(r, NODE_V, begin, end, v, (size_t)r->kv * 2);
    for (size_t t = begin; t < end; t++, q += r->q, k += r->kv * 2, v += r->kv * 2) {
        const float *turn = rope_row(r, t);
        const size_t row = (size_t)r->batch->kv_row[t] * r->kv;
        add_bias(r, NODE_Q, r->q, q);
        add_bias(r, NODE_K, r->kv, k);
        add_bias(r, NODE_V, r->kv, v);
        fl_rope_apply(r->layer->heads, m->head_size, m->rope_size, m->rope_half, false, turn, q);
        fl_rope_apply(r->layer->kv_heads, m->head_size, m->rope_size, m->rope_half, false, turn, k);
        memcpy(r->acts->k + row, k, r->kv * sizeof(float));
        memcpy(r->acts->v + row, v, r->kv * sizeof(float));
    }
}

// Pieces are blocks of tokens by key/value heads with their queries.
static void stage_attention(void *ctx, size_t begin, size_t end, unsigned worker) {
    const layer_run *r = ctx;
    const node_layer *l = r->layer;
    const uint32_t group = l->heads / l->kv_heads;
    const fl_attention a = {.heads = l->heads,
                            .kv_heads = l->kv_heads,
                            .head_size = r->model->head_size,
                            .kv_begin = r->batch->kv_begin,
                            .kv_row = r->batch->kv_row,
                            .q = r->acts->q,
                            .k = r->acts->k,
                            .v = r->acts->v,
                            .out = r->acts->attn,
                            .lse = r->acts->lse,
                            .q_stride = r->q,
                            .kv_stride = r->kv};
    (void)worker;
    for (size_t i = begin; i < end; i++) {
        const uint32_t head = (uint32_t)(i % l->kv_heads) * group;
        const uint32_t t = (uint32_t)(i / l->kv_heads) * NODE_ATTENTION_GRAIN;
        const uint32_t left = r->batch->tokens - t;
        const uint32_t count = left < NODE_ATTENTION_GRAIN ? left : NODE_ATTENTION_GRAIN;
        r->kern->attention->forward(&a, t, t + count, head, head + group);
    }
}

static void stage_before_o(void *ctx, size_t begin, size_t end, unsigned worker) {
    const layer_run *r = ctx;
    (void)worker;
    lora_down(r, NODE_O, r->acts->attn, begin, end);
    quantise(r, r->acts->attn, r->q, begin, end);
}

// y = x + out: the residual stream after a block's product.
static void add_residual(const layer_run *r, node_module module, const float *x, size_t begin,
                         size_t end, float *y) {
    const uint32_t n = r->model->hidden;
    float *out = r->scratch->out + begin * n;
    lora_up(r, module, begin, end, out, n);
    x += begin * n;
    y += begin * n;
    const size_t count = (end - begin) * n;
    for (size_t i = 0; i < count; i++) y[i] = x[i] + out[i];
}

static void stage_norm2(void *ctx, size_t begin, size_t end, unsigned worker) {
    const layer_run *r = ctx;
    const uint32_t n = r->model->hidden;
    (void)worker;
    add_residual(r, NODE_O, r->x, begin, end, r->acts->mid);
    r->kern->rmsnorm->forward(end - begin, n, r->model->norm_epsilon, r->acts->mid + begin * n,
                              r->layer->ffn_norm, r->acts->norm2 + begin * n);
    lora_down(r, NODE_GATE, r->acts->norm2, begin, end);
    lora_down(r, NODE_UP, r->acts->norm2, begin, end);
    quantise(r, r->acts->norm2, n, begin, end);
}

static void stage_act(void *ctx, size_t begin, size_t end, unsigned worker) {
    const layer_run *r = ctx;
    const size_t n = r->layer->ffn, at = begin * n;
    (void)worker;
    lora_up(r, NODE_GATE, begin, end, r->acts->gate + at, n);
    lora_up(r, NODE_UP, begin, end, r->acts->up + at, n);
    r->kern->swiglu->forward((end - begin) * n, r->acts->gate + at, r->acts->up + at,
                             r->acts->act + at);
    lora_down(r, NODE_DOWN, r->acts->act, begin, end);
    quantise(r, r->acts->act, (uint32_t)n, begin, end);
}

static void stage_end(void *ctx, size_t begin, size_t end, unsigned worker) {
    const layer_run *r = ctx;
    (void)worker;
    add_residual(r, NODE_DOWN, r->acts->mid, begin, end, r->x);
}

// Runs a stage over the batch's tokens, then products of what it left in rows of `from`.
static void stage_and_products(const node_engine *engine, layer_run *r, fl_pool_fn stage,
                               const float *from, const node_product *p, uint32_t count) {
    const uint32_t tokens = r->batch->tokens;
    const fl_x8 x8 = fl_x8_bind(r->scratch->x8, tokens, p->w->cols);
    r->x8 = node_products_packed(p, count) ? &x8 : NULL;
    fl_pool_run(engine->pool, tokens, NODE_TOKEN_GRAIN, stage, r);
    node_products_run(engine, p, count, tokens, from, &x8, r->scratch);
    r->x8 = NULL;
}

// Few tokens, or matrices as others made them: threads meet after every stage, since they share the
// rows of a product.
static void run_stages(const node_engine *engine, layer_run *r) {
    const uint32_t tokens = r->batch->tokens;
    const uint32_t blocks = (tokens + NODE_ATTENTION_GRAIN - 1) / NODE_ATTENTION_GRAIN;
    stage_and_products(engine, r, stage_norm1, r->acts->norm1, r->qkv, 3);
    fl_pool_run(engine->pool, tokens, NODE_TOKEN_GRAIN, stage_rotate, r);
    fl_pool_run(engine->pool, (size_t)blocks * r->layer->kv_heads, 1, stage_attention, r);
    stage_and_products(engine, r, stage_before_o, r->acts->attn, &r->o, 1);
    stage_and_products(engine, r, stage_norm2, r->acts->norm2, r->ffn, 2);
    stage_and_products(engine, r, stage_act, r->acts->act, &r->down, 1);
    fl_pool_run(engine->pool, tokens, NODE_TOKEN_GRAIN, stage_end, r);
}

// The same for a span of tokens that one thread keeps: what a stage leaves is in its cache for the
// next one.
static void span_products(layer_run *r, fl_pool_fn stage, const node_product *p, uint32_t count,
                          size_t begin, size_t end, unsigned worker) {
    uint8_t *codes = (uint8_t *)r->scratch->x8 + worker * r->scratch->x8_span;
    const fl_x8 x8 = fl_x8_bind(codes, (uint32_t)(end - begin), p->w->cols);
    r->x8 = &x8;
    r->x8_first = begin;
    stage(r, begin, end, worker);
    for (uint32_t i = 0; i < count; i++) node_product_span(r->kern, &p[i], begin, &x8);
    r->x8 = NULL;
}

static void span_keys(void *ctx, size_t begin, size_t end, unsigned worker) {
    layer_run r = *(const layer_run *)ctx;
    span_products(&r, stage_norm1, r.qkv, 3, begin, end, worker);
    stage_rotate(&r, begin, end, worker);
}

// From the last span to the first: the last has the most keys to look at, and what is begun last
// should be short.
static void span_rest(void *ctx, size_t piece, size_t pieces_end, unsigned worker) {
    layer_run r = *(const layer_run *)ctx;
    (void)pieces_end; // one at a time
    const size_t begin = (r.spans - 1 - piece) * (size_t)r.span, tokens = r.batch->tokens;
    const size_t end = tokens - begin < r.span ? tokens : begin + r.span;
    const size_t heads = r.layer->kv_heads;
    stage_attention(&r, begin / NODE_ATTENTION_GRAIN * heads,
                    (end + NODE_ATTENTION_GRAIN - 1) / NODE_ATTENTION_GRAIN * heads, worker);
    span_products(&r, stage_before_o, &r.o, 1, begin, end, worker);
    span_products(&r, stage_norm2, r.ffn, 2, begin, end, worker);
    span_products(&r, stage_act, &r.down, 1, begin, end, worker);
    stage_end(&r, begin, end, worker);
}

// Threads meet twice a layer: when all keys and values are there, and at its end.
static void run_spans(const node_engine *engine, layer_run *r) {
    _Static_assert(NODE_SPAN_TOKENS % NODE_ATTENTION_GRAIN == 0, "a span is whole blocks");
    r->spans = (r->batch->tokens + r->span - 1) / r->span;
    fl_pool_run(engine->pool, r->batch->tokens, r->span, span_keys, r);
    fl_pool_run(engine->pool, r->spans, 1, span_rest, r);
}

static bool is_packed(const node_layer *l) {
    for (int i = 0; i < NODE_MODULES; i++)
        if (l->linear[i].type != NODE_TYPE_PACKED) return false;
    return true;
}

// Tokens of a span; 0 when there are too few for every thread to have one that is worth unpacking
// all weights for.
static uint32_t span_of(const node_engine *engine, const node_layer *l, uint32_t tokens) {
    const uint32_t share = tokens / fl_pool_threads(engine->pool);
    if (!is_packed(l) || share < NODE_SPAN_TOKENS / 2) return 0;
    return share < NODE_SPAN_TOKENS ? NODE_SPAN_TOKENS / 2 : NODE_SPAN_TOKENS;
}

static node_product whole(const node_matrix *w, float *y, size_t y_stride) {
    return (node_product){w, 0, w->rows, y, y_stride};
}

void node_layer_forward(const node_engine *engine, const node_model *model, uint32_t layer,
                        const node_lora *lora, const node_batch *batch, node_acts *acts,
                        node_scratch *scratch, float *x) {
    FL_ASSERT(layer < model->layers && batch->tokens <= scratch->tokens);
    FL_ASSERT(fl_pool_threads(engine->pool) <= scratch->threads);
    if (batch->tokens == 0) return;
    const node_layer *l = &model->layer[layer];
    const uint32_t kv = l->kv_heads * model->head_size, q = l->heads * model->head_size;
    node_resident_layer(model, layer);
    layer_run r = {.kern = engine->kern,
                   .model = model,
                   .layer = l,
                   .adapter = lora == NULL ? NULL : &lora->layer[layer],
                   .rank = lora == NULL ? 0 : lora->rank,
                   .scale = lora == NULL ? 0 : lora->scale,
                   .batch = batch,
                   .acts = acts,
                   .scratch = scratch,
                   .x = x,
                   .q = q,
                   .kv = kv,
                   .span = span_of(engine, l, batch->tokens),
                   .qkv = {whole(&l->linear[NODE_Q], acts->q, q),
                           whole(&l->linear[NODE_K], scratch->out, (size_t)kv * 2),
                           whole(&l->linear[NODE_V], scratch->out + kv, (size_t)kv * 2)},
                   .o = whole(&l->linear[NODE_O], scratch->out, model->hidden),
                   .ffn = {whole(&l->linear[NODE_GATE], acts->gate, l->ffn),
                           whole(&l->linear[NODE_UP], acts->up, l->ffn)},
                   .down = whole(&l->linear[NODE_DOWN], scratch->out, model->hidden)};
    if (r.span != 0)
        run_spans(engine, &r);
    else
        run_stages(engine, &r);
}

const float *node_scratch_rope(node_scratch *scratch, const node_model *model,
                               const node_batch *batch) {
    const layer_run r = {.model = model, .batch = batch, .scratch = scratch};
    for (size_t t = 0; t < batch->tokens; t++) (void)rope_row(&r, t);
    return scratch->rope;
}
