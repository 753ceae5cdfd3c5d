// Property: a payload that opens gives only values within the promised range, the same ones in any
// order of reading, and its double and fixed-point values agree to half a unit; a sparse one names
// as many as it says.
#include "proto/update.h"
#include "tests/fuzz/fuzz.h"

#include <math.h>

enum { ONE_BY_ONE = 10000 };

// Page by page: no more values than it says, in the range, of the norm it says.
static void check_named(const fl_update *u) {
    static double values[FL_UPDATE_PAGE];
    uint32_t named = 0;
    double sum = 0.0;
    for (uint32_t at = 0; at < u->info.count; at += FL_UPDATE_PAGE) {
        const uint32_t left = u->info.count - at, n = left < FL_UPDATE_PAGE ? left : FL_UPDATE_PAGE;
        fl_update_values(u, at, n, values);
        for (uint32_t i = 0; i < n; i++) {
            const double square = values[i] * values[i];
            named += values[i] != 0.0;
            FL_ASSERT(fabs(values[i]) <= FL_UPDATE_ABS_MAX);
            sum += square;
        }
    }
    FL_ASSERT(named <= fl_update_kept(u) && sum == fl_update_norm2(u));
}

static void try_update(fl_bytes in) {
    fl_update u;
    if (fl_update_open(in, &u, NULL) != FL_OK) return;
    FL_ASSERT(fl_update_size_fits(u.info.count, in.size) || fl_update_kept(&u) > 0);
    if (fl_update_size(u.info.count, u.info.encoding) != 0)
        FL_ASSERT(in.size == fl_update_size(u.info.count, u.info.encoding));
    check_named(&u);
    if (u.info.count > ONE_BY_ONE) return; // a sparse one of a few bytes may have 4 Mi values
    double sum = 0.0, v;
    int64_t all[64], one;
    for (uint32_t at = 0; at < u.info.count;) {
        const uint32_t left = u.info.count - at, n = left < 61 ? left : 61;
        fl_update_fixed(&u, at, n, all);
        for (uint32_t i = 0; i < n; i++) {
            fl_update_fixed(&u, at + i, 1, &one);
            fl_update_values(&u, at + i, 1, &v);
            FL_ASSERT(one == all[i] && fabs(v) <= FL_UPDATE_ABS_MAX);
            FL_ASSERT(fabs(v * 0x1p32 - (double)one) <= 0.5);
            sum += v * v;
        }
        at += n;
    }
    FL_ASSERT(isfinite(sum) && sum == fl_update_norm2(&u));
}

static void try_layer(fl_bytes in) {
    fl_layer l;
    if (fl_layer_open(in, &l, NULL) != FL_OK) return;
    FL_ASSERT(in.size == fl_layer_size(l.count) && l.version != 0);
    for (uint32_t i = 0; i < l.count; i++) {
        float v;
        fl_layer_values(&l, i, 1, &v);
        FL_ASSERT(isfinite(v));
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    try_update((fl_bytes){data, size});
    try_layer((fl_bytes){data, size});
    return 0;
}
