#include "node/model/tokenizer.h"

#include "common/fault.h"
#include "node/model/tokenizer_impl.h"
#include "node/model/unicode.h"

#include <stdlib.h>
#include <string.h>

enum { GONE = -2, NOWHERE = UINT32_MAX };

// A piece of the word, first a character (SentencePiece) or a byte (BPE), later a union of some.
typedef struct symbol {
    uint32_t prev, next; // NOWHERE at the ends
    uint32_t begin, size;
    int32_t id; // -1: no token has this text; GONE: became part of the symbol to its left
} symbol;

// A pair that may merge. It is out of date when either side has changed since, which their common
// size tells, or is gone.
typedef struct candidate {
    uint64_t order; // rank, then position: the smallest merges first
    uint32_t right, size, id;
} candidate;

typedef struct scratch {
    symbol *symbols; // [NODE_WORD_MAX + 1]
    candidate *heap; // [2 * (NODE_WORD_MAX + 1)]: every merge takes one and adds at most two
    uint8_t *word;   // [NODE_WORD_MAX + 1]
    uint32_t heap_count;
} scratch;

typedef struct sink {
    int32_t *ids;
    size_t count, max;
    bool full;
} sink;

static void put(sink *out, int32_t id) {
    if (id < 0) return;
    if (out->count == out->max) {
        out->full = true;
        return;
    }
    out->ids[out->count++] = id;
}

static void heap_push(scratch *s, candidate c) {
    uint32_t at = s->heap_count++;
    while (at > 0 && s->heap[(at - 1) / 2].order > c.order) {
        s->heap[at] = s->heap[(at - 1) / 2];
        at = (at - 1) / 2;
    }
    s->heap[at] = c;
}

static candidate heap_pop(scratch *s) {
    const candidate top = s->heap[0], last = s->heap[--s->heap_count];
    uint32_t at = 0;
    for (;;) {
        uint32_t child = 2 * at + 1;
        if (child >= s->heap_count) break;
        if (child + 1 < s->heap_count && s->heap[child + 1].order < s->heap[child].order) child++;
        if (s->heap[child].order >= last.order) break;
        s->heap[at] = s->heap[child];
        at = child;
    }
    s->heap[at] = last;
    return top;
}

// What the pair (left, right) of neighbours would become; false when it may not merge.
static bool pair_find(const node_tokenizer *t, const scratch *s, uint32_t left, uint32_t right,
                      uint32_t *ret_rank, uint32_t *ret_id) {
    const symbol *a = &s->symbols[left], *b = &s->symbols[right];
    if (t->sentencepiece) {
        if (a->size + b->size > t->text_size_max) return false;
        const fl_bytes both = {s->word + a->begin, a->size + b->size};
        const int32_t id = node_tokenizer_find(t, &t->normal, both);
        if (id < 0) return false;
        *ret_rank = t->rank[id];
        *ret_id = (uint32_t)id;
        return true;
    }
    if (a->id < 0 || b->id < 0) return false;
    for (uint32_t at = node_pair_hash((uint32_t)a->id, (uint32_t)b->id);; at++) {
        const node_pair *p = &t->pair[at & t->pair_mask];
        if (p->rank == UINT32_MAX) return false;
        if (p->left != (uint32_t)a->id || p->right != (uint32_t)b->id) continue;
        *ret_rank = p->rank;
        *ret_id = p->id;
        return true;
    }
}

static void consider(const node_tokenizer *t, scratch *s, uint32_t left, uint32_t right) {
    uint32_t rank, id;
    if (left == NOWHERE || right == NOWHERE || !pair_find(t, s, left, right, &rank, &id)) return;
    heap_push(s, (candidate){.order = (uint64_t)rank << 32 | left,
                             .right = right,
                             .size = s->symbols[left].size + s->symbols[right].size,
                             .id = id});
}

static void merge_all(const node_tokenizer *t, scratch *s, uint32_t count) {
    s->heap_count = 0;
    for (uint32_t i = 0; i + 1 < count; i++) consider(t, s, i, i + 1);
    while (s->heap_count != 0) {
        const candidate c = heap_pop(s);
        const uint32_t left = (uint32_t)c.order;
        symbol *a = &s->symbols[left], *b = &s->symbols[c.right];
        if (a->id == GONE || b->id == GONE || a->size + b->size != c.size) continue;
        a->size = c.size;
        a->id = (int32_t)c.id;
        a->next = b->next;
        b->id = GONE;
        if (a->next != NOWHERE) s->symbols[a->next].prev = left;
        consider(t, s, a->prev, left);
        consider(t, s, left, a->next);
    }
}

static void add_symbol(scratch *s, uint32_t *count, uint32_t begin, uint32_t size, int32_t id) {
    const uint32_t i = (*count)++;
    s->symbols[i] = (symbol){
        .prev = i == 0 ? NOWHERE : i - 1, .next = NOWHERE, .begin = begin, .size = size, .id = id};
    if (i != 0) s->symbols[i - 1].next = i;
}

static void encode_bpe_word(const node_tokenizer *t, scratch *s, fl_bytes word, sink *out) {
    if (t->whole_words_merge) {
        const int32_t whole = node_tokenizer_find(t, &t->normal, word);
        if (whole >= 0) {
            put(out, whole);
            return;
        }
    }
    uint32_t count = 0;
    for (uint32_t i = 0; i < (uint32_t)word.size; i++) {
        const int32_t id = t->byte_id[word.data[i]];
        if (id >= 0) add_symbol(s, &count, i, 1, id); // a byte without token is dropped
    }
    if (count == 0) return;
    merge_all(t, s, count);
    for (uint32_t i = 0; i != NOWHERE; i = s->symbols[i].next) put(out, s->symbols[i].id);
}

static void encode_bpe(const node_tokenizer *t, scratch *s, fl_bytes text, sink *out) {
    size_t at = 0;
    while (at < text.size && !out->full) {
        const size_t end = node_pretoken_next(t->pre, text, at);
        while (at < end) {
            const size_t size = end - at < NODE_WORD_MAX ? end - at : NODE_WORD_MAX;
            encode_bpe_word(t, s, (fl_bytes){text.data + at, size}, out);
            at += size;
        }
    }
}

// The word lies in s->word, cut into s->symbols already.
static void finish_sp_word(const node_tokenizer *t, scratch *s, uint32_t count, sink *out) {
    if (count == 0) return;
    merge_all(t, s, count);
    for (uint32_t i = 0; i != NOWHERE; i = s->symbols[i].next) {
        const symbol *y = &s->symbols[i];
        if (y->id >= 0) {
            put(out, y->id);
            continue;
        }
        for (uint32_t k = 0; k < y->size; k++) {
            const int32_t byte = t->byte_id[s->word[y->begin + k]];
            put(out, byte >= 0 ? byte : t->unknown);
        }
    }
}

// Words begin at a space that follows something else. Where no token has such a place inside, no
// merge can cross it, so word by word gives what the whole text at once would.
static void encode_sp(const node_tokenizer *t, scratch *s, fl_bytes text, bool prefix, sink *out) {
    uint32_t count = 0, used = 0;
    bool in_word = false;
    size_t length;
    if (prefix) {
        s->word[used] = ' ';
        add_symbol(s, &count, used, 1, node_tokenizer_find(t, &t->normal, (fl_bytes){s->word, 1}));
        used++;
    }
    for (size_t at = 0; at < text.size && !out->full; at += length) {
        const uint32_t code = node_utf8_next(text, at, &length);
        const bool space = code == ' ' || code == 0x2581;
        const uint32_t size = space ? 1 : (uint32_t)length;
        if ((space && in_word && t->words_split) || used + size > NODE_WORD_MAX) {
            finish_sp_word(t, s, count, out);
            count = used = 0;
        }
        if (space)
            s->word[used] = ' ';
        else
            memcpy(s->word + used, text.data + at, size);
        const fl_bytes character = {s->word + used, size};
        add_symbol(s, &count, used, size, node_tokenizer_find(t, &t->normal, character));
        used += size;
        in_word = !space;
    }
    finish_sp_word(t, s, count, out);
}

static bool has_bit(const uint64_t *set, size_t bit) {
    return set[bit / 64] >> (bit % 64) & 1;
}

// The longest special token at text[at]; user-defined ones always count, the others when asked for.
static int32_t special_at(const node_tokenizer *t, fl_bytes text, size_t at, bool all) {
    if (!has_bit(t->special_first, text.data[at])) return -1;
    const size_t left = text.size - at;
    for (size_t size = left < NODE_SPECIAL_SIZE_MAX ? left : NODE_SPECIAL_SIZE_MAX; size > 0;
         size--) {
        if (!has_bit(t->special_size, size)) continue;
        const int32_t id = node_tokenizer_find(t, &t->special, (fl_bytes){text.data + at, size});
        if (id >= 0 && (all || t->type[id] == NODE_TOKEN_USER)) return id;
    }
    return -1;
}

static void encode_all(const node_tokenizer *t, scratch *s, fl_bytes text, unsigned flags,
                       sink *out) {
    if (flags & NODE_ENCODE_ENDS && t->add_bos) put(out, t->bos);
    size_t at = 0;
    while (at < text.size && !out->full) {
        size_t end = at;
        int32_t special = -1;
        while (end < text.size) {
            special = special_at(t, text, end, flags & NODE_ENCODE_SPECIAL);
            if (special >= 0) break;
            end++;
        }
        const fl_bytes plain = {text.data + at, end - at};
        if (plain.size != 0 && t->sentencepiece)
            encode_sp(t, s, plain, t->add_space_prefix, out); // at the start and after a special
        else if (plain.size != 0)
            encode_bpe(t, s, plain, out);
        at = end;
        if (special >= 0) {
            put(out, special);
            at += node_tokenizer_text(t, (uint32_t)special).size;
        }
    }
    if (flags & NODE_ENCODE_ENDS && t->add_eos) put(out, t->eos);
}

size_t node_tokenizer_ids_max(size_t size) {
    // A space before each piece, of which there is one for each special token of at least one byte.
    return size > (SIZE_MAX - 3) / 2 ? SIZE_MAX : 2 * size + 3;
}

fl_status node_tokenizer_encode(const node_tokenizer *t, fl_bytes text, unsigned flags,
                                int32_t *ids, size_t ids_max, size_t *ret_count, fl_err *err) {
    const size_t symbols = (text.size < NODE_WORD_MAX ? text.size : NODE_WORD_MAX) + 1;
    const size_t symbols_size = symbols * sizeof(symbol),
                 heap_size = 2 * symbols * sizeof(candidate);
    uint8_t *block = fl_fault() ? NULL : malloc(symbols_size + heap_size + symbols);
    if (block == NULL)
        return FL_FAIL(err, FL_ENOMEM, "no memory to encode %zu bytes of text", text.size);
    scratch s = {.heap = (candidate *)(void *)block,
                 .symbols = (symbol *)(void *)(block + heap_size),
                 .word = block + heap_size + symbols_size};
    sink out = {.ids = ids, .max = ids_max};
    encode_all(t, &s, text, flags, &out);
    free(block);
    if (out.full)
        return FL_FAIL(err, FL_ELIMIT, "%zu bytes of text give more than %zu tokens", text.size,
                       ids_max);
    *ret_count = out.count;
    return FL_OK;
}

fl_bytes node_tokenizer_piece(const node_tokenizer *t, int32_t id, bool special) {
    if (id < 0 || (uint32_t)id >= t->count) return (fl_bytes){0};
    const uint8_t type = t->type[id];
    const bool hidden = type == NODE_TOKEN_CONTROL || type == NODE_TOKEN_UNKNOWN;
    return hidden && !special ? (fl_bytes){0} : node_tokenizer_text(t, (uint32_t)id);
}

fl_status node_tokenizer_decode(const node_tokenizer *t, const int32_t *ids, size_t count,
                                bool special, uint8_t *out, size_t out_max, size_t *ret_size,
                                fl_err *err) {
    size_t size = 0;
    bool strip = t->add_space_prefix;
    for (size_t i = 0; i < count; i++) {
        fl_bytes piece = node_tokenizer_piece(t, ids[i], special);
        if (piece.size == 0) continue;
        if (strip && piece.data[0] == ' ') piece = (fl_bytes){piece.data + 1, piece.size - 1};
        strip = false;
        if (piece.size > out_max - size)
            return FL_FAIL(err, FL_ELIMIT, "%zu tokens give more than %zu bytes", count, out_max);
        if (piece.size != 0) memcpy(out + size, piece.data, piece.size);
        size += piece.size;
    }
    *ret_size = size;
    return FL_OK;
}

uint32_t node_tokenizer_count(const node_tokenizer *t) {
    return t->count;
}
int32_t node_tokenizer_bos(const node_tokenizer *t) {
    return t->bos;
}
int32_t node_tokenizer_eos(const node_tokenizer *t) {
    return t->eos;
}

int32_t node_tokenizer_special(const node_tokenizer *t, const char *text) {
    return node_tokenizer_find(t, &t->special, (fl_bytes){(const uint8_t *)text, strlen(text)});
}

bool node_tokenizer_is_end(const node_tokenizer *t, int32_t id) {
    if (id < 0) return false;
    for (uint32_t i = 0; i < t->end_count; i++)
        if (t->end_id[i] == id) return true;
    return id == t->eos;
}
