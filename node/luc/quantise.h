// quantise.h: float matrices to the packed form of kernels/packed.h.
//
// Each group of 64 weights of a row gets an fp16 scale and minimum that come from a search: a few
// shrunken ranges are tried, each is refined by least squares over its own codes, and the one with
// the smallest error, weighted column by column, is kept.
//
// With a factor of the inputs' Gram matrix, rounding feeds its errors back: columns are rounded
// last to first, and what column r lost is made good in the columns before it, in the proportion
// that their inputs share. With H = L L^T and U = L with its columns divided by their diagonals:
//     v_c = w_c + sum over r > c of (w - w')_r U_rc,    w'_c = the code nearest to v_c,
// and the output error is exactly the sum of L_cc^2 (v_c - w'_c)^2.
//   Source    Frantar et al. 2022 (GPTQ), arXiv 2210.17323, section 3; in this form Chee et al.
//   2023
//             (QuIP), arXiv 2307.13304, section 3.
#ifndef NODE_LUC_QUANTISE_H
#define NODE_LUC_QUANTISE_H

#include "node/luc/factor.h"

enum { NODE_QUANTISE_ROWS = 64 }; // rows that a worker takes at a time

// Memory of the workers.
typedef struct node_quantise {
    unsigned threads;
    uint32_t rows_max, cols_max;
    float *lost;   // [threads][NODE_QUANTISE_ROWS][cols_max] what rounding lost so far
    float *fed;    // [threads][NODE_QUANTISE_ROWS][64] what is fed back to a group
    float *lower;  // [cols_max][cols_max] U, filled by node_quantise_set_factor
    float *weight; // [cols_max] L_cc^2
    double *error; // [blocks of rows]
} node_quantise;

void node_quantise_bind(node_quantise *q, uint32_t rows_max, uint32_t cols_max, unsigned threads,
                        fl_arena *arena);

// Takes L (node_factor_cholesky) over as U and weights.
void node_quantise_set_factor(const node_engine *engine, node_quantise *q, const node_factor *f);

typedef struct node_quantise_job {
    const float *w; // [rows][total]
    // Columns cols .. total are removed: they are not packed, and with feedback what they did is
    // made good in the columns that stay. A zero in `w` under keep_zeros is a removed weight.
    uint32_t rows, cols, total, bits;
    const float *full;   // [rows][total] weights before the zeros were made; NULL: w
    const float *weight; // [cols] of the columns' errors in the search; NULL: all the same
    bool keep_zeros;     // weights that are zero stay exactly zero
    uint8_t *packed;     // fl_packed_size bytes, 64-byte aligned
} node_quantise_job;

// Nearest codes.
void node_quantise_nearest(const node_engine *engine, node_quantise *q,
                           const node_quantise_job *job);
// With feedback through the factor set last, of job->total columns; job->weight is not looked at.
// Returns the output error tr(E H E^T), less what removing columns costs whatever the rounding.
double node_quantise_feedback(const node_engine *engine, node_quantise *q,
                              const node_quantise_job *job);
// The same measure for whatever job->packed holds.
double node_quantise_error(const node_engine *engine, node_quantise *q,
                           const node_quantise_job *job);

// The one of the two with the smaller output error over the first NODE_QUANTISE_ROWS rows: judging
// all rows would cost as much as rounding them. Feedback wherever something was removed.
void node_quantise_best(const node_engine *engine, node_quantise *q, const node_quantise_job *job);

// ret_cost[c], c < cols: what removing column c adds to the output error of w[rows][cols], when all
// columns after it are removed too and the ones before it make good what they can. So the sum from
// c to the end is the error of keeping the first c columns. Needs the factor of all columns.
void node_quantise_removal(const node_engine *engine, node_quantise *q, const float *w,
                           uint32_t rows, uint32_t cols, double *ret_cost);

#endif
