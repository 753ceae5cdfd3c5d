#include "tests/model_fixtures.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/checked.h"
#include "common/rng.h"
#include "kernels/ggml.h"
#include "kernels/packed.h"
#include "node/model/container.h"
#include "node/model/gguf_write.h"

enum { I8 = 24 };

t_model_opts t_model_odd(void) {
    return (t_model_opts){.layers = 3,
                          .hidden = 72,
                          .heads = 6,
                          .kv_heads = 3,
                          .head_size = 12,
                          .ffn = 100,
                          .vocabulary = 131,
                          .seed = 1};
}

t_model_opts t_model_even(void) {
    return (t_model_opts){.layers = 4,
                          .hidden = 64,
                          .heads = 4,
                          .kv_heads = 2,
                          .head_size = 16,
                          .ffn = 96,
                          .vocabulary = 160,
                          .seed = 1};
}

static void *need(void *p) {
    if (p == NULL) abort();
    return p;
}

static uint64_t name_key(uint64_t seed, const char *name) {
    uint64_t h = 0;
    for (; *name != '\0'; name++) h = h * 257 + (uint8_t)*name;
    return fl_rng_key(seed, h, 0);
}

// Uniform in [-1, 1).
static float draw(uint64_t key, uint64_t i) {
    return 2.0f * fl_rng_unit(key, i) - 1.0f;
}

static void range_of(const float *w, uint32_t n, float *low, float *high) {
    *low = *high = w[0];
    for (uint32_t i = 1; i < n; i++) {
        if (w[i] < *low) *low = w[i];
        if (w[i] > *high) *high = w[i];
    }
}

static uint8_t code_of(float w, float scale, float minimum, int top) {
    const float c = scale > 0 ? roundf((w - minimum) / scale) : 0;
    return (uint8_t)(c < 0 ? 0 : c > (float)top ? top : (int)c);
}

void t_pack(const float *w, uint32_t rows, uint32_t cols, uint32_t bits, uint8_t *out) {
    const int top = (1 << bits) - 1;
    for (uint32_t r = 0; r < rows; r += FL_PACKED_ROWS) {
        for (uint32_t c = 0; c < cols; c += FL_PACKED_GROUP) {
            uint8_t codes[FL_PACKED_CODES] = {0};
            uint16_t scale[FL_PACKED_ROWS] = {0}, minimum[FL_PACKED_ROWS] = {0};
            const uint32_t n = cols - c < FL_PACKED_GROUP ? cols - c : FL_PACKED_GROUP;
            for (uint32_t i = 0; i < FL_PACKED_ROWS && r + i < rows; i++) {
                const float *x = w + (size_t)(r + i) * cols + c;
                float low, high;
                range_of(x, n, &low, &high);
                scale[i] = fl_f16_from_f32((high - low) / (float)top);
                minimum[i] = fl_f16_from_f32(low);
                for (uint32_t j = 0; j < n; j++)
                    codes[i * FL_PACKED_GROUP + j] =
                        code_of(x[j], fl_f16_to_f32(scale[i]), fl_f16_to_f32(minimum[i]), top);
            }
            fl_packed_tile_write(out, bits, codes, scale, minimum);
            out += fl_packed_tile_size(bits);
        }
    }
}

static void encode_q8_0(const float *w, uint8_t *out) {
    float most = 0;
    for (int i = 0; i < 32; i++) most = fabsf(w[i]) > most ? fabsf(w[i]) : most;
    const uint16_t d = fl_f16_from_f32(most / 127);
    fl_put_u16(out, d);
    for (int i = 0; i < 32; i++) {
        const float q = most > 0 ? roundf(w[i] / fl_f16_to_f32(d)) : 0;
        out[2 + i] = (uint8_t)(int8_t)(q > 127 ? 127 : q < -127 ? -127 : q);
    }
}

static void encode_q4_1(const float *w, uint8_t *out) {
    float low, high;
    range_of(w, 32, &low, &high);
    const uint16_t d = fl_f16_from_f32((high - low) / 15), m = fl_f16_from_f32(low);
    fl_put_u16(out, d);
    fl_put_u16(out + 2, m);
    for (int i = 0; i < 16; i++) {
        const uint8_t a = code_of(w[i], fl_f16_to_f32(d), fl_f16_to_f32(m), 15);
        const uint8_t b = code_of(w[i + 16], fl_f16_to_f32(d), fl_f16_to_f32(m), 15);
        out[4 + i] = (uint8_t)(a | b << 4);
    }
}

static void encode(uint32_t type, const float *w, size_t count, uint8_t *out) {
    const fl_ggml_type *info = need((void *)(uintptr_t)fl_ggml_type_find(type));
    for (size_t i = 0; i < count; i += info->block_elements, out += info->block_bytes) {
        uint32_t bits;
        memcpy(&bits, &w[i], sizeof(bits));
        switch (type) {
        case FL_GGML_F32:
            fl_put_f32(out, w[i]);
            break;
        case FL_GGML_F16:
            fl_put_u16(out, fl_f16_from_f32(w[i]));
            break;
        case FL_GGML_BF16:
            fl_put_u16(out, (uint16_t)(bits >> 16));
            break;
        case FL_GGML_Q8_0:
            encode_q8_0(&w[i], out);
            break;
        case FL_GGML_Q4_1:
            encode_q4_1(&w[i], out);
            break;
        default:
            abort();
        }
    }
}

// A file under construction. Each tensor is visited twice: declared, then written.
typedef struct maker {
    const t_model_opts *opts;
    node_gguf_writer *writer;
    bool data; // second visit
    fl_status status;
    fl_err *err;
} maker;

static void put(maker *k, const void *bytes, size_t size) {
    if (k->status == FL_OK)
        k->status = node_gguf_write_data(k->writer, (fl_bytes){bytes, size}, k->err);
}

static void vector(maker *k, const char *name, uint32_t n, float mean, float spread) {
    if (!k->data) {
        node_gguf_write_tensor(k->writer, name, FL_GGML_F32, 1, (uint64_t[]){n});
        return;
    }
    float *v = need(malloc(n * sizeof(float)));
    for (uint32_t i = 0; i < n; i++) v[i] = mean + spread * draw(name_key(k->opts->seed, name), i);
    put(k, v, n * sizeof(float));
    free(v);
}

static void matrix(maker *k, const char *name, uint32_t rows, uint32_t cols, float gain) {
    const t_model_opts *o = k->opts;
    char packed[NODE_GGUF_NAME_MAX + 16];
    snprintf(packed, sizeof(packed), "%s" NODE_CONTAINER_PACKED, name);
    size_t size, row_size;
    if (o->bits != 0 ? !fl_packed_size(rows, cols, o->bits, &size)
                     : !fl_ggml_row_size(o->type, cols, &row_size))
        abort();
    if (o->bits == 0) size = rows * row_size;
    if (!k->data) {
        if (o->bits != 0)
            node_gguf_write_tensor(k->writer, packed, I8, 1, (uint64_t[]){size});
        else
            node_gguf_write_tensor(k->writer, name, o->type, 2, (uint64_t[]){cols, rows});
        return;
    }
    const size_t count = (size_t)rows * cols;
    float *w = need(malloc(count * sizeof(float)));
    uint8_t *bytes = need(malloc(size));
    const float spread = gain * sqrtf(3.0f / (float)cols);
    for (size_t i = 0; i < count; i++) w[i] = spread * draw(name_key(o->seed, name), i);
    if (o->bits != 0)
        t_pack(w, rows, cols, o->bits, bytes);
    else
        encode(o->type, w, count, bytes);
    put(k, bytes, size);
    free(w);
    free(bytes);
}

typedef struct layer_size {
    uint32_t heads, kv_heads, ffn;
} layer_size;

static layer_size layer_size_of(const t_model_opts *o, uint32_t layer) {
    layer_size s = {o->heads, o->kv_heads, o->ffn};
    if (o->pruned && layer % 2 == 1 && o->kv_heads > 1) {
        s.kv_heads--;
        s.heads -= o->heads / o->kv_heads;
        s.ffn -= o->ffn / 5;
    }
    return s;
}

static void tensors(maker *k) {
    const t_model_opts *o = k->opts;
    static const char *const modules[] = {"attn_q", "attn_k", "attn_v"};
    matrix(k, "token_embd.weight", o->vocabulary, o->hidden, sqrtf((float)o->hidden) * 0.5f);
    for (uint32_t i = 0; i < o->layers; i++) {
        const layer_size s = layer_size_of(o, i);
        const uint32_t q = s.heads * o->head_size, kv = s.kv_heads * o->head_size;
        const uint32_t shape[NODE_MODULES][2] = {
            [NODE_Q] = {q, o->hidden},        [NODE_K] = {kv, o->hidden},
            [NODE_V] = {kv, o->hidden},       [NODE_O] = {o->hidden, q},
            [NODE_GATE] = {s.ffn, o->hidden}, [NODE_UP] = {s.ffn, o->hidden},
            [NODE_DOWN] = {o->hidden, s.ffn},
        };
        char name[NODE_GGUF_NAME_MAX + 1];
        snprintf(name, sizeof(name), "blk.%u.attn_norm.weight", i);
        vector(k, name, o->hidden, 1.0f, 0.2f);
        snprintf(name, sizeof(name), "blk.%u.ffn_norm.weight", i);
        vector(k, name, o->hidden, 1.0f, 0.2f);
        for (node_module m = 0; m < NODE_MODULES; m++) {
            node_model_linear_name(i, m, name);
            matrix(k, name, shape[m][0], shape[m][1], 1.0f);
        }
        for (node_module m = NODE_Q; o->biases && m <= NODE_V; m++) {
            snprintf(name, sizeof(name), "blk.%u.%s.bias", i, modules[m]);
            vector(k, name, shape[m][0], 0.0f, 0.3f);
        }
    }
    vector(k, "output_norm.weight", o->hidden, 1.0f, 0.2f);
    if (o->rope_factors) vector(k, "rope_freqs.weight", o->head_size / 2, 2.0f, 1.0f);
    if (o->untied) matrix(k, "output.weight", o->vocabulary, o->hidden, 1.0f);
}

static void key_u32(maker *k, const char *suffix, uint32_t value) {
    char key[96];
    snprintf(key, sizeof(key), "%s.%s", k->opts->architecture, suffix);
    node_gguf_write_u32(k->writer, key, value);
}

static void container_keys(maker *k) {
    const t_model_opts *o = k->opts;
    uint32_t bits[NODE_LAYERS_MAX], heads[NODE_LAYERS_MAX], kv_heads[NODE_LAYERS_MAX];
    uint32_t ffn[NODE_LAYERS_MAX];
    float sparsity[NODE_LAYERS_MAX], sense[NODE_LAYERS_MAX];
    for (uint32_t i = 0; i < o->layers; i++) {
        const layer_size s = layer_size_of(o, i);
        bits[i] = o->bits;
        heads[i] = s.heads;
        kv_heads[i] = s.kv_heads;
        ffn[i] = s.ffn;
        sparsity[i] = (float)(o->ffn - s.ffn) / (float)o->ffn;
        sense[i] = 0.01f * (float)(i + 1);
    }
    node_gguf_write_u32(k->writer, NODE_CONTAINER_VERSION, NODE_CONTAINER_VERSION_1);
    node_gguf_write_text(k->writer, NODE_LUC_POLICY, "uniform");
    node_gguf_write_u32(k->writer, NODE_LUC_HEAD_BITS, o->bits);
    node_gguf_write_u32s(k->writer, NODE_LUC_BITS, bits, o->layers);
    node_gguf_write_f32s(k->writer, NODE_LUC_SPARSITY, sparsity, o->layers);
    node_gguf_write_f32s(k->writer, NODE_LUC_SENSE_QUANT, sense, o->layers);
    node_gguf_write_f32s(k->writer, NODE_LUC_SENSE_PRUNE, sense, o->layers);
    node_gguf_write_u32s(k->writer, NODE_LAYER_HEADS, heads, o->layers);
    node_gguf_write_u32s(k->writer, NODE_LAYER_KV_HEADS, kv_heads, o->layers);
    node_gguf_write_u32s(k->writer, NODE_LAYER_FFN, ffn, o->layers);
}

static void keys(maker *k) {
    const t_model_opts *o = k->opts;
    char key[96];
    node_gguf_write_text(k->writer, "general.architecture", o->architecture);
    node_gguf_write_text(k->writer, "general.name", "a random test model");
    key_u32(k, "block_count", o->layers);
    key_u32(k, "context_length", 512);
    key_u32(k, "embedding_length", o->hidden);
    key_u32(k, "feed_forward_length", o->ffn);
    key_u32(k, "attention.head_count", o->heads);
    key_u32(k, "attention.head_count_kv", o->kv_heads);
    key_u32(k, "attention.key_length", o->head_size);
    key_u32(k, "attention.value_length", o->head_size);
    key_u32(k, "rope.dimension_count", o->head_size);
    key_u32(k, "vocab_size", o->vocabulary);
    snprintf(key, sizeof(key), "%s.attention.layer_norm_rms_epsilon", o->architecture);
    node_gguf_write_f32(k->writer, key, 1e-5f);
    snprintf(key, sizeof(key), "%s.rope.freq_base", o->architecture);
    node_gguf_write_f32(k->writer, key, 10000.0f);
    if (o->bits != 0) container_keys(k);
}

fl_status t_model_write(const char *path, const t_model_opts *opts, fl_err *err) {
    t_model_opts o = *opts;
    if (o.architecture == NULL) o.architecture = "llama";
    maker k = {.opts = &o, .err = err};
    FL_TRY(node_gguf_writer_open(path, NODE_CONTAINER_ALIGNMENT, &k.writer, err));
    keys(&k);
    tensors(&k);
    k.data = true;
    tensors(&k);
    if (k.status == FL_OK) return node_gguf_writer_commit(&k.writer, err);
    node_gguf_writer_discard(k.writer);
    return k.status;
}

node_model *t_model_make(const t_model_opts *opts) {
    char path[64];
    snprintf(path, sizeof(path), "fixture-%ld.tmp.gguf", (long)getpid());
    fl_err err = {0};
    node_model *model = NULL;
    if (t_model_write(path, opts, &err) != FL_OK || node_model_open(path, &model, &err) != FL_OK) {
        fprintf(stderr, "model fixture: %s\n", err.text);
        abort();
    }
    unlink(path);
    return model;
}
