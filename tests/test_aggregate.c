// Goal: a layer's updates become exactly the mean they should, whatever the order they came in, and
// the optimisers do what their papers say.
// Method: brute force with the same integers, permutations and trees of partial sums compared bit
// for bit, golden numbers computed independently, and what the gate must refuse.
#include "common/fault.h"
#include "coordinator/aggregate.h"
#include "coordinator/aggregate_vote.h"
#include "tests/check.h"

enum { COUNT = 97, UPDATES = 23 };
#define SUMS_DIGEST 0xf2c108f854e267b0u

typedef struct update {
    int64_t values[COUNT];
    uint64_t weight;
    uint32_t clip;
} update;

static void random_updates(update *u, size_t updates) {
    for (size_t k = 0; k < updates; k++) {
        for (size_t i = 0; i < COUNT; i++) u[k].values[i] = (int64_t)(t_rand() >> 24) - (1ll << 39);
        u[k].weight = coord_weight(1 + t_rand() % 100000, t_rand() % 9);
        u[k].clip = t_rand() % 3 == 0 ? (uint32_t)(t_rand() % COORD_ONE) : COORD_ONE;
    }
}

static void shuffle(size_t *order, size_t n) {
    for (size_t i = 0; i < n; i++) order[i] = i;
    for (size_t i = n; i > 1; i--) {
        const size_t j = t_rand() % i, kept = order[i - 1];
        order[i - 1] = order[j];
        order[j] = kept;
    }
}

static void test_staleness_is_the_rounded_root(void) {
    static const uint32_t golden[] = {65536, 46341, 37837, 32768, 29309};
    for (uint64_t tau = 0; tau < FL_COUNT(golden); tau++) T_EQ(coord_staleness(tau), golden[tau]);
    for (uint64_t tau = 0; tau < 100000; tau += 1 + tau / 64) {
        const double want = 65536.0 / sqrt(1.0 + (double)tau);
        T_CHECK(fabs(coord_staleness(tau) - want) <= 0.5 + 1e-9, "tau=%d", (int)tau);
    }
    T_EQ(coord_staleness(UINT64_MAX), 0);
    T_EQ(coord_weight(UINT64_MAX, 0), COORD_TOKENS_MAX * COORD_ONE);
    T_EQ(coord_weight(3, 3), 3 * 32768);
}

// The definition, written as plainly as it can be: one coordinate at a time, from all updates.
static double brute_mean(const update *u, size_t updates, size_t i, double unit, double kappa) {
    coord_wide sum = 0;
    coord_uwide squares = 0;
    uint64_t weight = 0;
    for (size_t k = 0; k < updates; k++) {
        sum += (coord_wide)u[k].values[i] * (coord_wide)u[k].weight * u[k].clip;
        weight += u[k].weight;
        squares += (coord_uwide)u[k].weight * u[k].weight;
    }
    const double n = (double)weight * (double)weight / (double)squares;
    return (double)sum / (double)weight * (n / (n + kappa) * unit / 65536.0);
}

static void test_any_order_gives_the_same_bits(void) {
    static update u[UPDATES];
    fl_err err;
    for (int trial = 0; trial < 20; trial++) {
        const size_t updates = 1 + t_rand() % UPDATES;
        size_t order[UPDATES];
        coord_sum all, part[3];
        double mean[COUNT];
        random_updates(u, updates);
        shuffle(order, updates);
        T_OK(coord_sum_init(&all, COUNT, &err), err);
        for (size_t p = 0; p < 3; p++) T_OK(coord_sum_init(&part[p], COUNT, &err), err);
        for (size_t k = 0; k < updates; k++) {
            const update *one = &u[order[k]];
            T_OK(coord_sum_fold(&part[t_rand() % 3], one->values, COUNT, one->weight, one->clip,
                                &err),
                 err);
        }
        for (size_t p = 0; p < 3; p++) T_OK(coord_sum_merge(&all, &part[p], &err), err);
        const double kappa = trial % 2 == 0 ? 0.0 : 1.5;
        T_OK(coord_sum_mean(&all, 0x1p-24, kappa, mean, &err), err);
        for (size_t i = 0; i < COUNT; i++) {
            const double want = brute_mean(u, updates, i, 0x1p-24, kappa);
            T_CHECK(memcmp(&mean[i], &want, sizeof(want)) == 0, "%zu: %a %a", i, mean[i], want);
        }
        coord_sum_done(&all);
        for (size_t p = 0; p < 3; p++) coord_sum_done(&part[p]);
    }
}

static void test_one_update_is_its_own_mean(void) {
    coord_sum s;
    fl_err err;
    const int64_t values[3] = {5, -7, COORD_VALUE_MAX};
    double mean[3];
    T_OK(coord_sum_init(&s, 3, &err), err);
    T_OK(coord_sum_fold(&s, values, 3, 12345 * (uint64_t)COORD_ONE, COORD_ONE, &err), err);
    T_OK(coord_sum_mean(&s, 1.0, 0.0, mean, &err), err);
    for (int i = 0; i < 3; i++) T_CHECK(mean[i] == (double)values[i], "%g", mean[i]);
    T_OK(coord_sum_mean(&s, 1.0, 1.0, mean, &err), err); // one node of a rare layer: halved
    T_CHECK(mean[0] == 2.5, "%g", mean[0]);
    coord_sum_done(&s);
}

// The proof of the bounds, at the bounds: the largest sum does not wrap.
static void test_the_largest_sum_fits(void) {
    coord_sum s, t;
    fl_err err;
    const int64_t value = -COORD_VALUE_MAX;
    double mean;
    T_OK(coord_sum_init(&s, 1, &err), err);
    T_OK(coord_sum_init(&t, 1, &err), err);
    T_OK(coord_sum_fold(&s, &value, 1, COORD_TOKENS_MAX * COORD_ONE, COORD_ONE, &err), err);
    for (int doubling = 0; doubling < 20; doubling++) {
        coord_sum_done(&t);
        T_OK(coord_sum_init(&t, 1, &err), err);
        T_OK(coord_sum_merge(&t, &s, &err), err);
        T_OK(coord_sum_merge(&s, &t, &err), err);
    }
    T_EQ(s.updates, COORD_FOLDS_MAX);
    T_OK(coord_sum_mean(&s, 1.0, 0.0, &mean, &err), err);
    T_CHECK(mean == -0x1p40, "%g", mean);
    T_EQ(coord_sum_merge(&s, &t, &err), FL_ELIMIT);
    T_EQ(coord_sum_fold(&s, &value, 1, 1, COORD_ONE, &err), FL_ELIMIT);
    coord_sum_done(&s);
    coord_sum_done(&t);
}

static void test_refused_folds_change_nothing(void) {
    coord_sum s;
    fl_err err;
    int64_t values[2] = {1, 2};
    double mean[2];
    T_OK(coord_sum_init(&s, 2, &err), err);
    T_EQ(coord_sum_mean(&s, 1.0, 0.0, mean, &err), FL_ESTATE);
    T_EQ(coord_sum_fold(&s, values, 1, 1, COORD_ONE, &err), FL_EARG);
    T_EQ(coord_sum_fold(&s, values, 2, 0, COORD_ONE, &err), FL_EARG);
    T_EQ(coord_sum_fold(&s, values, 2, COORD_TOKENS_MAX * COORD_ONE + 1, COORD_ONE, &err), FL_EARG);
    T_EQ(coord_sum_fold(&s, values, 2, 1, COORD_ONE + 1, &err), FL_EARG);
    values[1] = COORD_VALUE_MAX + 1;
    T_EQ(coord_sum_fold(&s, values, 2, 1, COORD_ONE, &err), FL_ELIMIT);
    values[1] = INT64_MIN;
    T_EQ(coord_sum_fold(&s, values, 2, 1, COORD_ONE, &err), FL_ELIMIT);
    T_EQ(s.updates, 0);
    T_CHECK(coord_sum_at(&s, 0) == 0 && s.weight == 0, "nothing was added");
    coord_sum_done(&s);
}

// ---- every way to a sum gives the same bits

typedef struct sample {
    float *floats; // the same values as integers
    int64_t *values;
    uint64_t weight;
    uint32_t clip;
} sample;

enum { SAMPLES = 40, VALUES = 9001 }; // no multiple of a vector

static sample samples[SAMPLES];

// Magnitudes from 2^-40 to 2^6, so that every path is taken; a few weights that no lane can hold.
static void make_samples(void) {
    for (size_t k = 0; k < SAMPLES; k++) {
        sample *s = &samples[k];
        if (s->floats == NULL) s->floats = malloc(VALUES * sizeof(*s->floats));
        if (s->values == NULL) s->values = malloc(VALUES * sizeof(*s->values));
        T_NEED(s->floats != NULL && s->values != NULL, "memory");
        const int scale = (int)(t_rand() % 46) - 40;
        for (size_t i = 0; i < VALUES; i++) {
            const float draw = t_randf(); // one after the other: arguments have no order
            const float value = ldexpf(draw, scale + (int)(t_rand() % 3));
            s->floats[i] = i == k ? 64.0f : value;
            if (fabsf(s->floats[i]) > 64.0f) s->floats[i] = -64.0f;
            s->values[i] = (int64_t)rint((double)s->floats[i] * 0x1p32);
        }
        const uint64_t tokens = t_rand() % 4 == 0 ? COORD_TOKENS_MAX : 1 + t_rand() % 5000;
        s->weight = coord_weight(tokens, t_rand() % 3 == 0 ? t_rand() % 9 : 0);
        s->clip = t_rand() % 4 == 0 ? (uint32_t)(t_rand() % COORD_ONE) : COORD_ONE;
    }
}

static coord_wide exact(size_t i) {
    coord_wide sum = 0;
    for (size_t k = 0; k < SAMPLES; k++)
        sum += (coord_wide)samples[k].values[i] * (coord_wide)samples[k].weight * samples[k].clip;
    return sum;
}

static void check_exact(const coord_sum *s, const char *what) {
    size_t wrong = 0;
    for (size_t i = 0; i < VALUES; i++) wrong += coord_sum_at(s, i) != exact(i);
    T_CHECK(wrong == 0, "%s: %zu values of %d differ", what, wrong, VALUES);
    T_EQ(s->updates, SAMPLES);
}

// By the path that its number chooses: integers or floats, by any variant.
static void fold_sample(coord_sum *s, size_t k, uint64_t how) {
    const uint32_t cpu = fl_cpu_detect();
    size_t variants = 0;
    fl_err err;
    while (fl_fold_variants[variants].tag != NULL) variants++;
    const fl_fold_variant *v = &fl_fold_variants[how % variants];
    if ((v->need & cpu) == v->need) s->fold = v;
    const sample *u = &samples[k];
    T_OK(how / variants % 2 == 0
             ? coord_sum_fold(s, u->values, VALUES, u->weight, u->clip, &err)
             : coord_sum_fold_f32(s, u->floats, VALUES, u->weight, u->clip, &err),
         err);
}

// A random tree: leaves take the samples in a random order, then two random sums become one until
// one is left.
static void test_any_tree_gives_the_same_bits(void) {
    enum { PARTS = 7 };
    fl_err err;
    for (int trial = 0; trial < 12; trial++) {
        size_t order[SAMPLES], parts = 1 + t_rand() % PARTS;
        coord_sum part[PARTS];
        make_samples();
        shuffle(order, SAMPLES);
        for (size_t p = 0; p < parts; p++) T_OK(coord_sum_init(&part[p], VALUES, &err), err);
        for (size_t k = 0; k < SAMPLES; k++)
            fold_sample(&part[t_rand() % parts], order[k], t_rand());
        while (parts > 1) {
            const size_t a = t_rand() % parts, b = (a + 1 + t_rand() % (parts - 1)) % parts;
            T_OK(coord_sum_merge(&part[a], &part[b], &err), err);
            coord_sum_done(&part[b]);
            part[b] = part[--parts];
            if (a == parts) continue; // it moved to b
        }
        check_exact(&part[0], "tree");
        coord_sum_done(&part[0]);
    }
}

// The digest of a fixed set of updates: printed, and the same on every kind of processor.
static void test_the_digest_is_that_of_every_machine(void) {
    enum { GOLDEN_ORDERS = 3 };
    fl_err err;
    t_seed = 20240229; // whatever --seed says
    make_samples();
    for (int turn = 0; turn < GOLDEN_ORDERS; turn++) {
        coord_sum s;
        size_t order[SAMPLES];
        double *mean = malloc(VALUES * sizeof(*mean));
        T_NEED(mean != NULL, "memory");
        T_OK(coord_sum_init(&s, VALUES, &err), err);
        shuffle(order, SAMPLES);
        for (size_t k = 0; k < SAMPLES; k++) fold_sample(&s, order[k], t_rand());
        T_OK(coord_sum_mean(&s, 0x1p-32, 1.0, mean, &err), err);
        uint64_t digest = 0xcbf29ce484222325u; // FNV-1a over the words of sums and means
        for (size_t i = 0; i < VALUES; i++) {
            const coord_uwide a = (coord_uwide)coord_sum_at(&s, i);
            uint64_t words[3] = {(uint64_t)a, (uint64_t)(a >> 64), 0};
            memcpy(&words[2], &mean[i], sizeof(mean[i]));
            for (int w = 0; w < 3; w++) digest = (digest ^ words[w]) * 0x100000001b3u;
        }
        if (turn == 0) printf("digest of sums and means: %016llx\n", (unsigned long long)digest);
        T_CHECK(digest == SUMS_DIGEST, "%016llx", (unsigned long long)digest);
        coord_sum_done(&s);
        free(mean);
    }
}

static void test_bad_floats_leave_no_trace(void) {
    static const float bad[] = {NAN, INFINITY, -INFINITY, 64.00001f, -1e30f};
    coord_sum s;
    fl_err err;
    make_samples();
    T_OK(coord_sum_init(&s, VALUES, &err), err);
    for (size_t k = 0; k < SAMPLES; k++) {
        const size_t at = t_rand() % VALUES;
        const float kept = samples[k].floats[at];
        samples[k].floats[at] = bad[k % FL_COUNT(bad)];
        T_EQ(coord_sum_fold_f32(&s, samples[k].floats, VALUES, samples[k].weight, samples[k].clip,
                                &err),
             FL_ELIMIT);
        samples[k].floats[at] = kept;
        T_EQ(s.updates, k);
        fold_sample(&s, k, t_rand());
    }
    check_exact(&s, "after refusals");
    coord_sum_done(&s);
}

// Layers of more than one block: what was folded before the bad value is taken back.
static void test_large_updates_are_all_or_nothing(void) {
    enum { LARGE = 150001 };
    float *values = malloc(LARGE * sizeof(*values));
    coord_sum s;
    fl_err err;
    T_NEED(values != NULL, "memory");
    for (size_t i = 0; i < LARGE; i++) values[i] = 8.0f * t_randf();
    T_OK(coord_sum_init(&s, LARGE, &err), err);
    for (size_t k = 0; k < 6; k++) {
        const size_t at = k == 0 ? LARGE - 1 : t_rand() % LARGE;
        const float kept = values[at];
        values[at] = k % 2 == 0 ? NAN : -64.5f;
        T_EQ(coord_sum_fold_f32(&s, values, LARGE, coord_weight(777, k), COORD_ONE, &err),
             FL_ELIMIT);
        values[at] = kept;
    }
    size_t wrong = 0;
    for (size_t i = 0; i < LARGE; i++) wrong += coord_sum_at(&s, i) != 0;
    T_EQ(wrong, 0);
    T_OK(coord_sum_fold_f32(&s, values, LARGE, coord_weight(777, 0), COORD_ONE, &err), err);
    for (size_t i = 0; i < LARGE; i++) {
        const int64_t fixed = (int64_t)rint((double)values[i] * 0x1p32);
        wrong += coord_sum_at(&s, i) != (coord_wide)fixed * 777 * ((coord_wide)1 << 32);
    }
    T_EQ(wrong, 0);
    coord_sum_done(&s);
    free(values);
}

// The memory claim: updates as they come in a fleet need 8 bytes a value.
static void test_usual_updates_stay_in_lanes(void) {
    coord_sum s;
    fl_err err;
    make_samples();
    T_OK(coord_sum_init(&s, VALUES, &err), err);
    for (size_t i = 0; i < VALUES; i++) samples[0].floats[i] = 0.03f * t_randf();
    for (uint64_t k = 0; k < 2000; k++) { // the last hundred not all fresh: finer units
        const uint64_t weight = coord_weight(4096, k >= 1900 ? k % 3 : 0);
        if (k == 1900) coord_sum_reset(&s);
        T_OK(coord_sum_fold_f32(&s, samples[0].floats, VALUES, weight, COORD_ONE, &err), err);
    }
    T_CHECK(s.high == NULL, "updates of 4096 tokens needed 128 bits");
    coord_sum_done(&s);
}

static void test_weighing_again_is_as_if_it_came_so(void) {
    coord_sum s, want;
    fl_err err;
    make_samples();
    T_OK(coord_sum_init(&s, VALUES, &err), err);
    T_OK(coord_sum_init(&want, VALUES, &err), err);
    for (size_t k = 0; k < SAMPLES; k++) fold_sample(&s, k, t_rand());
    for (size_t k = 0; k < SAMPLES; k += 3) {
        const uint64_t less = 1 + samples[k].weight / 3;
        T_OK(coord_sum_reweigh(&s, samples[k].values, VALUES, samples[k].weight, less,
                               samples[k].clip, &err),
             err);
        samples[k].weight = less;
    }
    for (size_t k = 0; k < SAMPLES; k++) fold_sample(&want, k, t_rand());
    check_exact(&s, "weighed again");
    T_CHECK(s.weight == want.weight && s.squares == want.squares, "weights");
    T_EQ(coord_sum_reweigh(&s, samples[0].values, VALUES, 1, 0, COORD_ONE, &err), FL_EARG);
    coord_sum_done(&s);
    coord_sum_done(&want);
}

// Golden numbers: (beta .9/.99, rate .1, tau 1e-3), theta (1,-1), deltas (.10,-.20), (.05,.40).
static void test_optimisers_golden(void) {
    static const double delta[2][2] = {{.10, -.20}, {.05, .40}};
    static const struct {
        coord_opt_kind kind;
        double want[2][2];
    } rows[] = {
        {COORD_FEDAVG, {{1.01, -1.02}, {1.015, -.98}}},
        {COORD_FEDAVGM, {{1.01, -1.02}, {1.024, -.998}}},
        {COORD_FEDADAM, {{1.090502831, -1.095126052}, {1.205450551, -1.046972925}}},
        {COORD_FEDYOGI, {{1.090498756, -1.095124922}, {1.205018444, -1.047019130}}},
    };
    for (size_t r = 0; r < FL_COUNT(rows); r++) {
        const coord_opt opt = {rows[r].kind, .1, .9, .99, 1e-3};
        float theta[2] = {1.0f, -1.0f};
        double moments[4];
        fl_err err;
        coord_opt_start(&opt, 2, moments);
        for (int step = 0; step < 2; step++) {
            T_OK(coord_opt_step(&opt, 2, delta[step], theta, moments, &err), err);
            // theta is stored as a float once a step: half a unit in the last place each time.
            for (int i = 0; i < 2; i++)
                T_NEAR(theta[i], rows[r].want[step][i], (step + 1) * 0x1p-24 + 1e-9,
                       "kind %d step %d", (int)rows[r].kind, step);
        }
    }
}

// Lazy moments: rounds without updates in between leave no trace in a layer, whatever the
// optimiser.
static void test_missed_rounds_leave_no_trace(void) {
    enum { N = 3, STEPS = 6 };
    for (int kind = 0; kind < COORD_OPT_COUNT; kind++) {
        const coord_opt opt = {(coord_opt_kind)kind, .1, .9, .99, 1e-3};
        float always[N] = {1.0f, -1.0f, 0.5f}, seldom[N] = {1.0f, -1.0f, 0.5f};
        double a[2 * N], b[2 * N], delta[STEPS][N];
        fl_err err;
        for (int s = 0; s < STEPS; s++)
            for (int i = 0; i < N; i++) delta[s][i] = 0.1 * (double)t_randf();
        coord_opt_start(&opt, N, a);
        coord_opt_start(&opt, N, b);
        for (int s = 0; s < STEPS; s++)
            T_OK(coord_opt_step(&opt, N, delta[s], always, a, &err), err);
        coord_sum sum;
        T_OK(coord_sum_init(&sum, N, &err), err);
        for (int s = 0, round = 0; s < STEPS; round++) {
            double mean[N];
            if (round % 4 != 3) { // nothing came: there is no mean to step with
                T_EQ(coord_sum_mean(&sum, 1.0, 0.0, mean, &err), FL_ESTATE);
                continue;
            }
            T_OK(coord_opt_step(&opt, N, delta[s++], seldom, b, &err), err);
        }
        coord_sum_done(&sum);
        T_CHECK(memcmp(always, seldom, sizeof(always)) == 0, "kind %d", kind);
        const size_t moments = coord_opt_moments(opt.kind) * N * sizeof(double);
        T_CHECK(memcmp(a, b, moments) == 0, "moments of kind %d", kind);
    }
}

// ---- shares of a layer

static void test_no_node_has_more_than_its_share(void) {
    enum { MOST = 12 };
    const uint64_t golden[4] = {100, 3000, 200, 300};
    uint64_t got[MOST];
    coord_share_cap(golden, 4, COORD_ONE / 2, got); // the largest weighs what the others do
    T_CHECK(got[0] == 100 && got[1] == 600 && got[2] == 200 && got[3] == 300, "%d", (int)got[1]);
    coord_share_cap(golden, 2, COORD_ONE / 4, got);
    T_EQ(got[1], 3000); // of two nodes one must have half
    coord_share_cap(golden, 4, COORD_ONE / 5, got);
    T_CHECK(got[0] == 100 && got[1] == 100 && got[3] == 100, "no share of 1/5 among four");
    for (int trial = 0; trial < 3000; trial++) {
        const size_t nodes = 3 + t_rand() % (MOST - 2);
        const uint32_t least = COORD_ONE / (uint32_t)nodes + 1;
        const uint32_t share = least + (uint32_t)(t_rand() % (COORD_ONE - least));
        uint64_t w[MOST], back[MOST], capped[MOST], most = 0, cap = 0;
        coord_uwide sum = 0, with_one_more = 0;
        for (size_t i = 0; i < nodes; i++) {
            w[i] = 1 + (t_rand() >> (24 + t_rand() % 38));
            most = w[i] > most ? w[i] : most;
        }
        for (size_t i = 0; i < nodes; i++) back[i] = w[nodes - 1 - i];
        coord_share_cap(w, nodes, share, capped);
        for (size_t i = 0; i < nodes; i++) {
            cap = capped[i] > cap ? capped[i] : cap;
            sum += capped[i];
        }
        T_CHECK((coord_uwide)cap * COORD_ONE <= sum * share, "cap %llu", (unsigned long long)cap);
        for (size_t i = 0; i < nodes; i++) {
            T_EQ(capped[i], w[i] < cap ? w[i] : cap);
            with_one_more += w[i] < cap + 1 ? w[i] : cap + 1;
        }
        T_CHECK(cap == most || (coord_uwide)(cap + 1) * COORD_ONE > with_one_more * share,
                "one unit more would do: %llu", (unsigned long long)cap);
        coord_share_cap(back, nodes, share, got);
        for (size_t i = 0; i < nodes; i++) T_EQ(got[i], capped[nodes - 1 - i]);
    }
    T_EQ(coord_share_of(10, 7, 100), 1);
    T_EQ(coord_share_of((uint64_t)1 << 40, (uint64_t)1 << 58, (uint64_t)1 << 60), 1ll << 38);
}

static void test_optimiser_refuses_what_is_not_finite(void) {
    const coord_opt opt = {COORD_FEDAVGM, 1e38, .9, .99, 1e-3};
    float theta[2] = {1.0f, 2.0f};
    double moments[2] = {0, 0};
    const double delta[2] = {0.5, 1e3};
    fl_err err;
    T_EQ(coord_opt_step(&opt, 2, delta, theta, moments, &err), FL_ELIMIT);
    T_CHECK(theta[0] == 1.0f && theta[1] == 2.0f && moments[0] == 0.0, "unchanged");
    coord_opt_kind kind;
    T_OK(coord_opt_parse("fedyogi", &kind, &err), err);
    T_EQ(kind, COORD_FEDYOGI);
    T_EQ(coord_opt_parse("adam", &kind, &err), FL_EARG);
}

static void test_gate_clips_and_refuses(void) {
    const coord_gate gate = {3.0, 10.0, 5};
    coord_norms norms = {0};
    fl_err err;
    uint32_t clip = 0;
    T_OK(coord_gate_norm(&gate, &norms, 1e9, &clip, &err), err); // no median yet
    T_EQ(clip, COORD_ONE);
    T_EQ(coord_gate_norm(&gate, &norms, NAN, &clip, &err), FL_ELIMIT);
    T_EQ(coord_gate_norm(&gate, &norms, INFINITY, &clip, &err), FL_ELIMIT);
    static const double seen[] = {1.0, 2.0, 4.0, 1000.0, 2.0};
    for (size_t i = 0; i < FL_COUNT(seen); i++) coord_norms_add(&norms, seen[i]);
    T_CHECK(coord_norms_median(&norms) == 2.0, "%g", coord_norms_median(&norms));
    T_OK(coord_gate_norm(&gate, &norms, 6.0, &clip, &err), err);
    T_EQ(clip, COORD_ONE);
    T_OK(coord_gate_norm(&gate, &norms, 12.0, &clip, &err), err);
    T_EQ(clip, COORD_ONE / 2);
    T_EQ(coord_gate_norm(&gate, &norms, 20.1, &clip, &err), FL_ELIMIT);
    for (int i = 0; i < COORD_NORMS_MAX; i++) coord_norms_add(&norms, 7.0); // old norms leave
    T_CHECK(coord_norms_median(&norms) == 7.0, "%g", coord_norms_median(&norms));
    const int64_t values[2] = {3ll << 20, 4ll << 20};
    T_CHECK(coord_norm(values, 2, 0x1p-20) == 5.0, "%g", coord_norm(values, 2, 0x1p-20));
}

// Two exits, tokens of a known mixture: the pooled step equals the step on all tokens at once.
static void test_vote_pools_exactly(void) {
    enum { NODES = 5, TOKENS = 64 };
    coord_vote vote, next;
    coord_vote_sums total = {0};
    double brute = 0.0, gain = 0.0, before = 0.0, after = 0.0;
    static double p[NODES * TOKENS][2];
    fl_err err;
    coord_vote_start(&vote, 2);
    T_CHECK(vote.weight[0] == COORD_VOTE_FLOOR, "%g", vote.weight[0]);
    vote.weight[0] = vote.weight[1] = 0.5;
    for (int k = 0; k < NODES; k++) {
        coord_vote_sums sums = {.exits = 2, .tokens = TOKENS};
        double share[2] = {0, 0}, nll = 0.0;
        for (int n = 0; n < TOKENS; n++) {
            double *q = p[k * TOKENS + n];
            q[0] = 0.05 + 0.4 * fabs((double)t_randf()),
            q[1] = 0.05 + 0.9 * fabs((double)t_randf());
            const double mix = 0.5 * q[0] + 0.5 * q[1];
            for (int t = 0; t < 2; t++) share[t] += 0.5 * q[t] / mix;
            nll -= log(mix);
        }
        for (int t = 0; t < 2; t++) sums.share[t] = llround(share[t] / COORD_VOTE_UNIT);
        sums.nll = llround(nll / COORD_VOTE_UNIT);
        brute += share[0];
        before += nll;
        T_OK(coord_vote_check(&vote, &sums, &err), err);
        coord_vote_add(&total, &sums);
    }
    T_OK(coord_vote_step(&vote, &total, 1e-5, &next, &gain, &err), err);
    T_EQ(next.version, 1);
    T_NEAR(next.weight[0], brute / (NODES * TOKENS), 1e-6, "pooled EM step");
    for (int n = 0; n < NODES * TOKENS; n++)
        after -= log(next.weight[0] * p[n][0] + next.weight[1] * p[n][1]);
    T_CHECK((before - after) / (NODES * TOKENS) >= gain && gain > 0, "the gain is certified");
    T_NEAR(coord_vote_loss(&total), before / (NODES * TOKENS), 1e-6, "loss");
    T_EQ(coord_vote_step(&vote, &total, 10.0, &next, &gain, &err), FL_ESTATE);
    // An exit without any share keeps the floor, and the promise still holds.
    total.share[1] += total.share[0], total.share[0] = 0;
    T_OK(coord_vote_step(&vote, &total, 1e-5, &next, &gain, &err), err);
    T_CHECK(next.weight[0] > 0.0009 && next.weight[0] < 0.0011, "%g", next.weight[0]);
}

static void test_vote_refuses_what_cannot_be(void) {
    coord_vote vote;
    fl_err err;
    coord_vote_start(&vote, 2);
    const coord_vote_sums good = {
        .exits = 2, .tokens = 4, .share = {3 << 20, 1 << 20}, .nll = 9 << 20};
    T_OK(coord_vote_check(&vote, &good, &err), err);
    coord_vote_sums s = good;
    s.exits = 3;
    T_EQ(coord_vote_check(&vote, &s, &err), FL_EARG);
    s = good, s.tokens = 0;
    T_EQ(coord_vote_check(&vote, &s, &err), FL_EARG);
    s = good, s.version = 1;
    T_EQ(coord_vote_check(&vote, &s, &err), FL_ESTATE);
    s = good, s.tokens = UINT64_MAX;
    T_EQ(coord_vote_check(&vote, &s, &err), FL_ELIMIT);
    s = good, s.share[0] = -1;
    T_EQ(coord_vote_check(&vote, &s, &err), FL_ELIMIT);
    s = good, s.share[1] = 2 << 20;
    T_EQ(coord_vote_check(&vote, &s, &err), FL_ELIMIT);
    s = good, s.nll = -1;
    T_EQ(coord_vote_check(&vote, &s, &err), FL_ELIMIT);
    s = good, s.nll = INT64_MAX;
    T_EQ(coord_vote_check(&vote, &s, &err), FL_ELIMIT);
}

#ifdef FL_FAULTS
static void test_no_memory_is_an_error(void) {
    coord_sum s;
    fl_fault_arm(1);
    T_EQ(coord_sum_init(&s, 10, NULL), FL_ENOMEM);
    fl_fault_arm(0);
    coord_sum_done(&s);
}
#endif

T_MAIN({"staleness_is_the_rounded_root", test_staleness_is_the_rounded_root},
       {"any_order_gives_the_same_bits", test_any_order_gives_the_same_bits},
       {"one_update_is_its_own_mean", test_one_update_is_its_own_mean},
       {"the_largest_sum_fits", test_the_largest_sum_fits},
       {"refused_folds_change_nothing", test_refused_folds_change_nothing},
       {"any_tree_gives_the_same_bits", test_any_tree_gives_the_same_bits},
       {"the_digest_is_that_of_every_machine", test_the_digest_is_that_of_every_machine},
       {"bad_floats_leave_no_trace", test_bad_floats_leave_no_trace},
       {"large_updates_are_all_or_nothing", test_large_updates_are_all_or_nothing},
       {"usual_updates_stay_in_lanes", test_usual_updates_stay_in_lanes},
       {"weighing_again_is_as_if_it_came_so", test_weighing_again_is_as_if_it_came_so},
       {"optimisers_golden", test_optimisers_golden},
       {"missed_rounds_leave_no_trace", test_missed_rounds_leave_no_trace},
       {"no_node_has_more_than_its_share", test_no_node_has_more_than_its_share},
       {"optimiser_refuses_what_is_not_finite", test_optimiser_refuses_what_is_not_finite},
       {"gate_clips_and_refuses", test_gate_clips_and_refuses},
       {"vote_pools_exactly", test_vote_pools_exactly},
       {"vote_refuses_what_cannot_be", test_vote_refuses_what_cannot_be},
#ifdef FL_FAULTS
       {"no_memory_is_an_error", test_no_memory_is_an_error},
#endif
)
