// sim.h: a whole federation in one thread: the coordinator's loop and store, the nodes' protocol
// core and every codec, as they are in the programs, on virtual time, simulated disks and a
// simulated network. Everything that happens follows from the seed, so a run that fails is run
// again, event for event.
//
// What is real: coordinator/ (loop, round, registry, aggregate, store, SQLite on the simulated
// disk), node/client, proto/ (frames, codec, channel with its counters and replay window, update
// format). What is not: public-key arithmetic (sim/crypto.h), ZeroMQ (frames are delivered, lost,
// doubled and reordered by sim/net.c), training (an update is drawn from the seed), the node's
// files (a spool that keeps what the real one syncs).
#ifndef SIM_SIM_H
#define SIM_SIM_H

#include "common/status.h"

#include <stdio.h>

typedef struct sim_opts {
    uint64_t seed;
    uint32_t nodes, rounds;
    double loss;      // most that a link loses; each node's is drawn below it
    double crashes;   // of the coordinator in a run, on average
    double attackers; // share of the nodes, on average
    FILE *trace;      // NULL: none
} sim_opts;

typedef struct sim_result {
    bool failed;
    char problem[240];
    uint64_t digest; // of every event, in order
    uint64_t virtual_ms, events, frames;
    uint64_t rounds, updates;    // sealed; counted
    uint64_t acknowledged;       // updates of which a node was told that they count
    uint64_t refused;            // updates that a node was told do not
    uint64_t checks;             // invariants that were looked at
    uint64_t crashes, power_cuts; // of the coordinator
    uint64_t node_crashes;
    uint64_t recoveries_compared; // memory against a second recovery
} sim_result;

// Runs one seed. A broken invariant is in *ret; a status other than FL_OK says that the simulator
// itself could not go on (no memory).
fl_status sim_run(const sim_opts *opts, sim_result *ret, fl_err *err) FL_NODISCARD;

#endif
