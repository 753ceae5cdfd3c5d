#include "node/tune/window.h"

#include <string.h>

#include "common/rng.h"

static const char *const names[] = {"last",  "ordered",    "cyclic", "random",
                                    "heavy", "importance", "fixed"};

const char *node_window_name(node_window_kind kind) {
    return (size_t)kind < FL_COUNT(names) ? names[kind] : "unknown";
}

bool node_window_parse(const char *name, node_window_kind *ret) {
    for (size_t i = 0; i < FL_COUNT(names); i++) {
        if (strcmp(name, names[i]) != 0) continue;
        *ret = (node_window_kind)i;
        return true;
    }
    return false;
}

node_window node_window_of_exit(const node_model *model, uint32_t size, uint32_t exit) {
    FL_ASSERT(exit < model->exits);
    const uint32_t end = model->exit_layer[exit];
    const uint32_t below = exit == 0 ? 0 : model->exit_layer[exit - 1];
    if (size == 0) size = end - below;
    if (size > end) size = end;
    return (node_window){.exit = exit, .first = end - size, .last = end - 1};
}

static uint32_t by_importance(const node_model *model, const node_window_opts *opts, float u) {
    float most = 0, sum = 0, weight[NODE_EXITS_MAX];
    for (uint32_t t = 0; t < model->exits; t++)
        if (opts->importance[t] > most) most = opts->importance[t];
    for (uint32_t t = 0; t < model->exits; t++) {
        weight[t] = most == 0 ? 1 : opts->importance[t] == 0 ? most : opts->importance[t];
        sum += weight[t];
    }
    u *= sum;
    for (uint32_t t = 0; t + 1 < model->exits; t++) {
        if (u < weight[t]) return t;
        u -= weight[t];
    }
    return model->exits - 1;
}

// Steps of each window but the last one of `ordered`.
static uint64_t ordered_run(const node_model *model, const node_window_opts *opts) {
    const uint64_t share = opts->steps / model->exits, epoch = opts->epoch_steps;
    if (share == 0) return 1;
    return epoch == 0 || share < epoch ? share : share - share % epoch;
}

static uint32_t exit_at(const node_model *model, const node_window_opts *opts, uint64_t step) {
    const uint32_t exits = model->exits;
    const uint64_t key = fl_rng_key(opts->seed, 0x77696e, 0);
    const uint64_t run = ordered_run(model, opts);
    switch (opts->kind) {
    case NODE_WINDOW_ORDERED:
        return step / run < exits ? (uint32_t)(step / run) : exits - 1;
    case NODE_WINDOW_CYCLIC:
        return (uint32_t)(step % exits);
    case NODE_WINDOW_RANDOM:
        return (uint32_t)fl_rng_below(key, step, exits);
    case NODE_WINDOW_HEAVY:
        if (step % 2 == 0 || exits == 1) return exits - 1;
        return (uint32_t)(step / 2 % (exits - 1));
    case NODE_WINDOW_IMPORTANCE:
        return by_importance(model, opts, fl_rng_unit(key, step));
    case NODE_WINDOW_FIXED:
        return opts->exit;
    case NODE_WINDOW_LAST:
        break;
    }
    return exits - 1;
}

// Layers below one exit that a step of these options trains.
static node_window window_of(const node_model *model, const node_window_opts *opts, uint32_t exit) {
    const bool whole = opts->kind == NODE_WINDOW_LAST && opts->size == 0;
    return node_window_of_exit(model, whole ? model->layers : opts->size, exit);
}

node_window node_window_at(const node_model *model, const node_window_opts *opts, uint64_t step) {
    return window_of(model, opts, exit_at(model, opts, step));
}

bool node_window_is_fixed(const node_window_opts *opts) {
    return opts->kind == NODE_WINDOW_FIXED || opts->kind == NODE_WINDOW_LAST;
}

uint64_t node_window_held(const node_model *model, const node_window_opts *opts) {
    if (!node_window_is_fixed(opts) && opts->kind != NODE_WINDOW_ORDERED) return 0;
    uint64_t held = opts->steps == 0 ? UINT64_MAX : opts->steps;
    if (opts->kind == NODE_WINDOW_ORDERED) held = ordered_run(model, opts);
    for (uint32_t t = 0; t < model->exits;
         t++) { // a window that begins at layer 0 has nothing below
        if (opts->kind == NODE_WINDOW_FIXED && t != opts->exit) continue;
        if (opts->kind == NODE_WINDOW_LAST && t != model->exits - 1) continue;
        if (window_of(model, opts, t).first > 0) return held;
    }
    return 0;
}

uint32_t node_window_layers(const node_model *model, const node_window_opts *opts) {
    uint32_t most = 0;
    for (uint32_t t = 0; t < model->exits; t++) {
        if (opts->kind == NODE_WINDOW_FIXED && t != opts->exit) continue;
        if (opts->kind == NODE_WINDOW_LAST && t != model->exits - 1) continue;
        const node_window w = window_of(model, opts, t);
        if (w.last - w.first + 1 > most) most = w.last - w.first + 1;
    }
    return most;
}

uint32_t node_window_depth(const node_model *model, const node_window_opts *opts) {
    return model->exit_layer[opts->kind == NODE_WINDOW_FIXED ? opts->exit : model->exits - 1] - 1;
}
