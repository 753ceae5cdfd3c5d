// validate.h: did the newest layers make the fleet's held-out loss worse, and which nodes keep
// sending what nobody else agrees with? Pure: numbers in, a judgement and a state as bytes out.
//
// A node's report says what the layers that it fetched lose on its own held-out text. The change of
// a node is that loss minus its loss under the last good layers, on the same text: paired, so what
// differs between nodes cancels. Up to f nodes may say anything. Sorted, the value at
// (n - f - 1) / 2 is at most the honest nodes' median however the liars lie, and its mirror at the
// other end is at least that median: only when the first is above the tolerance are the layers
// worse, and only when the second is below zero are they better. So f liars alone can neither
// trigger a rollback nor have a bad state taken for good.
#ifndef COORD_VALIDATE_H
#define COORD_VALIDATE_H

#include "coordinator/aggregate_vote.h"
#include "coordinator/robust.h"

enum {
    COORD_GOOD_LAYERS = 256, // as the store's
    COORD_CHANGES_MIN = 3,   // nodes without which nothing is judged
    COORD_GOOD_AGE = 8,      // rounds after which layers that are no worse become the good ones
    COORD_GOOD_FORGET = 64 // rounds without a judgement after which the good ones are forgotten
};

typedef struct coord_change { // of one node
    double nats;              // a token; above zero: the newest layers lose more
    uint64_t tokens;          // that it was measured on
} coord_change;

typedef enum coord_judgement {
    COORD_UNKNOWN, // too few nodes measured both
    COORD_BETTER,
    COORD_NO_WORSE,
    COORD_WORSE,
} coord_judgement;

// members: active nodes, of which at least half must be in `changes`. byzantine: as the rules'.
// tolerance: nats a token. A node's change must also be above two standard errors of a difference
// of losses, 1 / sqrt(tokens), to count as worse. *ret_change: the value that was judged. Sorts
// changes.
coord_judgement coord_validate(coord_change *changes, uint32_t n, uint32_t members,
                               double byzantine, double tolerance, double *ret_change);

// ---- the last good layers

typedef struct coord_good {
    bool known;
    int64_t round; // whose reports measured it
    int64_t last;  // round of the newest judgement
    uint32_t layers;
    int64_t version[COORD_GOOD_LAYERS];
    uint32_t exits;
    double vote[COORD_EXITS_MAX];
} coord_good;

// After a judgement of `round`: should the layers that were judged become the good ones? Keeps
// `last`, and forgets what was not judged for long.
bool coord_good_judged(coord_good *good, coord_judgement judgement, int64_t round);

enum { COORD_GOOD_BYTES = 40 + 8 * COORD_GOOD_LAYERS + 8 * COORD_EXITS_MAX };
size_t coord_good_encode(const coord_good *good, uint8_t out[COORD_GOOD_BYTES]);
fl_status coord_good_decode(fl_bytes in, coord_good *ret, fl_err *err) FL_NODISCARD; // FL_EFORMAT

// ---- conduct: scores and quarantine
//
// One round says little: nodes with text of their own kind point elsewhere too. So each node has a
// score, the exponentially forgotten mean of its updates' cosines to what the others agreed on;
// one that was refused for what was in it counts as -1. Who is below zero, below COORD_SCORE_LOW
// and below the fleet's median score by 3 deviations (1.4826 x the median absolute one) is put away
// for a while: its updates are taken, acknowledged and judged, and do not count. When its time is
// over it is released if its score has recovered, and stays if not.

enum {
    COORD_CONDUCT_MAX = 1 << 14,
    COORD_SEEN_MIN = 3,     // rounds before a node is judged
    COORD_QUARANTINE = 8,   // rounds of the first time; doubles each time
    COORD_QUARANTINE_MAX = 256,
};
#define COORD_SCORE_FORGET 0.85
#define COORD_SCORE_LOW    (-0.05)

typedef struct coord_conduct { // of one node
    int64_t node;
    int64_t until;      // quarantined up to and with this round; 0: it is not
    double sum, weight; // score = sum / weight
    uint32_t seen, times;
    double cosines; // of the open flush: over its layers and refused updates
    uint32_t voices;
} coord_conduct;
typedef struct coord_conducts {
    coord_conduct *rows; // [COORD_CONDUCT_MAX], the caller's
    uint32_t count;
} coord_conducts;

// The node's row, made when it has none; NULL when there is no more room.
coord_conduct *coord_conduct_of(coord_conducts *c, int64_t node);
// One more voice of the node in the open flush.
void coord_conduct_note(coord_conducts *c, int64_t node, double cosine);
bool coord_is_quarantined(const coord_conducts *c, int64_t node, int64_t round);

typedef enum coord_conduct_change {
    COORD_CONDUCT_SAME,
    COORD_CONDUCT_QUARANTINED,
    COORD_CONDUCT_RELEASED,
} coord_conduct_change;
typedef void (*coord_conduct_fn)(void *ctx, const coord_conduct *row, coord_conduct_change change);
// The flush of `round` is over. At most `quarantined_max` nodes are put away at once, those with
// the lowest scores first. Tells each change; clears the tallies.
void coord_conducts_close(coord_conducts *c, int64_t round, uint32_t quarantined_max,
                          coord_conduct_fn fn, void *ctx);
double coord_conduct_score(const coord_conduct *row); // 0 before anything is known

enum { COORD_CONDUCT_BYTES = 48 };
// [count * COORD_CONDUCT_BYTES]; tallies of the open flush are not in it.
size_t coord_conducts_encode(const coord_conducts *c, uint8_t *out);
fl_status coord_conducts_decode(fl_bytes in, coord_conducts *c, fl_err *err) FL_NODISCARD;

#endif
