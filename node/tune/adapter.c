#include "node/tune/adapter.h"

#include "common/checked.h"
#include "common/fault.h"
#include "kernels/gemm_f32.h"
#include "kernels/vec.h"
#include "node/model/resident.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { BLOCK_ALIGN = 64 };

node_adapter_opts node_adapter_defaults(void) {
    return (node_adapter_opts){.rank = NODE_ADAPTER_RANK, .alpha = 16.0f, .seed = 1};
}

uint32_t node_adapter_layer_count(const node_model *model, uint32_t layer, uint32_t rank) {
    uint32_t rows = 0;
    for (int m = 0; m < NODE_MODULES; m++) rows += model->layer[layer].linear[m].rows;
    return rows * rank;
}

static void bind_layer(node_adapter *a, const node_model *model, uint32_t layer, fl_arena *arena) {
    const uint32_t rank = a->opts.rank, count = node_adapter_layer_count(model, layer, rank);
    node_lora_layer *out = &a->layer[layer];
    float *b = FL_ARENA_NEW(arena, float, count);
    a->span[layer] = b;
    a->span_count[layer] = count;
    for (int m = 0; m < NODE_MODULES; m++) {
        const node_matrix *w = &model->layer[layer].linear[m];
        float *draw = FL_ARENA_NEW(arena, float, (size_t)rank * w->cols);
        if (fl_arena_counting(arena)) continue;
        node_lora_draw_a(a->opts.seed, layer, (node_module)m, rank, w->cols, draw);
        out->a[m] = draw;
        out->b[m] = b;
        b += (size_t)rank * w->rows;
    }
}

void node_adapter_bind(node_adapter *a, const node_model *model, const node_adapter_opts *opts,
                       fl_arena *arena) {
    *a = (node_adapter){.opts = *opts, .hidden = model->hidden, .vocabulary = model->vocabulary};
    a->lora = (node_lora){.rank = opts->rank,
                          .scale = opts->alpha / (float)opts->rank,
                          .layers = model->layers,
                          .layer = a->layer,
                          .exits = model->exits};
    for (uint32_t l = 0; l < model->layers; l++) bind_layer(a, model, l, arena);
    for (uint32_t t = 0; t < model->exits; t++) {
        float *gain = FL_ARENA_NEW(arena, float, model->hidden);
        a->span[model->layers + t] = a->lora.exit_gain[t] = gain;
        a->span_count[model->layers + t] = model->hidden;
        a->exit_layer[t] = model->exit_layer[t];
        if (gain != NULL) memcpy(gain, model->final_norm, model->hidden * sizeof(float));
    }
    node_vote_init(&a->vote, model->exits);
    if (!fl_arena_counting(arena)) a->model_id = node_adapter_model_id(model);
}

size_t node_adapter_size(const node_model *model, uint32_t rank) {
    node_adapter a;
    node_adapter_opts opts = node_adapter_defaults();
    opts.rank = rank;
    fl_arena arena;
    fl_arena_init_counting(&arena);
    node_adapter_bind(&a, model, &opts, &arena);
    return arena.peak;
}

static fl_status check_opts(const node_adapter_opts *opts, fl_err *err) {
    if (opts->rank < 1 || opts->rank > FL_RANK_MAX)
        return FL_FAIL(err, FL_EARG, "rank %u of the adapter is not between 1 and %d", opts->rank,
                       FL_RANK_MAX);
    if (!(opts->alpha > 0.0f && opts->alpha <= 4096.0f))
        return FL_FAIL(err, FL_EARG, "alpha %g of the adapter is not between 0 and 4096",
                       (double)opts->alpha);
    return FL_OK;
}

fl_status node_adapter_open(const node_model *model, const node_adapter_opts *opts,
                            node_adapter **ret, fl_err *err) {
    FL_TRY(check_opts(opts, err));
    const size_t size = node_adapter_size(model, opts->rank);
    node_adapter *a = fl_fault() ? NULL : malloc(sizeof(*a));
    void *block =
        a == NULL || fl_fault() ? NULL : aligned_alloc(BLOCK_ALIGN, (size + 63) / 64 * 64);
    if (block == NULL) {
        free(a);
        return FL_FAIL(err, FL_ENOMEM, "no memory for an adapter of %zu bytes", size);
    }
    fl_arena arena;
    fl_arena_init(&arena, block, size);
    node_adapter_bind(a, model, opts, &arena);
    a->block = block;
    *ret = a;
    return FL_OK;
}

void node_adapter_close(node_adapter *a) {
    if (a == NULL) return;
    free(a->block);
    free(a);
}

static uint64_t hash(uint64_t h, const void *data, size_t size) {
    const uint8_t *p = data; // FNV-1a, 64 bits
    for (size_t i = 0; i < size; i++) h = (h ^ p[i]) * 0x100000001b3u;
    return h;
}

static uint64_t hash_u32(uint64_t h, uint32_t v) {
    uint8_t bytes[4];
    fl_put_u32(bytes, v);
    return hash(h, bytes, sizeof(bytes));
}

// The first bytes of each matrix hold scales of its first row: they differ between any two models
// that were trained or compressed differently, and few pages are touched.
static uint64_t hash_matrix(uint64_t h, const node_matrix *w) {
    h = hash_u32(h, w->type);
    h = hash_u32(h, w->bits);
    h = hash_u32(h, w->rows);
    h = hash_u32(h, w->cols);
    return hash(h, w->data, w->size < 64 ? w->size : 64);
}

uint64_t node_adapter_model_id(const node_model *model) {
    uint64_t h = 0xcbf29ce484222325u;
    h = hash(h, model->architecture, strnlen(model->architecture, sizeof(model->architecture)));
    const uint32_t shape[] = {model->layers,   model->hidden,    model->ffn,       model->heads,
                              model->kv_heads, model->head_size, model->vocabulary};
    for (size_t i = 0; i < FL_COUNT(shape); i++) h = hash_u32(h, shape[i]);
    for (uint32_t l = 0; l < model->layers; l++) {
        h = hash_matrix(h, &model->layer[l].linear[NODE_Q]);
        h = hash_matrix(h, &model->layer[l].linear[NODE_DOWN]);
        for (uint32_t i = 0; i < 4 && i < model->hidden; i++) {
            uint8_t bytes[4];
            fl_put_f32(bytes, model->layer[l].attn_norm[i]);
            h = hash(h, bytes, sizeof(bytes));
        }
        node_resident_drop(model); // a touched byte may have mapped megabytes
    }
    return hash_matrix(h, &model->head);
}

uint32_t node_adapter_spans(const node_adapter *a) {
    return a->lora.layers + a->lora.exits;
}

void node_adapter_get(const node_adapter *a, uint32_t id, float *values) {
    FL_ASSERT(id < node_adapter_spans(a));
    memcpy(values, a->span[id], a->span_count[id] * sizeof(float));
}

fl_status node_adapter_set(node_adapter *a, uint32_t id, const float *values, uint64_t version,
                           fl_err *err) {
    FL_ASSERT(id < node_adapter_spans(a));
    if (!fl_vec_finite(a->span_count[id], values))
        return FL_FAIL(err, FL_EFORMAT, "span %u of the adapter has values that are not finite",
                       id);
    memcpy(a->span[id], values, a->span_count[id] * sizeof(float));
    a->version[id] = version;
    return FL_OK;
}

void node_adapter_delta(const node_adapter *a, uint32_t id, const float *base, float *delta) {
    FL_ASSERT(id < node_adapter_spans(a));
    for (uint32_t i = 0; i < a->span_count[id]; i++) delta[i] = a->span[id][i] - base[i];
}
