#include "node/model/pretoken.h"

#include "node/model/unicode.h"

#include <string.h>

typedef struct cursor {
    fl_bytes text;
    size_t at;     // of the character
    size_t length; // 0 at the end of the text
    uint32_t code;
    node_class class;
} cursor;

static cursor look(fl_bytes text, size_t at) {
    cursor c = {.text = text, .at = at};
    if (at >= text.size) return c;
    c.code = node_utf8_next(text, at, &c.length);
    c.class = node_unicode_class(c.code);
    return c;
}

static cursor after(cursor c) {
    return look(c.text, c.at + c.length);
}

static bool is(cursor c, node_class class) {
    return c.length != 0 && c.class == class;
}

static bool is_newline(cursor c) {
    return c.length != 0 && (c.code == '\r' || c.code == '\n');
}

static cursor skip(cursor c, node_class class) {
    while (is(c, class)) c = after(c);
    return c;
}

bool node_pretoken_find(const char *name, node_pretoken *ret_kind) {
    static const struct {
        const char *name;
        node_pretoken kind;
    } known[] = {
        {"gpt-2", NODE_PRETOKEN_GPT2},    {"default", NODE_PRETOKEN_GPT2},
        {"smollm", NODE_PRETOKEN_SMOLLM}, {"llama-bpe", NODE_PRETOKEN_LLAMA3},
        {"llama3", NODE_PRETOKEN_LLAMA3}, {"llama-v3", NODE_PRETOKEN_LLAMA3},
        {"qwen2", NODE_PRETOKEN_QWEN2},
    };
    for (size_t i = 0; i < FL_COUNT(known); i++) {
        if (strcmp(known[i].name, name) != 0) continue;
        *ret_kind = known[i].kind;
        return true;
    }
    return false;
}

// 's 't 're 've 'm 'll 'd at `at`: its length, 0 when there is none. With any_case also 'S, 'RE ...
static size_t contraction(fl_bytes text, size_t at, bool any_case) {
    if (at + 1 >= text.size || text.data[at] != '\'') return 0;
    uint8_t c[2] = {text.data[at + 1], at + 2 < text.size ? text.data[at + 2] : 0};
    for (int i = 0; any_case && i < 2; i++)
        if (c[i] >= 'A' && c[i] <= 'Z') c[i] = (uint8_t)(c[i] | 0x20);
    if (c[0] != 0 && strchr("stmd", c[0]) != NULL) return 2;
    const bool two = (c[0] == 'r' && c[1] == 'e') || (c[0] == 'v' && c[1] == 'e') ||
                     (c[0] == 'l' && c[1] == 'l');
    return two ? 3 : 0;
}

// \s+(?!\S)|\s+ : a run of white space, less its last character when a word follows.
static size_t space_run(cursor c) {
    size_t last = c.at;
    const size_t begin = c.at;
    while (is(c, NODE_CLASS_SPACE)) {
        last = c.at;
        c = after(c);
    }
    return c.length != 0 && last > begin ? last : c.at;
}

static size_t next_gpt2(fl_bytes text, size_t at) {
    const size_t short_form = contraction(text, at, false);
    if (short_form != 0) return at + short_form;
    cursor c = look(text, at);
    if (c.code == ' ') {
        const cursor word = after(c);
        if (word.length != 0 && word.class != NODE_CLASS_SPACE) c = word;
    }
    return is(c, NODE_CLASS_SPACE) ? space_run(c) : skip(c, c.class).at;
}

// Up to the next number character from `at`, so that GPT2 sees each piece alone.
static size_t next_smollm(fl_bytes text, size_t at) {
    const cursor c = look(text, at);
    if (c.class == NODE_CLASS_NUMBER) return at + c.length;
    // A word crosses into a digit only by the one space or the one run of spaces before it, so it
    // is enough to look at the word: it ends at the first number in it, and white space before a
    // number is the end of a piece, which (?!\S) counts as an end.
    if (c.class == NODE_CLASS_SPACE) {
        const cursor word = skip(c, NODE_CLASS_SPACE);
        if (is(word, NODE_CLASS_NUMBER)) return word.at;
    }
    return next_gpt2(text, at);
}

static size_t next_llama3(fl_bytes text, size_t at, unsigned digits_max) {
    const size_t short_form = contraction(text, at, true);
    if (short_form != 0) return at + short_form;
    cursor c = look(text, at);
    if (c.class == NODE_CLASS_LETTER) return skip(c, NODE_CLASS_LETTER).at;
    if (c.class == NODE_CLASS_NUMBER) {
        for (unsigned i = 0; i < digits_max && is(c, NODE_CLASS_NUMBER); i++) c = after(c);
        return c.at;
    }
    const cursor word = after(c);
    if (!is_newline(c) && is(word, NODE_CLASS_LETTER)) return skip(word, NODE_CLASS_LETTER).at;
    if (c.code == ' ' && is(word, NODE_CLASS_OTHER)) c = word;
    if (c.class == NODE_CLASS_OTHER) {
        c = skip(c, NODE_CLASS_OTHER);
        while (is_newline(c)) c = after(c);
        return c.at;
    }
    size_t newline_end = 0; // \s*[\r\n]+ : up to the last line end of the run
    for (cursor s = c; is(s, NODE_CLASS_SPACE); s = after(s))
        if (is_newline(s)) newline_end = s.at + s.length;
    return newline_end != 0 ? newline_end : space_run(c);
}

size_t node_pretoken_next(node_pretoken kind, fl_bytes text, size_t at) {
    switch (kind) {
    case NODE_PRETOKEN_SMOLLM:
        return next_smollm(text, at);
    case NODE_PRETOKEN_LLAMA3:
        return next_llama3(text, at, 3);
    case NODE_PRETOKEN_QWEN2:
        return next_llama3(text, at, 1);
    case NODE_PRETOKEN_GPT2:
        break;
    }
    return next_gpt2(text, at);
}
