// The variants of the kernels on floats, slowest first, closed by an empty entry.
#include "kernels/dispatch.h"

const fl_gemm_f32_variant fl_gemm_f32_variants[] = {
#define X(tag, need)                                                                               \
    {#tag, need, fl_gemm_f32_nt_##tag, fl_gemm_f32_nn_##tag, fl_gemm_f32_tn_##tag,                 \
     fl_gemm_f32_rank_up_##tag},
    FL_GEMM_F32_LIST(X)
#undef X
        {NULL, 0, NULL, NULL, NULL, NULL},
};

const fl_rmsnorm_variant fl_rmsnorm_variants[] = {
#define X(tag, need) {#tag, need, fl_rmsnorm_forward_##tag, fl_rmsnorm_backward_##tag},
    FL_RMSNORM_LIST(X)
#undef X
        {NULL, 0, NULL, NULL},
};

const fl_attention_variant fl_attention_variants[] = {
#define X(tag, need) {#tag, need, fl_attention_forward_##tag, fl_attention_backward_##tag},
    FL_ATTENTION_LIST(X)
#undef X
        {NULL, 0, NULL, NULL},
};

const fl_swiglu_variant fl_swiglu_variants[] = {
#define X(tag, need) {#tag, need, fl_swiglu_forward_##tag, fl_swiglu_backward_##tag},
    FL_SWIGLU_LIST(X)
#undef X
        {NULL, 0, NULL, NULL},
};

const fl_xent_variant fl_xent_variants[] = {
#define X(tag, need) {#tag, need, fl_xent_update_##tag, fl_xent_grad_##tag},
    FL_XENT_LIST(X)
#undef X
        {NULL, 0, NULL, NULL},
};

const fl_ggml_variant fl_ggml_variants[] = {
#define X(tag, need) {#tag, need, fl_ggml_row_to_f32_##tag},
    FL_GGML_LIST(X)
#undef X
        {NULL, 0, NULL},
};
