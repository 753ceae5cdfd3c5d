// rope: rotary position embedding. One definition: it is cheap, and the same bits everywhere.
//
//   Angle     pair i of `size` rotating dimensions turns by pos * freq[i],
//             freq[i] = base^(-2 i / size) / factors[i], all in double; only cos and sin are
//             rounded to float. A row is a function of (pos, freq) alone, so that it does not
//             matter where or how often it is made.
//   Row       cos_sin[size]: cos of the size/2 pairs, then sin.
//   Layout    half == false: pair i is elements (2i, 2i + 1), as GGUF's llama stores;
//             half == true: pair i is elements (i, i + size / 2).
//             Elements past `size` of a head stay as they are.
//   Inverse   turns by minus the angle: the backward pass, since a rotation's transpose is its
//             inverse.
//   Numerics  two products and one sum per element, each rounded to float: error of an element at
//             most 3 * FLT_EPSILON * (|a| + |b|) of its pair (a, b).
//   Errors    none; size is even.   Threads  pure.
//   Source    Su et al. 2021, arXiv 2104.09864, eq. 34.
#ifndef FL_KERNELS_ROPE_H
#define FL_KERNELS_ROPE_H

#include "kernels/cpu.h"

// freq[size / 2]; factors[size / 2] or NULL for all 1.
void fl_rope_freq(uint32_t size, double base, const float *factors, double *freq);

// cos_sin[size] of one position.
void fl_rope_row(uint32_t pos, uint32_t size, const double *freq, float *cos_sin);

// Turns `heads` heads of `head_size` elements (contiguous, size <= head_size) in place.
void fl_rope_apply(uint32_t heads, uint32_t head_size, uint32_t size, bool half, bool inverse,
                   const float *cos_sin, float *x);

#endif
