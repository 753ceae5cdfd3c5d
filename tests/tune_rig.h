// tune_rig.h: a small random model, a text that is easy to learn and a tuner bound to both.
#ifndef FL_TESTS_TUNE_RIG_H
#define FL_TESTS_TUNE_RIG_H

#include "node/tune/tuner.h"
#include "tests/tiny_model.h"

// Documents that repeat a few token patterns: easy to learn.
typedef struct text {
    int32_t ids[2000];
    uint64_t begin[9];
    node_docs docs;
} text;

static inline void make_text(text *x, uint32_t vocabulary) {
    for (uint32_t d = 0; d < 8; d++) {
        x->begin[d] = d * 250;
        for (uint32_t i = 0; i < 250; i++)
            x->ids[d * 250 + i] = (int32_t)((i * (d % 2 + 1) + d) % (vocabulary / 3));
    }
    x->begin[8] = 2000;
    x->docs = (node_docs){x->ids, x->begin, 8};
}

typedef struct rig {
    tiny_model *t;
    node_adapter *adapter;
    fl_kern kern;
    node_engine engine;
    text text;
    void *block;
    node_tune_plan plan;
    node_tuner tuner;
    size_t peak;
} rig;

static inline rig *rig_open(const tiny_shape *shape) {
    rig *r = calloc(1, sizeof(*r));
    T_NEED(r != NULL, "memory");
    r->t = tiny_open(shape);
    fl_kern_select(&r->kern, fl_cpu_detect());
    r->engine = (node_engine){&r->kern, NULL};
    node_adapter_opts opts = {.rank = 4, .alpha = 8.0f, .seed = 3};
    fl_err err;
    T_OK(node_adapter_open(&r->t->model, &opts, &r->adapter, &err), err);
    make_text(&r->text, shape->vocabulary);
    return r;
}

static inline void rig_bind(rig *r, const node_tune_opts *opts) {
    fl_err err;
    fl_arena arena;
    T_OK(node_tune_make_plan(&r->t->model, 4, &r->text.docs, opts, &r->plan, &err), err);
    free(r->block);
    r->block = aligned_alloc(64, (r->plan.arena_bytes + 63) / 64 * 64);
    T_NEED(r->block != NULL, "memory");
    fl_arena_init(&arena, r->block, r->plan.arena_bytes);
    node_tuner_bind(&r->tuner, &r->engine, &r->t->model, r->adapter, &r->text.docs, &r->plan.opts,
                    &arena);
    r->peak = arena.peak;
}

static inline void rig_close(rig *r) {
    free(r->block);
    node_adapter_close(r->adapter);
    tiny_close(r->t);
    free(r);
}

static inline node_tune_opts small_opts(void) {
    node_tune_opts o = node_tune_defaults();
    o.window.size = 2; // of 4: there are layers below it
    o.sequence = 32;
    o.chunk = 48;
    return o;
}

static inline uint8_t *bytes_of(const node_adapter *a, size_t *ret_size) {
    *ret_size = node_adapter_file_size(a);
    uint8_t *p = malloc(*ret_size);
    T_NEED(p != NULL, "memory");
    node_adapter_encode(a, p);
    return p;
}

#endif
