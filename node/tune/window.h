// window.h: which layers one tuning step trains, and at which exit its loss is taken.
//
// A window is the last `size` layers below an exit (at most down to layer 0). Windows are
// cumulative: each sits on the adapted layers below it, which it does not change.
//
//   last        always the last exit, and all layers below it unless a size is named: the model's
//               own output improves at once (docs/adr/0013-as-deep-as-memory.md)
//   ordered     exit 0 for the first steps/T steps, then exit 1, ... the last takes the remainder.
//               From below upwards, so that no window is trained on layers that change after it;
//               each for whole epochs where steps/T has one, so that every window sees all of the
//               text equally often and, from its second epoch on, finds its input in the prefix
//               cache (prefix.h)
//   cyclic      exit step mod T
//   random      every exit with the same probability
//   heavy       the last exit every other step, between them the others in turn
//   importance  exits with probabilities in proportion to `importance`, which the tuner keeps as a
//               running mean of each window's gradient norm (an exit not yet seen counts as the
//               largest)
//   fixed       the exit that is named: how a coordinator assigns windows
//
// A window is a function of the options and the step alone, so a run can be repeated or resumed.
#ifndef NODE_TUNE_WINDOW_H
#define NODE_TUNE_WINDOW_H

#include "node/model/model.h"

typedef enum node_window_kind {
    NODE_WINDOW_LAST,
    NODE_WINDOW_ORDERED,
    NODE_WINDOW_CYCLIC,
    NODE_WINDOW_RANDOM,
    NODE_WINDOW_HEAVY,
    NODE_WINDOW_IMPORTANCE,
    NODE_WINDOW_FIXED,
} node_window_kind;

const char *node_window_name(node_window_kind kind);
bool node_window_parse(const char *name, node_window_kind *ret) FL_NODISCARD;

typedef struct node_window_opts {
    node_window_kind kind;
    uint32_t size;        // layers; 0: from the exit below to this one, of `last` all of them
    uint32_t still;       // of them, nearest the exit, through which the gradient only passes
    uint32_t exit;        // of `fixed`
    uint64_t steps;       // of the whole run, for `ordered`; 0: not known
    uint64_t epoch_steps; // that go once through the text, for `ordered`; 0: not known
    uint64_t seed;
    float importance[NODE_EXITS_MAX];
} node_window_opts;

typedef struct node_window {
    uint32_t exit;
    uint32_t first, last; // layers, both included
} node_window;

node_window node_window_at(const node_model *model, const node_window_opts *opts, uint64_t step);
// The window of one exit.
node_window node_window_of_exit(const node_model *model, uint32_t size, uint32_t exit);
// Most layers that a window of these options has, and the deepest layer that any of them runs.
uint32_t node_window_layers(const node_model *model, const node_window_opts *opts);
uint32_t node_window_depth(const node_model *model, const node_window_opts *opts);
// Steps for which a window stays while nothing below it changes: 0 when every step may train
// another, UINT64_MAX when the run's end is not known. A run of one window: all its steps.
uint64_t node_window_held(const node_model *model, const node_window_opts *opts);
// Do all steps train the same layers?
bool node_window_is_fixed(const node_window_opts *opts);

#endif
