#include "kernels/dispatch.h"

// The variants of each kernel, slowest first, closed by an empty entry.

const fl_quantise_x8_variant fl_quantise_x8_variants[] = {
#define X(tag, need) {#tag, need, fl_quantise_x8_##tag},
    FL_QUANTISE_X8_LIST(X)
#undef X
        {NULL, 0, NULL},
};

const fl_gemm_packed_variant fl_gemm_packed_variants[] = {
#define X(tag, need) {#tag, need, fl_gemm_packed_##tag},
    FL_GEMM_PACKED_LIST(X)
#undef X
        {NULL, 0, NULL},
};

const fl_gemm_packed_dx_variant fl_gemm_packed_dx_variants[] = {
#define X(tag, need, rounding) {#tag, need, fl_gemm_packed_dx_##tag, rounding},
    FL_GEMM_PACKED_DX_LIST(X)
#undef X
        {NULL, 0, NULL, 0},
};

// The last variant the CPU supports wins.
#define X(name)                                                                                    \
    static void pick_##name(fl_kern *k, uint32_t cpu) {                                            \
        for (const fl_##name##_variant *v = fl_##name##_variants; v->fn != NULL; v++) {            \
            if ((v->need & cpu) != v->need) continue;                                              \
            k->name = v->fn;                                                                       \
            k->name##_tag = v->tag;                                                                \
        }                                                                                          \
    }
FL_KERN_LIST(X)
#undef X

#define X(name)                                                                                    \
    static void pick_##name(fl_kern *k, uint32_t cpu) {                                            \
        for (const fl_##name##_variant *v = fl_##name##_variants; v->tag != NULL; v++)             \
            if ((v->need & cpu) == v->need) k->name = v;                                           \
    }
FL_KERN_GROUP_LIST(X)
#undef X

void fl_kern_select(fl_kern *k, uint32_t cpu) {
#define X(name) pick_##name(k, cpu);
    FL_KERN_LIST(X)
    FL_KERN_GROUP_LIST(X)
#undef X
}
