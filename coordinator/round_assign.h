// round_assign.h: which layers a node trains next, and for how many steps. Pure and deterministic:
// a function of the round's state and of what the node says it can do.
//
// The plan wants layer l to receive tokens in proportion to want(l): the sum of the shares of the
// exits whose range covers it. An exit's range is the layers above the exit before it, or the
// setting's window when that reaches deeper. got(l) is what the layer received: weighted tokens
// admitted in the open round and the COORD_COVER_ROUNDS - 1 before it, and the tokens promised by
// tasks that are out. The layer's debt is want(l) * sum(got) / sum(want) - got(l).
//
// A node is given the window that holds the layer furthest behind its share, (got + task) / want,
// as stride scheduling does; ties go to the layer that has not changed for longest, then to the
// largest debt of the whole window. Where the setting or the link allows fewer layers than the
// range has, windows slide over it. The backward pass starts at the exit, so what memory limits is
// the distance from the exit down to the window's first layer: small nodes stay near the exit, and
// large ones find the largest debt below their reach and take it.
// Source: Waldspurger and Weihl, Stride Scheduling, section 2.
#ifndef COORD_ROUND_ASSIGN_H
#define COORD_ROUND_ASSIGN_H

#include "coordinator/round.h"

typedef struct coord_window {
    uint32_t exit, first, last;
} coord_window;

typedef struct coord_ask { // what the node can do
    uint32_t node, window_max;
    uint64_t speed;        // tokens tuned in 1000 s, measured; 0: not known
    uint64_t link_bytes_s; // measured; 0: not known
    uint64_t now_ms;
} coord_ask;

// False when nothing is left that the node may train: it sent all it can reach at these versions.
bool coord_assign_window(const coord_round *r, const coord_ask *ask, coord_window *ret);

// Steps of a task that the node finishes in half of a round's time, so that it is heard before the
// deadline: 1 .. opts.steps; opts.steps when its speed is not known.
// Source: local steps in proportion to measured speed, as in Li et al., FedCompass, section 3.
uint32_t coord_assign_steps(const coord_round_opts *opts, uint64_t speed);

// Tokens owed to each layer of the plan, ret[opts.layers]: below 0 where it had more than its
// share, 0 outside the plan.
void coord_assign_debts(const coord_round *r, uint64_t now_ms, int64_t *ret);

#endif
