// Goal: tuning keeps its promises: the plan is exact, a step allocates nothing and changes only its
// window, the loss falls, and a run is a function of its seed. Method: small random models,
// allocator calls counted, memory compared byte by byte, every refusal read.
#include "tests/tune_rig.h"

// Calls of the allocator from this program's objects: the linker leads them here (--wrap). Where
// the sanitizer can tell, those of the C library count too.
void *__real_malloc(size_t size);
void *__real_calloc(size_t count, size_t size);
void *__real_realloc(void *p, size_t size);
void *__real_aligned_alloc(size_t align, size_t size);
void __real_free(void *p);
void *__wrap_malloc(size_t size);
void *__wrap_calloc(size_t count, size_t size);
void *__wrap_realloc(void *p, size_t size);
void *__wrap_aligned_alloc(size_t align, size_t size);
void __wrap_free(void *p);

static volatile size_t allocations; // the compiler believes that malloc changes no variable

void *__wrap_malloc(size_t size) {
    allocations++;
    return __real_malloc(size);
}
void *__wrap_calloc(size_t count, size_t size) {
    allocations++;
    return __real_calloc(count, size);
}
void *__wrap_realloc(void *p, size_t size) {
    allocations++;
    return __real_realloc(p, size);
}
void *__wrap_aligned_alloc(size_t align, size_t size) {
    allocations++;
    return __real_aligned_alloc(align, size);
}
void __wrap_free(void *p) {
    allocations++;
    __real_free(p);
}

#if defined(__SANITIZE_ADDRESS__)
// Of the sanitizer's run time; gcc does not ship its header.
int __sanitizer_install_malloc_and_free_hooks(void (*on_malloc)(const volatile void *, size_t),
                                              void (*on_free)(const volatile void *));
static void on_malloc(const volatile void *p, size_t size) {
    (void)p, (void)size;
    allocations++;
}
static void on_free(const volatile void *p) {
    (void)p;
    allocations++;
}
static void count_allocations(void) {
    static bool installed;
    if (!installed) __sanitizer_install_malloc_and_free_hooks(on_malloc, on_free);
    installed = true;
}
#else
static void count_allocations(void) {}
#endif

static void check_plan(uint32_t sequence, uint32_t size, uint32_t kept, int kind) {
    tiny_shape shape = tiny_default;
    shape.bits = kind % 2 == 0 ? 0 : 4;
    rig *r = rig_open(&shape);
    node_tune_opts o = small_opts();
    node_tune_report report;
    o.window.kind = (node_window_kind)kind;
    o.window.size = size;
    o.sequence = sequence;
    o.kept = kept;
    o.threads = 1 + sequence / 16;
    rig_bind(r, &o);
    T_EQ(r->peak, r->plan.arena_bytes);
    node_tuner_step(&r->tuner, &report); // under ASan: inside the block
    T_EQ(report.tokens, sequence);
    rig_close(r);
}

static void test_plan_is_the_arena(void) {
    for (uint32_t sequence = 16; sequence <= 48; sequence += 32)
        for (uint32_t size = 0; size <= 4; size += 2)
            for (uint32_t kept = 0; kept <= 3; kept += 3)
                for (int kind = NODE_WINDOW_LAST; kind <= NODE_WINDOW_FIXED; kind++)
                    check_plan(sequence, size, kept, kind);
}

static void test_a_step_allocates_nothing(void) {
    rig *r = rig_open(&tiny_default);
    node_tune_opts o = small_opts();
    node_tune_report report;
    o.window.kind = NODE_WINDOW_CYCLIC;
    o.micro = 2;
    rig_bind(r, &o);
    count_allocations();
    const size_t before = allocations;
    void *volatile canary = malloc(10); // the counter counts
    free(canary);
    T_CHECK(allocations >= before + 2, "%zu", allocations);
    const size_t start = allocations;
    for (int i = 0; i < 40; i++) node_tuner_step(&r->tuner, &report); // crosses epochs too
    T_EQ(allocations - start, 0);
    T_CHECK(r->tuner.batches.epoch > 0, "the text went round");
    rig_close(r);
}

static void test_loss_falls(void) {
    for (uint32_t bits = 0; bits <= 4; bits += 4) {
        tiny_shape shape = tiny_default;
        shape.bits = bits;
        rig *r = rig_open(&shape);
        node_tune_opts o = small_opts();
        node_tune_report report;
        double first = 0, last = 0;
        o.lr = o.gain_lr = 0.02f;
        o.beta1 = 0.9f, o.beta2 = 0.99f;
        o.window.size = 4;
        rig_bind(r, &o);
        for (int i = 0; i < 80; i++) {
            node_tuner_step(&r->tuner, &report);
            if (i < 10) first += report.loss / 10;
            if (i >= 70) last += report.loss / 10;
            T_CHECK(!report.skipped && report.step == (uint64_t)i + 1, "step %d", i);
        }
        T_CHECK(last < 0.6 * first, "%u bits: from %.3f to %.3f", bits, first, last);
        rig_close(r);
    }
}

// Every span but those of the window keeps its bits.
static void changes_only_its_window(const node_tune_opts *o) {
    rig *r = rig_open(&tiny_default);
    node_tune_report report;
    rig_bind(r, o);
    const uint32_t layers = tiny_default.layers, spans = node_adapter_spans(r->adapter);
    for (int i = 0; i < 4; i++) {
        float *was[16];
        for (uint32_t id = 0; id < spans; id++) {
            was[id] = malloc(r->adapter->span_count[id] * sizeof(float));
            node_adapter_get(r->adapter, id, was[id]);
        }
        node_tuner_step(&r->tuner, &report);
        for (uint32_t id = 0; id < spans; id++) {
            const bool same = memcmp(was[id], r->adapter->span[id],
                                     r->adapter->span_count[id] * sizeof(float)) == 0;
            const uint32_t last = report.window.last - o->window.still;
            const bool mine = id < layers ? id >= report.window.first && id <= last
                                          : id - layers == report.window.exit && !o->window.still;
            T_CHECK(same != mine, "step %d, span %u", i, id);
            free(was[id]);
        }
    }
    rig_close(r);
}

static void test_a_step_changes_only_its_window(void) {
    node_tune_opts o = small_opts();
    o.window.kind = NODE_WINDOW_CYCLIC;
    o.window.size = 1;
    changes_only_its_window(&o);
    o.window.kind = NODE_WINDOW_FIXED; // layers 0 and 1 of 0 to 3, with the loss at the last exit
    o.window.exit = 1;
    o.window.size = 4;
    o.window.still = 2;
    changes_only_its_window(&o);
}

// Runs 6 steps from the same start; what comes out as a file.
static uint8_t *run_six(const node_tune_opts *o, uint32_t bits, fl_pool *pool, size_t *ret_size) {
    tiny_shape shape = tiny_default;
    shape.bits = bits;
    t_seed = 77;
    rig *r = rig_open(&shape);
    node_tune_report report;
    r->engine.pool = pool;
    rig_bind(r, o);
    for (int i = 0; i < 6; i++) node_tuner_step(&r->tuner, &report);
    uint8_t *p = bytes_of(r->adapter, ret_size);
    rig_close(r);
    return p;
}

static void test_bits_do_not_depend_on_the_plan(void) {
    fl_pool *pool = NULL;
    fl_err err;
    T_OK(fl_pool_open(3, &pool, &err), err);
    for (uint32_t bits = 0; bits <= 4; bits += 4) {
        size_t size, other;
        node_tune_opts o = small_opts();
        o.window.kind = NODE_WINDOW_RANDOM;
        o.kept = 0;
        uint8_t *want = run_six(&o, bits, NULL, &size);
        for (uint32_t kept = 1; kept <= 2; kept++) {
            o.kept = kept;
            o.threads = 3;
            uint8_t *got = run_six(&o, bits, kept == 1 ? pool : NULL, &other);
            T_CHECK(other == size && memcmp(want, got, size) == 0, "%u kept, %u bits", kept, bits);
            free(got);
        }
        o.seed = 2;
        uint8_t *got = run_six(&o, bits, NULL, &other);
        T_CHECK(other != size || memcmp(want, got, size) != 0, "the seed matters");
        free(got);
        free(want);
    }
    fl_pool_close(pool);
}

static void test_resume_from_a_file(void) {
    rig *r = rig_open(&tiny_default);
    const node_tune_opts o = small_opts();
    node_tune_report report;
    rig_bind(r, &o);
    for (int i = 0; i < 5; i++) node_tuner_step(&r->tuner, &report);
    size_t size, other;
    uint8_t *saved = bytes_of(r->adapter, &size), *ends[2];
    node_adapter *loaded = NULL;
    fl_err err;
    T_OK(node_adapter_decode((fl_bytes){saved, size}, &r->t->model, false, &loaded, &err), err);
    for (int way = 0; way < 2;
         way++) { // on with the one in memory, then with the one from the file
        rig_bind(r, &o);
        for (int i = 0; i < 3; i++) node_tuner_step(&r->tuner, &report);
        ends[way] = bytes_of(r->adapter, &other);
        node_adapter_close(way == 0 ? r->adapter : NULL);
        if (way == 0) r->adapter = loaded;
    }
    T_CHECK(memcmp(ends[0], ends[1], other) == 0, "the same bits");
    free(ends[0]);
    free(ends[1]);
    free(saved);
    rig_close(r);
}

static void test_a_gradient_that_is_not_finite_changes_nothing(void) {
    rig *r = rig_open(&tiny_default);
    const node_tune_opts o = small_opts();
    node_tune_report report;
    rig_bind(r, &o);
    r->adapter->span[3][1] = INFINITY;
    float *was = malloc(r->adapter->span_count[3] * sizeof(float));
    node_adapter_get(r->adapter, 3, was);
    node_tuner_step(&r->tuner, &report);
    T_CHECK(report.skipped, "it says so");
    T_CHECK(memcmp(was, r->adapter->span[3], r->adapter->span_count[3] * sizeof(float)) == 0,
            "the same bits");
    free(was);
    rig_close(r);
}

static void test_memory_is_refused_with_what_it_needs(void) {
    rig *r = rig_open(&tiny_default);
    node_tune_opts o = node_tune_defaults();
    node_tune_plan plan, again;
    o.prefix_bytes = 0;
    fl_err err;
    T_OK(node_tune_make_plan(&r->t->model, 4, &r->text.docs, &o, &plan, &err), err);
    T_EQ(plan.opts.sequence, NODE_TUNE_SEQUENCE);
    T_EQ(plan.opts.micro, 1);
    T_EQ(plan.opts.chunk, NODE_TUNE_CHUNK);
    T_EQ(plan.opts.kept, plan.window);
    node_tune_measure(&r->t->model, 4, &r->text.docs, &plan.opts, &again);
    T_EQ(again.peak_bytes, plan.peak_bytes);
    // The bound is sharp.
    o.memory_bytes = plan.peak_bytes;
    T_OK(node_tune_make_plan(&r->t->model, 4, &r->text.docs, &o, &again, &err), err);
    T_EQ(again.peak_bytes, plan.peak_bytes);
    o.memory_bytes--;
    T_EQ(node_tune_make_plan(&r->t->model, 4, &r->text.docs, &o, &again, &err), FL_ENOMEM);
    T_CHECK(strstr(err.text, "that does not fit") != NULL && strstr(err.text, "need") != NULL, "%s",
            err.text);
    rig_close(r);
}

// Moves the run to another plan after 3 steps and back after 7; the same bits as without.
static void test_a_run_goes_on_with_another_plan(void) {
    fl_pool *pool = NULL;
    fl_err err;
    T_OK(fl_pool_open(3, &pool, &err), err);
    for (int kind = NODE_WINDOW_LAST; kind <= NODE_WINDOW_IMPORTANCE; kind++) {
        size_t size, other;
        uint8_t *ends[2];
        for (int moving = 0; moving < 2; moving++) {
            t_seed = 78;
            rig *r = rig_open(&tiny_default);
            node_tune_opts o = small_opts();
            node_tune_report report;
            o.window.kind = (node_window_kind)kind;
            o.window.steps = 70;
            o.micro = 2;
            o.kept = 0;
            rig_bind(r, &o);
            for (int i = 0; i < 70; i++) { // more than an epoch
                node_tuner_step(&r->tuner, &report);
                if (!moving || (i != 3 && i != 40)) continue;
                void *state = malloc(node_tuner_state_size(&r->tuner));
                T_NEED(state != NULL, "memory");
                node_tuner_state_get(&r->tuner, state);
                o.kept = i == 3 ? 2 : 1;
                o.threads = i == 3 ? 3 : 1;
                r->engine.pool = i == 3 ? pool : NULL;
                rig_bind(r, &o);
                node_tuner_state_set(&r->tuner, state);
                free(state);
            }
            T_EQ(report.step, 70);
            T_CHECK(r->tuner.batches.epoch > 0, "epoch %llu",
                    (unsigned long long)r->tuner.batches.epoch);
            ends[moving] = bytes_of(r->adapter, moving ? &other : &size);
            rig_close(r);
        }
        T_CHECK(size == other && memcmp(ends[0], ends[1], size) == 0, "%s",
                node_window_name((node_window_kind)kind));
        free(ends[0]);
        free(ends[1]);
    }
    fl_pool_close(pool);
}

static void test_a_step_says_where_its_time_went(void) {
    rig *r = rig_open(&tiny_default);
    node_tune_opts o = small_opts();
    node_tune_report s;
    o.window.size = 2;
    o.micro = 3;
    rig_bind(r, &o);
    node_tuner_step(&r->tuner, &s);
    T_CHECK(s.below_s > 0 && s.window_s > 0 && s.head_s > 0 && s.back_s > 0 && s.rest_s > 0,
            "%g %g %g %g %g", s.below_s, s.window_s, s.head_s, s.back_s, s.rest_s);
    rig_close(r);
}

// The cache takes what the limit leaves, never more, and is bound to exactly what was planned.
static void test_the_plan_counts_the_prefix_cache(void) {
    rig *r = rig_open(&tiny_default);
    node_tune_opts o = small_opts();
    node_tune_plan bare, all, plan;
    node_prefix prefix;
    fl_arena arena;
    fl_err err;
    o.prefix_bytes = 0;
    T_OK(node_tune_make_plan(&r->t->model, 4, &r->text.docs, &o, &bare, &err), err);
    T_EQ(bare.prefix_bytes, 0);
    o.prefix_bytes = 1 << 30;
    T_OK(node_tune_make_plan(&r->t->model, 4, &r->text.docs, &o, &all, &err), err);
    T_EQ(all.prefix.places, all.batches);
    T_EQ(all.batches, (node_docs_inputs(&r->text.docs) + 31) / 32);
    T_EQ(all.arena_bytes, bare.arena_bytes);
    uint32_t before = 0;
    for (uint64_t left = 0; left <= all.prefix_bytes + 4000; left += 997) {
        o.memory_bytes = bare.peak_bytes + left;
        T_OK(node_tune_make_plan(&r->t->model, 4, &r->text.docs, &o, &plan, &err), err);
        T_CHECK(plan.peak_bytes <= o.memory_bytes, "%llu", (unsigned long long)plan.peak_bytes);
        T_EQ(plan.peak_bytes, bare.peak_bytes + plan.prefix_bytes);
        T_CHECK(plan.prefix.places >= before && plan.prefix.places <= all.batches, "more for more");
        before = plan.prefix.places;
        if (plan.prefix_bytes == 0) continue;
        void *block = aligned_alloc(64, (plan.prefix_bytes + 63) / 64 * 64);
        T_NEED(block != NULL, "memory");
        fl_arena_init(&arena, block, plan.prefix_bytes);
        node_prefix_bind(&prefix, &plan.prefix, NULL, &arena);
        T_EQ(arena.peak, plan.prefix_bytes);
        free(block);
    }
    T_EQ(before, all.batches);
    // None where no state comes again.
    o.memory_bytes = 0;
    o.window.steps = all.batches;
    T_OK(node_tune_make_plan(&r->t->model, 4, &r->text.docs, &o, &plan, &err), err);
    T_EQ(plan.prefix_bytes, 0);
    o.window.steps++;
    T_OK(node_tune_make_plan(&r->t->model, 4, &r->text.docs, &o, &plan, &err), err);
    T_CHECK(plan.prefix_bytes > 0, "the second epoch");
    o.window.size = 4; // the window is the whole model
    T_OK(node_tune_make_plan(&r->t->model, 4, &r->text.docs, &o, &plan, &err), err);
    T_EQ(plan.prefix_bytes, 0);
    o.window.size = 0;
    for (int kind = NODE_WINDOW_CYCLIC; kind <= NODE_WINDOW_IMPORTANCE; kind++) {
        o.window.kind = (node_window_kind)kind;
        T_OK(node_tune_make_plan(&r->t->model, 4, &r->text.docs, &o, &plan, &err), err);
        T_EQ(plan.prefix_bytes, 0);
    }
    o.window.kind = NODE_WINDOW_ORDERED;
    o.window.steps = 2 * all.batches; // one epoch each
    T_OK(node_tune_make_plan(&r->t->model, 4, &r->text.docs, &o, &plan, &err), err);
    T_EQ(plan.prefix_bytes, 0);
    o.window.steps = 4 * all.batches;
    T_OK(node_tune_make_plan(&r->t->model, 4, &r->text.docs, &o, &plan, &err), err);
    T_CHECK(plan.prefix_bytes > 0, "two epochs each");
    rig_close(r);
}

static void test_options_are_checked(void) {
    rig *r = rig_open(&tiny_default);
    const node_tune_opts good = small_opts();
    node_tune_plan plan;
    fl_err err;
#define REFUSE(change)                                                                             \
    do {                                                                                           \
        node_tune_opts o = good;                                                                   \
        change;                                                                                    \
        T_CHECK(node_tune_make_plan(&r->t->model, 4, &r->text.docs, &o, &plan, &err) == FL_EARG,   \
                #change);                                                                          \
    } while (0)
    REFUSE(o.window.size = 5);
    T_CHECK(strstr(err.text, "larger than the model's 4") != NULL, "%s", err.text);
    REFUSE((o.window.kind = NODE_WINDOW_FIXED, o.window.exit = 2));
    REFUSE((o.window.size = 2, o.window.still = 2));
    REFUSE(o.sequence = 8);
    REFUSE(o.sequence = 1 << 20);
    REFUSE(o.micro = 1 << 20);
    REFUSE(o.lr = NAN);
    REFUSE(o.lr = -1.0f);
    REFUSE(o.beta1 = 1.0f);
    REFUSE(o.epsilon = 0.0f);
    REFUSE(o.clip = -1.0f);
    T_EQ(node_tune_make_plan(&r->t->model, 0, &r->text.docs, &good, &plan, NULL), FL_EARG);
    T_EQ(node_tune_make_plan(&r->t->model, 65, &r->text.docs, &good, &plan, NULL), FL_EARG);
    r->text.ids[77] = (int32_t)tiny_default.vocabulary;
    T_EQ(node_tune_make_plan(&r->t->model, 4, &r->text.docs, &good, &plan, &err), FL_EARG);
    T_CHECK(strstr(err.text, "token 67") != NULL, "%s", err.text);
    r->text.ids[77] = 0;
    const node_docs none = {r->text.ids, r->text.begin, 0};
    T_EQ(node_tune_make_plan(&r->t->model, 4, &none, &good, &plan, NULL), FL_EARG);
    rig_close(r);
}

static void test_windows(void) {
    tiny_shape shape = tiny_default;
    shape.layers = 10;
    shape.exits = 4; // after 3, 5, 8, 10 layers
    tiny_model *t = tiny_open(&shape);
    const node_model *m = &t->model;
    for (int kind = NODE_WINDOW_LAST; kind <= NODE_WINDOW_FIXED; kind++) {
        node_window_opts o = {.kind = (node_window_kind)kind, .steps = 100, .exit = 2, .seed = 4};
        uint32_t seen[4] = {0};
        for (uint64_t step = 0; step < 100; step++) {
            const node_window w = node_window_at(m, &o, step);
            T_NEED(w.exit < 4, "%u", w.exit);
            T_EQ(w.last + 1, m->exit_layer[w.exit]);
            const bool whole = kind == NODE_WINDOW_LAST || w.exit == 0;
            T_EQ(w.first, whole ? 0 : m->exit_layer[w.exit - 1]);
            T_CHECK(w.last - w.first < node_window_layers(m, &o), "the widest");
            T_CHECK(w.last <= node_window_depth(m, &o), "the deepest");
            seen[w.exit]++;
        }
        node_window_kind parsed;
        T_CHECK(node_window_parse(node_window_name(o.kind), &parsed) && parsed == o.kind, "name");
        if (kind == NODE_WINDOW_LAST) T_EQ(seen[3], 100);
        if (kind == NODE_WINDOW_FIXED) T_EQ(seen[2], 100);
        if (kind == NODE_WINDOW_HEAVY) T_EQ(seen[3], 50);
        for (int e = 0; e < 4; e++) {
            if (kind == NODE_WINDOW_ORDERED || kind == NODE_WINDOW_CYCLIC) T_EQ(seen[e], 25);
            if (kind == NODE_WINDOW_RANDOM || kind == NODE_WINDOW_IMPORTANCE)
                T_CHECK(seen[e] >= 10, "exit %d: %u of 100", e, seen[e]);
        }
    }
    // Ordered windows stay for whole epochs, from below upwards, where an epoch fits.
    for (uint64_t epoch = 1; epoch < 40; epoch += 3) {
        const node_window_opts o = {
            .kind = NODE_WINDOW_ORDERED, .steps = 100, .epoch_steps = epoch};
        uint32_t runs[4] = {0}, exit = 0;
        for (uint64_t step = 0; step < 100; step++) {
            const node_window w = node_window_at(m, &o, step);
            T_CHECK(w.exit >= exit, "upwards");
            exit = w.exit;
            runs[exit]++;
        }
        for (int e = 0; e < 3; e++) T_EQ(runs[e], epoch <= 25 ? 25 - 25 % epoch : 25);
        T_EQ(node_window_held(m, &o), runs[0]);
    }
    const node_window_opts skewed = {.kind = NODE_WINDOW_IMPORTANCE,
                                     .importance = {1e-6f, 1e-6f, 1.0f, 1e-6f}};
    for (uint64_t step = 0; step < 50; step++) T_EQ(node_window_at(m, &skewed, step).exit, 2);
    const node_window deep = node_window_of_exit(m, 7, 1);
    T_EQ(deep.first, 0);
    T_EQ(deep.last, 4);
    node_window_kind kind;
    T_CHECK(!node_window_parse("sideways", &kind), "no such schedule");
    tiny_close(t);
}

T_MAIN({"plan_is_the_arena", test_plan_is_the_arena},
       {"a_step_allocates_nothing", test_a_step_allocates_nothing}, {"loss_falls", test_loss_falls},
       {"a_step_changes_only_its_window", test_a_step_changes_only_its_window},
       {"bits_do_not_depend_on_the_plan", test_bits_do_not_depend_on_the_plan},
       {"resume_from_a_file", test_resume_from_a_file},
       {"a_gradient_that_is_not_finite_changes_nothing",
        test_a_gradient_that_is_not_finite_changes_nothing},
       {"memory_is_refused_with_what_it_needs", test_memory_is_refused_with_what_it_needs},
       {"the_plan_counts_the_prefix_cache", test_the_plan_counts_the_prefix_cache},
       {"a_run_goes_on_with_another_plan", test_a_run_goes_on_with_another_plan},
       {"a_step_says_where_its_time_went", test_a_step_says_where_its_time_went},
       {"options_are_checked", test_options_are_checked}, {"windows", test_windows})
