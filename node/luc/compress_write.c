#include "node/luc/compress_write.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/fault.h"
#include "common/file.h"
#include "node/luc/work.h"
#include "node/model/container.h"
#include "node/model/gguf_write.h"

enum { HEAD_ROWS = 2048, TYPE_I8 = 24, TYPE_F32 = 0, NAME_SIZE = NODE_GGUF_NAME_MAX + 16 };

struct node_luc_writer {
    node_gguf_writer *out;
    char *path;
    uint64_t layers_written;
};

static void declare_packed(node_gguf_writer *out, const char *name, uint32_t rows, uint32_t cols,
                           uint32_t bits) {
    char packed[NAME_SIZE + sizeof(NODE_CONTAINER_PACKED)];
    size_t size = 0;
    snprintf(packed, sizeof(packed), "%s" NODE_CONTAINER_PACKED, name);
    FL_ASSERT(fl_packed_size(rows, cols, bits, &size));
    const uint64_t dim = size;
    node_gguf_write_tensor(out, packed, TYPE_I8, 1, &dim);
}

static void bias_name(uint32_t layer, int i, char *name) {
    static const char *const part[] = {"attn_q", "attn_k", "attn_v"};
    snprintf(name, NAME_SIZE, "blk.%u.%s.bias", layer, part[i]);
}

// Tensors that this program packs or rewrites: the others go over as they are.
static bool is_rewritten(const node_model *m, fl_bytes name) {
    char text[NAME_SIZE];
    static const char *const whole[] = {"token_embd.weight", "output.weight"};
    for (size_t i = 0; i < FL_COUNT(whole); i++)
        if (name.size == strlen(whole[i]) && memcmp(name.data, whole[i], name.size) == 0)
            return true;
    for (uint32_t l = 0; l < m->layers; l++) {
        for (node_module k = NODE_Q; k < NODE_MODULES; k++) {
            node_model_linear_name(l, k, text);
            if (name.size == strlen(text) && memcmp(name.data, text, name.size) == 0) return true;
        }
        for (int i = 0; i < 3; i++) {
            bias_name(l, i, text);
            if (name.size == strlen(text) && memcmp(name.data, text, name.size) == 0) return true;
        }
    }
    return false;
}

static void write_policy(node_gguf_writer *out, const node_compress_opts *o,
                         const node_compress_result *r) {
    uint32_t bits[NODE_LAYERS_MAX], heads[NODE_LAYERS_MAX], kv[NODE_LAYERS_MAX],
        ffn[NODE_LAYERS_MAX];
    float sparsity[NODE_LAYERS_MAX], quant[NODE_LAYERS_MAX], prune[NODE_LAYERS_MAX];
    for (uint32_t i = 0; i < r->layers; i++) {
        const node_compress_layer *l = &r->layer[i];
        bits[i] = l->bits, heads[i] = l->heads, kv[i] = l->kv_heads, ffn[i] = l->ffn;
        sparsity[i] = (float)l->sparsity;
        quant[i] = (float)l->sensitivity_quant;
        prune[i] = (float)l->sensitivity_prune;
    }
    node_gguf_write_u32(out, NODE_CONTAINER_VERSION, NODE_CONTAINER_VERSION_1);
    node_gguf_write_text(out, NODE_LUC_POLICY, node_policy_name(o->policy));
    node_gguf_write_u32(out, NODE_LUC_HEAD_BITS, r->head_bits);
    node_gguf_write_u32s(out, NODE_LUC_BITS, bits, r->layers);
    node_gguf_write_f32s(out, NODE_LUC_SPARSITY, sparsity, r->layers);
    node_gguf_write_f32s(out, NODE_LUC_SENSE_QUANT, quant, r->layers);
    node_gguf_write_f32s(out, NODE_LUC_SENSE_PRUNE, prune, r->layers);
    node_gguf_write_u32s(out, NODE_LAYER_HEADS, heads, r->layers);
    node_gguf_write_u32s(out, NODE_LAYER_KV_HEADS, kv, r->layers);
    node_gguf_write_u32s(out, NODE_LAYER_FFN, ffn, r->layers);
}

static void declare_layer(node_gguf_writer *out, const node_model *m, uint32_t layer,
                          const node_compress_layer *l) {
    uint32_t rows[NODE_MODULES], cols[NODE_MODULES];
    char name[NAME_SIZE];
    node_luc_dims(m, layer, (node_layer_shape){l->kv_heads, l->ffn}, rows, cols);
    for (node_module k = NODE_Q; k < NODE_MODULES; k++) {
        node_model_linear_name(layer, k, name);
        declare_packed(out, name, rows[k], cols[k], l->matrix_bits[k]);
    }
    for (int i = 0; i < 3; i++) {
        if (m->layer[layer].bias[i] == NULL) continue;
        const uint64_t dim = rows[i];
        bias_name(layer, i, name);
        node_gguf_write_tensor(out, name, TYPE_F32, 1, &dim);
    }
}

static void declare(node_gguf_writer *out, const node_model *m, const node_compress_opts *o,
                    const node_compress_result *r) {
    for (size_t i = 0; i < node_gguf_key_count(m->file); i++)
        node_gguf_write_key(out, node_gguf_key_at(m->file, i));
    write_policy(out, o, r);
    for (size_t i = 0; i < node_gguf_tensor_count(m->file); i++) {
        const node_gguf_tensor *t = node_gguf_tensor_at(m->file, i);
        char name[NAME_SIZE];
        if (is_rewritten(m, t->name)) continue;
        snprintf(name, sizeof(name), "%.*s", (int)t->name.size, (const char *)t->name.data);
        node_gguf_write_tensor(out, name, t->type, t->dims, t->dim);
    }
    declare_packed(out, "token_embd.weight", m->vocabulary, m->hidden, r->head_bits);
    if (!m->tied) declare_packed(out, "output.weight", m->vocabulary, m->hidden, r->head_bits);
    for (uint32_t i = 0; i < r->layers; i++) declare_layer(out, m, i, &r->layer[i]);
}

// A vocabulary of rows, packed some thousand at a time.
static fl_status write_rows(node_gguf_writer *out, const node_engine *engine, node_quantise *q,
                            const node_matrix *w, uint32_t bits, fl_err *err) {
    size_t size = 0;
    FL_ASSERT(fl_packed_size(HEAD_ROWS, w->cols, bits, &size));
    float *rows = fl_fault() ? NULL : malloc((size_t)HEAD_ROWS * w->cols * sizeof(float));
    uint8_t *packed = fl_fault() ? NULL : aligned_alloc(64, (size + 63) / 64 * 64);
    fl_status st = FL_OK;
    if (rows == NULL || packed == NULL) st = FL_FAIL(err, FL_ENOMEM, "no memory to pack the head");
    for (uint32_t first = 0; first < w->rows && st == FL_OK; first += HEAD_ROWS) {
        const uint32_t count = w->rows - first < HEAD_ROWS ? w->rows - first : HEAD_ROWS;
        for (uint32_t i = 0; i < count; i++)
            node_matrix_row(w, first + i, rows + (size_t)i * w->cols);
        const node_quantise_job job = {.w = rows,
                                       .rows = count,
                                       .cols = w->cols,
                                       .total = w->cols,
                                       .bits = bits,
                                       .packed = packed};
        node_quantise_nearest(engine, q, &job);
        FL_ASSERT(fl_packed_size(count, w->cols, bits, &size));
        st = node_gguf_write_data(out, (fl_bytes){packed, size}, err);
    }
    free(packed);
    free(rows);
    return st;
}

static fl_status write_fixed(node_gguf_writer *out, const node_engine *engine, node_quantise *q,
                             const node_model *m, uint32_t head_bits, fl_err *err) {
    for (size_t i = 0; i < node_gguf_tensor_count(m->file); i++) {
        const node_gguf_tensor *t = node_gguf_tensor_at(m->file, i);
        if (is_rewritten(m, t->name)) continue;
        FL_TRY(node_gguf_write_data(out, t->data, err));
    }
    FL_TRY(write_rows(out, engine, q, &m->embedding, head_bits, err));
    if (!m->tied) FL_TRY(write_rows(out, engine, q, &m->head, head_bits, err));
    return FL_OK;
}

fl_status node_luc_writer_open(const char *path, const node_engine *engine, node_quantise *quantise,
                               const node_model *model, const node_compress_opts *opts,
                               const node_compress_result *result, node_luc_writer **ret,
                               fl_err *err) {
    node_luc_writer *w = fl_fault() ? NULL : calloc(1, sizeof(*w));
    char *copy = fl_fault() ? NULL : strdup(path);
    fl_status st = FL_OK;
    if (w == NULL || copy == NULL) {
        free(w);
        free(copy);
        return FL_FAIL(err, FL_ENOMEM, "no memory to write a file");
    }
    w->path = copy;
    st = node_gguf_writer_open(path, NODE_CONTAINER_ALIGNMENT, &w->out, err);
    if (st == FL_OK) {
        declare(w->out, model, opts, result);
        st = write_fixed(w->out, engine, quantise, model, result->head_bits, err);
    }
    if (st != FL_OK) {
        node_luc_writer_discard(w);
        return st;
    }
    *ret = w;
    return FL_OK;
}

fl_status node_luc_write_layer(node_luc_writer *w, const node_layer *layer, fl_err *err) {
    for (int k = 0; k < NODE_MODULES; k++)
        FL_TRY(node_gguf_write_data(w->out,
                                    (fl_bytes){layer->linear[k].data, layer->linear[k].size}, err));
    for (int i = 0; i < 3; i++) {
        if (layer->bias[i] == NULL) continue;
        const fl_bytes bytes = {(const uint8_t *)layer->bias[i],
                                layer->linear[i].rows * sizeof(float)};
        FL_TRY(node_gguf_write_data(w->out, bytes, err));
    }
    return FL_OK;
}

fl_status node_luc_writer_commit(node_luc_writer **writer, uint64_t *ret_bytes, fl_err *err) {
    node_luc_writer *w = *writer;
    fl_map map = {0};
    *writer = NULL;
    fl_status st = node_gguf_writer_commit(&w->out, err);
    if (st == FL_OK) {
        st = fl_map_open(w->path, &map, err);
        if (st != FL_OK) (void)unlink(w->path); // a file that cannot be read back is none
        *ret_bytes = map.bytes.size;
        fl_map_close(&map);
    }
    node_luc_writer_discard(w);
    return st;
}

void node_luc_writer_discard(node_luc_writer *w) {
    if (w == NULL) return;
    node_gguf_writer_discard(w->out);
    free(w->path);
    free(w);
}
