// loop.h: the agent. One thread that owns all state: receives frames, feeds the client, carries out
// its effects, asks the owner's rules, and logs.
#ifndef NODE_LOOP_H
#define NODE_LOOP_H

#include "node/schedule/policy.h"
#include "node/state.h"
#include "node/worker.h"

typedef struct node_loop_opts {
    node_state *state; // enrolled
    node_worker *worker;
    node_rules rules;
    uint64_t memory_bytes; // told to the coordinator
    node_upload_rule upload;
    const char *data;
} node_loop_opts;

// Runs until the run is finished (FL_OK), the node is revoked (FL_EAUTH), or node_loop_stop was
// called (FL_OK).
fl_status node_loop_run(const node_loop_opts *opts, fl_err *err) FL_NODISCARD;
void node_loop_stop(int signal); // safe in a signal handler

// What `status` reads: one JSON file, written every few seconds and at every change of phase.
#define NODE_STATUS_FILE "status.json"

#endif
