// Goal: a policy meets its budget, is the best there is, and does not depend on the order of
// layers. Method: small random problems against brute force; hulls against the definition; the
// formulas of the paper against hand-made cases; zero and non-finite sensitivities are refused.
#include "node/luc/policy.h"
#include "tests/check.h"

enum { LAYERS = 5, CHOICES = 5 };

static void *scratch_for(uint32_t layers) {
    void *p = malloc(node_policy_choose_size(layers));
    T_NEED(p != NULL, "memory");
    return p;
}

// Falling losses and rising costs; `even` costs are multiples of 64.
static void random_problem(uint32_t layers, uint32_t choices, bool even, double *loss,
                           uint64_t *cost) {
    for (uint32_t l = 0; l < layers; l++)
        for (uint32_t c = 0; c < choices; c++) {
            const size_t i = (size_t)l * choices + c;
            const double old = c == 0 ? 1.0 : loss[i - 1];
            loss[i] = old * (0.3 + 0.6 * (double)(t_rand() % 1000) / 1000.0);
            const uint64_t step = even ? 64 * (1 + t_rand() % 4) : 1 + t_rand() % 300;
            cost[i] = (c == 0 ? 0 : cost[i - 1]) + step;
        }
}

static double brute_force(uint32_t layers, uint32_t choices, const double *loss,
                          const uint64_t *cost, uint64_t budget, bool hull) {
    bool on[LAYERS * CHOICES];
    for (uint32_t l = 0; l < layers; l++)
        node_policy_hull(choices, loss + l * choices, cost + l * choices, on + l * choices);
    uint32_t pick[LAYERS] = {0};
    double best = INFINITY;
    for (;;) {
        double sum = 0;
        uint64_t used = 0;
        bool allowed = true;
        for (uint32_t l = 0; l < layers; l++) {
            const size_t i = (size_t)l * choices + pick[l];
            sum += loss[i];
            used += cost[i];
            allowed &= !hull || on[i];
        }
        if (allowed && used <= budget && sum < best) best = sum;
        uint32_t l = 0;
        while (l < layers && ++pick[l] == choices) pick[l++] = 0;
        if (l == layers) return best;
    }
}

static void test_choice_equals_brute_force(void) {
    void *scratch = scratch_for(LAYERS);
    for (int round = 0; round < 60; round++) {
        double loss[LAYERS * CHOICES];
        uint64_t cost[LAYERS * CHOICES], least = 0, most = 0;
        const uint32_t layers = 1 + (uint32_t)round % LAYERS;
        random_problem(layers, CHOICES, round % 2 == 0, loss, cost);
        for (uint32_t l = 0; l < layers; l++) {
            least += cost[l * CHOICES];
            most += cost[l * CHOICES + CHOICES - 1];
        }
        const uint64_t budget = least + t_rand() % (most - least + 200);
        for (int hull = 0; hull < 2; hull++) {
            uint32_t pick[LAYERS];
            fl_err err;
            T_OK(node_policy_choose(layers, CHOICES, loss, cost, budget, hull, scratch, pick, &err),
                 err);
            double sum = 0;
            uint64_t used = 0;
            for (uint32_t l = 0; l < layers; l++) {
                sum += loss[l * CHOICES + pick[l]];
                used += cost[l * CHOICES + pick[l]];
            }
            T_CHECK(used <= budget, "round %d: %llu of %llu", round, (unsigned long long)used,
                    (unsigned long long)budget);
            T_NEAR(sum, brute_force(layers, CHOICES, loss, cost, budget, hull), 1e-12,
                   "round %d hull %d", round, hull);
        }
    }
    free(scratch);
}

// Far more units than the table has: rounded up, so never above; what is left is spent.
static void test_large_budgets_are_met_closely(void) {
    enum { MANY = 40 };
    double loss[MANY * CHOICES];
    uint64_t cost[MANY * CHOICES], budget = 0, used = 0;
    uint32_t pick[MANY];
    fl_err err;
    void *scratch = scratch_for(MANY);
    random_problem(MANY, CHOICES, false, loss, cost);
    for (size_t i = 0; i < MANY * CHOICES; i++) cost[i] = cost[i] * 99991 + i;
    for (uint32_t l = 0; l < MANY; l++) budget += cost[l * CHOICES + 2];
    T_OK(node_policy_choose(MANY, CHOICES, loss, cost, budget, false, scratch, pick, &err), err);
    for (uint32_t l = 0; l < MANY; l++) used += cost[l * CHOICES + pick[l]];
    T_CHECK(used <= budget && (double)used > 0.99 * (double)budget, "%llu of %llu",
            (unsigned long long)used, (unsigned long long)budget);
    T_EQ(node_policy_choose(MANY, CHOICES, loss, cost, 10, false, scratch, pick, NULL), FL_ELIMIT);
    free(scratch);
}

static void test_order_of_layers_does_not_matter(void) {
    double loss[LAYERS * CHOICES], turned_loss[LAYERS * CHOICES];
    uint64_t cost[LAYERS * CHOICES], turned_cost[LAYERS * CHOICES];
    uint32_t pick[LAYERS], turned[LAYERS];
    fl_err err;
    void *scratch = scratch_for(LAYERS);
    random_problem(LAYERS, CHOICES, true, loss, cost);
    for (uint32_t l = 0; l < LAYERS; l++)
        for (uint32_t c = 0; c < CHOICES; c++) {
            const uint32_t to = ((l + 2) % LAYERS) * CHOICES + c;
            turned_loss[to] = loss[l * CHOICES + c];
            turned_cost[to] = cost[l * CHOICES + c];
        }
    T_OK(node_policy_choose(LAYERS, CHOICES, loss, cost, 3000, true, scratch, pick, &err), err);
    T_OK(node_policy_choose(LAYERS, CHOICES, turned_loss, turned_cost, 3000, true, scratch, turned,
                            &err),
         err);
    for (uint32_t l = 0; l < LAYERS; l++) T_EQ(turned[(l + 2) % LAYERS], pick[l]);
    free(scratch);
}

static void test_hull(void) {
    const double loss[] = {1.0, 0.9, 0.4, 0.41, 0.3};
    const uint64_t cost[] = {1, 2, 3, 4, 5};
    bool on[5];
    node_policy_hull(5, loss, cost, on);
    const bool want[] = {true, false, true, false, true};
    for (int i = 0; i < 5; i++) T_CHECK(on[i] == want[i], "choice %d", i);
    // By definition: no point of the hull lies above the line between two other points.
    for (int round = 0; round < 200; round++) {
        double l[CHOICES];
        uint64_t c[CHOICES];
        bool h[CHOICES];
        random_problem(1, CHOICES, false, l, c);
        node_policy_hull(CHOICES, l, c, h);
        T_CHECK(h[0], "the cheapest is on the hull");
        for (int b = 1; b < CHOICES; b++) {
            bool above = false;
            for (int a = 0; a < b; a++)
                for (int d = b + 1; d < CHOICES; d++) {
                    const double part = (double)(c[b] - c[a]) / (double)(c[d] - c[a]);
                    above |= l[b] >= l[a] + part * (l[d] - l[a]);
                }
            T_CHECK(h[b] == !above, "round %d choice %d", round, b);
        }
    }
}

static void test_uniform(void) {
    uint32_t bits[30];
    const double means[] = {2.0, 3.0, 3.5, 4.1, 4.9, 8.0};
    for (size_t i = 0; i < FL_COUNT(means); i++) {
        double sum = 0;
        node_policy_uniform(30, means[i], bits);
        for (int l = 0; l < 30; l++) {
            sum += bits[l];
            T_CHECK(bits[l] == floor(means[i]) || bits[l] == ceil(means[i]), "%u bits", bits[l]);
        }
        T_NEAR(sum / 30, means[i], 0.5 / 30, "mean of %g", means[i]);
    }
}

static void test_paper(void) {
    const double s[] = {0.1, 0.4, 0.1, 0.2};
    uint32_t bits[4];
    double p[4];
    node_policy_paper_bits(4, 3.0, s, bits);
    const uint32_t want[] = {3, 4, 3, 4}; // the mean is 0.2
    for (int l = 0; l < 4; l++) T_EQ(bits[l], want[l]);
    node_policy_paper_sparsity(4, 0.3, 1.0, s, p);
    // u = 1, 0, 1, 2/3; p = 0.3 * 4 * u / (8/3)
    const double sparsity[] = {0.45, 0.0, 0.45, 0.3};
    for (int l = 0; l < 4; l++) T_NEAR(p[l], sparsity[l], 1e-9, "layer %d", l);
    node_policy_paper_sparsity(4, 0.3, 0.42, s, p); // capped, and the mean still met
    T_NEAR((p[0] + p[1] + p[2] + p[3]) / 4, 0.3, 1e-9, "mean");
    T_CHECK(p[0] <= 0.42 && p[2] <= 0.42 && p[1] == 0, "cap");
    const double same[] = {1, 1, 1, 1};
    node_policy_paper_sparsity(4, 0.25, 0.7, same, p);
    for (int l = 0; l < 4; l++) T_NEAR(p[l], 0.25, 1e-9, "layer %d", l);
}

static void test_broken_measurements_are_refused(void) {
    double loss[4] = {0.5, 0.2, 0.5, 0.2};
    T_EQ(node_policy_check(loss, 2, 2, "rounding", NULL), FL_OK);
    const double bad[] = {0.0, -1.0, NAN, INFINITY};
    for (size_t i = 0; i < FL_COUNT(bad); i++) {
        fl_err err = {0};
        loss[3] = bad[i];
        T_EQ(node_policy_check(loss, 2, 2, "rounding", &err), FL_EFORMAT);
        T_CHECK(strstr(err.text, "layer 1") != NULL, "%s", err.text);
    }
}

static void test_names(void) {
    node_policy_kind kind;
    for (int k = 0; k < 3; k++) {
        T_CHECK(node_policy_find(node_policy_name((node_policy_kind)k), &kind), "policy %d", k);
        T_EQ(kind, k);
    }
    T_CHECK(!node_policy_find("Luc", &kind), "no such policy");
}

T_MAIN({"choice_equals_brute_force", test_choice_equals_brute_force},
       {"large_budgets_are_met_closely", test_large_budgets_are_met_closely},
       {"order_of_layers_does_not_matter", test_order_of_layers_does_not_matter},
       {"hull", test_hull}, {"uniform", test_uniform}, {"paper", test_paper},
       {"broken_measurements_are_refused", test_broken_measurements_are_refused},
       {"names", test_names})
