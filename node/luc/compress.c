#include "node/luc/compress.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common/fault.h"
#include "common/rng.h"
#include "node/luc/compress_write.h"
#include "node/luc/decide.h"
#include "node/model/tokenizer.h"
#include "node/model/unicode.h"

// Everything that one compression holds besides its one block.
typedef struct job {
    const node_engine *engine;
    const node_model *model;
    const node_compress_opts *opts;
    uint32_t tokens;
    int32_t *ids;
    node_luc_work work;
    node_sense sense;
    void *scratch; // of node_decide
    node_decision decision;
    node_layer layer; // packed, of the layer at hand
    float *bias[3];   // its biases, in the order of its heads
    node_luc_writer *writer;
} job;

static fl_status check_opts(const node_model *m, const node_compress_opts *o, fl_err *err) {
    if (m->compressed)
        return FL_FAIL(err, FL_ESTATE, "this model is compressed already; start from the original");
    if (!(o->bits >= FL_PACKED_BITS_MIN && o->bits <= FL_PACKED_BITS_MAX))
        return FL_FAIL(err, FL_EARG, "mean bits of %g are outside 2 to 8", o->bits);
    if (!(o->sparsity >= 0 && o->sparsity <= NODE_PRUNE_MOST))
        return FL_FAIL(err, FL_EARG, "a sparsity of %g is outside 0 to %g", o->sparsity,
                       NODE_PRUNE_MOST);
    if (o->head_bits != 0 &&
        (o->head_bits < FL_PACKED_BITS_MIN || o->head_bits > FL_PACKED_BITS_MAX))
        return FL_FAIL(err, FL_EARG, "%u bits for the head are outside 2 to 8", o->head_bits);
    if (o->tokens > NODE_COMPRESS_TOKENS_MAX)
        return FL_FAIL(err, FL_EARG, "%u calibration tokens; at most %d are used", o->tokens,
                       NODE_COMPRESS_TOKENS_MAX);
    const size_t bad = node_utf8_check(o->calibration);
    if (bad != o->calibration.size)
        return FL_FAIL(err, FL_EFORMAT, "the calibration text is not UTF-8 (byte %zu)", bad);
    return FL_OK;
}

// The text's tokens, and of them `tokens` in whole windows spread over it: with many windows to
// choose from, the seed chooses; a short text is used from its beginning.
static fl_status choose_tokens(job *j, const int32_t *all, size_t count, fl_err *err) {
    const uint32_t want = j->opts->tokens == 0 ? NODE_COMPRESS_TOKENS : j->opts->tokens;
    const size_t windows = count / NODE_COMPRESS_WINDOW;
    if (count < 32)
        return FL_FAIL(err, FL_EFORMAT,
                       "the calibration text gives %zu tokens; at least 32 are "
                       "needed, %u are used",
                       count, want);
    if (count <= want || windows < 2) {
        j->tokens = count < want ? (uint32_t)count : want;
        memcpy(j->ids, all, j->tokens * sizeof(*all));
        return FL_OK;
    }
    const size_t wanted = (want + NODE_COMPRESS_WINDOW - 1) / NODE_COMPRESS_WINDOW;
    const size_t take = wanted < windows ? wanted : windows;
    size_t taken = 0;
    j->tokens = 0;
    for (size_t w = 0; w < windows && taken < take; w++) { // selection sampling, in order
        if (fl_rng_below(j->opts->seed, w, windows - w) >= take - taken) continue;
        taken++;
        for (size_t i = 0; i < NODE_COMPRESS_WINDOW && j->tokens < want; i++)
            j->ids[j->tokens++] = all[w * NODE_COMPRESS_WINDOW + i];
    }
    return FL_OK;
}

static fl_status use_tokens(job *j, const int32_t *all, size_t count, fl_err *err) {
    for (size_t i = 0; i < count; i++)
        if (all[i] < 0 || (uint32_t)all[i] >= j->model->vocabulary)
            return FL_FAIL(err, FL_EFORMAT, "token %d has no row in the embedding", all[i]);
    return choose_tokens(j, all, count, err);
}

static fl_status read_tokens(job *j, fl_err *err) {
    fl_bytes text = j->opts->calibration;
    if (j->opts->ids != NULL) return use_tokens(j, j->opts->ids, j->opts->id_count, err);
    if (text.size == 0) text = (fl_bytes){(const uint8_t *)node_luc_text, strlen(node_luc_text)};
    if (text.size > FL_MIB(4)) text.size = FL_MIB(4); // far more than is ever used
    node_tokenizer *t = NULL;
    int32_t *all = NULL;
    size_t count = 0;
    const size_t room = node_tokenizer_ids_max(text.size);
    fl_status st = node_tokenizer_open_gguf(j->model->file, &t, err);
    if (st != FL_OK) return st;
    all = fl_fault() ? NULL : malloc(room * sizeof(*all));
    if (all == NULL)
        st = FL_FAIL(err, FL_ENOMEM, "no memory for the tokens of the calibration text");
    if (st == FL_OK) st = node_tokenizer_encode(t, text, 0, all, room, &count, err);
    if (st == FL_OK) st = use_tokens(j, all, count, err);
    free(all);
    node_tokenizer_close(t);
    return st;
}

static void bind(job *j, fl_arena *arena) {
    node_luc_work_bind(&j->work, j->engine, j->model, j->tokens, arena);
    node_sense_bind(&j->sense, j->model, arena);
    j->scratch = fl_arena_alloc(arena, node_decide_size(j->model), 1, 64);
    for (int i = 0; i < 3; i++)
        j->bias[i] = FL_ARENA_NEW(arena, float, (size_t)j->model->heads * j->model->head_size);
}

static void sense_progress(void *ctx, uint32_t done, uint32_t total) {
    const node_compress_opts *o = ctx;
    if (o->progress != NULL) o->progress(o->ctx, "measuring", done, total);
}

static fl_status measure(job *j, fl_err *err) {
    const node_compress_opts *o = j->opts;
    node_sense_opts s = {.sparsity = o->sparsity,
                         .prune = o->prune,
                         .predict = o->policy == NODE_POLICY_LUC,
                         .nearest = o->policy == NODE_POLICY_UNIFORM,
                         .progress = sense_progress,
                         .ctx = (void *)(uintptr_t)o};
    node_decide_range(o->policy, o->bits, &s.bits_low, &s.bits_high);
    return node_sense_measure(&j->work, &s, &j->sense, err);
}

// Rows of a matrix in another order; `order` counts single rows.
static const float *gather_rows(node_luc_work *w, const float *from, uint32_t rows, uint32_t cols,
                                const uint32_t *order) {
    for (size_t r = 0; r < rows; r++)
        memcpy(w->moved + r * cols, from + order[r] * (size_t)cols, cols * sizeof(float));
    return w->moved;
}

static const float *gather_columns(node_luc_work *w, const float *from, uint32_t rows,
                                   uint32_t cols, const uint32_t *order) {
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < cols; c++) w->moved[r * cols + c] = from[r * cols + order[c]];
    return w->moved;
}

// Orders of the query rows, the key rows and the channels that a shape keeps; identities when
// nothing goes, so that an unpruned layer stays as it was.
typedef struct orders {
    uint32_t *query, *channel;             // work->order
    uint32_t key[NODE_HEAD_SIZE_MAX * 64]; // key and value rows
    bool heads_move, channels_move;
} orders;

static void identity(uint32_t n, uint32_t *order) {
    for (uint32_t i = 0; i < n; i++) order[i] = i;
}

static fl_status make_orders(job *j, uint32_t layer, orders *o, fl_err *err) {
    node_luc_work *w = &j->work;
    const node_layer *l = &j->model->layer[layer];
    const node_layer_shape shape = j->decision.shape[layer];
    const uint32_t size = j->model->head_size, group = l->heads / l->kv_heads * size;
    if ((size_t)l->kv_heads * size > FL_COUNT(o->key))
        return FL_FAIL(err, FL_ELIMIT, "%u key heads of %u are more than pruning supports",
                       l->kv_heads, size);
    o->query = w->order[0], o->channel = w->order[1];
    o->heads_move = shape.kv_heads != l->kv_heads;
    o->channels_move = shape.ffn != l->ffn;
    if (o->heads_move)
        node_prune_order(w->w[NODE_O], j->model->hidden, l->linear[NODE_O].cols, group,
                         w->acts.attn, w->batch.tokens, w->score, o->query);
    else
        identity(l->linear[NODE_O].cols, o->query);
    for (uint32_t k = 0; k < l->kv_heads; k++)
        for (uint32_t i = 0; i < size; i++)
            o->key[k * size + i] = o->query[k * group] / group * size + i;
    if (o->channels_move)
        node_prune_order(w->w[NODE_DOWN], j->model->hidden, l->ffn, 1, w->acts.act, w->batch.tokens,
                         w->score, o->channel);
    else
        identity(l->ffn, o->channel);
    return FL_OK;
}

// Rounds one matrix into the layer's block; with feedback, or to nearest codes where that turns out
// better.
static void pack_matrix(job *j, uint32_t layer, node_module module, const float *w,
                        const float *full, uint32_t rows, uint32_t cols, uint32_t total,
                        uint8_t **block) {
    node_luc_work *work = &j->work;
    const uint32_t bits = j->decision.bits[layer][module];
    const node_quantise_job q = {.w = w,
                                 .full = full,
                                 .rows = rows,
                                 .cols = cols,
                                 .total = total,
                                 .bits = bits,
                                 .weight = work->quantise.weight,
                                 .keep_zeros = full != NULL,
                                 .packed = *block};
    size_t size = 0;
    FL_ASSERT(fl_packed_size(rows, cols, bits, &size));
    node_quantise_best(j->engine, &work->quantise, &q);
    j->layer.linear[module] = (node_matrix){NODE_TYPE_PACKED, bits, rows, cols, *block, size};
    *block += size;
}

// Unstructured: work->moved is a masked copy, the original stays beside it.
static const float *masked(job *j, uint32_t layer, node_module module, const float *from) {
    node_luc_work *w = &j->work;
    const node_matrix *m = &j->model->layer[layer].linear[module];
    float *norm = (float *)(void *)w->score;
    memcpy(w->moved, from, (size_t)m->rows * m->cols * sizeof(float));
    node_luc_norms(w, layer, module, norm);
    node_prune_mask(j->engine, w->moved, m->rows, m->cols, j->decision.sparsity[layer], norm);
    return w->moved;
}

static void pack_module(job *j, uint32_t layer, node_module module, const orders *o,
                        uint8_t **block) {
    node_luc_work *work = &j->work;
    const node_layer *l = &j->model->layer[layer];
    const node_matrix *m = &l->linear[module];
    uint32_t rows[NODE_MODULES], cols[NODE_MODULES];
    const float *w = work->w[module];
    node_luc_dims(j->model, layer, j->decision.shape[layer], rows, cols);
    if (j->opts->sparsity > 0 && j->opts->prune == NODE_PRUNE_UNSTRUCTURED) {
        pack_matrix(j, layer, module, masked(j, layer, module, w), w, m->rows, m->cols, m->cols,
                    block);
        return;
    }
    const bool heads = module <= NODE_V && o->heads_move;
    const bool channels = (module == NODE_GATE || module == NODE_UP) && o->channels_move;
    if (heads)
        w = gather_rows(work, w, rows[module], m->cols, module == NODE_Q ? o->query : o->key);
    if (channels) w = gather_rows(work, w, rows[module], m->cols, o->channel);
    if (module == NODE_O && o->heads_move) w = gather_columns(work, w, m->rows, m->cols, o->query);
    if (module == NODE_DOWN && o->channels_move)
        w = gather_columns(work, w, m->rows, m->cols, o->channel);
    pack_matrix(j, layer, module, w, NULL, rows[module], cols[module], m->cols, block);
}

static void move_biases(job *j, uint32_t layer, const orders *o) {
    const node_layer *l = &j->model->layer[layer];
    for (int i = 0; i < 3; i++) {
        if (l->bias[i] == NULL) continue;
        const uint32_t *order = i == 0 ? o->query : o->key;
        for (uint32_t r = 0; r < j->layer.linear[i].rows; r++) j->bias[i][r] = l->bias[i][order[r]];
        j->layer.bias[i] = j->bias[i];
    }
}

// work->x are the layer's inputs behind the compressed layers below; they become its outputs.
static fl_status compress_layer(job *j, uint32_t layer, orders *o, fl_err *err) {
    node_luc_work *w = &j->work;
    const node_layer *l = &j->model->layer[layer];
    const node_layer_shape shape = j->decision.shape[layer];
    uint8_t *block = w->layer_block;
    memcpy(w->y, w->x, (size_t)w->batch.tokens * j->model->hidden * sizeof(float));
    node_luc_run(w, w->copy, layer, w->y);
    node_luc_load(w, layer);
    FL_TRY(make_orders(j, layer, o, err));
    j->layer = *l;
    j->layer.kv_heads = shape.kv_heads;
    j->layer.heads = l->heads / l->kv_heads * shape.kv_heads;
    j->layer.ffn = shape.ffn;
    for (node_module m = NODE_Q; m < NODE_MODULES; m++) {
        const bool shared = m == NODE_K || m == NODE_V || m == NODE_UP; // inputs of the one before
        const uint32_t *order = m == NODE_O ? o->query : m == NODE_DOWN ? o->channel : NULL;
        if (!shared) FL_TRY(node_luc_factor(w, layer, m, order, err));
        pack_module(j, layer, m, o, &block);
    }
    move_biases(j, layer, o);
    w->trial->layer[layer] = j->layer;
    node_luc_run(w, w->trial, layer, w->x);
    w->trial->layer[layer] = *l;
    return FL_OK;
}

static fl_status compress_layers(job *j, fl_err *err) {
    node_luc_work *w = &j->work;
    orders *o = fl_fault() ? NULL : calloc(1, sizeof(*o));
    if (o == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory for the order of heads");
    fl_status st = FL_OK;
    node_embed(j->engine, j->model, &w->batch, w->x);
    for (uint32_t i = 0; i < j->model->layers && st == FL_OK; i++) {
        st = compress_layer(j, i, o, err);
        if (st == FL_OK) st = node_luc_write_layer(j->writer, &j->layer, err);
        if (j->opts->progress != NULL)
            j->opts->progress(j->opts->ctx, "compressing", i + 1, j->model->layers);
    }
    free(o);
    return st;
}

// Bits and bytes of a layer as decided.
static void fill_layer(const job *j, uint32_t i, node_compress_result *ret) {
    const node_decision *d = &j->decision;
    const node_layer *l = &j->model->layer[i];
    node_compress_layer *out = &ret->layer[i];
    uint32_t rows[NODE_MODULES], cols[NODE_MODULES];
    double bits = 0, kept = 0;
    node_luc_dims(j->model, i, d->shape[i], rows, cols);
    for (int m = 0; m < NODE_MODULES; m++) {
        size_t size = 0;
        FL_ASSERT(fl_packed_size(rows[m], cols[m], d->bits[i][m], &size));
        ret->layer_bytes += size;
        kept += (double)rows[m] * cols[m];
        bits += (double)rows[m] * cols[m] * d->bits[i][m];
        out->matrix_bits[m] = d->bits[i][m];
    }
    out->mean_bits = bits / kept;
    out->bits = (uint32_t)lround(out->mean_bits);
    out->sparsity = d->sparsity[i];
    out->sensitivity_quant = j->sense.quant[(size_t)i * NODE_SENSE_BITS + out->bits];
    out->loss_weight = j->sense.weight[i];
    out->kv_heads = d->shape[i].kv_heads;
    out->heads = l->heads / l->kv_heads * out->kv_heads;
    out->ffn = d->shape[i].ffn;
    if (j->sense.levels != 0)
        out->sensitivity_prune = node_decide_prune_error(
            &j->sense, i, d->sparsity[i] > 0 ? d->sparsity[i] : j->opts->sparsity);
}

static void fill_result(const job *j, node_compress_result *ret) {
    const node_model *m = j->model;
    double bits = 0, kept = 0, removed = 0, all = 0;
    *ret = (node_compress_result){.layers = m->layers, .bytes_in = m->bytes};
    ret->head_bits = j->opts->head_bits == 0 ? NODE_COMPRESS_HEAD_BITS : j->opts->head_bits;
    ret->calibration_tokens = j->tokens;
    for (uint32_t i = 0; i < m->layers; i++) {
        const node_layer *l = &m->layer[i];
        const double n = (double)node_layer_weights(m, l->heads, l->kv_heads, l->ffn);
        const double stays = n - (double)node_shape_removed(m, i, j->decision.shape[i]);
        fill_layer(j, i, ret);
        all += n;
        kept += stays;
        bits += stays * ret->layer[i].mean_bits;
        removed += ret->layer[i].sparsity * n;
    }
    ret->mean_bits = bits / kept;
    ret->mean_sparsity = removed / all;
}

static fl_status run(job *j, const char *out_path, node_compress_result *ret, fl_err *err) {
    node_luc_work_batch(&j->work, j->ids, j->tokens, NODE_COMPRESS_WINDOW);
    FL_TRY(measure(j, err));
    FL_TRY(node_decide(j->model, j->opts, &j->sense, j->scratch, &j->decision, err));
    fill_result(j, ret);
    fl_status st = node_luc_writer_open(out_path, j->engine, &j->work.quantise, j->model, j->opts,
                                        ret, &j->writer, err);
    if (st == FL_OK) st = compress_layers(j, err);
    if (st == FL_OK) st = node_luc_writer_commit(&j->writer, &ret->bytes_out, err);
    node_luc_writer_discard(j->writer);
    return st;
}

fl_status node_compress(const node_engine *engine, const node_model *model,
                        const node_compress_opts *opts, const char *out_path,
                        node_compress_result *ret, fl_err *err) {
    FL_TRY(check_opts(model, opts, err));
    const uint32_t want = opts->tokens == 0 ? NODE_COMPRESS_TOKENS : opts->tokens;
    job *j = fl_fault() ? NULL : calloc(1, sizeof(*j));
    int32_t *ids = fl_fault() ? NULL : malloc(want * sizeof(*ids));
    void *block = NULL;
    fl_arena arena;
    fl_status st = FL_OK;
    if (j == NULL || ids == NULL) {
        st = FL_FAIL(err, FL_ENOMEM, "no memory to begin");
        goto out;
    }
    *j = (job){.engine = engine, .model = model, .opts = opts, .ids = ids};
    st = read_tokens(j, err);
    if (st != FL_OK) goto out;
    fl_arena_init_counting(&arena);
    bind(j, &arena);
    const size_t size = (arena.peak + 63) / 64 * 64;
    block = fl_fault() ? NULL : aligned_alloc(64, size);
    if (block == NULL) {
        st = FL_FAIL(err, FL_ENOMEM, "compressing this model takes %zu MiB of memory",
                     (size >> 20) + 1);
        goto out;
    }
    fl_arena_init(&arena, block, size);
    bind(j, &arena);
    st = run(j, out_path, ret, err);
out:
    free(block);
    free(ids);
    free(j);
    return st;
}
