#include "node/model/model.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/fault.h"
#include "kernels/attention.h"
#include "kernels/ggml.h"
#include "kernels/packed.h"
#include "kernels/rope.h"
#include "kernels/vec.h"
#include "node/model/container.h"
#include "node/model/resident.h"

enum { NAME_SIZE = NODE_GGUF_NAME_MAX + 1, KEY_SIZE = 96, I8 = 24 };

_Static_assert((int)NODE_HEAD_SIZE_MAX == (int)FL_HEAD_SIZE_MAX, "the kernels' limit is ours");

static const char *const module_names[NODE_MODULES] = {
    [NODE_Q] = "attn_q",      [NODE_K] = "attn_k",      [NODE_V] = "attn_v",
    [NODE_O] = "attn_output", [NODE_GATE] = "ffn_gate", [NODE_UP] = "ffn_up",
    [NODE_DOWN] = "ffn_down",
};

void node_model_linear_name(uint32_t layer, node_module module, char *name) {
    snprintf(name, NAME_SIZE, "blk.%u.%s.weight", layer, module_names[module]);
}

static fl_status check_range(const char *key, uint32_t value, uint32_t low, uint32_t high,
                             fl_err *err) {
    if (value < low) return FL_FAIL(err, FL_EFORMAT, "key '%s' is %u, below %u", key, value, low);
    if (value > high) return FL_FAIL(err, FL_ELIMIT, "key '%s' is %u, above %u", key, value, high);
    return FL_OK;
}

// The architecture's key `suffix`. A key that is there with a wrong type is an error even where it
// is optional (`*value` holds the default then; UINT32_MAX: it is not optional).
static fl_status get_size(const node_model *m, const char *suffix, uint32_t high, uint32_t *value,
                          fl_err *err) {
    char key[KEY_SIZE];
    snprintf(key, sizeof(key), "%s.%s", m->architecture, suffix);
    if (!node_gguf_get_u32(m->file, key, value)) {
        if (node_gguf_find(m->file, key) != NULL)
            return FL_FAIL(err, FL_EFORMAT, "key '%s' is not a single whole number", key);
        if (*value == UINT32_MAX) return FL_FAIL(err, FL_EFORMAT, "key '%s' is missing", key);
    }
    return check_range(key, *value, 1, high, err);
}

static fl_status get_float(const node_model *m, const char *suffix, float low, float high,
                           float *value, fl_err *err) {
    char key[KEY_SIZE];
    snprintf(key, sizeof(key), "%s.%s", m->architecture, suffix);
    if (!node_gguf_get_f32(m->file, key, value)) {
        if (node_gguf_find(m->file, key) != NULL)
            return FL_FAIL(err, FL_EFORMAT, "key '%s' is not a float", key);
        if (isnan(*value)) return FL_FAIL(err, FL_EFORMAT, "key '%s' is missing", key);
    }
    if (!(*value >= low && *value <= high))
        return FL_FAIL(err, FL_EFORMAT, "key '%s' is %g, not from %g to %g", key, (double)*value,
                       (double)low, (double)high);
    return FL_OK;
}

static void copy_string(const node_model *m, const char *key, char *out, size_t size) {
    fl_bytes s = {NULL, 0};
    if (!node_gguf_get_string(m->file, key, &s)) s.size = 0;
    if (s.size > size - 1) s.size = size - 1;
    if (s.size != 0) memcpy(out, s.data, s.size);
    out[s.size] = '\0';
}

static fl_status read_architecture(node_model *m, fl_err *err) {
    copy_string(m, "general.name", m->name, sizeof(m->name));
    copy_string(m, "general.architecture", m->architecture, sizeof(m->architecture));
    const bool llama = strcmp(m->architecture, "llama") == 0;
    m->rope_half = strcmp(m->architecture, "qwen2") == 0;
    if (llama || m->rope_half) return FL_OK;
    return FL_FAIL(err, FL_EUNSUPPORTED, "architecture '%s' is not supported; llama and qwen2 are",
                   m->architecture);
}

// Context extension that changes the angles: only llama3's, which comes as a tensor of factors.
static fl_status check_rope_scaling(const node_model *m, fl_err *err) {
    char key[KEY_SIZE];
    snprintf(key, sizeof(key), "%s.rope.scaling.type", m->architecture);
    char type[16];
    copy_string(m, key, type, sizeof(type));
    if (type[0] == '\0' || strcmp(type, "none") == 0 || strcmp(type, "llama3") == 0) return FL_OK;
    return FL_FAIL(err, FL_EUNSUPPORTED, "rope scaling '%s' is not supported", type);
}

static fl_status read_sizes(node_model *m, fl_err *err) {
    m->layers = m->hidden = m->ffn = m->heads = UINT32_MAX;
    FL_TRY(get_size(m, "block_count", NODE_LAYERS_MAX, &m->layers, err));
    FL_TRY(get_size(m, "embedding_length", NODE_WIDTH_MAX, &m->hidden, err));
    FL_TRY(get_size(m, "feed_forward_length", NODE_WIDTH_MAX, &m->ffn, err));
    FL_TRY(get_size(m, "attention.head_count", NODE_WIDTH_MAX, &m->heads, err));
    m->kv_heads = m->heads;
    FL_TRY(get_size(m, "attention.head_count_kv", m->heads, &m->kv_heads, err));
    m->context = 2048;
    FL_TRY(get_size(m, "context_length", UINT32_MAX, &m->context, err));
    if (m->context > NODE_CONTEXT_MAX) m->context = NODE_CONTEXT_MAX;
    m->head_size = m->hidden / m->heads;
    FL_TRY(get_size(m, "attention.key_length", NODE_HEAD_SIZE_MAX, &m->head_size, err));
    uint32_t value_size = m->head_size;
    FL_TRY(get_size(m, "attention.value_length", NODE_HEAD_SIZE_MAX, &value_size, err));
    m->rope_size = m->head_size;
    FL_TRY(get_size(m, "rope.dimension_count", m->head_size, &m->rope_size, err));
    if (value_size != m->head_size)
        return FL_FAIL(err, FL_EUNSUPPORTED, "keys of %u and values of %u dimensions a head",
                       m->head_size, value_size);
    if (m->head_size % 2 != 0 || m->rope_size % 2 != 0)
        return FL_FAIL(err, FL_EFORMAT, "head size %u or rope size %u is odd", m->head_size,
                       m->rope_size);
    if (m->heads % m->kv_heads != 0)
        return FL_FAIL(err, FL_EFORMAT, "%u heads do not share %u key/value heads evenly", m->heads,
                       m->kv_heads);
    if ((uint64_t)m->heads * m->head_size > NODE_WIDTH_MAX)
        return FL_FAIL(err, FL_ELIMIT, "%u heads of %u dimensions are too wide", m->heads,
                       m->head_size);
    m->norm_epsilon = NAN;
    m->rope_base = 10000.0f;
    FL_TRY(get_float(m, "attention.layer_norm_rms_epsilon", 1e-12f, 1.0f, &m->norm_epsilon, err));
    FL_TRY(get_float(m, "rope.freq_base", 1.0f, 1e12f, &m->rope_base, err));
    return check_rope_scaling(m, err);
}

// The embedding's second dimension, or for a packed one what the metadata says.
static fl_status read_vocabulary(node_model *m, fl_err *err) {
    const node_gguf_tensor *t = node_gguf_find_tensor(m->file, "token_embd.weight");
    const char *from = "token_embd.weight";
    node_gguf_value tokens;
    char key[KEY_SIZE];
    snprintf(key, sizeof(key), "%s.vocab_size", m->architecture);
    if (t != NULL) {
        m->vocabulary = t->dim[1] > UINT32_MAX ? UINT32_MAX : (uint32_t)t->dim[1];
    } else if (node_gguf_get_u32(m->file, key, &m->vocabulary)) {
        from = key;
    } else if (node_gguf_get_array(m->file, "tokenizer.ggml.tokens", NODE_GGUF_STRING, &tokens)) {
        from = "tokenizer.ggml.tokens";
        m->vocabulary = tokens.count > UINT32_MAX ? UINT32_MAX : (uint32_t)tokens.count;
    } else {
        return FL_FAIL(err, FL_EFORMAT, "tensor 'token_embd.weight' is missing");
    }
    return check_range(from, m->vocabulary, 1, NODE_VOCABULARY_MAX, err);
}

static fl_status packed_matrix(const node_gguf_tensor *t, const char *name, uint32_t rows,
                               uint32_t cols, node_matrix *ret, fl_err *err) {
    if (t->type != I8 || t->dims != 1 || (uintptr_t)t->data.data % NODE_CONTAINER_ALIGNMENT != 0)
        return FL_FAIL(err, FL_EFORMAT,
                       "tensor '%s" NODE_CONTAINER_PACKED
                       "' is not a one-dimensional I8 tensor aligned to 64 bytes",
                       name);
    for (uint32_t bits = FL_PACKED_BITS_MIN; bits <= FL_PACKED_BITS_MAX; bits++) {
        size_t size;
        if (!fl_packed_size(rows, cols, bits, &size) || size != t->data.size) continue;
        *ret = (node_matrix){NODE_TYPE_PACKED, bits, rows, cols, t->data.data, size};
        return FL_OK;
    }
    return FL_FAIL(err, FL_EFORMAT,
                   "tensor '%s" NODE_CONTAINER_PACKED "' has %zu bytes: no packed %u x %u matrix",
                   name, t->data.size, rows, cols);
}

// Looks for `name`, then for its packed form.
static fl_status get_matrix(const node_model *m, const char *name, uint32_t rows, uint32_t cols,
                            node_matrix *ret, fl_err *err) {
    const node_gguf_tensor *t = node_gguf_find_tensor(m->file, name);
    if (t == NULL && m->compressed) {
        char packed[NAME_SIZE + sizeof(NODE_CONTAINER_PACKED)];
        snprintf(packed, sizeof(packed), "%s" NODE_CONTAINER_PACKED, name);
        t = node_gguf_find_tensor(m->file, packed);
        if (t != NULL) return packed_matrix(t, name, rows, cols, ret, err);
    }
    if (t == NULL) return FL_FAIL(err, FL_EFORMAT, "tensor '%s' is missing", name);
    if (t->dims != 2 || t->dim[0] != cols || t->dim[1] != rows)
        return FL_FAIL(err, FL_EFORMAT, "tensor '%s' is %llu x %llu, not %u x %u", name,
                       (unsigned long long)t->dim[1], (unsigned long long)t->dim[0], rows, cols);
    if (fl_ggml_type_find(t->type) == NULL)
        return FL_FAIL(err, FL_EUNSUPPORTED, "tensor '%s' has type %s, which is not supported",
                       name, node_ggml_type(t->type)->name);
    *ret = (node_matrix){t->type, 0, rows, cols, t->data.data, t->data.size};
    return FL_OK;
}

static fl_status get_vector(const node_model *m, const char *name, uint32_t count, bool optional,
                            const float **ret, fl_err *err) {
    const node_gguf_tensor *t = node_gguf_find_tensor(m->file, name);
    if (t == NULL && optional) return FL_OK;
    if (t == NULL) return FL_FAIL(err, FL_EFORMAT, "tensor '%s' is missing", name);
    if (t->type != FL_GGML_F32 || t->dims != 1 || t->dim[0] != count)
        return FL_FAIL(err, FL_EFORMAT, "tensor '%s' is not %u floats", name, count);
    const float *v = (const float *)(const void *)t->data.data; // aligned to 8 or more
    if (!fl_vec_finite(count, v))
        return FL_FAIL(err, FL_EFORMAT, "tensor '%s' holds a NaN or an infinity", name);
    *ret = v;
    return FL_OK;
}

static fl_status layer_u32(const node_model *m, const char *key, uint32_t layer, uint32_t high,
                           uint32_t *ret, fl_err *err) {
    node_gguf_value a;
    if (!node_gguf_get_array(m->file, key, NODE_GGUF_U32, &a) || a.count != m->layers)
        return FL_FAIL(err, FL_EFORMAT, "key '%s' is not an array of %u u32", key, m->layers);
    *ret = fl_get_u32(a.bytes.data + (size_t)layer * 4);
    return check_range(key, *ret, 1, high, err);
}

static fl_status layer_f32(const node_model *m, const char *key, uint32_t layer, float *ret,
                           fl_err *err) {
    node_gguf_value a;
    if (!node_gguf_get_array(m->file, key, NODE_GGUF_F32, &a) || a.count != m->layers)
        return FL_FAIL(err, FL_EFORMAT, "key '%s' is not an array of %u f32", key, m->layers);
    *ret = fl_get_f32(a.bytes.data + (size_t)layer * 4);
    if (!isfinite(*ret) || *ret < 0)
        return FL_FAIL(err, FL_EFORMAT, "key '%s' holds %g for layer %u", key, (double)*ret, layer);
    return FL_OK;
}

static fl_status read_policy(node_model *m, fl_err *err) {
    uint32_t version = 0;
    m->compressed = node_gguf_find(m->file, NODE_CONTAINER_VERSION) != NULL;
    if (!m->compressed) return FL_OK;
    if (!node_gguf_get_u32(m->file, NODE_CONTAINER_VERSION, &version) ||
        version != NODE_CONTAINER_VERSION_1)
        return FL_FAIL(err, FL_EUNSUPPORTED,
                       "compressed model of version %u; this program reads version %u", version,
                       NODE_CONTAINER_VERSION_1);
    node_luc_policy *p = &m->policy;
    copy_string(m, NODE_LUC_POLICY, p->name, sizeof(p->name));
    if (!node_gguf_get_u32(m->file, NODE_LUC_HEAD_BITS, &p->head_bits) || p->head_bits > 32)
        return FL_FAIL(err, FL_EFORMAT, "key '" NODE_LUC_HEAD_BITS "' is missing or above 32");
    for (uint32_t i = 0; i < m->layers; i++) {
        FL_TRY(layer_u32(m, NODE_LUC_BITS, i, 32, &p->bits[i], err));
        FL_TRY(layer_f32(m, NODE_LUC_SPARSITY, i, &p->sparsity[i], err));
        FL_TRY(layer_f32(m, NODE_LUC_SENSE_QUANT, i, &p->sensitivity_quant[i], err));
        FL_TRY(layer_f32(m, NODE_LUC_SENSE_PRUNE, i, &p->sensitivity_prune[i], err));
    }
    return FL_OK;
}

static fl_status read_layer_sizes(node_model *m, uint32_t index, fl_err *err) {
    node_layer *l = &m->layer[index];
    l->heads = m->heads;
    l->kv_heads = m->kv_heads;
    l->ffn = m->ffn;
    if (!m->compressed) return FL_OK;
    FL_TRY(layer_u32(m, NODE_LAYER_HEADS, index, m->heads, &l->heads, err));
    FL_TRY(layer_u32(m, NODE_LAYER_KV_HEADS, index, m->kv_heads, &l->kv_heads, err));
    FL_TRY(layer_u32(m, NODE_LAYER_FFN, index, m->ffn, &l->ffn, err));
    if (l->heads % l->kv_heads != 0)
        return FL_FAIL(err, FL_EFORMAT, "layer %u: %u heads do not share %u key/value heads evenly",
                       index, l->heads, l->kv_heads);
    return FL_OK;
}

static fl_status read_layer(node_model *m, uint32_t index, fl_err *err) {
    FL_TRY(read_layer_sizes(m, index, err));
    node_layer *l = &m->layer[index];
    const uint32_t q = l->heads * m->head_size, kv = l->kv_heads * m->head_size;
    const uint32_t shape[NODE_MODULES][2] = {
        [NODE_Q] = {q, m->hidden},         [NODE_K] = {kv, m->hidden},
        [NODE_V] = {kv, m->hidden},        [NODE_O] = {m->hidden, q},
        [NODE_GATE] = {l->ffn, m->hidden}, [NODE_UP] = {l->ffn, m->hidden},
        [NODE_DOWN] = {m->hidden, l->ffn},
    };
    char name[NAME_SIZE];
    for (node_module i = 0; i < NODE_MODULES; i++) {
        node_model_linear_name(index, i, name);
        FL_TRY(get_matrix(m, name, shape[i][0], shape[i][1], &l->linear[i], err));
    }
    for (node_module i = NODE_Q; i <= NODE_V; i++) {
        snprintf(name, sizeof(name), "blk.%u.%s.bias", index, module_names[i]);
        FL_TRY(get_vector(m, name, shape[i][0], true, &l->bias[i], err));
    }
    snprintf(name, sizeof(name), "blk.%u.attn_norm.weight", index);
    FL_TRY(get_vector(m, name, m->hidden, false, &l->attn_norm, err));
    snprintf(name, sizeof(name), "blk.%u.ffn_norm.weight", index);
    return get_vector(m, name, m->hidden, false, &l->ffn_norm, err);
}

static fl_status read_rope(node_model *m, fl_err *err) {
    FL_TRY(get_vector(m, "rope_freqs.weight", m->rope_size / 2, true, &m->rope_factors, err));
    for (uint32_t i = 0; m->rope_factors != NULL && i < m->rope_size / 2; i++)
        if (!(m->rope_factors[i] > 0))
            return FL_FAIL(err, FL_EFORMAT, "factor %u of 'rope_freqs.weight' is not positive", i);
    fl_rope_freq(m->rope_size, (double)m->rope_base, m->rope_factors, m->rope_freq);
    return FL_OK;
}

static bool has_head(const node_model *m) {
    return node_gguf_find_tensor(m->file, "output.weight") != NULL ||
           (m->compressed &&
            node_gguf_find_tensor(m->file, "output.weight" NODE_CONTAINER_PACKED) != NULL);
}

static fl_status read_model(node_model *m, fl_err *err) {
    FL_TRY(read_architecture(m, err));
    FL_TRY(read_sizes(m, err));
    FL_TRY(read_policy(m, err));
    FL_TRY(read_vocabulary(m, err));
    FL_TRY(get_matrix(m, "token_embd.weight", m->vocabulary, m->hidden, &m->embedding, err));
    m->tied = !has_head(m);
    m->head = m->embedding;
    if (!m->tied) FL_TRY(get_matrix(m, "output.weight", m->vocabulary, m->hidden, &m->head, err));
    FL_TRY(get_vector(m, "output_norm.weight", m->hidden, false, &m->final_norm, err));
    FL_TRY(read_rope(m, err));
    for (uint32_t i = 0; i < m->layers; i++) {
        FL_TRY(read_layer(m, i, err));
        node_resident_drop(m); // its norms may have mapped all that lies around them
    }
    m->bytes = node_gguf_bytes(m->file).size;
    node_model_set_exits(m, m->layers < NODE_EXITS ? m->layers : NODE_EXITS);
    return FL_OK;
}

// Takes the file.
static fl_status open_gguf(node_gguf *take_file, node_model **ret, fl_err *err) {
    node_model *m = fl_fault() ? NULL : calloc(1, sizeof(*m));
    if (m == NULL) {
        node_gguf_close(take_file);
        return FL_FAIL(err, FL_ENOMEM, "no memory for a model's description");
    }
    m->file = take_file;
    const fl_status st = read_model(m, err);
    if (st != FL_OK)
        node_model_close(m);
    else
        *ret = m;
    return st;
}

fl_status node_model_open(const char *path, node_model **ret, fl_err *err) {
    node_gguf *file = NULL;
    FL_TRY(node_gguf_open(path, &file, err));
    return open_gguf(file, ret, err);
}

fl_status node_model_open_bytes(fl_bytes bytes, node_model **ret, fl_err *err) {
    FL_ASSERT((uintptr_t)bytes.data % NODE_CONTAINER_ALIGNMENT == 0);
    node_gguf *file = NULL;
    FL_TRY(node_gguf_open_bytes(bytes, &file, err));
    return open_gguf(file, ret, err);
}

void node_model_close(node_model *m) {
    if (m == NULL) return;
    node_resident_close(m);
    node_gguf_close(m->file);
    free(m);
}

void node_model_set_exits(node_model *m, uint32_t count) {
    FL_ASSERT(count >= 1 && count <= NODE_EXITS_MAX && count <= m->layers);
    m->exits = count;
    for (uint32_t i = 0; i < count; i++) // rounded to nearest, halves up
        m->exit_layer[i] = (2 * m->layers * (i + 1) + count) / (2 * count);
}

void node_matrix_row(const node_matrix *w, uint32_t row, float *out) {
    FL_ASSERT(row < w->rows);
    if (w->type == NODE_TYPE_PACKED) {
        const fl_packed p = {w->data, w->rows, w->cols, w->bits};
        fl_packed_row(&p, row, out);
        return;
    }
    const size_t size = w->size / w->rows; // exact: rows are whole blocks
    fl_ggml_row_to_f32(w->type, w->data + row * size, w->cols, out);
}
