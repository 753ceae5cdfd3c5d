// Makes a small model that the programs can do everything with: random weights, and a tokenizer of
// single bytes, so that any text has tokens and every token is text.
//
//   make_tiny_model OUT.gguf [--layers N] [--seed S] [--type ID] [--no-tokenizer]
//                   [--architecture NAME]
//
// --type is the ggml number of the matrices' type (0 F32, 1 F16, 3 Q4_1, 8 Q8_0, 30 BF16).
#include "node/model/gguf.h"
#include "node/model/gguf_write.h"
#include "tests/model_fixtures.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { BYTES = 256, END = BYTES, VOCABULARY = BYTES + 1 };
enum { NORMAL = 1, CONTROL = 3 }; // llama.cpp's token types

typedef struct options {
    t_model_opts model;
    const char *out;
    bool without_tokenizer;
} options;

// GPT-2's alphabet: printable bytes stand for themselves, the others for U+0100 and up.
static size_t byte_text(unsigned byte, char out[3]) {
    const bool itself = (byte >= 33 && byte <= 126) || (byte >= 161 && byte != 173);
    unsigned letter = byte;
    if (!itself) {
        letter = 256;
        for (unsigned b = 0; b < byte; b++)
            letter += !((b >= 33 && b <= 126) || (b >= 161 && b != 173));
    }
    if (letter < 0x80) {
        out[0] = (char)letter;
        return 1;
    }
    out[0] = (char)(0xc0 | letter >> 6);
    out[1] = (char)(0x80 | (letter & 0x3f));
    return 2;
}

static void tokenizer_keys(node_gguf_writer *w) {
    static char text[VOCABULARY][3];
    fl_bytes token[VOCABULARY];
    int32_t type[VOCABULARY];
    for (unsigned i = 0; i < BYTES; i++) {
        token[i] = (fl_bytes){(const uint8_t *)text[i], byte_text(i, text[i])};
        type[i] = NORMAL;
    }
    token[END] = (fl_bytes){(const uint8_t *)"<|endoftext|>", 13};
    type[END] = CONTROL;
    node_gguf_write_text(w, "tokenizer.ggml.model", "gpt2");
    node_gguf_write_text(w, "tokenizer.ggml.pre", "gpt-2");
    node_gguf_write_strings(w, "tokenizer.ggml.tokens", token, VOCABULARY);
    node_gguf_write_i32s(w, "tokenizer.ggml.token_type", type, VOCABULARY);
    node_gguf_write_u32(w, "tokenizer.ggml.bos_token_id", END);
    node_gguf_write_u32(w, "tokenizer.ggml.eos_token_id", END);
}

// The fixture as it is, with a tokenizer among its keys.
static fl_status add_tokenizer(const char *from, const char *to, fl_err *err) {
    node_gguf *g = NULL;
    node_gguf_writer *w = NULL;
    fl_status st = node_gguf_open(from, &g, err);
    if (st == FL_OK) st = node_gguf_writer_open(to, node_gguf_alignment(g), &w, err);
    if (st != FL_OK) goto out;
    for (size_t i = 0; i < node_gguf_key_count(g); i++)
        node_gguf_write_key(w, node_gguf_key_at(g, i));
    tokenizer_keys(w);
    for (size_t i = 0; i < node_gguf_tensor_count(g); i++) {
        const node_gguf_tensor *t = node_gguf_tensor_at(g, i);
        char name[NODE_GGUF_NAME_MAX + 1];
        snprintf(name, sizeof(name), "%.*s", (int)t->name.size, (const char *)t->name.data);
        node_gguf_write_tensor(w, name, t->type, t->dims, t->dim);
    }
    for (size_t i = 0; i < node_gguf_tensor_count(g) && st == FL_OK; i++)
        st = node_gguf_write_data(w, node_gguf_tensor_at(g, i)->data, err);
    if (st == FL_OK) st = node_gguf_writer_commit(&w, err);
out:
    node_gguf_writer_discard(w);
    node_gguf_close(g);
    return st;
}

static fl_status make(const options *o, fl_err *err) {
    char plain[4096];
    if (o->without_tokenizer) return t_model_write(o->out, &o->model, err);
    snprintf(plain, sizeof(plain), "%s.plain", o->out);
    FL_TRY(t_model_write(plain, &o->model, err));
    const fl_status st = add_tokenizer(plain, o->out, err);
    unlink(plain);
    return st;
}

static bool parse(int count, char **args, options *ret) {
    *ret = (options){.model = t_model_even()};
    ret->model.layers = 8;
    ret->model.vocabulary = VOCABULARY;
    for (int i = 1; i < count; i++) {
        const bool more = i + 1 < count;
        if (strcmp(args[i], "--no-tokenizer") == 0)
            ret->without_tokenizer = true;
        else if (strcmp(args[i], "--layers") == 0 && more)
            ret->model.layers = (uint32_t)strtoul(args[++i], NULL, 10);
        else if (strcmp(args[i], "--seed") == 0 && more)
            ret->model.seed = strtoull(args[++i], NULL, 10);
        else if (strcmp(args[i], "--type") == 0 && more)
            ret->model.type = (uint32_t)strtoul(args[++i], NULL, 10);
        else if (strcmp(args[i], "--architecture") == 0 && more)
            ret->model.architecture = args[++i];
        else if (args[i][0] != '-' && ret->out == NULL)
            ret->out = args[i];
        else
            return false;
    }
    return ret->out != NULL;
}

int main(int count, char **args) {
    options o;
    fl_err err = {0};
    if (!parse(count, args, &o)) {
        fprintf(stderr, "usage: make_tiny_model OUT.gguf [--layers N] [--seed S] [--type ID]\n"
                        "                       [--no-tokenizer] [--architecture NAME]\n");
        return 2;
    }
    if (make(&o, &err) == FL_OK) return 0;
    fprintf(stderr, "make_tiny_model: %s\n", err.text);
    return 1;
}
