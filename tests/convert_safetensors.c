// safetensors: u64 size of a JSON header, the header, tensors. Names as transformers gives them.
#include <stdio.h>
#include <string.h>

#include "tests/convert.h"
#include "tests/convert_common.h"

// --- as much JSON as the two files need ----------------------------------------------------------

typedef struct json {
    const char *p, *end;
} json;

static char peek(json *j) {
    while (j->p < j->end && strchr(" \t\r\n", *j->p) != NULL) j->p++;
    if (j->p == j->end) t_convert_die("JSON ends early");
    return *j->p;
}

static bool eat(json *j, char c) {
    if (peek(j) != c) return false;
    j->p++;
    return true;
}

static void want(json *j, char c) {
    if (!eat(j, c)) t_convert_die("JSON is not as expected");
}

static size_t put_utf8(unsigned c, char *out) {
    if (c < 0x80) return out[0] = (char)c, 1;
    if (c < 0x800) return out[0] = (char)(0xc0 | c >> 6), out[1] = (char)(0x80 | (c & 63)), 2;
    out[0] = (char)(0xe0 | c >> 12);
    out[1] = (char)(0x80 | (c >> 6 & 63));
    out[2] = (char)(0x80 | (c & 63));
    return 3;
}

// A string of at most 255 bytes, unescaped.
static size_t string(json *j, char out[256]) {
    size_t n = 0;
    want(j, '"');
    while (j->p < j->end && *j->p != '"') {
        if (n > 250) t_convert_die("a JSON string is too long");
        if (*j->p != '\\') {
            out[n++] = *j->p++;
            continue;
        }
        const char c = j->p[1];
        static const char from[] = "nrtbf", to[] = "\n\r\t\b\f";
        const char *simple = strchr(from, c);
        if (c == 'u') {
            unsigned code = 0;
            if (sscanf(j->p + 2, "%4x", &code) != 1) t_convert_die("bad escape");
            n += put_utf8(code, out + n);
            j->p += 6;
        } else {
            out[n++] = simple != NULL ? to[simple - from] : c;
            j->p += 2;
        }
    }
    j->p++;
    out[n] = '\0';
    return n;
}

static void skip(json *j) {
    char text[256];
    const char c = peek(j);
    if (c == '"') {
        string(j, text);
    } else if (c == '{' || c == '[') {
        const char close = c == '{' ? '}' : ']';
        for (j->p++; !eat(j, close); (void)eat(j, ',')) {
            skip(j);
            if (eat(j, ':')) skip(j);
        }
    } else {
        while (j->p < j->end && strchr(",]}", *j->p) == NULL) j->p++;
    }
}

// Goes to the value of `key` in the object that begins here.
static void find(json *j, const char *key) {
    char name[256];
    want(j, '{');
    for (;; want(j, ',')) {
        string(j, name);
        want(j, ':');
        if (strcmp(name, key) == 0) return;
        skip(j);
    }
}

static uint64_t number(json *j) {
    peek(j);
    char *after;
    const uint64_t n = strtoull(j->p, &after, 10);
    if (after == j->p) t_convert_die("JSON number expected");
    j->p = after;
    return n;
}

// --- the model -----------------------------------------------------------------------------------

typedef struct name_pair {
    const char *from, *to;
} name_pair;

static const name_pair parts[] = {
    {"self_attn.q_proj", "attn_q"},
    {"self_attn.k_proj", "attn_k"},
    {"self_attn.v_proj", "attn_v"},
    {"self_attn.o_proj", "attn_output"},
    {"mlp.gate_proj", "ffn_gate"},
    {"mlp.up_proj", "ffn_up"},
    {"mlp.down_proj", "ffn_down"},
    {"input_layernorm", "attn_norm"},
    {"post_attention_layernorm", "ffn_norm"},
};

static void gguf_name(const char *name, char out[64]) {
    unsigned layer = 0;
    int at = 0;
    if (strcmp(name, "lm_head.weight") == 0) {
        snprintf(out, 64, "token_embd.weight");
        return;
    }
    if (strcmp(name, "model.norm.weight") == 0) {
        snprintf(out, 64, "output_norm.weight");
        return;
    }
    if (sscanf(name, "model.layers.%u.%n", &layer, &at) != 1 || at == 0) t_convert_die(name);
    for (size_t i = 0; i < FL_COUNT(parts); i++) {
        const size_t size = strlen(parts[i].from);
        if (strncmp(name + at, parts[i].from, size) != 0 || name[at + (int)size] != '.') continue;
        snprintf(out, 64, "blk.%u.%s.weight", layer, parts[i].to);
        return;
    }
    t_convert_die(name);
}

// Pairs (i, i + n / 2) of each head become pairs (2i, 2i + 1).
static void interleave(t_convert_tensor *t, uint32_t heads) {
    const uint32_t size = t->rows / heads, cols = t->cols;
    t->own = malloc((size_t)t->rows * cols * sizeof(float));
    if (t->own == NULL) t_convert_die("no memory");
    for (uint32_t r = 0; r < t->rows; r++) {
        const uint32_t head = r / size, i = r % size;
        const uint32_t from = head * size + i / 2 + (i % 2) * (size / 2);
        memcpy(t->own + (size_t)r * cols, t->data + (size_t)from * cols, cols * sizeof(float));
    }
    t->data = t->own;
}

static void take_tensor(t_convert *c, const char *name, json *j, fl_bytes data) {
    char out[64], type[256];
    json at = *j;
    find(&at, "dtype");
    string(&at, type);
    if (strcmp(type, "F32") != 0) t_convert_die("only F32 is expected");
    at = *j;
    find(&at, "shape");
    want(&at, '[');
    uint32_t rows = (uint32_t)number(&at), cols = 0;
    if (eat(&at, ',')) cols = (uint32_t)number(&at);
    if (cols == 0) cols = rows, rows = 0;
    at = *j;
    find(&at, "data_offsets");
    want(&at, '[');
    const uint64_t begin = number(&at);
    if (begin > data.size || begin % 4 != 0) t_convert_die("bad offset");
    gguf_name(name, out);
    t_convert_take(c, (const float *)(const void *)(data.data + begin), out, rows, cols);
    t_convert_tensor *t = &c->tensor[c->tensors - 1];
    if (strstr(out, "attn_q.") != NULL) interleave(t, c->config.heads);
    if (strstr(out, "attn_k.") != NULL) interleave(t, c->config.kv_heads);
}

static void take_tensors(t_convert *c, fl_bytes file) {
    const uint64_t head = fl_get_u64(file.data);
    if (head > file.size - 8 || (8 + head) % 4 != 0) t_convert_die("bad header size");
    const fl_bytes data = {file.data + 8 + head, file.size - 8 - (size_t)head};
    c->end = (const float *)(const void *)(data.data + data.size / 4 * 4);
    json j = {(const char *)file.data + 8, (const char *)data.data};
    char name[256];
    for (want(&j, '{'); !eat(&j, '}'); (void)eat(&j, ',')) {
        string(&j, name);
        want(&j, ':');
        if (strcmp(name, "__metadata__") != 0) take_tensor(c, name, &j, data);
        skip(&j);
    }
}

// --- the vocabulary ------------------------------------------------------------------------------

static uint32_t find_token(const t_convert *c, const char *text, size_t size) {
    for (uint32_t i = 0; i < c->tokens; i++)
        if (c->token[i].size == size && memcmp(c->token[i].data, text, size) == 0) return i;
    t_convert_die("a merge makes no token");
}

// The n-th merge makes a token of score -n: what SentencePiece would have merged n-th.
static void take_vocabulary(t_convert *c, fl_bytes file) {
    json j = {(const char *)file.data, (const char *)file.data + file.size};
    char text[256];
    find(&j, "model");
    json at = j;
    find(&at, "vocab");
    for (want(&at, '{'); !eat(&at, '}'); (void)eat(&at, ',')) {
        const size_t size = string(&at, text);
        want(&at, ':');
        const uint64_t id = number(&at);
        if (id != c->tokens) t_convert_die("tokens are not in order");
        t_convert_token(c, (fl_bytes){(const uint8_t *)text, size}, 0,
                        id == 0  ? 2
                        : id < 3 ? 3
                                 : 1);
    }
    at = j;
    find(&at, "merges");
    float score = 0;
    for (want(&at, '['); !eat(&at, ']'); (void)eat(&at, ',')) {
        string(&at, text);
        char *space = strchr(text, ' ');
        if (space == NULL) t_convert_die("a merge has no space");
        memmove(space, space + 1, strlen(space));
        const uint32_t id = find_token(c, text, strlen(text));
        score -= 1;
        if (c->score[id] == 0) c->score[id] = score;
    }
}

static uint32_t config_number(fl_bytes file, const char *key) {
    json j = {(const char *)file.data, (const char *)file.data + file.size};
    find(&j, key);
    return (uint32_t)number(&j);
}

static fl_bytes read_in(const char *folder, const char *name) {
    char path[1024];
    snprintf(path, sizeof(path), "%s/%s", folder, name);
    return t_convert_read(path);
}

void t_convert_safetensors(const char *folder, const char *out) {
    const fl_bytes config = read_in(folder, "config.json");
    const fl_bytes weights = read_in(folder, "model.safetensors");
    const fl_bytes tokenizer = read_in(folder, "tokenizer.json");
    t_convert c = {.config = {.dim = config_number(config, "hidden_size"),
                              .ffn = config_number(config, "intermediate_size"),
                              .layers = config_number(config, "num_hidden_layers"),
                              .heads = config_number(config, "num_attention_heads"),
                              .kv_heads = config_number(config, "num_key_value_heads"),
                              .vocabulary = config_number(config, "vocab_size"),
                              .context = config_number(config, "max_position_embeddings"),
                              .epsilon = 1e-6f}};
    take_tensors(&c, weights);
    take_vocabulary(&c, tokenizer);
    t_convert_write(&c, out);
    free((void *)(uintptr_t)config.data);
    free((void *)(uintptr_t)weights.data);
    free((void *)(uintptr_t)tokenizer.data);
}
