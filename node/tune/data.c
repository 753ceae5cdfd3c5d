#include "node/tune/data.h"

#include "common/rng.h"

// Micro-batches out of documents. The text side is in corpus.c.

static uint32_t pieces_of(uint64_t inputs, uint32_t sequence) {
    return (uint32_t)((inputs + sequence - 1) / sequence);
}

uint64_t node_docs_inputs(const node_docs *docs) {
    uint64_t inputs = 0;
    for (uint32_t i = 0; i < docs->count; i++) inputs += docs->begin[i + 1] - docs->begin[i] - 1;
    return inputs;
}

fl_status node_docs_check(const node_docs *docs, uint32_t vocabulary, fl_err *err) {
    for (uint64_t i = docs->begin[0]; i < docs->begin[docs->count]; i++)
        if (docs->ids[i] < 0 || (uint32_t)docs->ids[i] >= vocabulary)
            return FL_FAIL(err, FL_EARG, "token %d of the text is not among the model's %u",
                           (int)docs->ids[i], vocabulary);
    return FL_OK;
}

uint32_t node_packer_pieces(const node_docs *docs, uint32_t sequence) {
    uint32_t pieces = 0;
    for (uint32_t i = 0; i < docs->count; i++)
        pieces += pieces_of(docs->begin[i + 1] - docs->begin[i] - 1, sequence);
    return pieces;
}

void node_packer_rewind(node_packer *p, uint64_t epoch) {
    const uint64_t key = fl_rng_key(p->seed, 0x70616b, epoch);
    p->next = 0;
    p->epoch = epoch;
    for (uint32_t i = 0; i < p->pieces; i++) p->order[i] = i;
    for (uint32_t i = p->pieces; p->shuffled && i > 1; i--) { // Fisher and Yates, from the top
        const uint32_t j = (uint32_t)fl_rng_below(key, i, i), last = p->order[i - 1];
        p->order[i - 1] = p->order[j];
        p->order[j] = last;
    }
}

void node_packer_bind(node_packer *p, const node_docs *docs, uint32_t sequence, bool shuffled,
                      uint64_t seed, fl_arena *arena) {
    *p = (node_packer){.ids = docs->ids,
                       .pieces = node_packer_pieces(docs, sequence),
                       .sequence = sequence,
                       .seed = seed,
                       .shuffled = shuffled};
    p->piece = FL_ARENA_NEW(arena, node_piece, p->pieces);
    p->order = FL_ARENA_NEW(arena, uint32_t, p->pieces);
    if (fl_arena_counting(arena)) return;
    uint32_t n = 0;
    for (uint32_t i = 0; i < docs->count; i++) {
        uint64_t left = docs->begin[i + 1] - docs->begin[i] - 1, at = docs->begin[i];
        while (left > 0) {
            const uint32_t length = left < sequence ? (uint32_t)left : sequence;
            p->piece[n++] = (node_piece){.at = at, .length = length};
            at += length;
            left -= length;
        }
    }
    FL_ASSERT(n == p->pieces);
    node_packer_rewind(p, 0);
}

void node_micro_bind(node_micro *m, uint32_t tokens_max, fl_arena *arena) {
    *m = (node_micro){.tokens_max = tokens_max};
    m->id = FL_ARENA_NEW(arena, int32_t, tokens_max);
    m->target = FL_ARENA_NEW(arena, int32_t, tokens_max);
    m->pos = FL_ARENA_NEW(arena, uint32_t, tokens_max);
    m->kv_begin = FL_ARENA_NEW(arena, uint32_t, tokens_max);
    m->kv_row = FL_ARENA_NEW(arena, uint32_t, tokens_max);
}

node_batch node_micro_batch(const node_micro *m) {
    return (node_batch){.tokens = m->tokens,
                        .id = m->id,
                        .pos = m->pos,
                        .kv_begin = m->kv_begin,
                        .kv_row = m->kv_row};
}

static void append(node_micro *m, const int32_t *ids, uint32_t length) {
    const uint32_t first = m->tokens;
    for (uint32_t i = 0; i < length; i++) {
        const uint32_t row = first + i;
        m->id[row] = ids[i];
        m->target[row] = ids[i + 1];
        m->pos[row] = i;
        m->kv_begin[row] = first;
        m->kv_row[row] = row;
    }
    m->tokens += length;
    m->scored += length;
}

bool node_packer_fill(node_packer *p, node_micro *m, bool wrap) {
    m->tokens = 0;
    m->scored = 0;
    while (m->tokens < m->tokens_max && p->pieces > 0) {
        if (p->next == p->pieces) {
            if (!wrap) break;
            node_packer_rewind(p, p->epoch + 1);
        }
        const node_piece *piece = &p->piece[p->order[p->next]];
        const uint32_t room = m->tokens_max - m->tokens;
        if (piece->length > room && !wrap) break;
        append(m, p->ids + piece->at, piece->length < room ? piece->length : room);
        p->next++;
    }
    return m->tokens > 0;
}
