// shapes.h: the matrices of the models we really tune (here SmolLM2-135M), rows by columns.
#ifndef FL_BENCH_SHAPES_H
#define FL_BENCH_SHAPES_H

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

#endif
