// robust.h: what a layer's updates become when some of the nodes may lie.
//
// A rule works on voices: one a node, its update of the layer (several of one node were averaged by
// the caller), in ascending order of the node's number. Values are read tile by tile, so memory is
// voices x COORD_TILE, whatever the layer's size; everything is a fixed sequence of correctly
// rounded double operations over voices in that order, so the same set of updates gives the same
// bits whatever order it came in, on every machine.
//
//   mean          sum w_i x_i / sum w_i
//   clipped-mean  the same, of norms cut to clip x the batch's median norm (as in all but mean)
//   median        of each coordinate; the mean of the middle two when they are even
//   trimmed-mean  each coordinate without its f smallest and f largest, weighted mean of the rest
//   krum          the update with the least sum of its m - f - 2 smallest squared distances
//   multi-krum    weighted mean of the m - f updates with the least of those sums
//   centred-clip  v += sum p_i min(1, r / |x_i - v|) (x_i - v), p_i = w_i / sum w
//   fltrust       sum t_i (|g| / |x_i|) x_i / sum t_i, t_i = max(0, cos(x_i, g)), g the root's
//
// Source: Yin et al., Byzantine-Robust Distributed Learning, ICML 2018 (median, trimmed mean);
// Blanchard et al., Machine Learning with Adversaries, NeurIPS 2017 (krum); Karimireddy et al.,
// Learning from History, ICML 2021 (centred clipping); Cao et al., FLTrust, NDSS 2021.
#ifndef COORD_ROBUST_H
#define COORD_ROBUST_H

#include "common/status.h"

enum {
    COORD_TILE = 4096, // coordinates of a tile; part of the definition of the sums
    COORD_VOICES_MAX = 1 << 14,
    COORD_RULE_REASON = 96,
    COORD_ROBUST_MIN = 5, // with fewer nodes nothing is safe from even one liar
};
#define COORD_NO_ROOT UINT32_MAX

#define COORD_RULE_LIST(X)                                                                         \
    X(MEAN, "mean")                                                                                \
    X(CLIPPED, "clipped-mean")                                                                     \
    X(MEDIAN, "median")                                                                            \
    X(TRIMMED, "trimmed-mean")                                                                     \
    X(KRUM, "krum")                                                                                \
    X(MULTI_KRUM, "multi-krum")                                                                    \
    X(CENTRED, "centred-clip")                                                                     \
    X(FLTRUST, "fltrust")
typedef enum coord_rule {
#define X(name, text) COORD_RULE_##name,
    COORD_RULE_LIST(X) COORD_RULE_COUNT
#undef X
} coord_rule;
const char *coord_rule_text(coord_rule rule);

// How many of m nodes are assumed bad: `byzantine` itself when it is 1 or more, otherwise that
// share of m, rounded up.
uint32_t coord_byzantine(double byzantine, uint32_t m);

// The rule that m voices allow, going down krum -> trimmed mean -> median -> mean; fltrust without
// a root goes to centred clipping. When it is not `rule`, reason says why; otherwise it is "".
coord_rule coord_rule_for(coord_rule rule, uint32_t m, double byzantine, bool has_root,
                          char reason[COORD_RULE_REASON]);

typedef struct coord_voice {
    uint64_t weight; // 0 .. 2^40; 0: it is judged and does not count
} coord_voice;

// Values first .. first + n - 1 of voice v, n <= COORD_TILE, first a multiple of COORD_TILE, each
// at most 2^40 in magnitude. Asked for each tile of each voice, several times over.
typedef fl_status (*coord_voice_read)(void *ctx, uint32_t v, size_t first, size_t n, int64_t *out,
                                      fl_err *err);

typedef struct coord_robust_opts {
    coord_rule rule;
    double byzantine;    // share below 1, or a count
    double clip;         // norms are cut to this times the batch's median norm; 0: they are not;
                         // the mean and centred clipping do not look at it
    bool filter;         // outliers are left out, at most f of them, and the rule is applied again
    double radius;       // of centred clipping; 0: the median distance, found anew each time
    uint32_t iterations; // of centred clipping, >= 1
    uint32_t root;       // voice of the owner's root; COORD_NO_ROOT
    double unit;         // what an integer of 1 is worth
    double kappa;        // n voices count n / (n + kappa), as coord_sum_mean
} coord_robust_opts;

typedef struct coord_opinion { // what the rule made of a voice
    double norm;               // before clipping, in units
    double cosine;             // to the result without its own part in it; 0 when either is zero
    double kept;               // 0: nothing of it counted, 1: all of it
    bool outlier; // points away from what the others agree on, further than they differ themselves
} coord_opinion;

// A voice is an outlier when its cosine to the result is below zero and below the median cosine by
// more than 3 deviations (1.4826 x the median absolute one): nodes with text of their own kind
// differ, and so widen what is tolerated. With fewer than COORD_ROBUST_MIN voices nobody is.

typedef struct coord_robust_result {
    coord_rule used;
    uint32_t bad;                   // f
    char reason[COORD_RULE_REASON]; // why another rule than asked for; "" when it is that
} coord_robust_result;

// mean[count]: in, the centre from which centred clipping starts (zeros are fine; other rules do
// not read it); out, the layer's step. opinions[m].
//   FL_EARG    no voice that counts, more than COORD_VOICES_MAX, no values, a weight above 2^40
//   FL_ENOMEM  and whatever `read` fails with: mean is then not specified
fl_status coord_robust_run(const coord_robust_opts *opts, const coord_voice *voices, uint32_t m,
                           size_t count, coord_voice_read read, void *ctx, double *mean,
                           coord_opinion *opinions, coord_robust_result *ret,
                           fl_err *err) FL_NODISCARD;

// From a ledger's rows to voices: one a node, whatever it sent and in whatever order it came.
// Several updates of one node (late ones of older versions) become one weighted mean, in integers.
typedef struct coord_ballot_row {
    int64_t node, base; // together unique
    uint64_t weight;    // 1 .. 2^40
    uint32_t clip;      // the gate's, as coord_sum_fold's
    uint32_t source;    // what the caller calls it
} coord_ballot_row;
typedef struct coord_ballot {
    coord_ballot_row *rows; // [row_count], by node, then base, after coord_ballot_sort
    uint32_t row_count;
    coord_voice *voices; // [row_count], of which the first voice_count are used
    uint32_t *first;     // [row_count + 1]: rows of voice v are first[v] .. first[v + 1] - 1
    uint32_t voice_count;
    coord_voice_read read; // of a row, by its source
    void *ctx;
} coord_ballot;

// rows, row_count, voices, first, read and ctx are the caller's; fills the rest.
void coord_ballot_sort(coord_ballot *b);
// The voice of a node, or COORD_NO_ROOT.
uint32_t coord_ballot_voice(const coord_ballot *b, int64_t node);
// A coord_voice_read whose ctx is the ballot.
fl_status coord_ballot_read(void *ballot, uint32_t v, size_t first, size_t n, int64_t *out,
                            fl_err *err) FL_NODISCARD;

#endif
