#include "tests/make_vocabulary.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BYTES = 256, TEXT_SIZE = 24 };
enum { NORMAL = 1, UNKNOWN = 2, CONTROL = 3, UNUSED = 5, BYTE = 6 }; // llama.cpp's token types

// The letters that are joined, likeliest first; '_' stands for the space.
static const char letters[] = "_etaoinshrdlucmfwygpbvkETAOINSHRDLUCMFWYGPBVKxjqzXJQZ.,0123456789;:";
enum { LETTERS = sizeof(letters) - 1 };

typedef struct table {
    char (*text)[TEXT_SIZE];
    fl_bytes *view;
    int32_t *type;
    uint32_t count, room;
} table;

static void *need(void *p) {
    if (p == NULL) abort();
    return p;
}

static table open_table(uint32_t room) {
    return (table){.text = need(calloc(room, TEXT_SIZE)),
                   .view = need(calloc(room, sizeof(fl_bytes))),
                   .type = need(calloc(room, sizeof(int32_t))),
                   .room = room};
}

static void close_table(table *t) {
    free(t->text);
    free(t->view);
    free(t->type);
}

static void add(table *t, int32_t type, const char *text) {
    if (t->count == t->room) return;
    snprintf(t->text[t->count], TEXT_SIZE, "%s", text);
    t->view[t->count] = (fl_bytes){(const uint8_t *)t->text[t->count], strlen(t->text[t->count])};
    t->type[t->count++] = type;
}

// Letter i as the vocabulary writes it: U+2581 or U+0120 for the space.
static const char *letter(uint32_t i, const char *space, char out[2]) {
    if (letters[i] == '_') return space;
    out[0] = letters[i];
    out[1] = '\0';
    return out;
}

// Joined letters number n: all pairs first, likely ones before unlikely ones, then a pair and a
// letter. A space stands only at the front, as in published vocabularies. False when n is none.
static bool joined(uint32_t n, const char *space, char *left, char *right) {
    char a[2], b[2], c[2];
    if (n < LETTERS * LETTERS) {
        const uint32_t i = n / LETTERS, j = n % LETTERS;
        if (letters[j] == '_') return false;
        snprintf(left, TEXT_SIZE, "%s", letter(i, space, a));
        snprintf(right, TEXT_SIZE, "%s", letter(j, space, b));
        return true;
    }
    n -= LETTERS * LETTERS;
    const uint32_t i = n / LETTERS / LETTERS % LETTERS, j = n / LETTERS % LETTERS, k = n % LETTERS;
    if (letters[j] == '_' || letters[k] == '_') return false;
    snprintf(left, TEXT_SIZE, "%s%s", letter(i, space, a), letter(j, space, b));
    snprintf(right, TEXT_SIZE, "%s", letter(k, space, c));
    return true;
}

enum { JOINED = LETTERS * LETTERS * (LETTERS + 1) };

void t_vocabulary_pieces(node_gguf_writer *w, uint32_t count) {
    static const char space[] = "\xe2\x96\x81";
    table t = open_table(count);
    float *score = need(calloc(count, sizeof(*score)));
    char text[TEXT_SIZE], left[TEXT_SIZE], right[TEXT_SIZE], one[2];
    add(&t, UNKNOWN, "<unk>");
    add(&t, CONTROL, "<s>");
    add(&t, CONTROL, "</s>");
    for (unsigned b = 0; b < BYTES; b++) {
        snprintf(text, sizeof(text), "<0x%02X>", b);
        add(&t, BYTE, text);
    }
    for (uint32_t i = 0; i < LETTERS; i++) add(&t, NORMAL, letter(i, space, one));
    for (uint32_t n = 0; n < JOINED && t.count < count; n++) {
        if (!joined(n, space, left, right)) continue;
        snprintf(text, sizeof(text), "%.12s%.7s", left, right);
        score[t.count] = -(float)t.count;
        add(&t, NORMAL, text);
    }
    node_gguf_write_text(w, "tokenizer.ggml.model", "llama");
    node_gguf_write_strings(w, "tokenizer.ggml.tokens", t.view, t.count);
    node_gguf_write_f32s(w, "tokenizer.ggml.scores", score, t.count);
    node_gguf_write_i32s(w, "tokenizer.ggml.token_type", t.type, t.count);
    node_gguf_write_u32(w, "tokenizer.ggml.unknown_token_id", 0);
    node_gguf_write_u32(w, "tokenizer.ggml.bos_token_id", 1);
    node_gguf_write_u32(w, "tokenizer.ggml.eos_token_id", 2);
    free(score);
    close_table(&t);
}

// GPT-2's alphabet: printable bytes stand for themselves, the others for U+0100 and up.
static void byte_text(unsigned byte, char out[TEXT_SIZE]) {
    unsigned code = byte;
    if (!((byte >= 33 && byte <= 126) || (byte >= 161 && byte != 173))) {
        code = 256;
        for (unsigned b = 0; b < byte; b++)
            code += !((b >= 33 && b <= 126) || (b >= 161 && b != 173));
    }
    if (code < 0x80)
        snprintf(out, TEXT_SIZE, "%c", (char)code);
    else
        snprintf(out, TEXT_SIZE, "%c%c", (char)(0xc0 | code >> 6), (char)(0x80 | (code & 0x3f)));
}

void t_vocabulary_merges(node_gguf_writer *w, uint32_t count) {
    static const char space[] = "\xc4\xa0"; // U+0120
    enum { SPECIAL = 293 };
    const uint32_t normal = count - SPECIAL;
    table t = open_table(count), merges = open_table(normal);
    char text[TEXT_SIZE], left[TEXT_SIZE], right[TEXT_SIZE];
    for (unsigned b = 0; b < BYTES; b++) {
        byte_text(b, text);
        add(&t, NORMAL, text);
    }
    for (uint32_t n = 0; n < JOINED && t.count < normal; n++) {
        if (!joined(n, space, left, right)) continue;
        snprintf(text, sizeof(text), "%.12s%.7s", left, right);
        add(&t, NORMAL, text);
        snprintf(text, sizeof(text), "%.12s %.7s", left, right);
        add(&merges, NORMAL, text);
    }
    const uint32_t end = t.count;
    add(&t, CONTROL, "<|endoftext|>");
    add(&t, CONTROL, "<|im_start|>");
    add(&t, CONTROL, "<|im_end|>");
    while (t.count < count) {
        snprintf(text, sizeof(text), "[PAD%u]", t.count);
        add(&t, UNUSED, text);
    }
    node_gguf_write_text(w, "tokenizer.ggml.model", "gpt2");
    node_gguf_write_text(w, "tokenizer.ggml.pre", "qwen2");
    node_gguf_write_strings(w, "tokenizer.ggml.tokens", t.view, t.count);
    node_gguf_write_i32s(w, "tokenizer.ggml.token_type", t.type, t.count);
    node_gguf_write_strings(w, "tokenizer.ggml.merges", merges.view, merges.count);
    node_gguf_write_u32(w, "tokenizer.ggml.bos_token_id", end);
    node_gguf_write_u32(w, "tokenizer.ggml.eos_token_id", end + 2);
    node_gguf_write_bool(w, "tokenizer.ggml.add_bos_token", false);
    close_table(&t);
    close_table(&merges);
}
