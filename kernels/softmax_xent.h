// softmax_xent: cross entropy over a vocabulary in chunks; logits of the whole vocabulary never
// exist.
//
// First pass: fl_lse_init, then for every chunk of logits `update` and fl_xent_pick. Then
// lse = fl_lse_value(state) and loss = lse - scale * logit of the target. Second pass, chunk by
// chunk with the same logits computed again: `grad`.
//
//   update    state[t] takes in scale * logits[t][0..n). Chunks may come in any size; -INFINITY is
//             a logit of probability zero; NaN makes the state NaN.
//   grad      dlogits[t][j] = (exp(logits[t][j] - lse[t]) - [first + j == target[t]]) * weight[t];
//             for scale 1. target[t] < 0: no target (the softmax alone). weight[t] == 0: zeros,
//             whatever the logits.
//   Thinning  a probability p below `least`, unless it is the target's, becomes `least` with chance
//             p / least and else 0, so that what the gradient is on average stays as it is while
//             most of it is zero and costs the product with it nothing. The chance is
//             fl_xent_chance(draw[t], first + j): the same on every machine, however the vocabulary
//             is cut. least 0: none of this, and draw is not read.
//   Shape     logits[tokens][n] with row distance ld; dlogits has row distance ldd and may be
//             logits.
//   Numerics  |lse - exact| <= 4 * FLT_EPSILON * max(1, |max logit|): sums are made in double, the
//             exponentials are within 2 ulp. How the vocabulary is cut matters in the last bits
//             only. grad: within 4 * FLT_EPSILON * (1 + p * max(1, |logit|, |lse|)) * |weight|.
//   Errors    none.   Threads  pure; split by tokens.
//   Source    Milakov & Gimelshein 2018, arXiv 1805.02867, algorithm 3. Leaving small
//             probabilities out: Wijmans et al. 2024, arXiv 2411.09009, section 4.3, which drops
//             them; at learning rates like ours that bias is seen in the loss after ten steps.
#ifndef FL_KERNELS_SOFTMAX_XENT_H
#define FL_KERNELS_SOFTMAX_XENT_H

#include "kernels/cpu.h"

// Sum of exp(l) over the logits so far = sum * exp(max).
typedef struct fl_lse {
    double max, sum;
} fl_lse;

void fl_lse_init(size_t tokens, fl_lse *state);
float fl_lse_value(const fl_lse *state); // max + log(sum); -INFINITY when nothing was seen

// picked[t] = logits[t][target[t] - first] where the target lies in this chunk; else untouched.
void fl_xent_pick(size_t tokens, size_t n, size_t first, const float *logits, size_t ld,
                  const int32_t *target, float *picked);

// Uniform in [0, 1), a multiple of 2^-24: bits mixed by two rounds of multiplication and shifts
// (constants: lowbias32 of Wellons' hash prospector).
static inline float fl_xent_chance(uint32_t draw, size_t entry) {
    uint32_t h = draw + (uint32_t)entry;
    h = (h ^ h >> 16) * UINT32_C(0x7feb352d);
    h = (h ^ h >> 15) * UINT32_C(0x846ca68b);
    return (float)((h ^ h >> 16) >> 8) * 0x1p-24f;
}

#define FL_XENT_LIST(X)                                                                            \
    X(ref, FL_CPU_NONE)                                                                            \
    FL_ON_X86(X(avx2, FL_CPU_AVX2 | FL_CPU_FMA))                                                   \
    FL_ON_X86(X(avx512, FL_CPU_AVX512_VNNI))                                                       \
    FL_ON_ARM64(X(neon, FL_CPU_NEON))

#define FL_XENT_UPDATE(tag)                                                                        \
    void fl_xent_update_##tag(size_t tokens, size_t n, float scale, const float *logits,           \
                              size_t ld, fl_lse *state)
#define FL_XENT_GRAD(tag)                                                                          \
    void fl_xent_grad_##tag(size_t tokens, size_t n, size_t first, const float *logits, size_t ld, \
                            const float *lse, const int32_t *target, const float *weight,          \
                            float least, const uint32_t *draw, float *dlogits, size_t ldd)

#define X(tag, need)                                                                               \
    FL_XENT_UPDATE(tag);                                                                           \
    FL_XENT_GRAD(tag);
FL_XENT_LIST(X)
#undef X

typedef struct fl_xent_variant {
    const char *tag; // NULL ends the list
    uint32_t need;
    void (*update)(size_t tokens, size_t n, float scale, const float *logits, size_t ld,
                   fl_lse *state);
    void (*grad)(size_t tokens, size_t n, size_t first, const float *logits, size_t ld,
                 const float *lse, const int32_t *target, const float *weight, float least,
                 const uint32_t *draw, float *dlogits, size_t ldd);
} fl_xent_variant;

extern const fl_xent_variant fl_xent_variants[];

#endif
