// choose.h: how much of a task's updates to send. Pure: what is wanted, what is measured and what
// the owner allows go in, an encoding and a share come out, with the reason.
//
// A ladder of encodings from all values in 16 bits down to one value in a thousand in 4 bits; the
// coordinator's setting is its top. Down from there:
//   auto    the first whose upload takes at most a quarter of the time that the task took, and at
//           most half of the time that is left of it: a slow link sends less instead of later, so
//           that unequal nodes finish together (AdaTopK of FusionLLM, arXiv 2410.12707; BCRS, arXiv
//           2408.14736). Error feedback carries the rest to the next task. Before the link was
//           measured: 5 % in 4 bits or less.
//   dense   the top
//   RATIO   that share of the values
// A budget of bytes a day is spread over what is left of the day, then lowers any of them. When not
// even the least fits what is left, nothing is sent and the node waits for the next day.
#ifndef NODE_UPLOAD_CHOOSE_H
#define NODE_UPLOAD_CHOOSE_H

#include "proto/update.h"

enum {
    NODE_UPLOAD_DAY_S = 24 * 3600,
    NODE_UPLOAD_OVERHEAD = 640, // bytes of a layer's messages besides the payload, seal included
};

typedef enum node_upload_mode {
    NODE_UPLOAD_AUTO,
    NODE_UPLOAD_DENSE,
    NODE_UPLOAD_RATIO
} node_upload_mode;

typedef struct node_upload_rule { // the owner's
    node_upload_mode mode;
    double ratio;          // RATIO: > 0, <= 1
    uint64_t budget_bytes; // a day; 0: no limit
} node_upload_rule;

// "auto", "dense", or a share: "0.02" or "2%". FL_EARG says what is allowed.
fl_status node_upload_parse(const char *text, node_upload_rule *ret, fl_err *err) FL_NODISCARD;

typedef struct node_upload_ask {
    node_upload_rule rule;
    // The coordinator's: see fl_task. most 0: nothing but `only` is known to it.
    uint32_t only, most, keep_ppm;
    const uint32_t *counts; // [layers] values of each layer of the window
    uint32_t layers;
    double bytes_per_s, rtt_s; // 0: not measured
    double work_s, left_s;     // the task took; is left until its deadline
    // Of the budget: what is left today, and the share of it that this task may take. UINT64_MAX
    // when there is none.
    uint64_t budget_left, budget_share;
} node_upload_ask;

typedef enum node_upload_why {
    NODE_UPLOAD_WANTED, // as much as the coordinator wants
    NODE_UPLOAD_OWNER,
    NODE_UPLOAD_UNMEASURED,
    NODE_UPLOAD_LINK,
    NODE_UPLOAD_BUDGET,
    NODE_UPLOAD_SPENT, // nothing: the day's budget is
} node_upload_why;
const char *node_upload_why_text(node_upload_why why);

typedef struct node_upload_choice {
    fl_update_encoding encoding;
    uint32_t keep_ppm; // of a sparse one
    uint64_t bytes;    // of all layers, about, with their messages
    uint64_t least;    // that any choice takes
    node_upload_why why;
} node_upload_choice;

node_upload_choice node_upload_choose(const node_upload_ask *ask);
// Values of a layer that a share keeps, at least one.
uint32_t node_upload_keep(uint32_t count, uint32_t keep_ppm);

// ---- the budget: bytes of updates in a day (UTC, by this node's clock), kept across restarts.
typedef struct node_upload_spent {
    int64_t day;   // since 1970
    int64_t bytes; // of updates spooled on it
    int64_t least; // what the last task needed at least
} node_upload_spent;

// Another day begins at zero, also when the clock went back.
void node_upload_roll(node_upload_spent *spent, int64_t now_s);
uint64_t node_upload_left(const node_upload_spent *spent, const node_upload_rule *rule);
// Of what is left, the part that a task of cycle_s seconds has of the rest of the day.
uint64_t node_upload_share(const node_upload_spent *spent, const node_upload_rule *rule,
                           int64_t now_s, double cycle_s);
// Must the node wait for another day?
bool node_upload_waits(const node_upload_spent *spent, const node_upload_rule *rule, int64_t now_s);

#endif
