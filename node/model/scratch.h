// scratch.h: what forward.c and matmul.c share. Not for other modules.
#ifndef NODE_MODEL_SCRATCH_H
#define NODE_MODEL_SCRATCH_H

#include "node/model/forward.h"

enum {
    NODE_PANEL_FLOATS = 32768, // 128 KiB a worker: a panel of float weights that stays in L2
    NODE_PANEL_ROWS = 64,      // most rows of a panel
    NODE_PANEL_ROWS_MIN = 8,   // fewest, of very long rows
    NODE_TOKEN_GRAIN = 8,      // tokens of a piece of work that goes row by row
    NODE_ATTENTION_GRAIN = 16, // tokens that read a block of keys and values together
    NODE_SPAN_TOKENS = 64,     // of a batch that one thread takes through a layer; see forward.c
    NODE_PRODUCTS_MAX = 3,
};

struct node_scratch {
    uint32_t tokens;
    unsigned threads;
    void *x8;            // quantised rows of all tokens, or of each thread's span
    size_t x8_span;      // bytes of a span's
    float *panel;        // [threads][panel_stride]
    size_t panel_stride; // floats, at least NODE_PANEL_FLOATS
    float *rope;         // [tokens][rope_size] cosines and sines
    uint64_t *rope_pos;  // [tokens] position of each rope row, plus one; 0: none yet
    float *out;          // [tokens][max(hidden, 2 * kv width)] product before the residual
};

// One product y[T][y_stride] = x W[row_begin..row_end)^T; several with the same x share its codes
// and one pass over the threads.
typedef struct node_product {
    const node_matrix *w;
    uint32_t row_begin, row_end;
    float *y;
    size_t y_stride;
} node_product;

// True when some product reads quantised rows.
bool node_products_packed(const node_product *p, uint32_t count);

// x[T][cols]; x8 holds the same rows quantised when node_products_packed.
void node_products_run(const node_engine *engine, const node_product *p, uint32_t count,
                       uint32_t tokens, const float *x, const fl_x8 *x8, node_scratch *scratch);

// A packed product for the tokens of x8, whose row 0 is token `begin` of y. The caller's thread.
void node_product_span(const fl_kern *kern, const node_product *p, size_t begin, const fl_x8 *x8);

#endif
