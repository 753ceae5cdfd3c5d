#include "tests/convert_common.h"

#include <stdio.h>
#include <string.h>

#include "common/file.h"
#include "node/model/gguf_write.h"

_Noreturn void t_convert_die(const char *what) {
    fprintf(stderr, "convert: %s\n", what);
    abort();
}

fl_bytes t_convert_read(const char *path) {
    uint8_t *data = NULL;
    size_t size = 0;
    fl_err err;
    if (fl_file_read(path, (size_t)1 << 28, &data, &size, &err) != FL_OK) t_convert_die(err.text);
    return (fl_bytes){data, size};
}

const float *t_convert_take(t_convert *c, const float *w, const char *name, uint32_t rows,
                            uint32_t cols) {
    if (c->tensors == T_CONVERT_TENSORS) t_convert_die("too many tensors");
    t_convert_tensor *t = &c->tensor[c->tensors++];
    snprintf(t->name, sizeof(t->name), "%s", name);
    t->rows = rows;
    t->cols = cols;
    t->data = w;
    const size_t count = (size_t)cols * (rows == 0 ? 1 : rows);
    if (count > (size_t)(c->end - w)) t_convert_die("the checkpoint is cut short");
    return w + count;
}

const float *t_convert_take_layers(t_convert *c, const float *w, const char *part, uint32_t rows,
                                   uint32_t cols) {
    for (uint32_t i = 0; i < c->config.layers; i++) {
        char name[64];
        snprintf(name, sizeof(name), "blk.%u.%s.weight", i, part);
        w = t_convert_take(c, w, name, rows, cols);
    }
    return w;
}

void t_convert_token(t_convert *c, fl_bytes text, float score, int32_t type) {
    if (c->tokens == T_CONVERT_TOKENS) t_convert_die("too many tokens");
    uint8_t *copy = malloc(text.size * 3 + 1);
    size_t size = 0;
    if (copy == NULL) t_convert_die("no memory");
    for (size_t i = 0; i < text.size; i++) {
        if (text.data[i] == ' ') {
            memcpy(copy + size, "\xe2\x96\x81", 3);
            size += 3;
        } else {
            copy[size++] = text.data[i];
        }
    }
    c->token[c->tokens] = (fl_bytes){copy, size};
    c->score[c->tokens] = score;
    c->type[c->tokens++] = type;
}

static void write_keys(const t_convert *c, node_gguf_writer *w) {
    const t_llama_config *k = &c->config;
    node_gguf_write_text(w, "general.architecture", "llama");
    node_gguf_write_u32(w, "llama.block_count", k->layers);
    node_gguf_write_u32(w, "llama.context_length", k->context);
    node_gguf_write_u32(w, "llama.embedding_length", k->dim);
    node_gguf_write_u32(w, "llama.feed_forward_length", k->ffn);
    node_gguf_write_u32(w, "llama.attention.head_count", k->heads);
    node_gguf_write_u32(w, "llama.attention.head_count_kv", k->kv_heads);
    node_gguf_write_f32(w, "llama.attention.layer_norm_rms_epsilon", k->epsilon);
    node_gguf_write_text(w, "tokenizer.ggml.model", "llama");
    node_gguf_write_strings(w, "tokenizer.ggml.tokens", c->token, c->tokens);
    node_gguf_write_f32s(w, "tokenizer.ggml.scores", c->score, c->tokens);
    node_gguf_write_i32s(w, "tokenizer.ggml.token_type", c->type, c->tokens);
    node_gguf_write_u32(w, "tokenizer.ggml.bos_token_id", 1);
    node_gguf_write_u32(w, "tokenizer.ggml.eos_token_id", 2);
    node_gguf_write_u32(w, "tokenizer.ggml.unknown_token_id", 0);
}

void t_convert_write(t_convert *c, const char *out) {
    node_gguf_writer *w = NULL;
    fl_err err;
    if (node_gguf_writer_open(out, 32, &w, &err) != FL_OK) t_convert_die(err.text);
    write_keys(c, w);
    for (uint32_t i = 0; i < c->tensors; i++) {
        const t_convert_tensor *t = &c->tensor[i];
        node_gguf_write_tensor(w, t->name, 0, t->rows == 0 ? 1 : 2, (uint64_t[]){t->cols, t->rows});
    }
    for (uint32_t i = 0; i < c->tensors; i++) {
        t_convert_tensor *t = &c->tensor[i];
        const size_t size = sizeof(float) * t->cols * (t->rows == 0 ? 1 : t->rows);
        const fl_bytes bytes = {(const uint8_t *)t->data, size};
        if (node_gguf_write_data(w, bytes, &err) != FL_OK) t_convert_die(err.text);
        free(t->own);
    }
    if (node_gguf_writer_commit(&w, &err) != FL_OK) t_convert_die(err.text);
    for (uint32_t i = 0; i < c->tokens; i++) free((void *)(uintptr_t)c->token[i].data);
}
