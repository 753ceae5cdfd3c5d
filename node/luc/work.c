#include "node/luc/work.h"

#include <math.h>
#include <string.h>

#define DAMPING 0.01 // of the mean energy of a layer's inputs: GPTQ's choice

static uint32_t most(uint32_t a, uint32_t b) {
    return a > b ? a : b;
}

void node_luc_dims(const node_model *m, uint32_t layer, node_layer_shape shape,
                   uint32_t rows[NODE_MODULES], uint32_t cols[NODE_MODULES]) {
    const node_layer *l = &m->layer[layer];
    const uint32_t kv = shape.kv_heads * m->head_size, q = kv * (l->heads / l->kv_heads);
    const uint32_t r[NODE_MODULES] = {q, kv, kv, m->hidden, shape.ffn, shape.ffn, m->hidden};
    const uint32_t c[NODE_MODULES] = {m->hidden, m->hidden, m->hidden, q,
                                      m->hidden, m->hidden, shape.ffn};
    memcpy(rows, r, sizeof(r));
    memcpy(cols, c, sizeof(c));
}

uint64_t node_luc_layer_bytes(const node_model *m, uint32_t layer, node_layer_shape shape,
                              uint32_t bits) {
    uint32_t rows[NODE_MODULES], cols[NODE_MODULES];
    uint64_t sum = 0;
    node_luc_dims(m, layer, shape, rows, cols);
    for (int i = 0; i < NODE_MODULES; i++) {
        size_t size = 0;
        FL_ASSERT(fl_packed_size(rows[i], cols[i], bits, &size)); // the model's limits are below
        sum += size;
    }
    return sum;
}

static node_layer_shape shape_of(const node_layer *l) {
    return (node_layer_shape){l->kv_heads, l->ffn};
}

static void bind_layer_memory(node_luc_work *w, fl_arena *arena) {
    const node_model *m = w->model;
    size_t biggest[NODE_MODULES] = {0}, moved = 0;
    uint32_t widest = 0, rows_max = 0, cols_max = 0;
    w->layer_size = 0;
    for (uint32_t i = 0; i < m->layers; i++) {
        uint32_t rows[NODE_MODULES], cols[NODE_MODULES];
        node_luc_dims(m, i, shape_of(&m->layer[i]), rows, cols);
        const uint64_t size =
            node_luc_layer_bytes(m, i, shape_of(&m->layer[i]), NODE_LUC_WORK_BITS);
        if (size > w->layer_size) w->layer_size = (size_t)size;
        for (int k = 0; k < NODE_MODULES; k++) {
            const size_t n = (size_t)rows[k] * cols[k];
            if (n > biggest[k]) biggest[k] = n;
            if (n > moved) moved = n;
            rows_max = most(rows_max, rows[k]);
            cols_max = most(cols_max, cols[k]);
        }
    }
    widest = most(rows_max, cols_max);
    const unsigned threads = fl_pool_threads(w->engine->pool);
    for (int k = 0; k < NODE_MODULES; k++) w->w[k] = FL_ARENA_NEW(arena, float, biggest[k]);
    w->moved = FL_ARENA_NEW(arena, float, moved);
    for (int k = 0; k < 2; k++) w->order[k] = FL_ARENA_NEW(arena, uint32_t, widest);
    w->score = FL_ARENA_NEW(arena, double, widest);
    w->layer_block = fl_arena_alloc(arena, w->layer_size, 1, 64);
    w->width_block = fl_arena_alloc(arena, w->layer_size, NODE_LUC_WIDTHS, 64);
    w->copy_block = fl_arena_alloc(arena, w->layer_size, m->layers, 64);
    node_factor_bind(&w->factor, cols_max, w->tokens, threads, arena);
    node_quantise_bind(&w->quantise, rows_max, cols_max, threads, arena);
}

void node_luc_work_bind(node_luc_work *w, const node_engine *engine, const node_model *model,
                        uint32_t tokens, fl_arena *arena) {
    const size_t rows = (size_t)tokens * model->hidden;
    *w = (node_luc_work){.engine = engine, .model = model, .tokens = tokens};
    w->copy = FL_ARENA_NEW(arena, node_model, 1);
    w->trial = FL_ARENA_NEW(arena, node_model, 1);
    w->x = FL_ARENA_NEW(arena, float, rows);
    w->y = FL_ARENA_NEW(arena, float, rows);
    w->other = FL_ARENA_NEW(arena, float, rows);
    w->batch.id = FL_ARENA_NEW(arena, int32_t, tokens);
    w->batch.pos = FL_ARENA_NEW(arena, uint32_t, tokens);
    w->batch.kv_begin = FL_ARENA_NEW(arena, uint32_t, tokens);
    w->batch.kv_row = FL_ARENA_NEW(arena, uint32_t, tokens);
    node_acts_bind(&w->acts, model, tokens, tokens, 0, arena);
    w->scratch = node_scratch_bind(model, tokens, fl_pool_threads(engine->pool), arena);
    bind_layer_memory(w, arena);
    if (fl_arena_counting(arena)) return;
    *w->copy = *model;
    *w->trial = *model;
}

void node_luc_work_batch(node_luc_work *w, const int32_t *ids, uint32_t tokens, uint32_t window) {
    FL_ASSERT(tokens <= w->tokens && window > 0);
    int32_t *id = (int32_t *)(uintptr_t)w->batch.id;
    uint32_t *pos = (uint32_t *)(uintptr_t)w->batch.pos;
    uint32_t *begin = (uint32_t *)(uintptr_t)w->batch.kv_begin;
    uint32_t *row = (uint32_t *)(uintptr_t)w->batch.kv_row;
    w->batch.tokens = tokens;
    for (uint32_t t = 0; t < tokens; t++) {
        id[t] = ids[t];
        pos[t] = t % window;
        begin[t] = t - t % window;
        row[t] = t;
    }
}

void node_luc_run(node_luc_work *w, const node_model *model, uint32_t layer, float *x) {
    node_layer_forward(w->engine, model, layer, NULL, &w->batch, &w->acts, w->scratch, x);
}

typedef struct load_run {
    const node_matrix *w;
    float *out;
} load_run;

static void load_rows(void *ctx, size_t begin, size_t end, unsigned worker) {
    const load_run *r = ctx;
    (void)worker;
    for (size_t i = begin; i < end; i++)
        node_matrix_row(r->w, (uint32_t)i, r->out + i * r->w->cols);
}

void node_luc_load(node_luc_work *w, uint32_t layer) {
    for (int i = 0; i < NODE_MODULES; i++) {
        load_run r = {&w->model->layer[layer].linear[i], w->w[i]};
        fl_pool_run(w->engine->pool, r.w->rows, 16, load_rows, &r);
    }
}

void node_luc_pack(node_luc_work *w, uint32_t layer, uint32_t bits, bool keep_zeros, uint8_t *block,
                   node_layer *ret) {
    const node_layer *from = &w->model->layer[layer];
    *ret = *from;
    for (int i = 0; i < NODE_MODULES; i++) {
        const uint32_t rows = from->linear[i].rows, cols = from->linear[i].cols;
        const node_quantise_job job = {.w = w->w[i],
                                       .rows = rows,
                                       .cols = cols,
                                       .total = cols,
                                       .bits = bits,
                                       .keep_zeros = keep_zeros,
                                       .packed = block};
        size_t size = 0;
        FL_ASSERT(fl_packed_size(rows, cols, bits, &size));
        node_quantise_nearest(w->engine, &w->quantise, &job);
        ret->linear[i] = (node_matrix){NODE_TYPE_PACKED, bits, rows, cols, block, size};
        block += size;
    }
}

static const float *inputs_of(const node_luc_work *w, node_module module) {
    return module <= NODE_V    ? w->acts.norm1
           : module == NODE_O  ? w->acts.attn
           : module <= NODE_UP ? w->acts.norm2
                               : w->acts.act;
}

void node_luc_norms(const node_luc_work *w, uint32_t layer, node_module module, float *norm) {
    const size_t n = w->model->layer[layer].linear[module].cols;
    const float *x = inputs_of(w, module);
    memset(norm, 0, n * sizeof(*norm));
    for (size_t t = 0; t < w->batch.tokens; t++)
        for (size_t c = 0; c < n; c++) norm[c] += x[t * n + c] * x[t * n + c];
    for (size_t c = 0; c < n; c++) norm[c] = sqrtf(norm[c]);
}

fl_status node_luc_factor(node_luc_work *w, uint32_t layer, node_module module,
                          const uint32_t *order, fl_err *err) {
    const uint32_t n = w->model->layer[layer].linear[module].cols;
    FL_TRY(node_factor_gram(w->engine, &w->factor, inputs_of(w, module), w->batch.tokens, n, order,
                            n, DAMPING, err));
    FL_TRY(node_factor_cholesky(w->engine, &w->factor, err));
    node_quantise_set_factor(w->engine, &w->quantise, &w->factor);
    return FL_OK;
}

fl_status node_luc_pack_widths(node_luc_work *w, uint32_t layer, uint32_t low, uint32_t high,
                               bool nearest, fl_err *err) {
    const node_layer *from = &w->model->layer[layer];
    size_t used[NODE_LUC_WIDTHS] = {0};
    FL_ASSERT(low <= high && high - low < NODE_LUC_WIDTHS);
    for (uint32_t i = 0; i <= high - low; i++) w->width[i] = *from;
    for (node_module m = NODE_Q; m < NODE_MODULES; m++) {
        const uint32_t rows = from->linear[m].rows, cols = from->linear[m].cols;
        const bool shared = m == NODE_K || m == NODE_V || m == NODE_UP; // inputs of the one before
        if (!shared && !nearest) FL_TRY(node_luc_factor(w, layer, m, NULL, err));
        for (uint32_t i = 0; i <= high - low; i++) {
            uint8_t *block = w->width_block + i * w->layer_size + used[i];
            const node_quantise_job job = {.w = w->w[m],
                                           .rows = rows,
                                           .cols = cols,
                                           .total = cols,
                                           .bits = low + i,
                                           .packed = block};
            size_t size = 0;
            FL_ASSERT(fl_packed_size(rows, cols, low + i, &size));
            if (nearest)
                node_quantise_nearest(w->engine, &w->quantise, &job);
            else
                (void)node_quantise_feedback(w->engine, &w->quantise, &job);
            w->width[i].linear[m] =
                (node_matrix){NODE_TYPE_PACKED, low + i, rows, cols, block, size};
            used[i] += size;
        }
    }
    return FL_OK;
}

static void gather_columns(const float *w, uint32_t rows, uint32_t cols, const uint32_t *order,
                           float *out) {
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < cols; c++) out[r * cols + c] = w[r * cols + order[c]];
}

// Cumulated from the end: ret[i] is the cost of removing the last i + 1 blocks.
static void cumulate(const double *cost, uint32_t n, uint32_t block, double *ret) {
    double sum = 0;
    for (uint32_t i = 0; i < n / block; i++) {
        for (uint32_t c = 0; c < block; c++) sum += cost[n - 1 - i * block - c];
        ret[i] = sum;
    }
}

static fl_status removal_costs(node_luc_work *w, uint32_t layer, node_module module, uint32_t block,
                               uint32_t unit, uint32_t *order, double *ret, fl_err *err) {
    const node_matrix *m = &w->model->layer[layer].linear[module];
    const float *x = inputs_of(w, module);
    node_prune_order(w->w[module], m->rows, m->cols, block, x, w->batch.tokens, w->score, order);
    FL_TRY(node_luc_factor(w, layer, module, order, err));
    gather_columns(w->w[module], m->rows, m->cols, order, w->moved);
    node_quantise_removal(w->engine, &w->quantise, w->moved, m->rows, m->cols, w->score);
    cumulate(w->score, m->cols, unit, ret);
    return FL_OK;
}

fl_status node_luc_prune_costs(node_luc_work *w, uint32_t layer, node_prune_costs *costs,
                               fl_err *err) {
    const node_layer *l = &w->model->layer[layer];
    const uint32_t group = l->heads / l->kv_heads * w->model->head_size;
    FL_TRY(removal_costs(w, layer, NODE_O, group, group, w->order[0], costs->attn, err));
    return removal_costs(w, layer, NODE_DOWN, 1, NODE_PRUNE_CHANNELS, w->order[1], costs->ffn, err);
}
