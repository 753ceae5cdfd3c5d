// shapes.h: the matrices of the models we really tune (here SmolLM2-135M), rows by columns.
#ifndef FL_BENCH_SHAPES_H
#define FL_BENCH_SHAPES_H

#include <stdbool.h>
#include <stdint.h>

typedef struct bench_shape {
    uint32_t rows, cols;
} bench_shape;

static const bench_shape bench_shapes[] = {
    {576, 576},   // attention query and output
    {192, 576},   // attention key and value
    {1536, 576},  // feed-forward gate and up
    {576, 1536},  // feed-forward down
    {49152, 576}, // the head
};

// The matrices of a layer in the order in which a token meets them; the engine's threads wait for
// one another after those with a barrier.
static const struct {
    bench_shape shape;
    bool barrier;
} bench_layer[] = {
    {{576, 576}, false},  {{192, 576}, false}, {{192, 576}, true},  {{576, 576}, true},
    {{1536, 576}, false}, {{1536, 576}, true}, {{576, 1536}, true},
};

#endif
