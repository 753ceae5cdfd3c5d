// Goal: the same ids as the independent tokenizers that made the reference vectors, all of them.
// Method: GPT-2 and Phi-3 vocabularies as GGUF files with the strings and ids that come with them;
// SmolLM2 from vocab.json and merges.txt; the 512-token SentencePiece vocabulary from its own
// format. Every text is decoded again too. Data: the folder in FLEETUNE_DATA, else ../shared/data
// beside the sources; exit status 77 when it is not there.
#include "common/checked.h"
#include "common/file.h"
#include "node/model/tokenizer.h"
#include "node/model/unicode.h"
#include "tests/check.h"

enum { IDS_MAX = 1 << 16, SMOLLM_MAX = 49152, MERGES_MAX = 49000, FILE_SIZE_MAX = 1 << 24 };

static char folder[512];
static int32_t ids[IDS_MAX], wanted[IDS_MAX];

static const char *path_of(const char *name) {
    static char path[1024];
    snprintf(path, sizeof(path), "%s/%s", folder, name);
    return path;
}

static fl_bytes read_all(const char *name) {
    uint8_t *data = NULL;
    size_t size = 0;
    fl_err err;
    T_OK(fl_file_read(path_of(name), FILE_SIZE_MAX, &data, &size, &err), err);
    return (fl_bytes){data, size};
}

static void check_ids(const node_tokenizer *t, fl_bytes text, unsigned flags, size_t want_count,
                      const char *what, size_t number) {
    size_t count = 0;
    fl_err err;
    T_OK(node_tokenizer_encode(t, text, flags, ids, IDS_MAX, &count, &err), err);
    T_CHECK(count == want_count && memcmp(ids, wanted, count * sizeof(ids[0])) == 0,
            "%s %zu: %zu ids, want %zu: \"%.*s\"", what, number, count, want_count,
            (int)(text.size > 60 ? 60 : text.size), (const char *)text.data);
}

static void check_decodes(const node_tokenizer *t, fl_bytes text, size_t count) {
    static uint8_t out[1 << 16];
    size_t size = 0;
    fl_err err;
    T_OK(node_tokenizer_decode(t, wanted, count, true, out, sizeof(out), &size, &err), err);
    T_CHECK(size == text.size && memcmp(out, text.data, size) == 0, "decodes to \"%.*s\"",
            (int)size, (char *)out);
}

// Numbers of one line into `wanted`.
static size_t read_ids(const char *line, const char *end) {
    size_t count = 0;
    while (line < end) {
        char *after;
        const long v = strtol(line, &after, 10);
        if (after == line || after > end) break;
        T_NEED(count < IDS_MAX, "too many ids");
        wanted[count++] = (int32_t)v;
        line = after + (*after == ',');
    }
    return count;
}

static void check_gguf(const char *name) {
    static const char mark[] = "\n__ggml_vocab_test__\n";
    char file[256];
    fl_err err;
    node_gguf *g = NULL;
    node_tokenizer *t = NULL;
    snprintf(file, sizeof(file), "tokenizers/gguf-vocab/%s", name);
    T_OK(node_gguf_open(path_of(file), &g, &err), err);
    T_OK(node_tokenizer_open_gguf(g, &t, &err), err);
    node_gguf_close(g);
    snprintf(file, sizeof(file), "tokenizers/gguf-vocab/%s.inp", name);
    const fl_bytes in = read_all(file);
    snprintf(file, sizeof(file), "tokenizers/gguf-vocab/%s.out", name);
    const fl_bytes out = read_all(file);
    const char *text = (const char *)in.data, *line = (const char *)out.data;
    size_t number = 0;
    while (text < (const char *)in.data + in.size) { // fl_file_read ends both with a zero
        const char *end = strstr(text, mark), *next = strchr(line, '\n');
        T_NEED(end != NULL && next != NULL, "%s: as many texts as lines", name);
        const fl_bytes one = {(const uint8_t *)text, (size_t)(end - text)};
        const size_t count = read_ids(line, next);
        check_ids(t, one, 0, count, name, number++);
        check_decodes(t, one, count);
        text = end + sizeof(mark) - 1;
        line = next + 1;
    }
    T_CHECK(number >= 46, "%zu texts in %s", number, name);
    node_tokenizer_close(t);
    free((void *)(uintptr_t)in.data);
    free((void *)(uintptr_t)out.data);
}

static void test_gpt2(void) {
    check_gguf("ggml-vocab-gpt-2.gguf");
}
static void test_phi3(void) {
    check_gguf("ggml-vocab-phi-3.gguf");
}

// A JSON string at *at, unescaped into out; *at moves behind the closing quote.
static size_t json_string(const char **at, uint8_t *out) {
    size_t size = 0;
    const char *p = *at;
    T_NEED(*p++ == '"', "a string");
    while (*p != '"') {
        if (*p != '\\') {
            out[size++] = (uint8_t)*p++;
            continue;
        }
        p += 2;
        if (p[-1] != 'u') {
            static const char from[] = "ntrbf\"\\/", to[] = "\n\t\r\b\f\"\\/";
            out[size++] = (uint8_t)to[strchr(from, p[-1]) - from];
            continue;
        }
        uint32_t code = 0, low = 0;
        T_NEED(sscanf(p, "%4x", &code) == 1, "an escape");
        p += 4;
        if (code >= 0xD800 && code < 0xDC00 && sscanf(p, "\\u%4x", &low) == 1) {
            code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
            p += 6;
        }
        size += node_utf8_put(code, out + size);
    }
    *at = p + 1;
    return size;
}

// Lines {"text": "...", "ids": [...] ...}.
static void check_lines(const node_tokenizer *t, const char *name, unsigned flags, size_t least,
                        bool decodes) {
    const fl_bytes file = read_all(name);
    uint8_t *text = malloc(file.size + 1);
    T_NEED(text != NULL, "memory");
    size_t number = 0;
    for (const char *line = (const char *)file.data; *line != '\0'; number++) {
        const char *next = strchr(line, '\n'), *at = strstr(line, "\"text\": ");
        if (next == NULL) next = (const char *)file.data + file.size;
        T_NEED(at != NULL && at < next, "a text in line %zu", number);
        at += strlen("\"text\": ");
        const size_t size = json_string(&at, text);
        const char *list = strchr(at, '[');
        T_NEED(list != NULL && list < next, "ids in line %zu", number);
        const size_t count = read_ids(list + 1, next);
        check_ids(t, (fl_bytes){text, size}, flags, count, name, number);
        if (decodes) check_decodes(t, (fl_bytes){text, size}, count);
        line = *next == '\0' ? next : next + 1;
    }
    T_CHECK(number >= least, "%zu lines in %s", number, name);
    free(text);
    free((void *)(uintptr_t)file.data);
}

static void test_smollm2(void) {
    static fl_bytes token[SMOLLM_MAX], merge[MERGES_MAX];
    static int32_t type[SMOLLM_MAX];
    const fl_bytes vocab = read_all("tokenizers/smollm2/vocab.json");
    const fl_bytes merges = read_all("tokenizers/smollm2/merges.txt");
    uint8_t *pool = malloc(vocab.size);
    T_NEED(pool != NULL, "memory");
    size_t used = 0;
    uint32_t count = 0, merge_count = 0;
    const char *at = strchr((const char *)vocab.data, '"');
    for (; at != NULL; at = strchr(at, '"'), count++) {
        const size_t size = json_string(&at, pool + used);
        const long id = strtol(at + 1, NULL, 10);
        T_NEED(id >= 0 && id < SMOLLM_MAX, "id %ld", id);
        token[id] = (fl_bytes){pool + used, size};
        type[id] = id < 17 ? NODE_TOKEN_CONTROL : NODE_TOKEN_NORMAL;
        used += size;
    }
    T_EQ(count, SMOLLM_MAX);
    for (const char *p = (const char *)merges.data; *p != '\0';) {
        const char *end = strchr(p, '\n');
        if (end == NULL) end = p + strlen(p);
        if (end > p && strncmp(p, "#version", 8) != 0)
            merge[merge_count++] = (fl_bytes){(const uint8_t *)p, (size_t)(end - p)};
        p = *end == '\0' ? end : end + 1;
    }
    T_EQ(merge_count, 48900);
    fl_err err;
    node_tokenizer *t = NULL;
    const node_vocabulary v = {.model = "gpt2",
                               .pre = "smollm",
                               .count = count,
                               .token = token,
                               .type = type,
                               .merge_count = merge_count,
                               .merge = merge,
                               .bos = 1,
                               .eos = 2,
                               .unknown = 0};
    T_OK(node_tokenizer_open(&v, &t, &err), err);
    T_EQ(node_tokenizer_special(t, "<|im_end|>"), 2);
    check_lines(t, "tokenizers/smollm2/vectors.jsonl", NODE_ENCODE_SPECIAL, 57, false);
    node_tokenizer_close(t);
    free(pool);
    free((void *)(uintptr_t)vocab.data);
    free((void *)(uintptr_t)merges.data);
}

// tok512.bin: length of the longest token, then score, length and text of each, all 32-bit.
static void test_tok512(void) {
    enum { COUNT = 512 };
    fl_bytes token[COUNT];
    float score[COUNT];
    int32_t type[COUNT];
    const fl_bytes file = read_all("models/stories260K/tok512.bin");
    fl_reader r = {.in = file};
    (void)fl_read_u32(&r);
    for (int32_t i = 0; i < COUNT; i++) {
        const uint32_t bits = fl_read_u32(&r);
        memcpy(&score[i], &bits, sizeof(bits));
        token[i] = fl_read_bytes(&r, fl_read_u32(&r));
        type[i] = i == 0        ? NODE_TOKEN_UNKNOWN
                  : i < 3       ? NODE_TOKEN_CONTROL
                  : i < 3 + 256 ? NODE_TOKEN_BYTE
                                : NODE_TOKEN_NORMAL;
    }
    T_NEED(!r.bad, "512 tokens");
    fl_err err;
    node_tokenizer *t = NULL;
    const node_vocabulary v = {.model = "llama",
                               .pre = "default",
                               .count = COUNT,
                               .token = token,
                               .score = score,
                               .type = type,
                               .bos = 1,
                               .eos = 2,
                               .unknown = 0,
                               .add_bos = true,
                               .add_space_prefix = true};
    T_OK(node_tokenizer_open(&v, &t, &err), err);
    check_lines(t, "models/stories260K/tok512_vectors.jsonl", NODE_ENCODE_ENDS, 58, false);
    node_tokenizer_close(t);
    free((void *)(uintptr_t)file.data);
}

int main(int argc, char **argv) {
    const char *set = getenv("FLEETUNE_DATA");
    snprintf(folder, sizeof(folder), "%s", set != NULL ? set : FL_DATA_FOLDER);
    if (access(folder, R_OK) != 0) {
        fprintf(stderr, "skip: no data in %s (set FLEETUNE_DATA)\n", folder);
        return 77;
    }
    static const t_case cases[] = {{"gpt2", test_gpt2},
                                   {"phi3", test_phi3},
                                   {"smollm2", test_smollm2},
                                   {"tok512", test_tok512}};
    return t_main(argc, argv, cases, FL_COUNT(cases));
}
