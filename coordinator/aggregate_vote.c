#include "coordinator/aggregate_vote.h"

#include "coordinator/aggregate.h"

#include <math.h>

void coord_vote_start(coord_vote *vote, uint32_t exits) {
    FL_ASSERT(exits >= 1 && exits <= COORD_EXITS_MAX);
    *vote = (coord_vote){.exits = exits};
    for (uint32_t t = 0; t < exits - 1; t++) vote->weight[t] = COORD_VOTE_FLOOR;
    vote->weight[exits - 1] = 1.0 - COORD_VOTE_FLOOR * (exits - 1);
}

fl_status coord_vote_check(const coord_vote *vote, const coord_vote_sums *sums, fl_err *err) {
    if (sums->exits != vote->exits)
        return FL_FAIL(err, FL_EARG, "sums for %u exits, the run has %u", sums->exits, vote->exits);
    if (sums->tokens == 0) return FL_FAIL(err, FL_EARG, "sums over no tokens");
    if (sums->version != vote->version)
        return FL_FAIL(err, FL_ESTATE, "sums under vote %llu, published is %llu",
                       (unsigned long long)sums->version, (unsigned long long)vote->version);
    if (sums->tokens > COORD_TOKENS_MAX)
        return FL_FAIL(err, FL_ELIMIT, "sums over more than %llu tokens",
                       (unsigned long long)COORD_TOKENS_MAX);
    const int64_t whole = (int64_t)(sums->tokens << 20);
    int64_t total = 0;
    for (uint32_t t = 0; t < sums->exits; t++) {
        if (sums->share[t] < 0 || sums->share[t] > whole)
            return FL_FAIL(err, FL_ELIMIT, "exit %u has more or less than all tokens", t);
        total += sums->share[t];
    }
    // Each token's shares add up to one; a float a token may round by 2^-20 of it.
    const int64_t off = total > whole ? total - whole : whole - total;
    if (off > whole >> 10) return FL_FAIL(err, FL_ELIMIT, "the exits' shares do not add up");
    if (sums->nll < 0 || sums->nll / 64 > whole)
        return FL_FAIL(err, FL_ELIMIT, "a loss that no vote can have");
    return FL_OK;
}

void coord_vote_add(coord_vote_sums *total, const coord_vote_sums *sums) {
    if (total->tokens == 0)
        *total = (coord_vote_sums){.version = sums->version, .exits = sums->exits};
    FL_ASSERT(total->exits == sums->exits && total->version == sums->version);
    total->tokens += sums->tokens;
    total->nll += sums->nll;
    for (uint32_t t = 0; t < sums->exits; t++) total->share[t] += sums->share[t];
}

double coord_vote_loss(const coord_vote_sums *sums) {
    return sums->tokens == 0 ? 0.0 : (double)sums->nll * COORD_VOTE_UNIT / (double)sums->tokens;
}

fl_status coord_vote_step(const coord_vote *vote, const coord_vote_sums *total, double gain_min,
                          coord_vote *ret_next, double *ret_gain, fl_err *err) {
    coord_vote next = {.version = vote->version + 1, .exits = vote->exits};
    double sum = 0.0, gain = 0.0;
    if (total->tokens == 0 || total->exits != vote->exits || total->version != vote->version)
        return FL_FAIL(err, FL_ESTATE, "no sums under the published weights");
    for (uint32_t t = 0; t < next.exits; t++) sum += (double)total->share[t];
    if (sum <= 0.0) return FL_FAIL(err, FL_ESTATE, "no exit has a share");
    double floored = 0.0;
    for (uint32_t t = 0; t < next.exits; t++) {
        const double a = (double)total->share[t] / sum;
        next.weight[t] = a > COORD_VOTE_FLOOR ? a : COORD_VOTE_FLOOR;
        floored += next.weight[t];
    }
    for (uint32_t t = 0; t < next.exits; t++) {
        next.weight[t] /= floored;
        gain += (double)total->share[t] / sum * log(next.weight[t] / vote->weight[t]);
    }
    if (!(gain >= gain_min) || !isfinite(gain))
        return FL_FAIL(err, FL_ESTATE, "the vote would gain %.3g nats a token, less than %.3g",
                       gain, gain_min);
    *ret_next = next;
    *ret_gain = gain;
    return FL_OK;
}
