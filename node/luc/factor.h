// factor.h: the Gram matrix of a layer's inputs, and its Cholesky factor.
//
// With H = sum over tokens of x x^T = L L^T, the squared error that a change E of a weight matrix
// makes in its outputs is tr(E H E^T) = |E L|^2. Rounding with feedback, the cost of removing a
// channel and the repair after it all come from this one factor (quantise.h, prune.h).
#ifndef NODE_LUC_FACTOR_H
#define NODE_LUC_FACTOR_H

#include "node/model/forward.h"

enum { NODE_FACTOR_BLOCK = 64 };

// Memory for matrices of at most n columns and `tokens` rows of input.
typedef struct node_factor {
    uint32_t n_max, tokens_max;
    unsigned threads;
    float *xt;     // [n_max][tokens_max]
    float *rows;   // [threads][NODE_FACTOR_BLOCK][n_max]
    float *panel;  // [NODE_FACTOR_BLOCK][n] a block column, transposed
    float *solved; // [n_max][NODE_FACTOR_BLOCK] the same as it is
    double *h;     // [n][n]: the Gram matrix, then its factor; only the lower triangle counts
    uint32_t n;    // of what `h` holds
} node_factor;

void node_factor_bind(node_factor *f, uint32_t n_max, uint32_t tokens_max, unsigned threads,
                      fl_arena *arena);

// h = X^T X for the columns order[0..n) of x[tokens][stride] (order NULL: 0..n), then
// `damping` times the mean of its diagonal is added to the diagonal. FL_EFORMAT when an entry of
// the diagonal is not finite or all are zero. An input that never occurs gets no weight but the
// damping.
fl_status node_factor_gram(const node_engine *engine, node_factor *f, const float *x,
                           uint32_t tokens, size_t stride, const uint32_t *order, uint32_t n,
                           double damping, fl_err *err) FL_NODISCARD;

// h = L with L L^T = h, lower triangle, blocked and right-looking (Golub and Van Loan, Matrix
// Computations, 4th ed., 4.2.9). Products within a block of NODE_FACTOR_BLOCK columns are of
// floats, sums over blocks are doubles: |L L^T - h| of entry (i, j) is about FLT_EPSILON sqrt(h_ii
// h_jj), as large as what the sums of node_factor_gram leave out. FL_EFORMAT when h is not positive
// definite. The same bits with any number of threads.
fl_status node_factor_cholesky(const node_engine *engine, node_factor *f, fl_err *err) FL_NODISCARD;

#endif
