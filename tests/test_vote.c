// Goal: the vote is a distribution, its weights are learned from sums that add exactly, and each
// mode does what it says. Method: random exits, properties against a double reference, brute force
// over the pooled text.
#include "node/exits/vote.h"
#include "tests/check.h"

enum { EXITS = 4, TOKENS = 600, VOCABULARY = 37 };
static float logp[EXITS * TOKENS];

// Exit t is good on its own quarter of the tokens: the mixture has something to win.
static void make_logp(void) {
    for (size_t t = 0; t < EXITS; t++)
        for (size_t i = 0; i < TOKENS; i++) {
            const float base = i % EXITS == t ? -0.5f : -4.0f;
            logp[t * TOKENS + i] = base - 2.0f * fabsf(t_randf());
        }
}

static void distribution(const node_vote *v, float *logits, float *p) {
    fl_kern kern;
    fl_kern_select(&kern, fl_cpu_detect());
    node_vote_distribution(&kern, v, VOCABULARY, logits, p);
}

static double mixture_nll(const node_vote *v, const float *lp, size_t n) {
    double nll = 0;
    for (size_t i = 0; i < n; i++) {
        double p = 0;
        for (size_t t = 0; t < v->exits; t++)
            p += (double)v->weight[t] * exp((double)lp[t * n + i]);
        nll -= log(p);
    }
    return nll / (double)n;
}

static void test_em_never_gets_worse(void) {
    make_logp();
    node_vote v;
    node_vote_init(&v, EXITS);
    v.mode = NODE_VOTE_MIXTURE;
    for (size_t t = 0; t < EXITS; t++) v.weight[t] = 1.0f / EXITS;
    double before = mixture_nll(&v, logp, TOKENS);
    for (int step = 0; step < 60; step++) {
        node_vote_sums s = {0};
        node_vote_sums_add(&s, &v, logp, TOKENS);
        T_NEAR(node_vote_mean_nll(&s), before, 1e-6, "step %d: the sums hold the loss", step);
        node_vote_em_step(&v, &s);
        const double now = mixture_nll(&v, logp, TOKENS);
        T_CHECK(now <= before + 1e-7, "step %d: %.9g after %.9g", step, now, before);
        before = now;
    }
    T_EQ(node_vote_check(&v, NULL), FL_OK);
}

// Three nodes with unequal shares of the text, in two orders, against the whole text at once.
static void test_pooled_step_is_exact(void) {
    static const size_t cut[] = {0, 17, 401, TOKENS};
    static const int order[2][3] = {{0, 1, 2}, {2, 0, 1}};
    make_logp();
    for (int o = 0; o < 2; o++) {
        node_vote whole, pooled;
        node_vote_init(&whole, EXITS);
        whole.mode = NODE_VOTE_MIXTURE;
        for (size_t t = 0; t < EXITS; t++) whole.weight[t] = 0.1f * (float)(t + 1);
        pooled = whole;
        for (int step = 0; step < 20; step++) {
            node_vote_sums all = {0}, sum = {0};
            node_vote_sums_add(&all, &whole, logp, TOKENS);
            for (int k = 0; k < 3; k++) {
                const size_t begin = cut[order[o][k]], n = cut[order[o][k] + 1] - begin;
                static float part[EXITS * TOKENS];
                for (size_t t = 0; t < EXITS; t++)
                    memcpy(part + t * n, logp + t * TOKENS + begin, n * sizeof(float));
                node_vote_sums one = {0};
                node_vote_sums_add(&one, &pooled, part, n);
                node_vote_sums_merge(&sum, &one);
            }
            T_CHECK(memcmp(&all, &sum, sizeof(all)) == 0, "sums of step %d", step);
            node_vote_em_step(&whole, &all);
            node_vote_em_step(&pooled, &sum);
            T_CHECK(memcmp(&whole, &pooled, sizeof(whole)) == 0, "weights of step %d", step);
        }
    }
}

static void test_responsibilities_are_whole_tokens(void) {
    make_logp();
    node_vote v;
    node_vote_init(&v, EXITS);
    for (size_t t = 0; t < EXITS; t++) v.weight[t] = 0.25f;
    node_vote_sums s = {0};
    node_vote_sums_add(&s, &v, logp, TOKENS);
    uint64_t sum = 0;
    for (size_t t = 0; t < EXITS; t++) sum += s.responsibility[t];
    T_CHECK(sum == (uint64_t)TOKENS << 20, "%llu", (unsigned long long)sum);
}

static void test_fit_wins_or_falls_back(void) {
    make_logp();
    node_vote v;
    node_vote_init(&v, EXITS);
    const double nll = node_vote_fit(&v, logp, TOKENS);
    T_EQ(v.mode, NODE_VOTE_MIXTURE);
    T_CHECK(!v.fell_back, "the exits complement each other");
    T_NEAR(nll, mixture_nll(&v, logp, TOKENS), 1e-6, "what fit returns");
    for (size_t t = 0; t < EXITS; t++) T_NEAR(v.weight[t], 0.25, 0.05, "weight %zu", t);
    // Exits that are noise beside a good last one.
    for (size_t i = 0; i < TOKENS; i++) {
        for (size_t t = 0; t + 1 < EXITS; t++) logp[t * TOKENS + i] = -9.0f;
        logp[(EXITS - 1) * TOKENS + i] = -1.0f;
    }
    node_vote_init(&v, EXITS);
    T_NEAR(node_vote_fit(&v, logp, TOKENS), 1.0, 1e-6, "the last exit alone");
    T_EQ(v.mode, NODE_VOTE_LAST);
    T_CHECK(v.fell_back, "and it says so");
    T_CHECK(v.weight[EXITS - 1] == 1.0f, "%g", (double)v.weight[EXITS - 1]);
}

static void test_fit_of_nothing(void) {
    node_vote v;
    node_vote_init(&v, 1);
    T_NEAR(node_vote_fit(&v, logp, 0), 0.0, 0.0, "no tokens");
    T_EQ(v.mode, NODE_VOTE_LAST);
    node_vote_sums s = {.exits = 1};
    node_vote_em_step(&v, &s);
    T_CHECK(v.weight[0] == 1.0f, "no tokens, no step");
}

static void test_bad_log_probabilities_cannot_poison(void) {
    static const float bad[] = {NAN, -INFINITY, INFINITY, 1.0f, -1e30f};
    node_vote v;
    node_vote_init(&v, 2);
    v.mode = NODE_VOTE_MIXTURE;
    v.weight[0] = v.weight[1] = 0.5f;
    for (size_t i = 0; i < FL_COUNT(bad); i++) {
        const float lp[2] = {bad[i], -1.0f};
        node_vote_sums s = {0};
        node_vote_sums_add(&s, &v, lp, 1);
        node_vote_em_step(&v, &s);
        T_EQ(node_vote_check(&v, NULL), FL_OK);
    }
}

static void fill_logits(float *x) {
    for (size_t i = 0; i < (size_t)EXITS * VOCABULARY; i++) x[i] = 5.0f * t_randf();
}

static void softmax_ref(const float *x, double tau, double *p) {
    double top = -1e300, sum = 0;
    for (size_t i = 0; i < VOCABULARY; i++) top = fmax(top, (double)x[i]);
    for (size_t i = 0; i < VOCABULARY; i++) sum += p[i] = exp(((double)x[i] - top) / tau);
    for (size_t i = 0; i < VOCABULARY; i++) p[i] /= sum;
}

static void test_distribution_of_each_mode(void) {
    float x[EXITS * VOCABULARY], scratch[EXITS * VOCABULARY], p[VOCABULARY];
    double want[EXITS][VOCABULARY];
    for (int round = 0; round < 50; round++) {
        fill_logits(x);
        node_vote v;
        node_vote_init(&v, EXITS);
        const float tau[EXITS] = {0.8f, 1.0f, 1.3f, 1.5f};
        for (size_t t = 0; t < EXITS; t++) v.weight[t] = 0.1f * (float)(t + 1);
        for (int mode = NODE_VOTE_MIXTURE; mode <= NODE_VOTE_LAST; mode++) {
            v.mode = (node_vote_mode)mode;
            for (size_t t = 0; t < EXITS; t++) {
                v.tau[t] = mode == NODE_VOTE_MIXTURE ? tau[t] : 1.0f;
                softmax_ref(x + t * VOCABULARY, (double)v.tau[t], want[t]);
            }
            memcpy(scratch, x, sizeof(x));
            distribution(&v, scratch, p);
            double sum = 0, z = 0, q[VOCABULARY];
            for (size_t i = 0; i < VOCABULARY; i++) {
                q[i] = mode == NODE_VOTE_LAST ? want[EXITS - 1][i] : 0;
                for (size_t t = 0; t < EXITS && mode != NODE_VOTE_LAST; t++)
                    q[i] = mode == NODE_VOTE_MAX ? fmax(q[i], want[t][i])
                                                 : q[i] + (double)v.weight[t] * want[t][i];
                z += q[i];
            }
            for (size_t i = 0; i < VOCABULARY; i++) {
                sum += (double)p[i];
                T_NEAR(p[i], q[i] / z, 1e-6, "%s, entry %zu", node_vote_mode_name(v.mode), i);
            }
            T_NEAR(sum, 1.0, 1e-5, "%s", node_vote_mode_name(v.mode));
        }
    }
}

// The paper's rule: its winner is what the exit with the highest top-1 probability says.
static void test_max_follows_the_most_confident_exit(void) {
    float x[EXITS * VOCABULARY], p[VOCABULARY];
    for (int round = 0; round < 200; round++) {
        double want[VOCABULARY], best = -1;
        size_t winner = 0;
        fill_logits(x);
        for (size_t t = 0; t < EXITS; t++) {
            softmax_ref(x + t * VOCABULARY, 1.0, want);
            for (size_t i = 0; i < VOCABULARY; i++)
                if (want[i] > best) best = want[i], winner = i;
        }
        node_vote v;
        node_vote_init(&v, EXITS);
        v.mode = NODE_VOTE_MAX;
        distribution(&v, x, p);
        for (size_t i = 0; i < VOCABULARY; i++) T_CHECK(p[i] <= p[winner], "entry %zu", i);
    }
}

static void test_order_of_exits_is_irrelevant(void) {
    float x[EXITS * VOCABULARY], y[EXITS * VOCABULARY], p[VOCABULARY], q[VOCABULARY];
    static const size_t at[EXITS] = {2, 0, 3, 1};
    fill_logits(x);
    node_vote v, w;
    node_vote_init(&v, EXITS);
    node_vote_init(&w, EXITS);
    for (size_t t = 0; t < EXITS; t++) {
        v.weight[t] = w.weight[at[t]] = 0.1f * (float)(t + 1);
        v.tau[t] = w.tau[at[t]] = 0.7f + 0.2f * (float)t;
        memcpy(y + at[t] * VOCABULARY, x + t * VOCABULARY, VOCABULARY * sizeof(float));
    }
    for (int mode = NODE_VOTE_MIXTURE; mode <= NODE_VOTE_MAX; mode++) {
        float a[EXITS * VOCABULARY], b[EXITS * VOCABULARY];
        memcpy(a, x, sizeof(x));
        memcpy(b, y, sizeof(y));
        v.mode = w.mode = (node_vote_mode)mode;
        distribution(&v, a, p);
        distribution(&w, b, q);
        for (size_t i = 0; i < VOCABULARY; i++) T_NEAR(p[i], q[i], 1e-6, "entry %zu", i);
    }
}

static void test_one_exit_is_the_model(void) {
    float x[VOCABULARY], y[VOCABULARY], p[VOCABULARY], q[VOCABULARY];
    for (size_t i = 0; i < VOCABULARY; i++) x[i] = y[i] = 5.0f * t_randf();
    node_vote v;
    node_vote_init(&v, 1);
    distribution(&v, x, p);
    v.mode = NODE_VOTE_MIXTURE;
    distribution(&v, y, q);
    for (size_t i = 0; i < VOCABULARY; i++) T_NEAR(p[i], q[i], 1e-7, "entry %zu", i);
}

static void test_temperatures_from_sums(void) {
    node_tau_sums s = {.exits = 2, .tokens = 1000}, half = s;
    for (size_t g = 0; g < NODE_TAU_GRID; g++) {
        s.nll[0][g] = ((uint64_t)3000 << 20) + (g == 5 ? 0 : (4u << 20)); // gains 0.004 a token
        s.nll[1][g] = ((uint64_t)3000 << 20) + (g == 1 ? 0 : (1u << 19)); // gains too little
        half.nll[0][g] = s.nll[0][g] / 2, half.nll[1][g] = s.nll[1][g] / 2;
    }
    node_vote v;
    node_vote_init(&v, 2);
    node_vote_set_tau(&v, &s);
    T_CHECK(v.tau[0] == node_tau_grid[5], "%g", (double)v.tau[0]);
    T_CHECK(v.tau[1] == 1.0f, "%g", (double)v.tau[1]);
    node_tau_sums two = half;
    node_tau_sums_merge(&two, &half);
    T_CHECK(memcmp(two.nll, s.nll, sizeof(s.nll)) == 0, "sums add");
    T_CHECK(node_tau_grid[NODE_TAU_ONE] == 1.0f, "the grid holds 1");
}

static void test_check_refuses(void) {
    node_vote good, v;
    node_vote_init(&good, EXITS);
    T_EQ(node_vote_check(&good, NULL), FL_OK);
#define REFUSE(change) v = good, change, T_CHECK(node_vote_check(&v, NULL) == FL_EFORMAT, #change)
    REFUSE(v.exits = 0);
    REFUSE(v.exits = NODE_EXITS_MAX + 1);
    REFUSE(v.mode = (node_vote_mode)3);
    REFUSE(v.mode = (node_vote_mode)-1);
    REFUSE(v.weight[0] = NAN);
    REFUSE(v.weight[0] = -0.1f);
    REFUSE(v.weight[0] = 0.5f);
    REFUSE(v.weight[EXITS - 1] = 0.0f);
    REFUSE(v.tau[1] = 0.0f);
    REFUSE(v.tau[1] = INFINITY);
    REFUSE(v.tau[1] = NAN);
    node_vote_mode mode;
    T_CHECK(node_vote_mode_parse("max", &mode) && mode == NODE_VOTE_MAX, "a name");
    T_CHECK(!node_vote_mode_parse("most", &mode), "no such name");
}

T_MAIN({"em_never_gets_worse", test_em_never_gets_worse},
       {"pooled_step_is_exact", test_pooled_step_is_exact},
       {"responsibilities_are_whole_tokens", test_responsibilities_are_whole_tokens},
       {"fit_wins_or_falls_back", test_fit_wins_or_falls_back},
       {"fit_of_nothing", test_fit_of_nothing},
       {"bad_log_probabilities_cannot_poison", test_bad_log_probabilities_cannot_poison},
       {"distribution_of_each_mode", test_distribution_of_each_mode},
       {"max_follows_the_most_confident_exit", test_max_follows_the_most_confident_exit},
       {"order_of_exits_is_irrelevant", test_order_of_exits_is_irrelevant},
       {"one_exit_is_the_model", test_one_exit_is_the_model},
       {"temperatures_from_sums", test_temperatures_from_sums},
       {"check_refuses", test_check_refuses})
