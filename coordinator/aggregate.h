// aggregate.h: what becomes of a layer's updates: exact weighted sums, then one optimiser step.
//
// Sums are integers, so any order of arrival, any number of threads and any tree of partial sums
// gives the same bits on every platform. Everything after the sums is a fixed sequence of
// correctly rounded double operations (+ - * / sqrt), which is the same everywhere as well.
//
// Bounds that make overflow impossible: |value| <= 2^40, weight <= 2^40, clip <= 2^16 and at most
// 2^20 updates in a sum, so |sum| <= 2^116 fits 128 bits and the sum of weights fits 64.
#ifndef COORD_AGGREGATE_H
#define COORD_AGGREGATE_H

#include "common/status.h"
#include "coordinator/round_weight.h"
#include "kernels/fold.h"

#define COORD_VALUE_MAX ((int64_t)1 << 40)
#define COORD_FLOAT_MAX 64.0f // in fixed point 2^38
enum { COORD_FOLDS_MAX = 1 << 20 };

__extension__ typedef __int128 coord_wide;
__extension__ typedef unsigned __int128 coord_uwide;

// sqrt(sum v^2) * unit. |v| <= COORD_VALUE_MAX, count <= 2^32; the sum is exact.
double coord_norm(const int64_t *values, size_t count, double unit);

// One layer's accumulator. A[i] += weight * clip * value[i]; W += weight; Q += weight^2.
//
// A lives in 64-bit lanes, in units of 2^shift (a fresh update's factor is its tokens times 2^32:
// little is left of it), as long as a bound kept from the updates' largest values says that no lane
// can overflow; before one could, the upper part of all lanes moves into a second word, which is
// made then. A is the same number either way: 8 bytes a value, or 16.
typedef struct coord_sum {
    int64_t *lane;    // [count], owned
    int64_t *high;    // [count], owned, in units of 2^60 lanes; NULL: nothing has left the lanes
    size_t count;
    uint32_t shift;
    uint64_t bound;      // |lane[i]| <= bound <= COORD_LANE_MAX
    uint64_t weight;     // W
    coord_uwide squares; // Q
    uint32_t updates;
    const fl_fold_variant *fold; // this machine's best; all give the same bits
} coord_sum;

#define COORD_LANE_MAX ((uint64_t)1 << 62)

fl_status coord_sum_init(coord_sum *s, size_t count, fl_err *err) FL_NODISCARD; // FL_ENOMEM
void coord_sum_done(coord_sum *s);                                              // empty is fine
void coord_sum_reset(coord_sum *s);

// Adds one update, or nothing at all. FL_EARG: count differs, weight is 0 or above its bound.
// FL_ELIMIT: a value above COORD_VALUE_MAX, or the sum is full.
fl_status coord_sum_fold(coord_sum *s, const int64_t *values, size_t count, uint64_t weight,
                         uint32_t clip, fl_err *err) FL_NODISCARD;
// The same of floats: a value counts as round_half_even(value * 2^32). FL_ELIMIT: one is not finite
// or above COORD_FLOAT_MAX. Larger layers pass through the cache once.
fl_status coord_sum_fold_f32(coord_sum *s, const float *values, size_t count, uint64_t weight,
                             uint32_t clip, fl_err *err) FL_NODISCARD;
// An update that was folded with one weight counts with another, as if it had come with that.
// FL_EARG: count differs, a weight is 0 or above its bound, or it cannot have been folded so.
fl_status coord_sum_reweigh(coord_sum *s, const int64_t *values, size_t count, uint64_t old_weight,
                            uint64_t new_weight, uint32_t clip, fl_err *err) FL_NODISCARD;
coord_wide coord_sum_at(const coord_sum *s, size_t i); // A[i]
// Adds another partial sum of the same layer. FL_EARG when counts differ.
fl_status coord_sum_merge(coord_sum *s, const coord_sum *other, fl_err *err) FL_NODISCARD;

// mean[i] = lambda * A[i] / (W * 2^16) * unit, lambda = n/(n + kappa), n = W^2 / Q: kappa > 0 keeps
// a single update from dragging a rare layer. FL_ESTATE when nothing was folded.
// Source: federated averaging over the nodes that sent the layer, with shrinkage.
fl_status coord_sum_mean(const coord_sum *s, double unit, double kappa, double *mean,
                         fl_err *err) FL_NODISCARD;

// What nodes weigh in one layer when none may have more than share / 2^16 of their sum: ret[i] is
// weight[i], or the largest cap for which that holds, in whole units. With fewer than
// COORD_SHARE_NODES nodes nothing is capped; where there are too few for the share, all weigh the
// same. Order does not matter. weights > 0, nodes <= COORD_NODES_MAX, 0 < share <= 2^16.
enum { COORD_SHARE_NODES = 3 };
void coord_share_cap(const uint64_t *weight, size_t nodes, uint32_t share, uint64_t *ret);
// An update's part of its node's cap: weight * cap / sum, at least 1.
uint64_t coord_share_of(uint64_t weight, uint64_t cap, uint64_t sum);

// The server's optimiser, per layer, lazily: a layer without updates is not stepped at all. Its
// moments stay as they are too, and do not decay for the rounds it missed: they are of its own
// steps, and decaying v without gradients would make its next step larger, m without them smaller,
// by an amount that only says how rarely it was assigned.
//   fedavg    theta += rate d
//   fedavgm   m = beta1 m + d;                theta += rate m
//   fedadam   m = beta1 m + (1 - beta1) d;    v = beta2 v + (1 - beta2) d^2
//   fedyogi   m as fedadam;                   v = v - (1 - beta2) d^2 sign(v - d^2)
//             both theta += rate m / (sqrt(v) + tau), v starts as tau^2, m as 0
// Source: Reddi et al., Adaptive Federated Optimization, algorithms 1 and 2.
#define COORD_OPT_LIST(X)                                                                          \
    X(FEDAVG, "fedavg", 0)                                                                         \
    X(FEDAVGM, "fedavgm", 1)                                                                       \
    X(FEDADAM, "fedadam", 2)                                                                       \
    X(FEDYOGI, "fedyogi", 2)
typedef enum coord_opt_kind {
#define X(name, text, moments) COORD_##name,
    COORD_OPT_LIST(X) COORD_OPT_COUNT
#undef X
} coord_opt_kind;

typedef struct coord_opt {
    coord_opt_kind kind;
    double rate, beta1, beta2, tau;
} coord_opt;

// FL_EARG when the name is not in COORD_OPT_LIST; the text lists the names.
fl_status coord_opt_parse(const char *name, coord_opt_kind *ret, fl_err *err) FL_NODISCARD;
size_t coord_opt_moments(coord_opt_kind kind); // doubles of state for each coordinate: 0, 1 or 2
// moments[coord_opt_moments(kind) * count]: all m, then all v.
void coord_opt_start(const coord_opt *opt, size_t count, double *moments);
// One step in place. FL_ELIMIT: some result would not be finite; theta and moments are then
// unchanged.
fl_status coord_opt_step(const coord_opt *opt, size_t count, const double *delta, float *theta,
                         double *moments, fl_err *err) FL_NODISCARD;

// The gate's last check: an update's norm against the running median of its layer.
enum { COORD_NORMS_MAX = 64 };
typedef struct coord_norms { // the newest norms of a layer; zeroed is empty
    double ring[COORD_NORMS_MAX];
    uint32_t count, next;
} coord_norms;
typedef struct coord_gate {
    double clip_factor;   // a norm above this times the median is scaled down to it
    double refuse_factor; // above this times the median it is refused
    uint32_t norms_min;   // fewer norms than this are no median: everything finite passes
} coord_gate;

void coord_norms_add(coord_norms *n, double norm);
double coord_norms_median(const coord_norms *n); // lower median; 0 when empty
// *ret_clip: COORD_ONE, or less when the update must be scaled down. FL_ELIMIT: refuse, and why.
fl_status coord_gate_norm(const coord_gate *gate, const coord_norms *n, double norm,
                          uint32_t *ret_clip, fl_err *err) FL_NODISCARD;

#endif
