// Goal: a layer's updates become exactly the mean they should, whatever the order they came in, and
// the optimisers do what their papers say.
// Method: brute force with the same integers, permutations and trees of partial sums compared bit
// for bit, golden numbers computed independently, and what the gate must refuse.
#include "common/fault.h"
#include "coordinator/aggregate.h"
#include "coordinator/aggregate_vote.h"
#include "tests/check.h"

enum { COUNT = 97, UPDATES = 23 };

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
        t.a[0] = s.a[0], t.weight = s.weight, t.squares = s.squares, t.updates = s.updates;
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
    T_CHECK(s.a[0] == 0 && s.weight == 0, "nothing was added");
    coord_sum_done(&s);
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
       {"optimisers_golden", test_optimisers_golden},
       {"optimiser_refuses_what_is_not_finite", test_optimiser_refuses_what_is_not_finite},
       {"gate_clips_and_refuses", test_gate_clips_and_refuses},
       {"vote_pools_exactly", test_vote_pools_exactly},
       {"vote_refuses_what_cannot_be", test_vote_refuses_what_cannot_be},
#ifdef FL_FAULTS
       {"no_memory_is_an_error", test_no_memory_is_an_error},
#endif
)
