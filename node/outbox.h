// outbox.h: from a layer's change to a sealed file in the spool: adds what earlier updates left,
// encodes, keeps what this one leaves, seals, and makes it durable in one rename.
#ifndef NODE_OUTBOX_H
#define NODE_OUTBOX_H

#include "node/state.h"
#include "node/upload/uplink.h"

typedef struct node_outbox {
    node_state *state; // its counters of updates and of the day's budget go on
    const fl_task *task;
    const uint8_t *update_key; // the coordinator's
    node_upload_choice choice;
} node_outbox;

typedef struct node_outbox_terms {
    node_upload_rule rule;
    node_uplink uplink;
    double work_s, left_s; // the task took; is left until its deadline
    int64_t now_s;         // wall clock
} node_outbox_terms;

// How the updates of layers of so many values are to be made. Notes in the state what they need at
// least, which is what the node waits for when the day's budget is spent.
node_upload_choice node_outbox_choose(node_state *state, const fl_task *task,
                                      const node_outbox_terms *terms, const uint32_t *counts,
                                      uint32_t layers);

// Spools the change of a layer from version `base`. Durable when it returns, with what it leaves.
//   FL_EFORMAT  the change is not finite or too large: training diverged
//   FL_ENOMEM, FL_EIO: nothing of it is there
fl_status node_outbox_put(node_outbox *o, uint32_t layer, uint64_t base, const float *delta,
                          uint32_t count, uint64_t tokens, fl_update_begin *ret,
                          fl_err *err) FL_NODISCARD;

#endif
