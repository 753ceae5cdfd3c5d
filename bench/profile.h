// profile.h: where the time of the engine goes, by part, without touching the engine.
//
// The table of kernels that an engine is given is copied with functions that count around the real
// ones; fl_pool_run and the plain functions beside the table are taken over by the linker's --wrap
// (see CMakeLists.txt). What lies between, in pieces of the pool or outside them, is told apart
// too, and so is a thread's waiting for the others. One engine at a time.
#ifndef FL_BENCH_PROFILE_H
#define FL_BENCH_PROFILE_H

#include "node/model/forward.h"

// part, what is printed, whether it is a product of matrices
#define BENCH_PART_LIST(X)                                                                         \
    X(FORWARD, "layers forward", true)                                                             \
    X(HEAD, "head forward", true)                                                                  \
    X(DX, "layers dX", true)                                                                       \
    X(HEAD_DX, "head dX", true)                                                                    \
    X(ADAPTERS, "adapters", true)                                                                  \
    X(ATTENTION, "attention", false)                                                               \
    X(ATTENTION_BACK, "attention backward", false)                                                 \
    X(QUANTISE, "rows to bytes", false)                                                            \
    X(NORM, "rmsnorm", false)                                                                      \
    X(SWIGLU, "swiglu", false)                                                                     \
    X(XENT, "softmax, loss", false)                                                                \
    X(ROPE, "rope", false)                                                                         \
    X(VECTORS, "plain vectors", false)                                                             \
    X(ADAMW, "adamw", false)                                                                       \
    X(ROWS, "embedding rows", false)                                                               \
    X(PIECES, "rest of the pieces", false)                                                         \
    X(BETWEEN, "between the pieces", false)                                                        \
    X(WAITING, "waiting for others", false)                                                        \
    X(IDLE, "idle between pieces", false)

typedef enum bench_part {
#define X(part, text, product) BENCH_PART_##part,
    BENCH_PART_LIST(X)
#undef X
        BENCH_PARTS
} bench_part;

typedef struct bench_profile {
    double wall_s;
    double s[BENCH_PARTS];   // of all threads together; they add up to wall_s * threads
    double ops[BENCH_PARTS]; // of products, as if nothing were left out
} bench_profile;

// ret works as real does, and counts. `head` tells the head's products from the layers'. real and
// head outlive it.
void bench_profile_kern(const fl_kern *real, const node_matrix *head, fl_kern *ret);
void bench_profile_begin(void);
bench_profile bench_profile_end(unsigned threads);
void bench_profile_print(const bench_profile *p, unsigned threads, unsigned times);

#endif
