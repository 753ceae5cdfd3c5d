// robust_tile.h: what the robust rules do within a tile. Not for others: include robust.h.
#ifndef COORD_ROBUST_TILE_H
#define COORD_ROBUST_TILE_H

#include "coordinator/robust.h"

// sum x[i] * y[i], in 8 interleaved sums that are added pairwise: vector code without reordering.
double coord_tile_dot(const double *x, const double *y, size_t n);
// sum (x[i] - y[i])^2, in the same order.
double coord_tile_distance2(const double *x, const double *y, size_t n);

// Sorts m pairs by value; equal values keep their order. scratch holds as many.
typedef struct coord_pair {
    double value;
    uint32_t voice;
} coord_pair;
void coord_pairs_sort(coord_pair *pairs, coord_pair *scratch, uint32_t m);

// x: m rows of COORD_TILE, n of each used. out[n]. factor[m] scales each row. pairs: 2 * m.
// kept[m] is raised by the number of coordinates in which the voice is within the middle.
void coord_tile_median(const double *x, const double *factor, uint32_t m, size_t n,
                       coord_pair *pairs, double *kept, double *out);
void coord_tile_trimmed(const double *x, const double *factor, const coord_voice *voices,
                        uint32_t m, uint32_t cut, size_t n, coord_pair *pairs, double *kept,
                        double *out);
// out[i] = sum_k factor[k] * x[k][i], in order of k.
void coord_tile_combine(const double *x, const double *factor, uint32_t m, size_t n, double *out);

// Lower median; sorts `values`.
double coord_lower_median(double *values, uint32_t n);

#endif
