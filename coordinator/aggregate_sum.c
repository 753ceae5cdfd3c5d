// Sums of one layer's updates: 64-bit lanes while they suffice, a second word above them then.
#include "common/checked.h"
#include "common/fault.h"
#include "coordinator/aggregate.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    BLOCK = 262144,  // values looked at, which brings them near, before they are folded
    LANE_BITS = 60, // of the lower word when there is an upper one
};

double coord_norm(const int64_t *values, size_t count, double unit) {
    coord_uwide sum = 0;
    for (size_t i = 0; i < count; i++)
        sum += (coord_uwide)((coord_wide)values[i] * (coord_wide)values[i]);
    return sqrt((double)sum) * unit;
}

// Zeros on a cache line: lanes that lie across two cost a fold half of its speed.
static int64_t *words(size_t count) {
    const size_t size = (count * sizeof(int64_t) + 63) / 64 * 64;
    int64_t *ret = count == 0 || fl_fault() ? NULL : aligned_alloc(64, size);
    return ret == NULL ? NULL : memset(ret, 0, size);
}

fl_status coord_sum_init(coord_sum *s, size_t count, fl_err *err) {
    *s = (coord_sum){.fold = fl_fold_select(fl_cpu_detect())};
    s->lane = words(count);
    if (s->lane == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory to add up %zu values", count);
    s->count = count;
    return FL_OK;
}

void coord_sum_done(coord_sum *s) {
    free(s->lane);
    free(s->high);
    *s = (coord_sum){0};
}

void coord_sum_reset(coord_sum *s) {
    if (s->lane != NULL) memset(s->lane, 0, s->count * sizeof(*s->lane)); // else they only counted
    free(s->high);
    s->high = NULL;
    s->bound = 0;
    s->weight = 0;
    s->squares = 0;
    s->updates = 0;
}

// Both words, in units of 2^shift.
static coord_wide whole(const coord_sum *s, size_t i) {
    const coord_wide high = s->high == NULL ? 0 : s->high[i];
    return high * ((coord_wide)1 << LANE_BITS) + s->lane[i];
}

coord_wide coord_sum_at(const coord_sum *s, size_t i) {
    return whole(s, i) * ((coord_wide)1 << s->shift);
}

static void set_whole(coord_sum *s, size_t i, coord_wide value) {
    const coord_uwide mask = ((coord_uwide)1 << LANE_BITS) - 1;
    s->lane[i] = (int64_t)((coord_uwide)value & mask);
    s->high[i] = (int64_t)((value - s->lane[i]) / ((coord_wide)1 << LANE_BITS));
}

static fl_status need_high(coord_sum *s, fl_err *err) {
    if (s->high == NULL) s->high = words(s->count);
    return s->high != NULL ? FL_OK
                           : FL_FAIL(err, FL_ENOMEM, "no memory to add up %zu values", s->count);
}

// What the lanes can give up goes into the upper words; the unit becomes 2^finer times smaller.
static fl_status spill(coord_sum *s, uint32_t finer, fl_err *err) {
    FL_TRY(need_high(s, err));
    for (size_t i = 0; i < s->count; i++) set_whole(s, i, whole(s, i) * ((coord_wide)1 << finer));
    s->shift -= finer;
    s->bound = (uint64_t)1 << LANE_BITS;
    return FL_OK;
}

// The lanes' unit becomes one that divides the factor.
static fl_status settle_shift(coord_sum *s, uint64_t factor, fl_err *err) {
    const uint32_t shift = (uint32_t)factor == 0 ? 32 : (uint16_t)factor == 0 ? 16 : 0;
    if (s->bound == 0) s->shift = shift; // all lanes are 0
    if (shift >= s->shift) return FL_OK;
    const uint32_t finer = s->shift - shift;
    if (s->high != NULL || s->bound > COORD_LANE_MAX >> finer) return spill(s, finer, err);
    for (size_t i = 0; i < s->count; i++) s->lane[i] *= (int64_t)1 << finer;
    s->bound <<= finer;
    s->shift = shift;
    return FL_OK;
}

static fl_status check_fold(const coord_sum *s, size_t count, uint64_t weight, uint32_t clip,
                            fl_err *err) {
    if (count != s->count)
        return FL_FAIL(err, FL_EARG, "%zu values for a layer of %zu", count, s->count);
    if (weight == 0 || weight > COORD_TOKENS_MAX * COORD_ONE)
        return FL_FAIL(err, FL_EARG, "weight %llu is out of range", (unsigned long long)weight);
    if (clip > COORD_ONE) return FL_FAIL(err, FL_EARG, "clip %u is above 1", clip);
    if (s->updates >= COORD_FOLDS_MAX)
        return FL_FAIL(err, FL_ELIMIT, "the sum already holds %u updates", s->updates);
    return FL_OK;
}

static void count_update(coord_sum *s, uint64_t weight) {
    s->weight += weight;
    s->squares += (coord_uwide)weight * weight;
    s->updates++;
}

// Makes room for m * most in every lane; false: such products fit no lane.
static fl_status make_room(coord_sum *s, uint64_t m, uint64_t most, bool *ret_fits, fl_err *err) {
    *ret_fits = m == 0 || most <= (COORD_LANE_MAX - ((uint64_t)1 << LANE_BITS)) / m;
    if (!*ret_fits) return spill(s, 0, err);
    if (m * most > COORD_LANE_MAX - s->bound) FL_TRY(spill(s, 0, err));
    s->bound += m * most;
    return FL_OK;
}

fl_status coord_sum_fold(coord_sum *s, const int64_t *values, size_t count, uint64_t weight,
                         uint32_t clip, fl_err *err) {
    uint64_t most = 0;
    bool fits;
    FL_TRY(check_fold(s, count, weight, clip, err));
    for (size_t i = 0; i < count; i++) {
        const uint64_t u = (uint64_t)values[i], size = values[i] < 0 ? 0 - u : u;
        most = size > most ? size : most;
    }
    if (most > (uint64_t)COORD_VALUE_MAX)
        return FL_FAIL(err, FL_ELIMIT, "a value of the update is too large");
    const uint64_t factor = weight * clip; // <= 2^56
    FL_TRY(settle_shift(s, factor, err));
    const uint64_t m = factor >> s->shift;
    FL_TRY(make_room(s, m, most, &fits, err));
    if (fits) {
        s->fold->i64(count, values, m, s->lane);
    } else {
        for (size_t i = 0; i < count; i++)
            set_whole(s, i, whole(s, i) + (coord_wide)m * values[i]);
    }
    count_update(s, weight);
    return FL_OK;
}

// ---- floats

static const uint32_t float_max_bits = 0x42800000u; // COORD_FLOAT_MAX

// In fixed point, not below any value of this magnitude.
static uint64_t fixed_most(uint32_t bits) {
    float most;
    memcpy(&most, &bits, sizeof(most));
    return (uint64_t)((double)most * 0x1p32) + 1;
}

static fl_status too_large(fl_err *err) {
    return FL_FAIL(err, FL_ELIMIT, "a value of the update is not finite or above %.0f",
                   (double)COORD_FLOAT_MAX);
}

// Block by block, each read from memory once. A bad value takes back what came before it: integers
// leave no trace.
static fl_status fold_in_one_pass(coord_sum *s, const float *values, uint64_t m, fl_err *err) {
    uint32_t most = 0;
    for (size_t at = 0; at < s->count; at += BLOCK) {
        const size_t n = s->count - at < BLOCK ? s->count - at : BLOCK;
        const uint32_t here = s->fold->most(n, values + at);
        if (here > float_max_bits) {
            s->fold->f32(at, values, 0 - m, s->lane);
            return too_large(err);
        }
        most = here > most ? here : most;
        s->fold->f32(n, values + at, m, s->lane + at);
    }
    s->bound += m * fixed_most(most);
    return FL_OK;
}

static int64_t fixed(const coord_sum *s, float x) {
    int64_t ret = 0;
    s->fold->f32(1, &x, 1, &ret);
    return ret;
}

static fl_status fold_in_two(coord_sum *s, const float *values, uint64_t m, fl_err *err) {
    const uint32_t most = s->fold->most(s->count, values);
    bool fits;
    if (most > float_max_bits) return too_large(err);
    FL_TRY(make_room(s, m, fixed_most(most), &fits, err));
    if (fits) {
        s->fold->f32(s->count, values, m, s->lane);
    } else {
        for (size_t i = 0; i < s->count; i++)
            set_whole(s, i, whole(s, i) + (coord_wide)m * fixed(s, values[i]));
    }
    return FL_OK;
}

fl_status coord_sum_fold_f32(coord_sum *s, const float *values, size_t count, uint64_t weight,
                             uint32_t clip, fl_err *err) {
    const uint64_t most = fixed_most(float_max_bits);
    FL_TRY(check_fold(s, count, weight, clip, err));
    const uint64_t factor = weight * clip;
    FL_TRY(settle_shift(s, factor, err));
    const uint64_t m = factor >> s->shift;
    const bool room = m == 0 || most <= (COORD_LANE_MAX - s->bound) / m;
    FL_TRY(room ? fold_in_one_pass(s, values, m, err) : fold_in_two(s, values, m, err));
    count_update(s, weight);
    return FL_OK;
}

// ---- whole sums

fl_status coord_sum_reweigh(coord_sum *s, const int64_t *values, size_t count, uint64_t old_weight,
                            uint64_t new_weight, uint32_t clip, fl_err *err) {
    if (count != s->count || old_weight == 0 || old_weight > s->weight || s->updates == 0 ||
        new_weight == 0 || new_weight > COORD_TOKENS_MAX * COORD_ONE || clip > COORD_ONE)
        return FL_FAIL(err, FL_EARG, "an update of %zu values cannot be weighed again", count);
    FL_TRY(settle_shift(s, old_weight * clip, err));
    FL_TRY(settle_shift(s, new_weight * clip, err));
    FL_TRY(spill(s, 0, err));
    const coord_wide change =
        ((coord_wide)new_weight - (coord_wide)old_weight) * clip / ((coord_wide)1 << s->shift);
    for (size_t i = 0; i < count; i++) set_whole(s, i, whole(s, i) + change * values[i]);
    s->weight = s->weight - old_weight + new_weight;
    s->squares -= (coord_uwide)old_weight * old_weight;
    s->squares += (coord_uwide)new_weight * new_weight;
    return FL_OK;
}

fl_status coord_sum_merge(coord_sum *s, const coord_sum *other, fl_err *err) {
    if (s->count != other->count)
        return FL_FAIL(err, FL_EARG, "%zu values for a layer of %zu", other->count, s->count);
    if (other->updates > COORD_FOLDS_MAX - s->updates)
        return FL_FAIL(err, FL_ELIMIT, "the sum already holds %u updates", s->updates);
    if (other->bound != 0) FL_TRY(settle_shift(s, (uint64_t)1 << other->shift, err));
    const bool alike = s->high == NULL && other->high == NULL && s->shift == other->shift &&
                       other->bound <= COORD_LANE_MAX - s->bound;
    if (!alike) FL_TRY(spill(s, 0, err));
    const coord_wide unit = (coord_wide)1 << s->shift; // divides what the other holds
    for (size_t i = 0; i < s->count; i++) {
        if (alike)
            s->lane[i] += other->lane[i];
        else
            set_whole(s, i, whole(s, i) + coord_sum_at(other, i) / unit);
    }
    if (alike) s->bound += other->bound;
    s->weight += other->weight;
    s->squares += other->squares;
    s->updates += other->updates;
    return FL_OK;
}

fl_status coord_sum_mean(const coord_sum *s, double unit, double kappa, double *mean, fl_err *err) {
    if (s->updates == 0) return FL_FAIL(err, FL_ESTATE, "no update was folded");
    const double weight = (double)s->weight;
    const double n = weight * weight / (double)s->squares; // in [1, updates]
    const double scale = n / (n + kappa) * unit / COORD_ONE;
    if (s->high == NULL) { // a power of two more or less does not change how a number is rounded
        const double step = ldexp(1.0, (int)s->shift);
        for (size_t i = 0; i < s->count; i++)
            mean[i] = (double)s->lane[i] * step / weight * scale;
        return FL_OK;
    }
    for (size_t i = 0; i < s->count; i++) mean[i] = (double)coord_sum_at(s, i) / weight * scale;
    return FL_OK;
}
