// Goal: a conversation gives the same bits however its tokens were fed, stays inside its plan, and
// refuses what does not fit; sampling follows the distribution that was asked for.
// Method: one text fed whole, in pieces, token by token, and again after a rewind, against the
// layers run over the whole text; frequencies of 40,000 draws against their expectation.
#include "node/model/generate.h"
#include "tests/check.h"
#include "tests/model_fixtures.h"

enum { TOKENS = 40 };

static fl_kern kern;
static node_engine engine = {&kern, NULL};

__attribute__((constructor)) static void select_kernels(void) {
    fl_kern_select(&kern, fl_cpu_detect());
}

typedef struct talk {
    void *block;
    node_session *session;
} talk;

static talk talk_open(const node_model *m, uint32_t context, uint32_t chunk) {
    const node_session_opts opts = {context, chunk, 2, 0};
    size_t size;
    fl_err err;
    T_OK(node_session_plan(m, &opts, &size, &err), err);
    talk t = {.block = aligned_alloc(64, (size + 63) / 64 * 64)};
    fl_arena arena;
    fl_arena_init(&arena, t.block, size);
    t.session = node_session_bind(m, &opts, &arena);
    T_EQ(arena.peak, size);
    return t;
}

static const float *feed(talk *t, const int32_t *ids, size_t count) {
    const float *hidden = NULL;
    fl_err err;
    T_OK(node_session_feed(t->session, &engine, NULL, ids, count, &hidden, &err), err);
    return hidden;
}

// Hidden states of the last token at every exit, without a session.
static void whole(const node_model *m, const int32_t *ids, float *ret) {
    uint32_t pos[TOKENS], zero[TOKENS] = {0};
    for (uint32_t t = 0; t < TOKENS; t++) pos[t] = t;
    const node_batch batch = {TOKENS, ids, pos, zero, pos};
    fl_arena arena;
    void *block = aligned_alloc(64, 1 << 22);
    fl_arena_init(&arena, block, 1 << 22);
    node_acts acts;
    node_acts_bind(&acts, m, TOKENS, TOKENS, 0, &arena);
    node_scratch *scratch = node_scratch_bind(m, TOKENS, 1, &arena);
    float *x = FL_ARENA_NEW(&arena, float, (size_t)TOKENS * m->hidden);
    T_NEED(x != NULL, "memory");
    node_embed(&engine, m, &batch, x);
    for (uint32_t l = 0, e = 0; l < m->layers; l++) {
        node_layer_forward(&engine, m, l, NULL, &batch, &acts, scratch, x);
        if (m->exit_layer[e] == l + 1)
            memcpy(ret + (size_t)e++ * m->hidden, x + (size_t)(TOKENS - 1) * m->hidden,
                   m->hidden * sizeof(float));
    }
    free(block);
}

static void check_model(const t_model_opts *o) {
    static const uint32_t chunks[] = {1, 7, 16, TOKENS};
    node_model *m = t_model_make(o);
    int32_t ids[TOKENS];
    for (uint32_t t = 0; t < TOKENS; t++) ids[t] = (int32_t)(t_rand() % m->vocabulary);
    const size_t size = sizeof(float) * m->exits * m->hidden;
    float *want = malloc(size);
    whole(m, ids, want);
    for (size_t c = 0; c < FL_COUNT(chunks); c++) {
        talk t = talk_open(m, TOKENS, chunks[c]);
        T_CHECK(memcmp(feed(&t, ids, TOKENS), want, size) == 0, "chunks of %u", chunks[c]);
        node_session_rewind(t.session, 13);
        feed(&t, ids + 13, 20);
        for (uint32_t i = 33; i + 1 < TOKENS; i++) feed(&t, ids + i, 1);
        T_CHECK(memcmp(feed(&t, ids + TOKENS - 1, 1), want, size) == 0, "rewound, %u", chunks[c]);
        T_EQ(node_session_length(t.session), TOKENS);
        free(t.block);
    }
    free(want);
    node_model_close(m);
}

static void test_feeding_in_pieces_changes_no_bit(void) {
    t_model_opts o = t_model_odd();
    o.layers = 5;
    check_model(&o);
    o.bits = 3;
    o.pruned = true;
    check_model(&o);
}

static void test_refuses_what_does_not_fit(void) {
    const t_model_opts o = t_model_odd();
    node_model *m = t_model_make(&o);
    size_t size = 7;
    T_EQ(node_session_plan(m, &(node_session_opts){513, 1, 1, 0}, &size, NULL), FL_EARG);
    T_EQ(node_session_plan(m, &(node_session_opts){8, 9, 1, 0}, &size, NULL), FL_EARG);
    T_EQ(node_session_plan(m, &(node_session_opts){0, 0, 1, 0}, &size, NULL), FL_EARG);
    T_EQ(node_session_plan(m, &(node_session_opts){8, 8, 0, 0}, &size, NULL), FL_EARG);
    T_EQ(size, 7);
    talk t = talk_open(m, 8, 3);
    const int32_t good[9] = {1, 2, 3, 4, 5, 6, 7, 8, 9}, bad[3] = {1, 2, (int32_t)o.vocabulary};
    const float *hidden = NULL;
    fl_err err;
    T_EQ(node_session_feed(t.session, &engine, NULL, good, 9, &hidden, &err), FL_ELIMIT);
    T_EQ(node_session_feed(t.session, &engine, NULL, good, 0, &hidden, &err), FL_EARG);
    T_EQ(node_session_feed(t.session, &engine, NULL, bad, 3, &hidden, &err), FL_EARG);
    T_EQ(node_session_feed(t.session, &engine, NULL, (int32_t[]){-1}, 1, &hidden, &err), FL_EARG);
    T_CHECK(hidden == NULL && node_session_length(t.session) == 0, "nothing has happened");
    feed(&t, good, 8);
    T_EQ(node_session_feed(t.session, &engine, NULL, good, 1, &hidden, &err), FL_ELIMIT);
    free(t.block);
    node_model_close(m);
}

enum { COUNT = 50, DRAWS = 40000 };

// Frequencies of DRAWS draws against `want`, 5 standard deviations each.
static void check_draws(const node_sample_opts *opts, const float *p, const double *want) {
    node_candidate scratch[COUNT];
    uint32_t seen[COUNT] = {0};
    for (uint64_t i = 0; i < DRAWS; i++) {
        const int32_t id = node_sample(opts, i, p, COUNT, scratch);
        T_NEED(id >= 0 && id < COUNT, "%d", id);
        seen[id]++;
    }
    for (uint32_t i = 0; i < COUNT; i++)
        T_NEAR(seen[i] / (double)DRAWS, want[i],
               5 * sqrt(want[i] * (1 - want[i]) / DRAWS) + (want[i] > 0 ? 1e-4 : 0), "token %u", i);
}

// want = p^(1/T) over those `keep` says, summing to 1.
static void expect(const float *p, double temperature, const bool *keep, double *want) {
    double sum = 0;
    for (uint32_t i = 0; i < COUNT; i++) {
        want[i] = keep[i] ? pow((double)p[i], 1 / temperature) : 0;
        sum += want[i];
    }
    for (uint32_t i = 0; i < COUNT; i++) want[i] /= sum;
}

static void test_draws_follow_the_distribution(void) {
    float p[COUNT];
    double want[COUNT];
    bool keep[COUNT];
    for (uint32_t i = 0; i < COUNT; i++) p[i] = 0.001f + (float)((i * 37) % COUNT) / 1000;
    for (uint32_t i = 0; i < COUNT; i++) keep[i] = true;
    expect(p, 1, keep, want);
    check_draws(&(node_sample_opts){1, 0, 1, 3}, p, want);
    expect(p, 0.5, keep, want);
    check_draws(&(node_sample_opts){0.5f, 0, 1, 4}, p, want);
    for (uint32_t i = 0; i < COUNT; i++) keep[i] = (i * 37) % COUNT >= COUNT - 6;
    expect(p, 2, keep, want);
    check_draws(&(node_sample_opts){2, 6, 1, 5}, p, want);
    check_draws(&(node_sample_opts){2, 6, 0.9999f, 5}, p, want);
    // Sum of all is 1.275: the four largest, 0.050 .. 0.047, reach 0.152 of it, five 0.188.
    for (uint32_t i = 0; i < COUNT; i++) keep[i] = (i * 37) % COUNT >= COUNT - 5;
    expect(p, 1, keep, want);
    check_draws(&(node_sample_opts){1, 0, 0.16f, 6}, p, want);
    for (uint32_t i = 0; i < COUNT; i++) keep[i] = (i * 37) % COUNT >= COUNT - 4;
    expect(p, 1, keep, want);
    check_draws(&(node_sample_opts){1, 0, 0.15f, 7}, p, want);
}

static void test_select_keeps_the_most_probable(void) {
    for (uint32_t round = 0; round < 200; round++) {
        float p[COUNT];
        node_candidate scratch[COUNT];
        for (uint32_t i = 0; i < COUNT; i++) p[i] = (float)(1 + t_rand() % 20); // many equals
        const uint32_t k = 1 + (uint32_t)(t_rand() % COUNT);
        bool drawn[COUNT] = {false};
        const node_sample_opts opts = {100, k, 1, round};
        for (uint64_t i = 0; i < 50; i++) {
            const int32_t id = node_sample(&opts, i, p, COUNT, scratch);
            T_NEED(id >= 0 && id < COUNT, "%d", id);
            drawn[id] = true;
        }
        for (uint32_t i = 0; i < COUNT; i++) { // rank: how many come before it
            uint32_t rank = 0;
            for (uint32_t j = 0; j < COUNT; j++) rank += p[j] > p[i] || (p[j] == p[i] && j < i);
            T_CHECK(!drawn[i] || rank < k, "rank %u drawn with top %u", rank, k);
        }
    }
}

static void test_greedy_and_broken_distributions(void) {
    node_candidate scratch[4];
    const node_sample_opts greedy = {0, 0, 1, 1}, drawn = {1, 2, 0.9f, 1};
    T_EQ(node_sample(&greedy, 0, (float[]){0.1f, 0.4f, 0.4f, 0.1f}, 4, scratch), 1);
    T_EQ(node_sample(&greedy, 0, (float[]){NAN, 0.1f, INFINITY, -1}, 4, scratch), 1);
    T_EQ(node_sample(&drawn, 0, (float[]){NAN, 0.1f, INFINITY, -1}, 4, scratch), 1);
    T_EQ(node_sample(&greedy, 0, (float[]){NAN, 0, 0, -1}, 4, scratch), -1);
    T_EQ(node_sample(&drawn, 0, (float[]){NAN, 0, 0, -1}, 4, scratch), -1);
    T_EQ(node_sample(&drawn, 0, (float[]){0}, 0, scratch), -1);
}

T_MAIN({"feeding_in_pieces_changes_no_bit", test_feeding_in_pieces_changes_no_bit},
       {"refuses_what_does_not_fit", test_refuses_what_does_not_fit},
       {"draws_follow_the_distribution", test_draws_follow_the_distribution},
       {"select_keeps_the_most_probable", test_select_keeps_the_most_probable},
       {"greedy_and_broken_distributions", test_greedy_and_broken_distributions}, )
