#include "node/tune/data.h"

#include "common/rng.h"

// Micro-batches out of documents. The text side is in corpus.c.

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

static uint64_t inputs_of(const uint64_t *begin, uint32_t doc) {
    return begin[doc + 1] - begin[doc] - 1;
}

uint32_t node_batches_count(const node_docs *docs, uint32_t sequence) {
    return (uint32_t)((node_docs_inputs(docs) + sequence - 1) / sequence);
}

// 0 .. n - 1 in an order that is a function of the key: Fisher and Yates, from the top.
static void shuffle(uint64_t key, uint32_t n, uint32_t *order) {
    for (uint32_t i = 0; i < n; i++) order[i] = i;
    for (uint32_t i = n; i > 1; i--) {
        const uint32_t j = (uint32_t)fl_rng_below(key, i, i), last = order[i - 1];
        order[i - 1] = order[j];
        order[j] = last;
    }
}

static void begin_epoch(node_batches *b, uint64_t epoch) {
    shuffle(fl_rng_key(b->seed, 0x70616b, epoch), b->count, b->order);
    b->epoch = epoch;
    b->at = 0;
}

void node_batches_bind(node_batches *b, const node_docs *docs, uint32_t sequence,
                       uint64_t text_seed, uint64_t seed, fl_arena *arena) {
    *b = (node_batches){.ids = docs->ids,
                        .begin = docs->begin,
                        .docs = docs->count,
                        .count = node_batches_count(docs, sequence),
                        .sequence = sequence,
                        .seed = seed};
    b->doc = FL_ARENA_NEW(arena, uint32_t, b->docs);
    b->start_place = FL_ARENA_NEW(arena, uint32_t, b->count);
    b->start_input = FL_ARENA_NEW(arena, uint64_t, b->count);
    b->order = FL_ARENA_NEW(arena, uint32_t, b->count);
    if (fl_arena_counting(arena)) return;
    shuffle(fl_rng_key(text_seed, 0x6c696e65, 0), b->docs, b->doc);
    uint64_t before = 0; // inputs of the documents that come earlier in the line
    uint32_t index = 0;
    for (uint32_t place = 0; place < b->docs; place++) {
        const uint64_t inputs = inputs_of(b->begin, b->doc[place]);
        for (; (uint64_t)index * sequence < before + inputs; index++) {
            b->start_place[index] = place;
            b->start_input[index] = (uint64_t)index * sequence - before;
        }
        before += inputs;
    }
    FL_ASSERT(index == b->count);
    begin_epoch(b, 0);
}

uint32_t node_batches_next(node_batches *b) {
    if (b->at == b->count) begin_epoch(b, b->epoch + 1);
    return b->order[b->at++];
}

void node_batches_seek(node_batches *b, uint64_t epoch, uint32_t at) {
    FL_ASSERT(at <= b->count);
    begin_epoch(b, epoch);
    b->at = at;
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

void node_batches_fill(const node_batches *b, uint32_t index, node_micro *m) {
    uint32_t place = b->start_place[index];
    uint64_t from = b->start_input[index];
    FL_ASSERT(m->tokens_max == b->sequence);
    m->tokens = 0;
    m->scored = 0;
    while (m->tokens < b->sequence) {
        const uint32_t doc = b->doc[place], room = b->sequence - m->tokens;
        const uint64_t left = inputs_of(b->begin, doc) - from;
        append(m, b->ids + b->begin[doc] + from, left < room ? (uint32_t)left : room);
        place = place + 1 == b->docs ? 0 : place + 1;
        from = 0;
    }
}
