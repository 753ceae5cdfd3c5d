// Builds the one block of a tokenizer: texts in the bytes they stand for, hashes, merges.
#include "common/arena.h"
#include "common/checked.h"
#include "common/fault.h"
#include "node/model/tokenizer_impl.h"
#include "node/model/unicode.h"

#include <stdlib.h>
#include <string.h>

static const char *const end_names[] = {"<|endoftext|>", "<|im_end|>",      "<|eot_id|>",
                                        "<|end|>",       "<|end_of_text|>", "</s>"};

// GPT-2's printable alphabet: every byte has a character; those that print stand for themselves,
// the others follow from U+0100 on in order. inverse[code] is the byte + 1, 0 for none.
typedef struct byte_alphabet {
    uint16_t inverse[0x100 + 68];
} byte_alphabet;

static void alphabet_init(byte_alphabet *a) {
    memset(a, 0, sizeof(*a));
    uint32_t next = 0x100;
    for (uint32_t b = 0; b < 256; b++) {
        const bool prints = (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
        a->inverse[prints ? b : next++] = (uint16_t)(b + 1);
    }
}

// Bytes that a token of the byte-level alphabet stands for; false when a character is not in it.
// out has room for text.size bytes.
static bool alphabet_decode(const byte_alphabet *a, fl_bytes text, uint8_t *out, size_t *ret_size) {
    size_t size = 0, length;
    for (size_t at = 0; at < text.size; at += length) {
        const uint32_t code = node_utf8_next(text, at, &length);
        if (code >= FL_COUNT(a->inverse) || a->inverse[code] == 0) return false;
        out[size++] = (uint8_t)(a->inverse[code] - 1);
    }
    *ret_size = size;
    return true;
}

// U+2581 becomes the space that it stands for.
static size_t spaces_decode(fl_bytes text, uint8_t *out) {
    size_t size = 0;
    for (size_t at = 0; at < text.size; at++) {
        if (text.size - at >= 3 && memcmp(text.data + at, "\xE2\x96\x81", 3) == 0) {
            out[size++] = ' ';
            at += 2;
        } else {
            out[size++] = text.data[at];
        }
    }
    return size;
}

static int hex_digit(uint8_t c) {
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'A' && c <= 'F') return c - 'A' + 10;
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

// "<0x41>" to 0x41, -1 for anything else.
static int byte_token(fl_bytes text) {
    if (text.size != 6 || memcmp(text.data, "<0x", 3) != 0 || text.data[5] != '>') return -1;
    const int high = hex_digit(text.data[3]), low = hex_digit(text.data[4]);
    return high < 0 || low < 0 ? -1 : high * 16 + low;
}

static uint32_t text_hash(fl_bytes text) {
    uint64_t h = 0x9e3779b97f4a7c15u ^ text.size;
    for (size_t i = 0; i < text.size; i++) h = (h ^ text.data[i]) * 0xff51afd7ed558ccdu;
    h ^= h >> 29;
    return (uint32_t)((h * 0xc4ceb9fe1a85ec53u) >> 32);
}

uint32_t node_pair_hash(uint32_t left, uint32_t right) {
    const uint64_t h = ((uint64_t)left << 32 | right) * 0x9e3779b97f4a7c15u;
    return (uint32_t)(((h ^ h >> 31) * 0xbf58476d1ce4e5b9u) >> 32);
}

fl_bytes node_tokenizer_text(const node_tokenizer *t, uint32_t id) {
    return (fl_bytes){t->texts + t->offset[id], t->offset[id + 1] - t->offset[id]};
}

int32_t node_tokenizer_find(const node_tokenizer *t, const node_text_hash *hash, fl_bytes text) {
    for (uint32_t at = text_hash(text);; at++) {
        const uint32_t slot = hash->slot[at & hash->mask];
        if (slot == 0) return -1;
        const fl_bytes have = node_tokenizer_text(t, slot - 1);
        if (have.size == text.size && memcmp(have.data, text.data, text.size) == 0)
            return (int32_t)(slot - 1);
    }
}

// The first of two equal texts stays.
static void hash_add(const node_tokenizer *t, node_text_hash *hash, uint32_t id) {
    const fl_bytes text = node_tokenizer_text(t, id);
    if (text.size == 0 || node_tokenizer_find(t, hash, text) >= 0) return;
    uint32_t at = text_hash(text) & hash->mask;
    while (hash->slot[at] != 0) at = (at + 1) & hash->mask;
    hash->slot[at] = id + 1;
}

// A power of two, at most half of it used.
static uint32_t slots_for(uint32_t count) {
    uint32_t slots = 16;
    while (slots < 2 * count) slots *= 2;
    return slots;
}

static node_token_type type_of(const node_vocabulary *v, uint32_t id) {
    return v->type == NULL ? NODE_TOKEN_NORMAL : (node_token_type)v->type[id];
}

static bool is_special(node_token_type type) {
    return type == NODE_TOKEN_CONTROL || type == NODE_TOKEN_USER || type == NODE_TOKEN_UNKNOWN;
}

typedef struct sizes {
    size_t texts; // bytes of all texts
    uint32_t specials;
} sizes;

static fl_status check(const node_vocabulary *v, node_pretoken *ret_pre, sizes *ret, fl_err *err) {
    const bool sentencepiece = strcmp(v->model, "llama") == 0;
    if (!sentencepiece && strcmp(v->model, "gpt2") != 0)
        return FL_FAIL(err, FL_EUNSUPPORTED,
                       "tokenizer model \"%.32s\" is not supported; known are gpt2 and llama",
                       v->model);
    *ret_pre = NODE_PRETOKEN_GPT2;
    if (!sentencepiece && !node_pretoken_find(v->pre, ret_pre))
        return FL_FAIL(err, FL_EUNSUPPORTED,
                       "pre-tokenizer \"%.32s\" is not supported; known are gpt-2, smollm, "
                       "llama-bpe and qwen2",
                       v->pre);
    if (v->count == 0) return FL_FAIL(err, FL_EFORMAT, "the vocabulary is empty");
    if (v->count > NODE_TOKENS_MAX || v->merge_count > 2 * NODE_TOKENS_MAX)
        return FL_FAIL(err, FL_ELIMIT, "%u tokens and %u merges; at most %d and %d are supported",
                       v->count, v->merge_count, NODE_TOKENS_MAX, 2 * NODE_TOKENS_MAX);
    if (sentencepiece && v->score == NULL)
        return FL_FAIL(err, FL_EFORMAT, "the vocabulary has no scores (tokenizer.ggml.scores)");
    *ret = (sizes){0};
    for (uint32_t i = 0; i < v->count; i++) {
        if (v->token[i].size > NODE_TOKEN_SIZE_MAX)
            return FL_FAIL(err, FL_ELIMIT, "token %u has %zu bytes; at most %d are supported", i,
                           v->token[i].size, NODE_TOKEN_SIZE_MAX);
        const node_token_type type = type_of(v, i);
        if (type < NODE_TOKEN_NORMAL || type > NODE_TOKEN_BYTE)
            return FL_FAIL(err, FL_EFORMAT, "token %u has unknown type %d", i, (int)type);
        if (type == NODE_TOKEN_BYTE && byte_token(v->token[i]) < 0)
            return FL_FAIL(err, FL_EFORMAT, "byte token %u is not of the form <0x41>", i);
        if (sentencepiece && v->score[i] != v->score[i])
            return FL_FAIL(err, FL_EFORMAT, "the score of token %u is not a number", i);
        ret->texts += v->token[i].size;
        ret->specials += is_special(type);
    }
    if (ret->texts > NODE_TEXTS_MAX)
        return FL_FAIL(err, FL_ELIMIT, "the tokens have %zu bytes in all; at most %d are supported",
                       ret->texts, NODE_TEXTS_MAX);
    const int32_t named[] = {v->bos, v->eos, v->unknown};
    for (size_t i = 0; i < FL_COUNT(named); i++)
        if (named[i] < -1 || named[i] >= (int32_t)v->count)
            return FL_FAIL(err, FL_EFORMAT, "special id %d is outside the %u tokens", named[i],
                           v->count);
    return FL_OK;
}

// Memory only; the same code counts and binds.
typedef struct parts {
    uint8_t *texts, *type;
    uint32_t *offset, *rank;
    node_pair *pair;
} parts;

static node_tokenizer *take(const node_vocabulary *v, const sizes *n, fl_arena *a, parts *p,
                            node_text_hash *normal, node_text_hash *special) {
    node_tokenizer *t = FL_ARENA_NEW(a, node_tokenizer, 1);
    p->offset = FL_ARENA_NEW(a, uint32_t, v->count + 1);
    p->rank = FL_ARENA_NEW(a, uint32_t, v->count);
    normal->mask = slots_for(v->count) - 1;
    normal->slot = FL_ARENA_NEW(a, uint32_t, normal->mask + 1);
    special->mask = slots_for(n->specials) - 1;
    special->slot = FL_ARENA_NEW(a, uint32_t, special->mask + 1);
    p->pair = FL_ARENA_NEW(a, node_pair, slots_for(v->merge_count));
    p->type = FL_ARENA_NEW(a, uint8_t, v->count);
    p->texts = FL_ARENA_NEW(a, uint8_t, n->texts + 1);
    return t;
}

static void set_bit(uint64_t *set, size_t bit) {
    set[bit / 64] |= (uint64_t)1 << (bit % 64);
}

static void add_special(node_tokenizer *t, uint32_t id) {
    const fl_bytes text = node_tokenizer_text(t, id);
    if (text.size == 0 || text.size > NODE_SPECIAL_SIZE_MAX) return;
    hash_add(t, &t->special, id);
    set_bit(t->special_size, text.size);
    set_bit(t->special_first, text.data[0]);
    for (size_t i = 0; i < FL_COUNT(end_names); i++)
        if (text.size == strlen(end_names[i]) && memcmp(text.data, end_names[i], text.size) == 0 &&
            t->end_count < FL_COUNT(t->end_id))
            t->end_id[t->end_count++] = (int32_t)id;
}

// Floats as integers that sort the other way round: the best score has the lowest rank. -0 and 0
// must tie as floats do.
static uint32_t rank_of_score(float score) {
    uint32_t bits;
    score += 0.0f;
    memcpy(&bits, &score, sizeof(bits));
    const uint32_t ascending = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    const uint32_t rank = ~ascending;
    return rank == UINT32_MAX ? rank - 1 : rank; // UINT32_MAX says "no pair"
}

// A space after something else: then words are not separable there.
static bool has_inner_space(fl_bytes text) {
    for (size_t i = 1; i < text.size; i++)
        if (text.data[i] == ' ' && text.data[i - 1] != ' ') return true;
    return false;
}

static void fill_texts(node_tokenizer *t, const parts *p, const node_vocabulary *v) {
    byte_alphabet alphabet;
    alphabet_init(&alphabet);
    uint32_t used = 0;
    for (uint32_t i = 0; i < v->count; i++) {
        const node_token_type type = type_of(v, i);
        const fl_bytes text = v->token[i];
        size_t size = text.size;
        p->type[i] = (uint8_t)type;
        p->offset[i] = used;
        if (type == NODE_TOKEN_BYTE) {
            p->texts[used] = (uint8_t)byte_token(text);
            size = 1;
        } else if (is_special(type)) {
            if (size != 0) memcpy(p->texts + used, text.data, size);
        } else if (t->sentencepiece) {
            size = spaces_decode(text, p->texts + used);
        } else if (!alphabet_decode(&alphabet, text, p->texts + used, &size)) {
            size = text.size; // a literal text added after training
            memcpy(p->texts + used, text.data, size);
        }
        used += (uint32_t)size;
        p->offset[i + 1] = used;
        if (t->sentencepiece) p->rank[i] = rank_of_score(v->score[i]);
    }
}

static void fill_hashes(node_tokenizer *t) {
    for (size_t b = 0; b < 256; b++) t->byte_id[b] = -1;
    t->words_split = true;
    for (uint32_t i = 0; i < t->count; i++) {
        const node_token_type type = (node_token_type)t->type[i];
        const fl_bytes text = node_tokenizer_text(t, i);
        if (is_special(type)) add_special(t, i);
        const bool one_byte = type == NODE_TOKEN_BYTE ||
                              (!t->sentencepiece && type == NODE_TOKEN_NORMAL && text.size == 1);
        if (one_byte && t->byte_id[text.data[0]] < 0) t->byte_id[text.data[0]] = (int32_t)i;
        if (type != NODE_TOKEN_NORMAL) continue;
        hash_add(t, &t->normal, i);
        if (text.size > t->text_size_max) t->text_size_max = (uint32_t)text.size;
        if (t->sentencepiece && has_inner_space(text)) t->words_split = false;
    }
}

static int32_t merge_part(const node_tokenizer *t, const byte_alphabet *alphabet, fl_bytes text,
                          uint8_t *out, size_t *ret_size) {
    if (text.size == 0 || text.size > NODE_TOKEN_SIZE_MAX) return -1;
    if (!alphabet_decode(alphabet, text, out, ret_size)) return -1;
    return node_tokenizer_find(t, &t->normal, (fl_bytes){out, *ret_size});
}

static fl_status fill_merges(node_tokenizer *t, node_pair *pair, const node_vocabulary *v,
                             fl_err *err) {
    byte_alphabet alphabet;
    alphabet_init(&alphabet);
    uint8_t both[2 * NODE_TOKEN_SIZE_MAX];
    for (uint32_t i = 0; i <= t->pair_mask; i++) pair[i].rank = UINT32_MAX;
    for (uint32_t i = 0; i < v->merge_count; i++) {
        const fl_bytes m = v->merge[i];
        const uint8_t *gap = m.size < 2 ? NULL : memchr(m.data + 1, ' ', m.size - 1);
        if (gap == NULL) return FL_FAIL(err, FL_EFORMAT, "merge %u is not two parts", i);
        const size_t before = (size_t)(gap - m.data);
        size_t left_size = 0, right_size = 0;
        const int32_t left = merge_part(t, &alphabet, (fl_bytes){m.data, before}, both, &left_size);
        const int32_t right = merge_part(t, &alphabet, (fl_bytes){gap + 1, m.size - before - 1},
                                         both + left_size, &right_size);
        const int32_t id =
            left < 0 || right < 0
                ? -1
                : node_tokenizer_find(t, &t->normal, (fl_bytes){both, left_size + right_size});
        if (id < 0)
            return FL_FAIL(err, FL_EFORMAT, "merge %u joins or gives what is not a token", i);
        uint32_t at = node_pair_hash((uint32_t)left, (uint32_t)right) & t->pair_mask;
        while (pair[at].rank != UINT32_MAX &&
               (pair[at].left != (uint32_t)left || pair[at].right != (uint32_t)right))
            at = (at + 1) & t->pair_mask;
        if (pair[at].rank != UINT32_MAX) continue; // the first, more urgent one counts
        pair[at] = (node_pair){(uint32_t)left, (uint32_t)right, i, (uint32_t)id};
    }
    return FL_OK;
}

static fl_status fill(node_tokenizer *t, const parts *p, const node_vocabulary *v, fl_err *err) {
    t->sentencepiece = strcmp(v->model, "llama") == 0;
    t->whole_words_merge = !t->sentencepiece && t->pre == NODE_PRETOKEN_LLAMA3;
    t->add_bos = v->add_bos && v->bos >= 0;
    t->add_eos = v->add_eos && v->eos >= 0;
    t->add_space_prefix = t->sentencepiece && v->add_space_prefix;
    t->count = v->count;
    t->bos = v->bos, t->eos = v->eos, t->unknown = v->unknown;
    t->texts = p->texts, t->offset = p->offset, t->type = p->type, t->rank = p->rank;
    t->pair = p->pair;
    t->pair_mask = slots_for(v->merge_count) - 1;
    fill_texts(t, p, v);
    fill_hashes(t);
    return fill_merges(t, p->pair, v, err);
}

fl_status node_tokenizer_open(const node_vocabulary *vocabulary, node_tokenizer **ret,
                              fl_err *err) {
    node_vocabulary local = *vocabulary;
    const node_vocabulary *v = &local;
    if (strcmp(v->model, "llama") == 0) local.merge_count = 0; // scores say what merges
    node_pretoken pre;
    sizes n;
    parts p;
    node_text_hash normal, special;
    fl_arena arena;
    FL_TRY(check(v, &pre, &n, err));
    fl_arena_init_counting(&arena);
    (void)take(v, &n, &arena, &p, &normal, &special);
    const size_t size = arena.peak;
    void *block = fl_fault() ? NULL : aligned_alloc(64, (size + 63) / 64 * 64);
    if (block == NULL)
        return FL_FAIL(err, FL_ENOMEM, "no memory for a tokenizer of %zu bytes", size);
    fl_arena_init(&arena, block, size);
    node_tokenizer *t = take(v, &n, &arena, &p, &normal, &special);
    FL_ASSERT((void *)t == block && p.texts != NULL);
    t->pre = pre, t->normal = normal, t->special = special;
    const fl_status st = fill(t, &p, v, err);
    if (st != FL_OK) {
        free(block);
        return st;
    }
    *ret = t;
    return FL_OK;
}

void node_tokenizer_close(node_tokenizer *tokenizer) {
    free(tokenizer);
}
