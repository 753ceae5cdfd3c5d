#include "kernels/fold_loop.h"

FL_FOLD_MOST(ref) {
    return fl_fold_most(n, x);
}

FL_FOLD_F32(ref) {
    fl_fold_f32(n, x, m, lane);
}

FL_FOLD_I64(ref) {
    fl_fold_i64(n, x, m, lane);
}

const fl_fold_variant fl_fold_variants[] = {
#define X(tag, need) {#tag, need, fl_fold_most_##tag, fl_fold_f32_##tag, fl_fold_i64_##tag},
    FL_FOLD_LIST(X)
#undef X
        {NULL, 0, NULL, NULL, NULL},
};

const fl_fold_variant *fl_fold_select(uint32_t cpu) {
    const fl_fold_variant *best = fl_fold_variants;
    for (const fl_fold_variant *v = fl_fold_variants; v->tag != NULL; v++) {
        if ((v->need & cpu) == v->need) best = v;
    }
    return best;
}
