// aggregate_vote.h: the fleet's weights of the exits, from sums alone.
//
// The vote is p(y) = sum_t a_t p_t(y). A node sends R_t, the sum over its held-out tokens of the
// responsibility of exit t under the published weights, and its number of tokens N. Then
// a'_t = sum R_t / sum N is exactly one EM step on the pooled tokens, and the pooled loss falls by
// at least sum_t (R_t / N) ln(a'_t / a_t) nats a token (Jensen), whatever a' is: the certificate
// that publishing needs, and that the floor below keeps honest. Source: Dempster, Laird, Rubin,
// Maximum Likelihood from Incomplete Data via EM, section 3.
#ifndef COORD_AGGREGATE_VOTE_H
#define COORD_AGGREGATE_VOTE_H

#include "common/status.h"

enum { COORD_EXITS_MAX = 16 };
#define COORD_VOTE_UNIT 0x1p-20 // sums travel and add as integers of this size

typedef struct coord_vote { // plain: published weights, on the simplex
    uint64_t version;       // 0: nothing was published yet, the last exit has nearly all
    uint32_t exits;
    double weight[COORD_EXITS_MAX];
} coord_vote;

typedef struct coord_vote_sums {
    uint64_t version; // the weights under which these were measured
    uint32_t exits;
    uint64_t tokens;
    int64_t share[COORD_EXITS_MAX]; // R_t in COORD_VOTE_UNIT; they add up to tokens
    int64_t nll;                    // of the vote, summed over the tokens, in COORD_VOTE_UNIT
} coord_vote_sums;

// No exit's weight is ever less: one that is useless today may be trained tomorrow, and EM cannot
// raise a zero. What that costs is at most exits / 1000 nats a token.
#define COORD_VOTE_FLOOR 0.001

// Version 0: COORD_VOTE_FLOOR for every exit, the rest for the last: untrained exits below it would
// only do harm. 1 <= exits <= COORD_EXITS_MAX.
void coord_vote_start(coord_vote *vote, uint32_t exits);

// Is this something a node can have measured? Says what is wrong: FL_EARG for exits that differ or
// no tokens, FL_ESTATE for other weights than `vote`, FL_ELIMIT for sums that cannot be.
fl_status coord_vote_check(const coord_vote *vote, const coord_vote_sums *sums,
                           fl_err *err) FL_NODISCARD;

// *total += *sums, both checked; an empty total (tokens == 0) takes on their exits and version.
void coord_vote_add(coord_vote_sums *total, const coord_vote_sums *sums);
double coord_vote_loss(const coord_vote_sums *sums); // nats a token

// One EM step. FL_OK: *ret_next is `vote` with the next version and better weights, by at least
// *ret_gain nats a token. FL_ESTATE: the gain is below gain_min, keep what is published.
fl_status coord_vote_step(const coord_vote *vote, const coord_vote_sums *total, double gain_min,
                          coord_vote *ret_next, double *ret_gain, fl_err *err) FL_NODISCARD;

#endif
