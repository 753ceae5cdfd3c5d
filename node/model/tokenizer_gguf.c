// Gathers the views of a vocabulary from the metadata of a GGUF file.
#include "common/fault.h"
#include "node/model/tokenizer.h"

#include <stdlib.h>
#include <string.h>

#define KEY "tokenizer.ggml."

// A short name as a C string; FL_ENOENT when it is not there.
static fl_status get_name(const node_gguf *g, const char *key, char *out, size_t out_size,
                          fl_err *err) {
    fl_bytes text;
    if (!node_gguf_get_string(g, key, &text))
        return FL_FAIL(err, FL_ENOENT, "the file has no %s: it carries no tokenizer", key);
    if (text.size >= out_size || memchr(text.data, 0, text.size) != NULL)
        return FL_FAIL(err, FL_EUNSUPPORTED,
                       "%s is a name of %zu bytes, which is none of those known", key, text.size);
    memcpy(out, text.data, text.size);
    out[text.size] = '\0';
    return FL_OK;
}

static int32_t get_id(const node_gguf *g, const char *key) {
    uint32_t id;
    return node_gguf_get_u32(g, key, &id) && id <= INT32_MAX ? (int32_t)id : -1;
}

static bool get_flag(const node_gguf *g, const char *key, bool otherwise) {
    bool flag;
    return node_gguf_get_bool(g, key, &flag) ? flag : otherwise;
}

// The arrays as found, before memory is taken for the views on them.
typedef struct arrays {
    node_gguf_value token, score, type, merge;
    bool has_score, has_type, has_merge;
} arrays;

static fl_status find_arrays(const node_gguf *g, arrays *a, fl_err *err) {
    *a = (arrays){0};
    if (!node_gguf_get_array(g, KEY "tokens", NODE_GGUF_STRING, &a->token))
        return FL_FAIL(err, FL_EFORMAT, "tokenizer.ggml.tokens is not an array of strings");
    a->has_score = node_gguf_get_array(g, KEY "scores", NODE_GGUF_F32, &a->score);
    a->has_type = node_gguf_get_array(g, KEY "token_type", NODE_GGUF_I32, &a->type);
    a->has_merge = node_gguf_get_array(g, KEY "merges", NODE_GGUF_STRING, &a->merge);
    if (a->token.count > NODE_TOKENS_MAX || a->merge.count > 2 * NODE_TOKENS_MAX)
        return FL_FAIL(err, FL_ELIMIT, "the vocabulary has more than %d tokens or %d merges",
                       NODE_TOKENS_MAX, 2 * NODE_TOKENS_MAX);
    if ((a->has_score && a->score.count != a->token.count) ||
        (a->has_type && a->type.count != a->token.count))
        return FL_FAIL(err, FL_EFORMAT,
                       "tokenizer.ggml.scores or token_type has not one value for "
                       "each of the %u tokens",
                       (unsigned)a->token.count);
    return FL_OK;
}

static void read_strings(const node_gguf_value *value, fl_bytes *out) {
    fl_reader r = {.in = value->bytes};
    for (uint64_t i = 0; i < value->count; i++) out[i] = node_gguf_next_string(&r);
}

fl_status node_tokenizer_open_gguf(const node_gguf *g, node_tokenizer **ret, fl_err *err) {
    char model[32], pre[32] = "default";
    arrays a;
    FL_TRY(get_name(g, KEY "model", model, sizeof(model), err));
    if (node_gguf_find(g, KEY "pre") != NULL) FL_TRY(get_name(g, KEY "pre", pre, sizeof(pre), err));
    FL_TRY(find_arrays(g, &a, err));
    const bool sentencepiece = strcmp(model, "llama") == 0;
    const bool begins = sentencepiece || strcmp(pre, "llama-bpe") == 0;
    const size_t count = (size_t)a.token.count, merges = (size_t)a.merge.count;
    const size_t views = (count + merges) * sizeof(fl_bytes);
    uint8_t *block =
        fl_fault() ? NULL : malloc(views + count * (sizeof(float) + sizeof(int32_t)) + 1);
    if (block == NULL)
        return FL_FAIL(err, FL_ENOMEM, "no memory to read a vocabulary of %zu tokens", count);
    fl_bytes *token = (fl_bytes *)(void *)block, *merge = token + count;
    float *score = (float *)(void *)(block + views);
    int32_t *type = (int32_t *)(void *)(score + count);
    read_strings(&a.token, token);
    read_strings(&a.merge, merge);
    for (size_t i = 0; a.has_score && i < count; i++)
        score[i] = fl_get_f32(a.score.bytes.data + 4 * i);
    for (size_t i = 0; a.has_type && i < count; i++)
        type[i] = (int32_t)fl_get_u32(a.type.bytes.data + 4 * i);
    const node_vocabulary v = {
        .model = model,
        .pre = pre,
        .count = (uint32_t)count,
        .token = token,
        .score = a.has_score ? score : NULL,
        .type = a.has_type ? type : NULL,
        .merge_count = (uint32_t)merges,
        .merge = merge,
        .bos = get_id(g, KEY "bos_token_id"),
        .eos = get_id(g, KEY "eos_token_id"),
        .unknown = get_id(g, KEY "unknown_token_id"),
        .add_bos = get_flag(g, KEY "add_bos_token", begins),
        .add_eos = get_flag(g, KEY "add_eos_token", false),
        .add_space_prefix = get_flag(g, KEY "add_space_prefix", sentencepiece),
    };
    const fl_status st = node_tokenizer_open(&v, ret, err);
    free(block);
    return st;
}
