// Goal: the prefix cache changes time and nothing else: what it gives back is what was put in, for
// exactly this key; it keeps its bound; a change below the window empties it; a store that loses,
// refuses or alters entries costs hits, never bits. Method: micro-batches in the orders of real
// runs against a replay of the rule and against two simpler ones; a store that fails on purpose;
// training with every kind of cache, compared byte by byte with training without.
#include "tests/tune_rig.h"

// ---- the form of an entry

static void test_rows_survive(void) {
    enum { T = 9, N = 37 };
    float x[T][N], y[T][N];
    const size_t size = node_prefix_entry_size(T, N);
    uint8_t *block = aligned_alloc(64, 4096), *entry = block;
    T_NEED(block != NULL && size <= 4096, "memory");
    static const float scale[T] = {1.0f, 1e-3f, 0.0f, 3e4f, 7e4f, 1e9f, 3e38f, 1.0f, 1.0f};
    for (int t = 0; t < T; t++)
        for (int i = 0; i < N; i++) x[t][i] = scale[t] * t_randf();
    x[3][5] = 32767.9f; // rounds up to 2^15, which still has a half
    x[5][7] = -1e9f;
    x[6][0] = 3.4e38f;
    x[7][3] = INFINITY;
    x[8][4] = NAN;
    node_prefix_encode(T, N, &x[0][0], entry);
    node_prefix_decode(T, N, entry, &y[0][0]);
    for (int t = 0; t < 7; t++) {
        float most = 0;
        for (int i = 0; i < N; i++) most = fmaxf(most, fabsf(x[t][i]));
        const double step = fmax((double)most / 0x1p15, 1.0) * 0x1p-25; // half the least subnormal
        for (int i = 0; i < N; i++)
            T_NEAR((double)y[t][i], (double)x[t][i], 0x1p-11 * fabs((double)x[t][i]) + step * 2,
                   "row %d, %d", t, i);
    }
    for (int i = 0; i < N; i++) // an ordinary row is plain fp16
        T_CHECK(y[0][i] == fl_f16_to_f32(fl_f16_from_f32(x[0][i])), "%g", (double)x[0][i]);
    T_CHECK(isinf(y[7][3]) && isnan(y[8][4]), "what is broken stays broken");
    free(block);
}

// ---- keys

static void test_a_key_is_of_everything_below(void) {
    rig *r = rig_open(&tiny_default);
    node_model *m = &r->t->model;
    node_adapter *a = r->adapter;
    const node_prefix_key was = node_prefix_base(m, a, 2);
#define OTHER(change, back)                                                                        \
    do {                                                                                           \
        change;                                                                                    \
        const node_prefix_key now = node_prefix_base(m, a, 2);                                     \
        T_CHECK(memcmp(&was, &now, sizeof(was)) != 0, #change);                                    \
        back;                                                                                      \
        const node_prefix_key again = node_prefix_base(m, a, 2);                                   \
        T_CHECK(memcmp(&was, &again, sizeof(was)) == 0, #back);                                    \
    } while (0)
    for (uint32_t l = 0; l < 2; l++)
        for (uint32_t i = 0; i < a->span_count[l]; i += i < 40 ? 1 : 97)
            OTHER(a->span[l][i] = 1e-30f, a->span[l][i] = 0.0f);
    OTHER(a->span[1][a->span_count[1] - 1] = 1.0f, a->span[1][a->span_count[1] - 1] = 0.0f);
    OTHER(a->model_id ^= 1, a->model_id ^= 1);
    OTHER(a->opts.seed++, a->opts.seed--);
    OTHER(a->lora.scale *= 2, a->lora.scale /= 2);
    OTHER(m->policy.bits[3]++, m->policy.bits[3]--);
    OTHER(m->policy.sparsity[0] = 0.5f, m->policy.sparsity[0] = 0.0f);
#undef OTHER
    const node_prefix_key other = node_prefix_base(m, a, 1);
    T_CHECK(memcmp(&was, &other, sizeof(was)) != 0, "another window");
    a->span[2][0] = 1.0f; // the window itself and what lies above it are nothing to the key
    a->span[3][0] = 1.0f;
    a->lora.exit_gain[0][0] = 2.0f;
    const node_prefix_key same = node_prefix_base(m, a, 2);
    T_CHECK(memcmp(&was, &same, sizeof(was)) == 0, "above the window");
    rig_close(r);
}

static void test_a_key_is_of_tokens_and_their_places(void) {
    int32_t id[9] = {5, 6, 7, 8, 9, 10, 11, 12, 13};
    uint32_t pos[9] = {0, 1, 2, 3, 0, 1, 2, 3, 4}, begin[9] = {0, 0, 0, 0, 4, 4, 4, 4, 4};
    uint32_t row[9] = {0, 1, 2, 3, 4, 5, 6, 7, 8};
    const node_micro m = {
        .tokens_max = 9, .tokens = 9, .id = id, .pos = pos, .kv_begin = begin, .kv_row = row};
    const node_prefix_key base = {{1, 2}}, next = {{1, 3}};
    const node_prefix_key was = node_prefix_key_of(base, &m);
    node_prefix_key now = node_prefix_key_of(next, &m);
    T_CHECK(memcmp(&was, &now, sizeof(was)) != 0, "another base");
    void *const array[] = {id, pos, begin, row};
    for (int k = 0; k < 4; k++) {
        for (int i = 0; i < 9; i++) {
            int32_t *at = (int32_t *)array[k] + i;
            *at ^= 1;
            now = node_prefix_key_of(base, &m);
            T_CHECK(memcmp(&was, &now, sizeof(was)) != 0, "array %d, token %d", k, i);
            *at ^= 1;
        }
    }
    now = node_prefix_key_of(base, &m);
    T_CHECK(memcmp(&was, &now, sizeof(was)) == 0, "the same");
}

// ---- places

enum { ENTRY = 48 };

typedef struct fake_store { // keeps entries in memory; fails as it is told
    uint8_t kept[64][ENTRY + NODE_PREFIX_ROOM];
    uint32_t puts, gets, put_fails_at, get_fails_every;
} fake_store;

static bool fake_put(void *self, uint32_t place, uint8_t *entry, size_t size) {
    fake_store *f = self;
    T_EQ(size, ENTRY);
    memset(entry + size, 0xee, NODE_PREFIX_ROOM); // the room is there
    memcpy(f->kept[place], entry, ENTRY);
    memset(entry, 0xdd, size); // sealed in place
    return ++f->puts != f->put_fails_at;
}

static bool fake_get(void *self, uint32_t place, uint8_t *entry, size_t size) {
    fake_store *f = self;
    if (f->get_fails_every > 0 && ++f->gets % f->get_fails_every == 0) {
        memset(entry, 0xcc, size + NODE_PREFIX_ROOM); // what did not unseal
        return false;
    }
    memcpy(entry, f->kept[place], size);
    return true;
}

// A text whose micro-batches number 40, a cache, and the turns that a tuner would take.
typedef struct turns {
    int32_t ids[641];
    uint64_t begin[2];
    node_docs docs;
    node_batches batches;
    fake_store fake;
    node_prefix prefix;
    node_prefix_key base;
    _Alignas(64) uint8_t block[1 << 15];
} turns;

enum { BATCHES = 40 };

static turns *turns_open(uint32_t places, uint32_t store_places) {
    turns *t = calloc(1, sizeof(*t));
    T_NEED(t != NULL, "memory");
    t->begin[1] = 641;
    t->docs = (node_docs){t->ids, t->begin, 1};
    fl_arena arena;
    fl_arena_init(&arena, t->block, sizeof(t->block));
    node_batches_bind(&t->batches, &t->docs, 16, 3, t_rand(), &arena);
    T_EQ(t->batches.count, BATCHES);
    const node_prefix_shape shape = {BATCHES, places, store_places, ENTRY};
    const node_prefix_store store = {&t->fake, store_places, fake_put, fake_get};
    const size_t before = arena.used;
    node_prefix_bind(&t->prefix, &shape, &store, &arena);
    T_CHECK(arena.used - before <= node_prefix_size(&shape) + 64, "the size is known");
    t->base = (node_prefix_key){{7, 7}};
    node_prefix_begin(&t->prefix, t->base);
    return t;
}

// One turn as the tuner takes it; what is found must be what was put. Was it found?
static bool take_turn(turns *t) {
    uint8_t entry[ENTRY + NODE_PREFIX_ROOM], want[ENTRY];
    const uint32_t index = node_batches_next(&t->batches);
    const node_prefix_key key = {{t->base.half[0], index}};
    for (size_t i = 0; i < ENTRY; i++) want[i] = (uint8_t)(key.half[0] * 31 + index * 7 + i);
    const bool hit = node_prefix_get(&t->prefix, index, key, entry);
    if (hit) {
        T_CHECK(memcmp(entry, want, ENTRY) == 0, "micro-batch %u", index);
    } else {
        memcpy(entry, want, ENTRY);
        node_prefix_put(&t->prefix, index, key, entry);
    }
    uint32_t placed = 0;
    for (uint32_t i = 0; i < BATCHES; i++) placed += t->prefix.place_of[i] != 0;
    T_EQ(t->prefix.taken, placed);
    T_CHECK(placed <= t->prefix.shape.places + t->prefix.shape.store_places, "%u", placed);
    return hit;
}

static uint32_t hits_of(turns *t, uint32_t epochs) {
    uint32_t hits = 0;
    for (uint32_t i = 0; i < epochs * BATCHES; i++) hits += take_turn(t);
    T_EQ(t->prefix.hits, hits);
    T_EQ(t->prefix.misses, epochs * BATCHES - hits);
    return hits;
}

// What a cache that throws out what was used longest ago would find in the same order.
static uint32_t hits_of_oldest_out(const turns *t, uint32_t places, uint32_t epochs) {
    node_batches b = t->batches;
    uint32_t order[BATCHES], used[BATCHES] = {0}, hits = 0; // used: turn, from 1; 0: not there
    memcpy(order, b.order, sizeof(order));
    b.order = order;
    for (uint32_t now = 1; now <= epochs * BATCHES; now++) {
        const uint32_t index = node_batches_next(&b);
        uint32_t count = 0, oldest = UINT32_MAX;
        for (uint32_t i = 0; i < BATCHES; i++) {
            count += used[i] != 0;
            if (used[i] != 0 && (oldest == UINT32_MAX || used[i] < used[oldest])) oldest = i;
        }
        hits += used[index] != 0;
        if (used[index] == 0 && count == places) used[oldest] = 0;
        used[index] = now;
    }
    return hits;
}

// The most that any choice of what to keep could find: of the stretches from one use to the next,
// as many as possible with at most `places` over any turn. Taking them by their ends, and leaving
// what no longer fits, is optimal.
static uint32_t hits_at_best(const turns *t, uint32_t places, uint32_t epochs) {
    enum { MOST = 12 * BATCHES };
    node_batches b = t->batches;
    uint32_t order[BATCHES], seen[MOST], load[MOST] = {0}, best = 0;
    memcpy(order, b.order, sizeof(order));
    b.order = order;
    T_NEED(epochs <= 12, "%u", epochs);
    for (uint32_t end = 0; end < epochs * BATCHES; end++) {
        seen[end] = node_batches_next(&b);
        uint32_t from = end;
        while (from > 0 && seen[from - 1] != seen[end]) from--;
        if (from-- == 0) continue; // the first time
        bool fits = true;
        for (uint32_t i = from; i < end; i++) fits = fits && load[i] < places;
        for (uint32_t i = from; fits && i < end; i++) load[i]++;
        best += fits;
    }
    return best;
}

static void test_no_rule_finds_more(void) {
    enum { EPOCHS = 12 };
    for (uint32_t places = 1; places <= BATCHES; places += 3) {
        turns *t = turns_open(places, 0);
        const uint32_t oldest_out = hits_of_oldest_out(t, places, EPOCHS);
        const uint32_t best = hits_at_best(t, places, EPOCHS), hits = hits_of(t, EPOCHS);
        T_EQ(hits, places * (EPOCHS - 1));
        T_EQ(hits, best);
        if (places <= BATCHES / 2)
            T_CHECK(oldest_out < hits * 3 / 4, "%u places: %u of %u", places, oldest_out, hits);
        free(t);
    }
    turns *t = turns_open(0, 0);
    T_EQ(hits_of(t, 2), 0);
    free(t);
}

static void test_the_store_takes_the_rest_once(void) {
    turns *t = turns_open(10, 20);
    T_EQ(hits_of(t, 12), 30 * 11);
    T_EQ(t->fake.puts, 20); // whatever comes later: a card wears
    free(t);
    t = turns_open(0, 40); // nothing in memory
    T_EQ(hits_of(t, 5), 4 * BATCHES);
    T_EQ(t->fake.puts, 40);
    free(t);
}

static void test_a_store_that_fails_is_a_miss(void) {
    for (uint32_t n = 1; n <= 20; n++) { // the n-th put fails: nothing is offered after it
        turns *t = turns_open(5, 20);
        t->fake.put_fails_at = n;
        T_EQ(hits_of(t, 6), (5 + n - 1) * 5);
        T_EQ(t->fake.puts, n);
        t->base.half[0]++; // entries are dropped: it is asked again
        node_prefix_begin(&t->prefix, t->base);
        for (int i = 0; i < 11; i++) take_turn(t);
        T_EQ(t->fake.puts, n + 6);
        free(t);
    }
    turns *t = turns_open(5, 30); // entries are lost: found anew, kept anew
    t->fake.get_fails_every = 3;
    const uint32_t hits = hits_of(t, 10);
    // 5 from memory and about two thirds of 30 every time.
    T_CHECK(hits > 9 * 20 && hits < 9 * 30, "%u", hits);
    T_EQ(t->fake.puts, 35 * 9 + 30 - hits);
    free(t);
}

static void test_a_change_drops_everything(void) {
    turns *t = turns_open(20, 20);
    for (uint32_t round = 0; round < 4; round++) {
        for (uint32_t i = 0; i < BATCHES; i++) T_CHECK(!take_turn(t), "round %u", round);
        node_prefix_begin(&t->prefix, t->base); // the same: nothing happens
        for (uint32_t i = 0; i < BATCHES; i++) T_CHECK(take_turn(t), "round %u", round);
        t->base.half[0]++;
        node_prefix_begin(&t->prefix, t->base);
    }
    free(t);
    t = turns_open(20, 20); // another text under the same number is a miss too, and takes over
    for (uint32_t i = 0; i < BATCHES; i++) take_turn(t);
    t->base.half[0]++;
    for (uint32_t i = 0; i < BATCHES; i++) T_CHECK(!take_turn(t), "another key");
    for (uint32_t i = 0; i < BATCHES; i++) T_CHECK(take_turn(t), "kept");
    free(t);
}

static void test_the_bound_is_sharp(void) {
    for (uint32_t store = 0; store <= 40; store += 20) {
        node_prefix_shape s = {.batches = 40, .store_places = store, .entry_size = 1000};
        uint32_t before = 0;
        for (uint64_t bytes = 0; bytes < 60000; bytes += 61) {
            node_prefix_fit(&s, bytes);
            T_CHECK(s.places == 0 || node_prefix_size(&s) <= bytes, "%u places in %u bytes",
                    s.places, (unsigned)bytes);
            T_CHECK(s.places >= before && s.places <= 40, "%u", s.places);
            before = s.places;
            node_prefix_shape more = s;
            more.places++;
            T_CHECK(s.places == 40 || node_prefix_size(&more) + 64 > bytes, "room for one more");
        }
        T_EQ(s.places, 40);
    }
}

// ---- training

typedef struct memory_store { // a store without bounds that fails as it is told
    uint8_t *kept;
    size_t size;
    uint32_t calls, fails_every;
} memory_store;

static bool memory_put(void *self, uint32_t place, uint8_t *entry, size_t size) {
    memory_store *s = self;
    if (s->fails_every > 0 && ++s->calls % s->fails_every == 0) return false;
    memcpy(s->kept + place * size, entry, size);
    memset(entry, 0xdd, size + NODE_PREFIX_ROOM);
    return true;
}

static bool memory_get(void *self, uint32_t place, uint8_t *entry, size_t size) {
    memory_store *s = self;
    memset(entry, 0xcc, size + NODE_PREFIX_ROOM);
    if (s->fails_every > 0 && ++s->calls % s->fails_every == 0) return false;
    memcpy(entry, s->kept + place * size, size);
    return true;
}

typedef struct kind { // of a cache
    uint32_t places, store_places, fails_every;
    bool none;
} kind;

typedef struct outcome {
    uint8_t *adapter;
    size_t size;
    double loss; // of the last step
    uint64_t hits, misses;
    uint32_t batches;
} outcome;

// Trains three epochs; after the second the values below the window become others, as a new round
// of a federation makes them.
static outcome train(const node_tune_opts *o, uint32_t bits, const kind *k, uint32_t change_layer) {
    tiny_shape shape = tiny_default;
    shape.bits = bits;
    t_seed = 77;
    rig *r = rig_open(&shape);
    rig_bind(r, o);
    const uint32_t batches = r->tuner.batches.count;
    const node_prefix_shape s = {batches, k->places, k->store_places,
                                 node_prefix_entry_size(o->sequence, shape.hidden)};
    memory_store kept = {.kept = malloc((batches + 1) * s.entry_size),
                         .fails_every = k->fails_every};
    const node_prefix_store store = {&kept, k->store_places, memory_put, memory_get};
    void *block = aligned_alloc(64, (node_prefix_size(&s) + 127) / 64 * 64);
    node_prefix prefix = {0};
    fl_arena arena;
    T_NEED(kept.kept != NULL && block != NULL, "memory");
    fl_arena_init(&arena, block, node_prefix_size(&s));
    node_prefix_bind(&prefix, &s, &store, &arena);
    if (!k->none) node_tuner_use_prefix(&r->tuner, &prefix);
    node_tune_report report = {0};
    for (uint32_t i = 0; i < 3 * batches; i++) {
        if (i == 2 * batches) r->adapter->span[change_layer][3] += 0.25f;
        node_tuner_step(&r->tuner, &report);
    }
    outcome out = {
        .loss = report.loss, .hits = prefix.hits, .misses = prefix.misses, .batches = batches};
    out.adapter = bytes_of(r->adapter, &out.size);
    free(block);
    free(kept.kept);
    rig_close(r);
    return out;
}

static void test_training_has_the_same_bits(void) {
    static const kind kinds[] = {{.places = 1000},
                                 {.places = 7},
                                 {.places = 3, .store_places = 9},
                                 {.store_places = 1000},
                                 {.places = 2, .store_places = 50, .fails_every = 3},
                                 {0}};
    for (uint32_t bits = 0; bits <= 4; bits += 4) {
        const node_tune_opts o = small_opts();
        const kind none = {.none = true};
        const outcome want = train(&o, bits, &none, 1);
        for (size_t i = 0; i < FL_COUNT(kinds); i++) {
            const outcome got = train(&o, bits, &kinds[i], 1);
            T_CHECK(got.size == want.size && memcmp(got.adapter, want.adapter, got.size) == 0,
                    "cache %zu, %u bits", i, bits);
            T_CHECK(got.loss == want.loss, "%.17g, %.17g", got.loss, want.loss);
            if (i == 0) { // misses: the first epoch, and the one after the change
                T_EQ(got.misses, 2 * got.batches);
                T_EQ(got.hits, got.batches);
            }
            if (i == 5) T_EQ(got.hits, 0);
            free(got.adapter);
        }
        // The change mattered, and one above the window's input drops nothing.
        const outcome above = train(&o, bits, &kinds[0], 3);
        T_CHECK(above.size != want.size || memcmp(above.adapter, want.adapter, want.size) != 0,
                "another change");
        T_EQ(above.hits, 2 * above.batches);
        free(above.adapter);
        free(want.adapter);
    }
}

// As the tasks of a fleet are: each in its own order, all of the same micro-batches.
static void test_a_later_run_finds_what_an_earlier_left(void) {
    uint8_t *ends[2];
    size_t size = 0;
    for (int with = 0; with < 2; with++) {
        t_seed = 77;
        rig *r = rig_open(&tiny_default);
        node_tune_opts o = small_opts();
        node_tune_report report;
        node_prefix prefix = {0};
        void *block = NULL;
        o.text_seed = 9;
        for (o.seed = 1; o.seed <= 3; o.seed++) {
            rig_bind(r, &o);
            const uint32_t batches = r->plan.batches;
            if (with && block == NULL) {
                fl_arena arena;
                block = aligned_alloc(64, (r->plan.prefix_bytes + 63) / 64 * 64);
                T_NEED(block != NULL, "memory");
                fl_arena_init(&arena, block, r->plan.prefix_bytes);
                node_prefix_bind(&prefix, &r->plan.prefix, NULL, &arena);
            }
            if (with) node_tuner_use_prefix(&r->tuner, &prefix);
            for (uint32_t i = 0; i < batches; i++) node_tuner_step(&r->tuner, &report);
            if (with) T_EQ(prefix.hits, (o.seed - 1) * batches);
            if (with) T_EQ(prefix.misses, batches);
        }
        ends[with] = bytes_of(r->adapter, &size);
        free(block);
        rig_close(r);
    }
    T_CHECK(memcmp(ends[0], ends[1], size) == 0, "the same bits");
    free(ends[0]);
    free(ends[1]);
}

// A run that is bound anew within an epoch goes on with the order of that epoch and with what the
// cache holds: each micro-batch misses once, and the bits are those of a run without either.
static void test_a_run_that_is_bound_anew_finds_its_states(void) {
    uint8_t *ends[2];
    size_t size = 0;
    for (int moving = 0; moving < 2; moving++) {
        t_seed = 79;
        rig *r = rig_open(&tiny_default);
        node_tune_opts o = small_opts();
        node_tune_report report;
        node_prefix prefix = {0};
        void *block = NULL;
        o.kept = 0;
        rig_bind(r, &o);
        const uint32_t batches = r->plan.batches;
        if (moving) {
            fl_arena arena;
            block = aligned_alloc(64, (r->plan.prefix_bytes + 63) / 64 * 64);
            T_NEED(block != NULL, "memory");
            fl_arena_init(&arena, block, r->plan.prefix_bytes);
            node_prefix_bind(&prefix, &r->plan.prefix, NULL, &arena);
            node_tuner_use_prefix(&r->tuner, &prefix);
        }
        for (uint32_t i = 0; i < 2 * batches; i++) {
            node_tuner_step(&r->tuner, &report);
            if (!moving || i % 7 != 4) continue;
            void *state = malloc(node_tuner_state_size(&r->tuner));
            T_NEED(state != NULL, "memory");
            node_tuner_state_get(&r->tuner, state);
            o.kept = i % 2;
            rig_bind(r, &o);
            node_tuner_use_prefix(&r->tuner, &prefix);
            node_tuner_state_set(&r->tuner, state);
            free(state);
        }
        if (moving) T_EQ(prefix.misses, batches);
        if (moving) T_EQ(prefix.hits, batches);
        ends[moving] = bytes_of(r->adapter, &size);
        free(block);
        rig_close(r);
    }
    T_CHECK(memcmp(ends[0], ends[1], size) == 0, "the same bits");
    free(ends[0]);
    free(ends[1]);
}

static void test_every_schedule_has_the_same_bits(void) {
    const kind none = {.none = true}, all = {.places = 1000};
    for (int w = NODE_WINDOW_LAST; w <= NODE_WINDOW_FIXED; w++) {
        node_tune_opts o = small_opts();
        o.window.kind = (node_window_kind)w;
        o.window.exit = 1;
        o.window.steps = 189;
        const outcome want = train(&o, 4, &none, 3), got = train(&o, 4, &all, 3);
        T_CHECK(got.size == want.size && memcmp(got.adapter, want.adapter, got.size) == 0, "%s",
                node_window_name(o.window.kind));
        if (w == NODE_WINDOW_ORDERED) T_EQ(got.hits, got.batches); // the second window's second
        free(got.adapter);
        free(want.adapter);
    }
}

T_MAIN({"rows_survive", test_rows_survive},
       {"a_key_is_of_everything_below", test_a_key_is_of_everything_below},
       {"a_key_is_of_tokens_and_their_places", test_a_key_is_of_tokens_and_their_places},
       {"no_rule_finds_more", test_no_rule_finds_more},
       {"the_store_takes_the_rest_once", test_the_store_takes_the_rest_once},
       {"a_store_that_fails_is_a_miss", test_a_store_that_fails_is_a_miss},
       {"a_change_drops_everything", test_a_change_drops_everything},
       {"the_bound_is_sharp", test_the_bound_is_sharp},
       {"training_has_the_same_bits", test_training_has_the_same_bits},
       {"a_later_run_finds_what_an_earlier_left", test_a_later_run_finds_what_an_earlier_left},
       {"a_run_that_is_bound_anew_finds_its_states",
        test_a_run_that_is_bound_anew_finds_its_states},
       {"every_schedule_has_the_same_bits", test_every_schedule_has_the_same_bits})
