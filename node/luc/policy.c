#include "node/luc/policy.h"

#include <math.h>
#include <string.h>

static const char *const names[] = {
    [NODE_POLICY_LUC] = "luc", [NODE_POLICY_UNIFORM] = "uniform", [NODE_POLICY_PAPER] = "paper"};

const char *node_policy_name(node_policy_kind kind) {
    return names[kind];
}

bool node_policy_find(const char *name, node_policy_kind *ret_kind) {
    for (size_t i = 0; i < FL_COUNT(names); i++) {
        if (strcmp(names[i], name) != 0) continue;
        *ret_kind = (node_policy_kind)i;
        return true;
    }
    return false;
}

fl_status node_policy_check(const double *loss, uint32_t layers, uint32_t choices, const char *what,
                            fl_err *err) {
    for (uint32_t l = 0; l < layers; l++)
        for (uint32_t c = 0; c < choices; c++) {
            const double v = loss[(size_t)l * choices + c];
            if (isfinite(v) && v > 0) continue;
            return FL_FAIL(
                err, FL_EFORMAT,
                "the sensitivity of layer %u to %s came out as %g: a broken measurement; "
                "check the model and the calibration text",
                l, what, v);
        }
    return FL_OK;
}

void node_policy_hull(uint32_t choices, const double *loss, const uint64_t *cost, bool *ret_on) {
    uint32_t stack[NODE_POLICY_CHOICES_MAX], top = 0;
    FL_ASSERT(choices > 0 && choices <= NODE_POLICY_CHOICES_MAX);
    stack[top++] = 0;
    for (uint32_t c = 1; c < choices; c++) {
        if (!(loss[c] < loss[stack[top - 1]])) continue; // dearer and no better
        while (top >= 2) {
            const uint32_t a = stack[top - 2], b = stack[top - 1];
            const double ab = (loss[a] - loss[b]) * (double)(cost[c] - cost[b]);
            const double bc = (loss[b] - loss[c]) * (double)(cost[b] - cost[a]);
            if (ab > bc) break; // gain per unit of cost falls: convex
            top--;
        }
        stack[top++] = c;
    }
    memset(ret_on, 0, choices * sizeof(*ret_on));
    for (uint32_t i = 0; i < top; i++) ret_on[stack[i]] = true;
}

static uint64_t divisor(uint64_t a, uint64_t b) {
    while (b != 0) {
        const uint64_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

size_t node_policy_choose_size(uint32_t layers) {
    return (size_t)(NODE_POLICY_UNITS + 1) * (2 * sizeof(double) + layers);
}

// The problem in whole units above the cheapest choices.
typedef struct choice_problem {
    uint32_t layers, choices;
    const double *loss;
    const uint64_t *cost;
    uint64_t unit;
    uint32_t units;
    bool hull;
} choice_problem;

static uint64_t units_of(const choice_problem *p, uint32_t layer, uint32_t choice) {
    const uint64_t *cost = p->cost + (size_t)layer * p->choices;
    return (cost[choice] - cost[0] + p->unit - 1) / p->unit;
}

// best[u]: least loss of the layers so far with at most u units; pick[layer][u]: the choice there.
static void solve(const choice_problem *p, double *best, double *next, uint8_t *pick,
                  uint32_t *ret_choice) {
    const size_t width = (size_t)p->units + 1;
    for (size_t u = 0; u < width; u++) best[u] = 0;
    for (uint32_t l = 0; l < p->layers; l++) {
        const double *loss = p->loss + (size_t)l * p->choices;
        bool on[NODE_POLICY_CHOICES_MAX];
        node_policy_hull(p->choices, loss, p->cost + (size_t)l * p->choices, on);
        for (size_t u = 0; u < width; u++) next[u] = INFINITY;
        for (uint32_t c = 0; c < p->choices; c++) {
            const uint64_t need = units_of(p, l, c);
            if (p->hull && !on[c]) continue;
            for (size_t u = need; u < width; u++) {
                const double sum = best[u - need] + loss[c];
                if (!(sum < next[u])) continue;
                next[u] = sum;
                pick[l * width + u] = (uint8_t)c;
            }
        }
        memcpy(best, next, width * sizeof(*best));
    }
    size_t u = p->units;
    for (uint32_t l = p->layers; l-- > 0;) {
        ret_choice[l] = pick[l * width + u];
        u -= (size_t)units_of(p, l, ret_choice[l]);
    }
}

// Spends what rounding to units left over, best loss per cost first.
static void spend_rest(const choice_problem *p, uint64_t rest, uint32_t *choice) {
    for (;;) {
        double best = 0;
        uint32_t layer = 0, to = 0;
        for (uint32_t l = 0; l < p->layers; l++) {
            const double *loss = p->loss + (size_t)l * p->choices;
            const uint64_t *cost = p->cost + (size_t)l * p->choices;
            for (uint32_t c = choice[l] + 1; c < p->choices; c++) {
                const uint64_t more = cost[c] - cost[choice[l]];
                const double gain = loss[choice[l]] - loss[c];
                if (more > rest || !(gain > best * (double)more)) continue;
                best = gain / (double)more;
                layer = l, to = c;
            }
        }
        if (!(best > 0)) return;
        const uint64_t *cost = p->cost + (size_t)layer * p->choices;
        rest -= cost[to] - cost[choice[layer]];
        choice[layer] = to;
    }
}

fl_status node_policy_choose(uint32_t layers, uint32_t choices, const double *loss,
                             const uint64_t *cost, uint64_t budget, bool hull, void *scratch,
                             uint32_t *ret_choice, fl_err *err) {
    FL_ASSERT(choices > 0 && choices <= NODE_POLICY_CHOICES_MAX);
    uint64_t least = 0, most = 0, common = 0;
    for (uint32_t l = 0; l < layers; l++) {
        const uint64_t *row = cost + (size_t)l * choices;
        least += row[0];
        most += row[choices - 1] - row[0];
        for (uint32_t c = 1; c < choices; c++) {
            FL_ASSERT(row[c] >= row[c - 1]);
            common = divisor(common, row[c] - row[0]);
        }
    }
    if (least > budget)
        return FL_FAIL(err, FL_ELIMIT, "the budget of %llu is below the least possible, %llu",
                       (unsigned long long)budget, (unsigned long long)least);
    const uint64_t extra = budget - least < most ? budget - least : most;
    choice_problem p = {layers, choices, loss, cost, common == 0 ? 1 : common, 0, hull};
    if (extra / p.unit > NODE_POLICY_UNITS) p.unit = extra / NODE_POLICY_UNITS + 1;
    p.units = (uint32_t)(extra / p.unit);
    double *best = scratch, *next = best + p.units + 1;
    solve(&p, best, next, (uint8_t *)(next + p.units + 1), ret_choice);
    uint64_t used = 0;
    for (uint32_t l = 0; l < layers; l++)
        used += cost[(size_t)l * choices + ret_choice[l]] - cost[(size_t)l * choices];
    if (p.unit != common) spend_rest(&p, budget - least - used, ret_choice);
    return FL_OK;
}

void node_policy_uniform(uint32_t layers, double mean, uint32_t *ret_bits) {
    const double low = floor(mean);
    const uint64_t more = (uint64_t)llround((mean - low) * layers);
    for (uint64_t l = 0; l < layers; l++)
        ret_bits[l] = (uint32_t)low + (uint32_t)((l + 1) * more / layers - l * more / layers);
}

void node_policy_paper_bits(uint32_t layers, double bits, const double *sensitivity,
                            uint32_t *ret_bits) {
    double mean = 0;
    for (uint32_t l = 0; l < layers; l++) mean += sensitivity[l] / layers;
    for (uint32_t l = 0; l < layers; l++)
        ret_bits[l] = (uint32_t)floor(bits) + (sensitivity[l] >= mean);
}

static double capped_mean(uint32_t layers, double lambda, double cap, const double *u) {
    double sum = 0;
    for (uint32_t l = 0; l < layers; l++) sum += fmin(cap, lambda * u[l]);
    return sum / layers;
}

void node_policy_paper_sparsity(uint32_t layers, double mean, double cap, const double *sensitivity,
                                double *ret_sparsity) {
    double low = INFINITY, high = -INFINITY;
    for (uint32_t l = 0; l < layers; l++) {
        low = fmin(low, sensitivity[l]);
        high = fmax(high, sensitivity[l]);
    }
    for (uint32_t l = 0; l < layers; l++) // the most sensitive layer keeps everything, if it can
        ret_sparsity[l] = high > low ? 1.0 - (sensitivity[l] - low) / (high - low) : 1.0;
    double a = 0, b = 1;
    while (capped_mean(layers, b, cap, ret_sparsity) < mean - 1e-12 && b < 1e12) b *= 2;
    for (int i = 0; i < 200; i++) {
        const double mid = (a + b) / 2;
        if (capped_mean(layers, mid, cap, ret_sparsity) < mean)
            a = mid;
        else
            b = mid;
    }
    for (uint32_t l = 0; l < layers; l++) ret_sparsity[l] = fmin(cap, b * ret_sparsity[l]);
}
