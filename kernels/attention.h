// attention: causal attention with grouped queries over rows of keys and values.
//
// Token t sees rows kv_begin[t] .. kv_row[t], both included (kv_begin[t] <= kv_row[t]). Query head
// h reads key/value head h / (heads / kv_heads). Scores are scaled by 1 / sqrt(head_size).
//
//   Forward   out[t][h] = sum_j p_j v_j, p = softmax over the visible rows; lse[t][h] = log of the
//             sum of exp(scaled scores), which the backward pass needs. Online softmax over blocks
//             of FL_ATTENTION_BLOCK rows counted from kv_begin[t]; no matrix of scores exists.
//             A token's bits depend on its own q and on its visible rows in order, on nothing else:
//             neither on other tokens of the batch nor on where in memory the rows lie.
//   Backward  from q, k, v, out, lse of the forward pass and dout it adds to dq, dk and dv:
//             p = exp(s - lse), ds = p * (dout . v - dout . out) / sqrt(head_size),
//             dq += ds k, dk += ds q, dv += p dout. Order of additions is fixed by (tokens,
//             kv_begin, kv_row) alone; a key/value head is one caller's, so threads split over
//             those.
//   Shape     q, out, dq, dout[tokens][heads * head_size] with row distance q_stride;
//             k, v, dk, dv[rows][kv_heads * head_size] with row distance kv_stride;
//             lse[tokens][heads]. head_size: a multiple of 2, at most FL_HEAD_SIZE_MAX; multiples
//             of 8 are fast. heads is a multiple of kv_heads. Reads nothing past a row's end.
//   Aliasing  none.
//   Numerics  |out - exact| <= 4 * (head_size + 32) * FLT_EPSILON * max|s'| * max|v| with s' the
//             sum of |q_i k_i| / sqrt(head_size) or 1, whichever is more. A NaN in any operand that
//             is seen reaches the result.
//   Errors    none.   Threads  pure; uses up to 112 KiB of stack.
//   Source    Dao 2023, FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2; online softmax:
//             Milakov & Gimelshein 2018, arXiv 1805.02867, section 3; grouped queries: Ainslie et
//             al. 2023, arXiv 2305.13245.
#ifndef FL_KERNELS_ATTENTION_H
#define FL_KERNELS_ATTENTION_H

#include "kernels/cpu.h"

enum { FL_HEAD_SIZE_MAX = 256, FL_ATTENTION_BLOCK = 32 };

typedef struct fl_attention {
    uint32_t heads, kv_heads, head_size;
    const uint32_t *kv_begin, *kv_row; // [tokens]
    const float *q;
    const float *k, *v;
    float *out;
    float *lse; // NULL in forward: not wanted
    size_t q_stride, kv_stride; // floats
} fl_attention;

typedef struct fl_attention_grad {
    const float *dout;
    float *dq, *dk, *dv; // added to
} fl_attention_grad;

#define FL_ATTENTION_LIST(X)                                                                       \
    X(ref, FL_CPU_NONE)                                                                            \
    FL_ON_X86(X(avx2, FL_CPU_AVX2 | FL_CPU_FMA))                                                   \
    FL_ON_X86(X(avx512, FL_CPU_AVX512_VNNI))                                                       \
    FL_ON_ARM64(X(neon, FL_CPU_NEON))

// Tokens [token_begin, token_end) by query heads [head_begin, head_end); any ranges.
#define FL_ATTENTION_FORWARD(tag)                                                                  \
    void fl_attention_forward_##tag(const fl_attention *a, uint32_t token_begin,                   \
                                    uint32_t token_end, uint32_t head_begin, uint32_t head_end)
// All tokens, key/value heads [kv_head_begin, kv_head_end) with their query heads.
#define FL_ATTENTION_BACKWARD(tag)                                                                 \
    void fl_attention_backward_##tag(const fl_attention *a, const fl_attention_grad *g,            \
                                     uint32_t tokens, uint32_t kv_head_begin,                      \
                                     uint32_t kv_head_end)

#define X(tag, need)                                                                               \
    FL_ATTENTION_FORWARD(tag);                                                                     \
    FL_ATTENTION_BACKWARD(tag);
FL_ATTENTION_LIST(X)
#undef X

typedef struct fl_attention_variant {
    const char *tag; // NULL ends the list
    uint32_t need;
    void (*forward)(const fl_attention *a, uint32_t token_begin, uint32_t token_end,
                    uint32_t head_begin, uint32_t head_end);
    void (*backward)(const fl_attention *a, const fl_attention_grad *g, uint32_t tokens,
                     uint32_t kv_head_begin, uint32_t kv_head_end);
} fl_attention_variant;

extern const fl_attention_variant fl_attention_variants[];

#endif
