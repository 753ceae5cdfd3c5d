#include "node/exits/vote.h"

#include <math.h>
#include <string.h>

#include "kernels/vec.h"

enum { EM_STEPS_MAX = 500 };
static const double ONE_TOKEN = 1048576.0; // 2^20
static const double ONE_NAT = 1048576.0;
static const double NATS_MAX = 1000.0; // of one token

const float node_tau_grid[NODE_TAU_GRID] = {0.7f, 0.8f, 0.9f, 1.0f, 1.15f, 1.3f, 1.5f};

static const char *const mode_names[] = {"mixture", "max", "last"};

const char *node_vote_mode_name(node_vote_mode mode) {
    return (size_t)mode < FL_COUNT(mode_names) ? mode_names[mode] : "unknown";
}

bool node_vote_mode_parse(const char *name, node_vote_mode *ret) {
    for (size_t i = 0; i < FL_COUNT(mode_names); i++) {
        if (strcmp(name, mode_names[i]) != 0) continue;
        *ret = (node_vote_mode)i;
        return true;
    }
    return false;
}

void node_vote_init(node_vote *vote, uint32_t exits) {
    FL_ASSERT(exits >= 1 && exits <= NODE_EXITS_MAX);
    *vote = (node_vote){.mode = NODE_VOTE_LAST, .exits = exits};
    for (uint32_t t = 0; t < exits; t++) vote->tau[t] = 1.0f;
    vote->weight[exits - 1] = 1.0f;
}

fl_status node_vote_check(const node_vote *vote, fl_err *err) {
    if (vote->exits < 1 || vote->exits > NODE_EXITS_MAX)
        return FL_FAIL(err, FL_EFORMAT, "the vote names %u exits; 1 to %d are possible",
                       vote->exits, NODE_EXITS_MAX);
    if ((size_t)vote->mode >= FL_COUNT(mode_names))
        return FL_FAIL(err, FL_EFORMAT, "the vote's mode %d is not known", (int)vote->mode);
    double sum = 0;
    for (uint32_t t = 0; t < vote->exits; t++) {
        const float a = vote->weight[t], tau = vote->tau[t];
        if (!(a >= 0.0f && a <= 1.0f))
            return FL_FAIL(err, FL_EFORMAT, "weight of exit %u is not between 0 and 1", t);
        if (!(tau >= 0.05f && tau <= 20.0f))
            return FL_FAIL(err, FL_EFORMAT, "temperature of exit %u is not between 0.05 and 20", t);
        sum += (double)a;
    }
    if (!(fabs(sum - 1.0) <= 1e-3))
        return FL_FAIL(err, FL_EFORMAT, "the weights of the exits add up to %g, not 1", sum);
    return FL_OK;
}

// NaN-safe: fmax and fmin return the other argument.
static double clamp_logp(float logp) {
    return fmin(fmax((double)logp, -NATS_MAX), 0.0);
}

// log p of the mixture, and in share[] the responsibility of every exit.
static double mix(const node_vote *vote, const float *logp, size_t stride, double *share) {
    double top = -INFINITY, lp[NODE_EXITS_MAX], sum = 0;
    for (uint32_t t = 0; t < vote->exits; t++) {
        lp[t] = clamp_logp(logp[t * stride]);
        if (vote->weight[t] > 0 && lp[t] > top) top = lp[t];
    }
    for (uint32_t t = 0; t < vote->exits; t++) {
        share[t] = vote->weight[t] > 0 ? (double)vote->weight[t] * exp(lp[t] - top) : 0.0;
        sum += share[t];
    }
    FL_ASSERT(sum > 0); // the largest term is its weight, and weights are checked to sum to 1
    for (uint32_t t = 0; t < vote->exits; t++) share[t] /= sum;
    return top + log(sum);
}

double node_vote_token_nll(const node_vote *vote, const float *logp, size_t stride) {
    double share[NODE_EXITS_MAX];
    if (vote->mode == NODE_VOTE_LAST) return -clamp_logp(logp[(vote->exits - 1) * stride]);
    return fmax(-mix(vote, logp, stride, share), 0.0);
}

// Rounds shares to integers that add up to exactly one token; the largest takes the difference.
static void add_shares(node_vote_sums *sums, const double *share, uint32_t exits) {
    int64_t whole = (int64_t)ONE_TOKEN, rounded[NODE_EXITS_MAX];
    uint32_t largest = 0;
    for (uint32_t t = 0; t < exits; t++) {
        rounded[t] = (int64_t)llrint(share[t] * ONE_TOKEN);
        whole -= rounded[t];
        if (rounded[t] > rounded[largest]) largest = t;
    }
    rounded[largest] += whole;
    for (uint32_t t = 0; t < exits; t++) sums->responsibility[t] += (uint64_t)rounded[t];
}

void node_vote_sums_add(node_vote_sums *sums, const node_vote *vote, const float *logp,
                        size_t count) {
    FL_ASSERT(sums->tokens == 0 || sums->exits == vote->exits);
    sums->exits = vote->exits;
    for (size_t i = 0; i < count; i++) {
        double share[NODE_EXITS_MAX];
        mix(vote, logp + i, count, share);
        add_shares(sums, share, vote->exits);
        for (uint32_t t = 0; t < vote->exits; t++)
            sums->exit_nll[t] += (uint64_t)llrint(-clamp_logp(logp[t * count + i]) * ONE_NAT);
        sums->vote_nll += (uint64_t)llrint(node_vote_token_nll(vote, logp + i, count) * ONE_NAT);
    }
    sums->tokens += count;
}

void node_vote_sums_merge(node_vote_sums *sums, const node_vote_sums *other) {
    if (other->tokens == 0) return;
    FL_ASSERT(sums->tokens == 0 || sums->exits == other->exits);
    sums->exits = other->exits;
    sums->tokens += other->tokens;
    sums->vote_nll += other->vote_nll;
    for (uint32_t t = 0; t < other->exits; t++) {
        sums->responsibility[t] += other->responsibility[t];
        sums->exit_nll[t] += other->exit_nll[t];
    }
}

void node_vote_em_step(node_vote *vote, const node_vote_sums *sums) {
    uint64_t total = 0;
    for (uint32_t t = 0; t < sums->exits; t++) total += sums->responsibility[t];
    if (total == 0) return;
    for (uint32_t t = 0; t < vote->exits; t++)
        vote->weight[t] = (float)((double)sums->responsibility[t] / (double)total);
}

double node_vote_mean_nll(const node_vote_sums *sums) {
    return sums->tokens == 0 ? 0.0 : (double)sums->vote_nll / ONE_NAT / (double)sums->tokens;
}

double node_vote_mean_exit_nll(const node_vote_sums *sums, uint32_t exit) {
    return sums->tokens == 0 ? 0.0 : (double)sums->exit_nll[exit] / ONE_NAT / (double)sums->tokens;
}

static double fit_weights(node_vote *vote, const float *logp, size_t count) {
    double before = INFINITY;
    for (uint32_t t = 0; t < vote->exits; t++) vote->weight[t] = 1.0f / (float)vote->exits;
    for (int step = 0; step < EM_STEPS_MAX; step++) {
        double sum[NODE_EXITS_MAX] = {0}, share[NODE_EXITS_MAX], nll = 0;
        for (size_t i = 0; i < count; i++) {
            nll -= mix(vote, logp + i, count, share);
            for (uint32_t t = 0; t < vote->exits; t++) sum[t] += share[t];
        }
        nll /= (double)count;
        if (before - nll < 1e-7) return nll;
        before = nll;
        for (uint32_t t = 0; t < vote->exits; t++)
            vote->weight[t] = (float)(sum[t] / (double)count);
    }
    return before;
}

double node_vote_fit(node_vote *vote, const float *logp, size_t count) {
    const float *last = logp + (vote->exits - 1) * count;
    double last_nll = 0;
    for (size_t i = 0; i < count; i++) last_nll -= clamp_logp(last[i]);
    last_nll /= count == 0 ? 1.0 : (double)count;
    if (count != 0 && vote->exits > 1) {
        vote->mode = NODE_VOTE_MIXTURE;
        const double nll = fit_weights(vote, logp, count), gain = last_nll - nll;
        if (gain > 1e-4 && gain * (double)count > (double)(vote->exits - 1)) {
            vote->fell_back = false;
            return nll;
        }
    }
    node_vote_init(vote, vote->exits);
    vote->fell_back = true;
    return last_nll;
}

void node_tau_sums_add(node_tau_sums *sums, const float *logp, size_t count) {
    for (uint32_t t = 0; t < sums->exits; t++)
        for (uint32_t g = 0; g < NODE_TAU_GRID; g++) {
            const float *lp = logp + ((size_t)t * NODE_TAU_GRID + g) * count;
            for (size_t i = 0; i < count; i++)
                sums->nll[t][g] += (uint64_t)llrint(-clamp_logp(lp[i]) * ONE_NAT);
        }
    sums->tokens += count;
}

void node_tau_sums_merge(node_tau_sums *sums, const node_tau_sums *other) {
    FL_ASSERT(sums->exits == other->exits);
    sums->tokens += other->tokens;
    for (uint32_t t = 0; t < sums->exits; t++)
        for (uint32_t g = 0; g < NODE_TAU_GRID; g++) sums->nll[t][g] += other->nll[t][g];
}

void node_vote_set_tau(node_vote *vote, const node_tau_sums *sums) {
    const double least = 0.001 * ONE_NAT * (double)sums->tokens;
    for (uint32_t t = 0; t < vote->exits; t++) {
        uint32_t best = NODE_TAU_ONE;
        for (uint32_t g = 0; g < NODE_TAU_GRID; g++)
            if (sums->nll[t][g] < sums->nll[t][best]) best = g;
        const bool gains = (double)sums->nll[t][NODE_TAU_ONE] - (double)sums->nll[t][best] > least;
        vote->tau[t] = gains ? node_tau_grid[best] : 1.0f;
    }
}

// logits become probabilities at temperature tau.
static void softmax(const fl_kern *kern, float *x, size_t n, float tau) {
    static const int32_t no_target = -1;
    static const float one = 1.0f;
    fl_lse state;
    if (tau != 1.0f) fl_vec_scale(n, 1.0f / tau, x);
    fl_lse_init(1, &state);
    kern->xent->update(1, n, 1.0f, x, n, &state);
    const float lse = fl_lse_value(&state);
    kern->xent->grad(1, n, 0, x, n, &lse, &no_target, &one, 0.0f, NULL, x, n);
}

void node_vote_distribution(const fl_kern *kern, const node_vote *vote, size_t vocabulary,
                            float *logits, float *ret_p) {
    const uint32_t last = vote->exits - 1;
    if (vote->mode == NODE_VOTE_LAST) {
        memcpy(ret_p, logits + last * vocabulary, vocabulary * sizeof(float));
        softmax(kern, ret_p, vocabulary, 1.0f);
        return;
    }
    memset(ret_p, 0, vocabulary * sizeof(float));
    for (uint32_t t = 0; t < vote->exits; t++) {
        float *p = logits + t * vocabulary;
        const float a = vote->weight[t];
        if (vote->mode == NODE_VOTE_MIXTURE && a <= 0.0f) continue;
        softmax(kern, p, vocabulary, vote->mode == NODE_VOTE_MAX ? 1.0f : vote->tau[t]);
        for (size_t i = 0; i < vocabulary; i++) {
            if (vote->mode == NODE_VOTE_MIXTURE)
                ret_p[i] += a * p[i];
            else
                ret_p[i] = p[i] > ret_p[i] ? p[i] : ret_p[i];
        }
    }
    double sum = 0;
    for (size_t i = 0; i < vocabulary; i++) sum += (double)ret_p[i];
    const float scale = (float)(1.0 / sum);
    for (size_t i = 0; i < vocabulary; i++) ret_p[i] *= scale;
}
