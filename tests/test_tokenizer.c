// Goal: what the tokenizer gives is what its definition says, for any bytes, in bounded time.
// Method: small made-up vocabularies; merges are compared with a quadratic implementation of the
// definition on random texts; every truncation of UTF-8; every kind of bad vocabulary is refused.
#include "common/fault.h"
#include "node/model/pretoken.h"
#include "node/model/tokenizer.h"
#include "node/model/unicode.h"
#include "tests/check.h"

#include <time.h>

static fl_bytes view(const char *s) {
    return (fl_bytes){(const uint8_t *)s, strlen(s)};
}

static void test_utf8(void) {
    static const char whole[] = "a\xC3\xA9\xE6\x9D\xB1\xF0\x9F\x99\x82"; // 1, 2, 3 and 4 bytes
    const size_t ends[] = {0, 1, 3, 6, 10};
    for (size_t size = 0; size <= 10; size++) {
        uint8_t *text = t_guarded(size);
        memcpy(text, whole, size);
        size_t last = 0;
        for (size_t i = 0; i < FL_COUNT(ends); i++)
            if (ends[i] <= size) last = ends[i];
        const fl_bytes view_ = {text, size};
        T_EQ(node_utf8_valid(view_), last == size);
        T_EQ(node_utf8_check(view_), last);
        T_EQ(node_utf8_unfinished(view_), size - last);
        t_guarded_free(text, size);
    }
    static const char *const bad[] = {"\x80",         "\xC0\x80",         "\xC1\xBF",
                                      "\xE0\x9F\xBF", "\xED\xA0\x80",     "\xF0\x8F\xBF\xBF",
                                      "\xF5\x80",     "\xF4\x90\x80\x80", "\xFF"};
    for (size_t i = 0; i < FL_COUNT(bad); i++) {
        T_CHECK(!node_utf8_valid(view(bad[i])), "bad form %zu", i);
        T_EQ(node_utf8_check(view(bad[i])), 0);
        size_t length = 0;
        T_EQ(node_utf8_next(view(bad[i]), 0, &length), NODE_UNICODE_BAD + (uint8_t)bad[i][0]);
        T_EQ(length, 1);
        T_EQ(node_utf8_unfinished(view(bad[i])), 0);
    }
    for (uint32_t code = 0; code < NODE_UNICODE_BAD; code++) {
        if (code >= 0xD800 && code < 0xE000) continue;
        uint8_t out[4];
        size_t length = 0;
        const fl_bytes text = {out, node_utf8_put(code, out)};
        if (node_utf8_next(text, 0, &length) != code || length != text.size)
            T_CHECK(false, "code %u", code);
    }
}

static void test_classes(void) {
    static const struct {
        uint32_t code;
        node_class want;
    } rows[] = {{'A', NODE_CLASS_LETTER},
                {'z', NODE_CLASS_LETTER},
                {'@', NODE_CLASS_OTHER},
                {'[', NODE_CLASS_OTHER},
                {'`', NODE_CLASS_OTHER},
                {'{', NODE_CLASS_OTHER},
                {'0', NODE_CLASS_NUMBER},
                {'9', NODE_CLASS_NUMBER},
                {':', NODE_CLASS_OTHER},
                {'/', NODE_CLASS_OTHER},
                {9, NODE_CLASS_SPACE},
                {13, NODE_CLASS_SPACE},
                {8, NODE_CLASS_OTHER},
                {14, NODE_CLASS_OTHER},
                {0x85, NODE_CLASS_SPACE},
                {0xA0, NODE_CLASS_SPACE},
                {0xAA, NODE_CLASS_LETTER},
                {0xBD, NODE_CLASS_NUMBER},
                {0xD7, NODE_CLASS_OTHER},
                {0xE9, NODE_CLASS_LETTER},
                {0x3000, NODE_CLASS_SPACE},
                {0x200B, NODE_CLASS_OTHER},
                {0x6771, NODE_CLASS_LETTER},
                {0x2167, NODE_CLASS_NUMBER},
                {0x1F642, NODE_CLASS_OTHER},
                {0x0301, NODE_CLASS_OTHER},
                {0x0967, NODE_CLASS_NUMBER},
                {0x10FFFF, NODE_CLASS_OTHER},
                {NODE_UNICODE_BAD + 0x80, NODE_CLASS_OTHER}};
    for (size_t i = 0; i < FL_COUNT(rows); i++)
        T_CHECK(node_unicode_class(rows[i].code) == rows[i].want, "U+%04X is %d", rows[i].code,
                (int)node_unicode_class(rows[i].code));
}

// The words of `text`, joined by '|'.
static void check_words(node_pretoken kind, const char *text, const char *want) {
    char got[256];
    size_t used = 0;
    const fl_bytes all = view(text);
    for (size_t at = 0; at < all.size;) {
        const size_t end = node_pretoken_next(kind, all, at);
        T_NEED(end > at && end <= all.size, "progress in \"%s\"", text);
        if (at != 0) got[used++] = '|';
        memcpy(got + used, all.data + at, end - at);
        used += end - at;
        at = end;
    }
    got[used] = '\0';
    T_STR(got, want);
}

static void test_words(void) {
    const node_pretoken gpt2 = NODE_PRETOKEN_GPT2, smollm = NODE_PRETOKEN_SMOLLM,
                        llama3 = NODE_PRETOKEN_LLAMA3, qwen2 = NODE_PRETOKEN_QWEN2;
    check_words(gpt2, "I'm we'll they'vex 's", "I|'m| we|'ll| they|'ve|x| '|s");
    check_words(gpt2, "a  b   ", "a| | b|   ");
    check_words(gpt2, "a \n\n b", "a| \n\n| b");
    check_words(gpt2, "x1234 56!? 7", "x|1234| 56|!?| 7");
    check_words(gpt2, "\xC3\xA9t\xC3\xA9 \xF0\x9F\x99\x82.",
                "\xC3\xA9t\xC3\xA9| \xF0\x9F\x99\x82.");
    check_words(gpt2, "\xFF\xFE a", "\xFF\xFE| a");
    check_words(gpt2, "'S 'R", "'|S| '|R");
    check_words(smollm, "year 2026 x", "year| |2|0|2|6| x");
    check_words(smollm, "a   12  b", "a|   |1|2| | b");
    check_words(smollm, "3.14\xC2\xBD", "3|.|1|4|\xC2\xBD");
    check_words(llama3, "12345 It'S\n\n  x", "123|45| It|'S|\n\n| | x");
    check_words(llama3, "f(x)==1;\n\ny \n z", "f|(x|)==|1|;\n\n|y| \n| z");
    check_words(llama3, "\tword !!\r\n", "\tword| !!\r\n");
    check_words(llama3, "a   b  ", "a|  | b|  ");
    check_words(qwen2, "12 345", "1|2| |3|4|5");
}

// A byte-complete vocabulary: 256 bytes in the printable alphabet, then random unions.
enum { MADE_TOKENS = 700, MADE_TEXT = 64 };
typedef struct made {
    char text[MADE_TOKENS][MADE_TEXT];   // as GGUF writes it
    uint8_t raw[MADE_TOKENS][MADE_TEXT]; // the bytes it stands for
    size_t raw_size[MADE_TOKENS];
    char merge_text[MADE_TOKENS][2 * MADE_TEXT];
    uint32_t left[MADE_TOKENS], right[MADE_TOKENS];
    fl_bytes token[MADE_TOKENS], merge[MADE_TOKENS];
    int32_t type[MADE_TOKENS];
    float score[MADE_TOKENS];
    uint32_t count, merges;
} made;
static made m;

static void made_bytes(void) {
    m.count = m.merges = 0;
    uint32_t next = 0x100;
    for (uint32_t b = 0; b < 256; b++) {
        const bool prints = (b > 32 && b < 127) || (b > 160 && b != 173);
        m.text[b][node_utf8_put(prints ? b : next++, (uint8_t *)m.text[b])] = '\0';
        m.raw[b][0] = (uint8_t)b;
        m.raw_size[b] = 1;
        m.token[b] = view(m.text[b]);
        m.type[b] = NODE_TOKEN_NORMAL;
    }
    m.count = 256;
}

static bool made_has(const uint8_t *raw, size_t size) {
    for (uint32_t i = 0; i < m.count; i++)
        if (m.raw_size[i] == size && memcmp(m.raw[i], raw, size) == 0) return true;
    return false;
}

// Adds left + right as a token and as the next merge.
static void made_union(uint32_t left, uint32_t right) {
    const uint32_t id = m.count, k = m.merges;
    const size_t size = m.raw_size[left] + m.raw_size[right];
    if (size >= MADE_TEXT / 2) return;
    uint8_t raw[MADE_TEXT];
    memcpy(raw, m.raw[left], m.raw_size[left]);
    memcpy(raw + m.raw_size[left], m.raw[right], m.raw_size[right]);
    if (made_has(raw, size)) return;
    memcpy(m.raw[id], raw, size);
    m.raw_size[id] = size;
    const size_t a = strlen(m.text[left]), b = strlen(m.text[right]) + 1;
    memcpy(m.text[id], m.text[left], a);
    memcpy(m.text[id] + a, m.text[right], b);
    memcpy(m.merge_text[k], m.text[left], a);
    m.merge_text[k][a] = ' ';
    memcpy(m.merge_text[k] + a + 1, m.text[right], b);
    m.token[id] = view(m.text[id]);
    m.type[id] = NODE_TOKEN_NORMAL;
    m.merge[k] = view(m.merge_text[k]);
    m.left[k] = left, m.right[k] = right;
    m.count++, m.merges++;
}

static void made_random(const char *letters) {
    made_bytes();
    const size_t n = strlen(letters);
    while (m.merges < 300) {
        uint32_t side[2];
        for (int i = 0; i < 2; i++) {
            const uint64_t r = t_rand();
            side[i] = r % 3 != 0 && m.merges > 0 ? 256 + (uint32_t)((r >> 8) % m.merges)
                                                 : (uint8_t)letters[(r >> 8) % n];
        }
        made_union(side[0], side[1]);
    }
}

static node_vocabulary made_vocabulary(void) {
    return (node_vocabulary){.model = "gpt2",
                             .pre = "gpt-2",
                             .count = m.count,
                             .token = m.token,
                             .type = m.type,
                             .merge_count = m.merges,
                             .merge = m.merge,
                             .bos = -1,
                             .eos = -1,
                             .unknown = -1};
}

static node_tokenizer *open_made(const node_vocabulary *v) {
    node_tokenizer *t = NULL;
    fl_err err;
    T_OK(node_tokenizer_open(v, &t, &err), err);
    return t;
}

static uint32_t rank_of_pair(int32_t left, int32_t right) {
    for (uint32_t k = 0; k < m.merges; k++)
        if ((int32_t)m.left[k] == left && (int32_t)m.right[k] == right) return k;
    return UINT32_MAX;
}

// The definition: merge the most urgent pair, leftmost first, until none is left.
static size_t slow_bpe(fl_bytes word, int32_t *out) {
    size_t n = word.size;
    for (size_t i = 0; i < n; i++) out[i] = word.data[i];
    for (;;) {
        size_t best = 0;
        uint32_t rank = UINT32_MAX;
        for (size_t i = 0; i + 1 < n; i++)
            if (rank_of_pair(out[i], out[i + 1]) < rank)
                rank = rank_of_pair(out[i], out[i + 1]), best = i;
        if (rank == UINT32_MAX) return n;
        out[best] = 256 + (int32_t)rank;
        memmove(out + best + 1, out + best + 2, (n - best - 2) * sizeof(*out));
        n--;
    }
}

static void test_bpe_equals_the_definition(void) {
    for (int round = 0; round < 4; round++) {
        made_random(round % 2 == 0 ? "abc" : "ab '\n1");
        const node_vocabulary v = made_vocabulary();
        node_tokenizer *t = open_made(&v);
        for (size_t size = 0; size < 120; size++) {
            uint8_t *text = t_guarded(size), back[128];
            int32_t ids[256], want[256];
            for (size_t i = 0; i < size; i++)
                text[i] =
                    t_rand() % 16 == 0 ? (uint8_t)t_rand() : (uint8_t) "abc '\n1a"[t_rand() % 8];
            size_t count = 0, want_count = 0, back_size = 0;
            fl_err err;
            const fl_bytes all = {text, size};
            for (size_t at = 0; at < size;) {
                const size_t end = node_pretoken_next(NODE_PRETOKEN_GPT2, all, at);
                want_count += slow_bpe((fl_bytes){text + at, end - at}, want + want_count);
                at = end;
            }
            T_OK(node_tokenizer_encode(t, all, 0, ids, want_count, &count, &err), err);
            T_CHECK(count == want_count && memcmp(ids, want, count * sizeof(*ids)) == 0,
                    "size %zu: %zu ids, want %zu", size, count, want_count);
            if (want_count != 0)
                T_EQ(node_tokenizer_encode(t, all, 0, ids, want_count - 1, &count, NULL),
                     FL_ELIMIT);
            T_OK(node_tokenizer_decode(t, want, want_count, false, back, size, &back_size, &err),
                 err);
            T_CHECK(back_size == size && memcmp(back, text, size) == 0, "round trip of %zu", size);
            if (size != 0)
                T_EQ(node_tokenizer_decode(t, want, want_count, false, back, size - 1, &back_size,
                                           NULL),
                     FL_ELIMIT);
            t_guarded_free(text, size);
        }
        node_tokenizer_close(t);
    }
}

// SentencePiece: the union with the best score merges first. Scores are few, so that ties occur.
static void made_scores(void) {
    for (uint32_t i = 0; i < m.count; i++) {
        m.score[i] = -(float)(t_rand() % 40);
        if (i >= 256) continue;
        snprintf(m.text[i], MADE_TEXT, "<0x%02X>", i);
        m.token[i] = view(m.text[i]);
        m.type[i] = NODE_TOKEN_BYTE;
    }
}

static int32_t slow_find(const uint8_t *raw, size_t size) {
    for (uint32_t i = 256; i < m.count; i++)
        if (m.raw_size[i] == size && memcmp(m.raw[i], raw, size) == 0) return (int32_t)i;
    return -1;
}

static size_t slow_sp(fl_bytes text, int32_t *out) {
    size_t n = text.size, begin[256];
    for (size_t i = 0; i <= n; i++) begin[i] = i;
    for (;;) {
        size_t best = 0;
        float score = -1e30f;
        for (size_t i = 0; i + 1 < n; i++) {
            const int32_t id = slow_find(text.data + begin[i], begin[i + 2] - begin[i]);
            if (id >= 0 && m.score[id] > score) score = m.score[id], best = i + 1;
        }
        if (best == 0) break;
        memmove(begin + best, begin + best + 1, (n - best) * sizeof(*begin));
        n--;
    }
    size_t count = 0;
    for (size_t i = 0; i < n; i++) {
        const int32_t id = slow_find(text.data + begin[i], begin[i + 1] - begin[i]);
        for (size_t k = begin[i]; id < 0 && k < begin[i + 1]; k++) out[count++] = text.data[k];
        if (id >= 0) out[count++] = id;
    }
    return count;
}

static void test_sentencepiece_equals_the_definition(void) {
    for (int round = 0; round < 4; round++) {
        // Two rounds have tokens with a space inside, so that words cannot be cut.
        made_random(round < 2 ? "abc" : "ab ");
        for (const char *c = "abc "; *c != '\0' && round != 1; c++) { // single characters
            m.raw[m.count][0] = (uint8_t)*c;
            m.raw_size[m.count] = 1;
            snprintf(m.text[m.count], MADE_TEXT, "%c", *c);
            m.token[m.count] = view(m.text[m.count]);
            m.type[m.count++] = NODE_TOKEN_NORMAL;
        }
        made_scores();
        for (uint32_t i = 256; i < m.count; i++) // raw text, so that a space is a space
            m.token[i] = (fl_bytes){m.raw[i], m.raw_size[i]};
        node_vocabulary v = made_vocabulary();
        v.model = "llama", v.score = m.score, v.unknown = 0;
        node_tokenizer *t = open_made(&v);
        for (size_t size = 0; size < 120; size++) {
            uint8_t text[128];
            int32_t ids[256], want[256];
            for (size_t i = 0; i < size; i++) text[i] = (uint8_t) "abcab a\xFE"[t_rand() % 8];
            size_t count = 0;
            fl_err err;
            const size_t want_count = slow_sp((fl_bytes){text, size}, want);
            T_OK(node_tokenizer_encode(t, (fl_bytes){text, size}, 0, ids, 256, &count, &err), err);
            T_CHECK(count == want_count && memcmp(ids, want, count * sizeof(*ids)) == 0,
                    "round %d size %zu: %zu ids, want %zu", round, size, count, want_count);
        }
        node_tokenizer_close(t);
    }
}

static size_t encode(const node_tokenizer *t, const char *text, unsigned flags, int32_t *ids) {
    size_t count = 0;
    fl_err err;
    T_OK(node_tokenizer_encode(t, view(text), flags, ids, 64, &count, &err), err);
    return count;
}

static void test_special_tokens(void) {
    made_bytes();
    static const char *const names[] = {"<|im_start|>", "<|im_end|>", "<|im_end|>>", "[user]"};
    for (size_t i = 0; i < FL_COUNT(names); i++) {
        m.token[m.count] = view(names[i]);
        m.type[m.count++] = i == 3 ? NODE_TOKEN_USER : NODE_TOKEN_CONTROL;
    }
    node_vocabulary v = made_vocabulary();
    v.bos = 256, v.eos = 97, v.add_bos = true, v.add_eos = true;
    node_tokenizer *t = open_made(&v);
    int32_t ids[64];
    T_EQ(encode(t, "a<|im_end|>b", 0, ids), 12);
    T_EQ(encode(t, "a<|im_end|>b", NODE_ENCODE_SPECIAL, ids), 3);
    T_EQ(ids[1], 257);
    T_EQ(encode(t, "<|im_end|>><|im_end|", NODE_ENCODE_SPECIAL, ids), 1 + 9); // the longest counts
    T_EQ(ids[0], 258);
    T_EQ(encode(t, "a[user]", 0, ids), 2); // user-defined tokens always count
    T_EQ(encode(t, "", NODE_ENCODE_ENDS, ids), 2);
    T_EQ(ids[0], 256);
    T_EQ(ids[1], 97);
    T_EQ(node_tokenizer_piece(t, 257, false).size, 0);
    T_EQ(node_tokenizer_piece(t, 257, true).size, 10);
    T_EQ(node_tokenizer_piece(t, 259, false).size, 6);
    T_EQ(node_tokenizer_piece(t, -1, true).size, 0);
    T_EQ(node_tokenizer_piece(t, 260, true).size, 0);
    T_EQ(node_tokenizer_special(t, "<|im_end|>"), 257);
    T_EQ(node_tokenizer_special(t, "<|im_"), -1);
    T_CHECK(node_tokenizer_is_end(t, 257) && node_tokenizer_is_end(t, 97), "ends");
    T_CHECK(!node_tokenizer_is_end(t, 256) && !node_tokenizer_is_end(t, -1), "not ends");
    T_EQ(node_tokenizer_count(t), 260);
    T_EQ(node_tokenizer_bos(t), 256);
    T_EQ(node_tokenizer_eos(t), 97);
    node_tokenizer_close(t);
}

static void test_space_prefix(void) {
    static const char *const texts[] = {"<unk>", "\xE2\x96\x81", "a",
                                        "\xE2\x96\x81"
                                        "a",
                                        "<x>"};
    fl_bytes token[5];
    for (size_t i = 0; i < 5; i++) token[i] = view(texts[i]);
    const int32_t type[] = {NODE_TOKEN_UNKNOWN, 1, 1, 1, NODE_TOKEN_CONTROL};
    const float score[] = {0, -2, -3, -1, 0};
    const node_vocabulary v = {.model = "llama",
                               .count = 5,
                               .token = token,
                               .score = score,
                               .type = type,
                               .bos = -1,
                               .eos = -1,
                               .unknown = 0,
                               .add_space_prefix = true};
    node_tokenizer *t = open_made(&v);
    int32_t ids[64];
    uint8_t out[64];
    size_t size = 0;
    T_EQ(encode(t, "a a", 0, ids), 2);
    T_EQ(ids[0], 3);
    T_EQ(ids[1], 3);
    T_EQ(node_tokenizer_decode(t, ids, 2, false, out, sizeof(out), &size, NULL), FL_OK);
    T_CHECK(size == 3 && memcmp(out, "a a", 3) == 0, "got \"%.*s\"", (int)size, (char *)out);
    T_EQ(encode(t, "a<x>a", NODE_ENCODE_SPECIAL, ids), 3); // the piece after a special token too
    T_EQ(ids[2], 3);
    T_EQ(encode(t, "z", 0, ids), 2); // no byte tokens here: unknown
    T_EQ(ids[1], 0);
    T_EQ(encode(t, "", 0, ids), 0);
    node_tokenizer_close(t);
}

// Bytes without a token are dropped by BPE, and what was beside them becomes neighbours.
static void test_dropped_bytes(void) {
    fl_bytes token[] = {view("a"), view("b"), view("ab")}, merge[] = {view("a b")};
    const node_vocabulary v = {.model = "gpt2",
                               .pre = "smollm",
                               .count = 3,
                               .token = token,
                               .merge_count = 1,
                               .merge = merge,
                               .bos = -1,
                               .eos = -1,
                               .unknown = -1};
    node_tokenizer *t = open_made(&v);
    int32_t ids[64];
    T_EQ(encode(t, "axb", 0, ids), 1);
    T_EQ(ids[0], 2);
    T_EQ(encode(t, "xyz", 0, ids), 0);
    node_tokenizer_close(t);
}

static void check_refused(const node_vocabulary *v, fl_status want, const char *what) {
    node_tokenizer *t = NULL;
    fl_err err = {0};
    const fl_status got = node_tokenizer_open(v, &t, &err);
    T_CHECK(got == want && t == NULL && err.text[0] != '\0', "%s: %s (%s)", what,
            fl_status_name(got), err.text);
    node_tokenizer_close(t);
}

static void test_bad_vocabularies(void) {
    made_random("abc");
    const node_vocabulary good = made_vocabulary();
    node_vocabulary v = good;
    v.model = "unigram";
    check_refused(&v, FL_EUNSUPPORTED, "model");
    v = good, v.pre = "tekken";
    check_refused(&v, FL_EUNSUPPORTED, "pre-tokenizer");
    v = good, v.count = 0;
    check_refused(&v, FL_EFORMAT, "no tokens");
    v = good, v.count = NODE_TOKENS_MAX + 1;
    check_refused(&v, FL_ELIMIT, "too many tokens");
    v = good, v.bos = (int32_t)v.count;
    check_refused(&v, FL_EFORMAT, "bos");
    v = good, v.model = "llama";
    check_refused(&v, FL_EFORMAT, "no scores");
    m.score[5] = NAN, v.score = m.score;
    check_refused(&v, FL_EFORMAT, "a score that is no number");
    m.type[7] = 9;
    check_refused(&good, FL_EFORMAT, "type");
    m.type[7] = NODE_TOKEN_BYTE;
    check_refused(&good, FL_EFORMAT, "byte token of another form");
    m.type[7] = NODE_TOKEN_NORMAL;
    static const char *const merges[] = {"", "a", " ", "a ", " b", "ab", "a \xFF", "zz a", "z z"};
    for (size_t i = 0; i < FL_COUNT(merges); i++) {
        const fl_bytes kept = m.merge[3];
        m.merge[3] = view(merges[i]);
        check_refused(&good, FL_EFORMAT, merges[i]);
        m.merge[3] = kept;
    }
    const fl_bytes kept = m.token[9];
    m.token[9].size = NODE_TOKEN_SIZE_MAX + 1;
    check_refused(&good, FL_ELIMIT, "a long token");
    m.token[9] = kept;
    node_tokenizer *t = open_made(&good);
    node_tokenizer_close(t);
}

// One word of a megabyte in which everything merges, and a text full of beginnings of special
// tokens: a quadratic step anywhere would take hours.
static void test_long_texts_take_linear_time(void) {
    enum { SIZE = 1 << 20 };
    made_bytes();
    for (uint32_t size = 1, id = 'a'; size < 16; size *= 2, id = m.count - 1) made_union(id, id);
    m.token[m.count] = view("<<<<<<<<<<<<<<<<<<<<<<<<<<<<<<<<<<<<<<<!");
    m.type[m.count++] = NODE_TOKEN_CONTROL;
    for (uint32_t i = 0; i < m.count; i++) m.score[i] = (float)i;
    uint8_t *text = malloc(SIZE);
    int32_t *ids = malloc(SIZE * sizeof(*ids));
    T_NEED(text != NULL && ids != NULL, "memory");
    node_vocabulary v = made_vocabulary();
    for (int family = 0; family < 2; family++) {
        if (family == 1) v.model = "llama", v.score = m.score, v.unknown = 0;
        node_tokenizer *t = open_made(&v);
        for (const char *fill = "a< "; *fill != '\0'; fill++) {
            memset(text, *fill, SIZE);
            const clock_t begin = clock();
            size_t count = 0;
            fl_err err;
            T_OK(node_tokenizer_encode(t, (fl_bytes){text, SIZE}, NODE_ENCODE_SPECIAL, ids, SIZE,
                                       &count, &err),
                 err);
            T_EQ(count, *fill == 'a' ? SIZE / 16 : SIZE);
            const double seconds = (double)(clock() - begin) / CLOCKS_PER_SEC;
            T_CHECK(seconds < 10, "'%c': %.1f s", *fill, seconds);
        }
        node_tokenizer_close(t);
    }
    free(text);
    free(ids);
}

#ifdef FL_FAULTS
static void test_every_failure_is_clean(void) {
    made_random("abc");
    const node_vocabulary v = made_vocabulary();
    unsigned n = 0;
    bool fired;
    do {
        node_tokenizer *t = NULL;
        int32_t ids[64];
        size_t count = 0;
        fl_fault_arm(++n);
        fl_status st = node_tokenizer_open(&v, &t, NULL);
        if (st == FL_OK) st = node_tokenizer_encode(t, view("abcabc"), 0, ids, 64, &count, NULL);
        fired = fl_fault_fired();
        T_EQ(st, fired ? FL_ENOMEM : FL_OK);
        fl_fault_arm(0);
        node_tokenizer_close(t);
    } while (fired);
    T_EQ(n, 3);
}
#endif

T_MAIN({"utf8", test_utf8}, {"classes", test_classes}, {"words", test_words},
       {"bpe_equals_the_definition", test_bpe_equals_the_definition},
       {"sentencepiece_equals_the_definition", test_sentencepiece_equals_the_definition},
       {"special_tokens", test_special_tokens}, {"space_prefix", test_space_prefix},
       {"dropped_bytes", test_dropped_bytes}, {"bad_vocabularies", test_bad_vocabularies},
#ifdef FL_FAULTS
       {"every_failure_is_clean", test_every_failure_is_clean},
#endif
       {"long_texts_take_linear_time", test_long_texts_take_linear_time})
