#include "node/tune/prefix.h"

#include <string.h>

#include "common/rng.h"
#include "kernels/vec.h"

// ---- the form of an entry

static const uint32_t two_pow_15 = 0x47000000; // as the bits of a float

size_t node_prefix_entry_size(uint32_t tokens, uint32_t hidden) {
    return (size_t)tokens * (hidden + 1u) * sizeof(uint16_t);
}

static float power_of_two(int power) { // of -112 .. 112: always a normal float
    const uint32_t bits = (uint32_t)(power + 127) << 23;
    float v;
    memcpy(&v, &bits, sizeof(v));
    return v;
}

// The power that brings the row's largest magnitude below 2^15; 0 when something is not finite, as
// then nothing can be saved.
static int row_power(uint32_t n, const float *x) {
    const uint32_t most = fl_vec_most_bits(n, x);
    return most < two_pow_15 || most >= 0x7f800000 ? 0 : (int)(most >> 23) - (127 + 14);
}

void node_prefix_encode(uint32_t tokens, uint32_t hidden, const float *x, uint8_t *entry) {
    uint16_t *half = (uint16_t *)(void *)entry, *powers = half + (size_t)tokens * hidden;
    for (uint32_t t = 0; t < tokens; t++, x += hidden, half += hidden) {
        const int power = row_power(hidden, x);
        powers[t] = (uint16_t)power;
        fl_vec_to_f16(hidden, power_of_two(-power), x, half);
    }
}

void node_prefix_decode(uint32_t tokens, uint32_t hidden, const uint8_t *entry, float *x) {
    const uint16_t *half = (const uint16_t *)(const void *)entry;
    const uint16_t *powers = half + (size_t)tokens * hidden;
    for (uint32_t t = 0; t < tokens; t++, x += hidden, half += hidden)
        fl_vec_from_f16(hidden, power_of_two(powers[t]), half, x);
}

// ---- keys

// Four lanes, so that megabytes of B's take no time. Every step is a bijection of its lane: one
// changed word always changes the digest's lane.
typedef struct digest {
    uint64_t lane[4];
    uint64_t count;
} digest;

static uint64_t lane_step(uint64_t lane, uint64_t word) {
    lane = (lane ^ word) * 0x9fb21c651e98df25u;
    return lane ^ lane >> 32;
}

static void digest_add(digest *d, const void *data, size_t size) {
    const uint8_t *p = data;
    uint64_t word[4];
    for (; size >= sizeof(word); p += sizeof(word), size -= sizeof(word)) {
        memcpy(word, p, sizeof(word));
        for (int i = 0; i < 4; i++) d->lane[i] = lane_step(d->lane[i], word[i]);
        d->count++;
    }
    if (size > 0) {
        memset(word, 0, sizeof(word));
        memcpy(word, p, size);
        for (int i = 0; i < 4; i++) d->lane[i] = lane_step(d->lane[i], word[i]);
    }
    d->count++;
    d->lane[0] = lane_step(d->lane[0], d->count); // where one array ends and the next begins
}

static node_prefix_key digest_done(const digest *d) {
    return (node_prefix_key){{fl_rng_key(d->lane[0], d->lane[1], d->lane[2] + d->count),
                              fl_rng_key(d->lane[3], d->lane[2], d->lane[1] - d->count)}};
}

node_prefix_key node_prefix_base(const node_model *model, const node_adapter *a, uint32_t first) {
    digest d = {{1, 2, 3, 4}, 0};
    const uint64_t numbers[] = {a->model_id, first, a->lora.rank, a->opts.seed};
    digest_add(&d, numbers, sizeof(numbers));
    digest_add(&d, &a->lora.scale, sizeof(a->lora.scale));
    digest_add(&d, model->policy.bits, sizeof(model->policy.bits));
    digest_add(&d, model->policy.sparsity, sizeof(model->policy.sparsity));
    for (uint32_t l = 0; l < first; l++)
        digest_add(&d, a->span[l], a->span_count[l] * sizeof(float));
    return digest_done(&d);
}

node_prefix_key node_prefix_key_of(node_prefix_key base, const node_micro *m) {
    digest d = {{base.half[0], base.half[1], 3, 4}, 0};
    digest_add(&d, m->id, m->tokens * sizeof(*m->id));
    digest_add(&d, m->pos, m->tokens * sizeof(*m->pos));
    digest_add(&d, m->kv_begin, m->tokens * sizeof(*m->kv_begin));
    digest_add(&d, m->kv_row, m->tokens * sizeof(*m->kv_row));
    return digest_done(&d);
}

static bool same_key(node_prefix_key x, node_prefix_key y) {
    return x.half[0] == y.half[0] && x.half[1] == y.half[1];
}

// ---- places

static uint32_t all_places(const node_prefix_shape *s) {
    return s->places + s->store_places;
}

void node_prefix_bind(node_prefix *p, const node_prefix_shape *shape,
                      const node_prefix_store *store, fl_arena *arena) {
    *p = (node_prefix){.shape = *shape};
    if (store != NULL) p->store = *store;
    p->memory = fl_arena_alloc(arena, shape->places, shape->entry_size, 64);
    p->key = FL_ARENA_NEW(arena, node_prefix_key, all_places(shape));
    p->place_of = FL_ARENA_NEW(arena, uint32_t, shape->batches);
}

bool node_prefix_same_shape(const node_prefix_shape *x, const node_prefix_shape *y) {
    return x->batches == y->batches && x->places == y->places &&
           x->store_places == y->store_places && x->entry_size == y->entry_size;
}

size_t node_prefix_size(const node_prefix_shape *shape) {
    node_prefix unused;
    fl_arena arena;
    fl_arena_init_counting(&arena);
    node_prefix_bind(&unused, shape, NULL, &arena);
    return arena.peak;
}

void node_prefix_fit(node_prefix_shape *shape, uint64_t bytes) {
    shape->places = 0;
    const uint64_t fixed = node_prefix_size(shape) + 64; // 64: more than alignment can cost
    const uint64_t each = shape->entry_size + sizeof(node_prefix_key);
    const uint64_t fit = bytes < fixed ? 0 : (bytes - fixed) / each;
    shape->places = fit < shape->batches ? (uint32_t)fit : shape->batches;
}

void node_prefix_begin(node_prefix *p, node_prefix_key base) {
    if (same_key(p->base, base)) return;
    p->base = base;
    p->store_full = false;
    memset(p->place_of, 0, p->shape.batches * sizeof(*p->place_of));
    p->taken = 0;
}

static bool load(node_prefix *p, uint32_t place, uint8_t *entry) {
    const size_t size = p->shape.entry_size;
    if (place >= p->shape.places)
        return p->store.get(p->store.self, place - p->shape.places, entry, size);
    memcpy(entry, p->memory + place * size, size);
    return true;
}

bool node_prefix_get(node_prefix *p, uint32_t index, node_prefix_key key, uint8_t *entry) {
    FL_ASSERT(index < p->shape.batches);
    const uint32_t at = p->place_of[index];
    if (at != 0 && same_key(p->key[at - 1], key) && load(p, at - 1, entry)) {
        p->hits++;
        return true;
    }
    p->misses++;
    return false;
}

void node_prefix_put(node_prefix *p, uint32_t index, node_prefix_key key, uint8_t *entry) {
    const size_t size = p->shape.entry_size;
    FL_ASSERT(index < p->shape.batches);
    if (p->place_of[index] == 0) {
        if (p->taken == all_places(&p->shape)) return;
        p->place_of[index] = ++p->taken;
    }
    const uint32_t place = p->place_of[index] - 1;
    p->key[place] = (node_prefix_key){{0, 0}};
    if (place < p->shape.places) {
        memcpy(p->memory + place * size, entry, size);
    } else if (p->store_full ||
               !p->store.put(p->store.self, place - p->shape.places, entry, size)) {
        p->store_full = true;
        return;
    }
    p->key[place] = key;
}
