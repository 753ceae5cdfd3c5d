// robust_fleet.h: a small fleet with attackers, to choose the default rule by experiment: 15 nodes
// tune a classifier of two layers on data of their own kind, and the coordinator's real gate, rules
// and quarantine make of their updates what they make of real ones.
#ifndef FL_BENCH_ROBUST_FLEET_H
#define FL_BENCH_ROBUST_FLEET_H

#include "coordinator/aggregate.h"
#include "coordinator/robust.h"

enum {
    FLEET_NODES = 15,
    FLEET_BAD = 3, // the last ones
    FLEET_IN = 20,
    FLEET_HIDDEN = 24,
    FLEET_CLASSES = 10,
    FLEET_W1 = FLEET_HIDDEN * (FLEET_IN + 1),
    FLEET_W2 = FLEET_CLASSES * (FLEET_HIDDEN + 1),
    FLEET_VALUES = FLEET_W1 + FLEET_W2,
};

#define FLEET_ATTACK_LIST(X)                                                                       \
    X(NONE, "none")         /* all fifteen are honest */                                           \
    X(FLIP, "flip")         /* the update with the other sign */                                   \
    X(FLIP3, "flip x3")     /* three times as long, which passes the gate */                       \
    X(HUNDRED, "x100")      /* a hundred times as long */                                          \
    X(NOISE, "noise x3")    /* normal noise, three times as long as an honest update */            \
    X(TARGETED, "targeted") /* honest training on wrong labels */                                  \
    X(AWAY, "flip x100")    /* the other sign, a hundred times as long */
typedef enum fleet_attack {
#define X(name, text) FLEET_##name,
    FLEET_ATTACK_LIST(X) FLEET_ATTACK_COUNT
#undef X
} fleet_attack;

typedef struct fleet_run {
    coord_robust_opts opts;
    bool gated, quarantine;
    double sparse; // share of values that travel, with error feedback; 1: all
    double skew;   // share of a node's examples that are of its own two classes
    fleet_attack attack;
    uint32_t rounds;
    uint64_t seed;
} fleet_run;

// Held-out loss of the honest nodes' text after the rounds, nats; NaN when the model is broken.
// *ret_quarantined: how many bad and good nodes were ever put away.
double fleet_loss(const fleet_run *run, uint32_t ret_quarantined[2]);

#endif
