#include "coordinator/aggregate.h"

#include "common/checked.h"
#include "common/fault.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

// floor(sqrt(n)) by the digit method: no floating point, so nothing to round.
static uint64_t isqrt(uint64_t n) {
    uint64_t root = 0;
    for (uint64_t bit = (uint64_t)1 << 31; bit != 0; bit >>= 1) {
        const uint64_t trial = root | bit;
        if (trial * trial <= n) root = trial;
    }
    return root;
}

uint32_t coord_staleness(uint64_t tau) {
    if (tau >= (uint64_t)1 << 34) return 0;
    // floor(2^17 / sqrt(n)) = isqrt(floor(2^34 / n)); half of it, rounded, is what we want.
    const uint64_t doubled = isqrt(((uint64_t)1 << 34) / (1 + tau));
    return (uint32_t)((doubled + 1) / 2);
}

uint64_t coord_weight(uint64_t tokens, uint64_t tau) {
    if (tokens > COORD_TOKENS_MAX) tokens = COORD_TOKENS_MAX;
    return tokens * coord_staleness(tau);
}

double coord_norm(const int64_t *values, size_t count, double unit) {
    coord_uwide sum = 0;
    for (size_t i = 0; i < count; i++)
        sum += (coord_uwide)((coord_wide)values[i] * (coord_wide)values[i]);
    return sqrt((double)sum) * unit;
}

fl_status coord_sum_init(coord_sum *s, size_t count, fl_err *err) {
    *s = (coord_sum){0};
    s->a = count == 0 || fl_fault() ? NULL : calloc(count, sizeof(*s->a));
    if (s->a == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory to add up %zu values", count);
    s->count = count;
    return FL_OK;
}

void coord_sum_done(coord_sum *s) {
    free(s->a);
    *s = (coord_sum){0};
}

void coord_sum_reset(coord_sum *s) {
    if (s->a != NULL) memset(s->a, 0, s->count * sizeof(*s->a)); // else the updates only counted
    s->weight = 0;
    s->squares = 0;
    s->updates = 0;
}

fl_status coord_sum_fold(coord_sum *s, const int64_t *values, size_t count, uint64_t weight,
                         uint32_t clip, fl_err *err) {
    if (count != s->count)
        return FL_FAIL(err, FL_EARG, "%zu values for a layer of %zu", count, s->count);
    if (weight == 0 || weight > COORD_TOKENS_MAX * COORD_ONE)
        return FL_FAIL(err, FL_EARG, "weight %llu is out of range", (unsigned long long)weight);
    if (clip > COORD_ONE) return FL_FAIL(err, FL_EARG, "clip %u is above 1", clip);
    if (s->updates >= COORD_FOLDS_MAX)
        return FL_FAIL(err, FL_ELIMIT, "the sum already holds %u updates", s->updates);
    for (size_t i = 0; i < count; i++) {
        if (values[i] > COORD_VALUE_MAX || values[i] < -COORD_VALUE_MAX)
            return FL_FAIL(err, FL_ELIMIT, "value %zu is too large", i);
    }
    const int64_t factor = (int64_t)(weight * clip); // <= 2^56
    for (size_t i = 0; i < count; i++) s->a[i] += (coord_wide)factor * values[i];
    s->weight += weight;
    s->squares += (coord_uwide)weight * weight;
    s->updates++;
    return FL_OK;
}

fl_status coord_sum_merge(coord_sum *s, const coord_sum *other, fl_err *err) {
    if (other->count != s->count)
        return FL_FAIL(err, FL_EARG, "partial sums of %zu and %zu values", other->count, s->count);
    if (other->updates > COORD_FOLDS_MAX - s->updates)
        return FL_FAIL(err, FL_ELIMIT, "the sum would hold too many updates");
    for (size_t i = 0; i < s->count; i++) s->a[i] += other->a[i];
    s->weight += other->weight;
    s->squares += other->squares;
    s->updates += other->updates;
    return FL_OK;
}

fl_status coord_sum_mean(const coord_sum *s, double unit, double kappa, double *mean, fl_err *err) {
    if (s->updates == 0) return FL_FAIL(err, FL_ESTATE, "no update was folded");
    const double weight = (double)s->weight;
    const double effective = weight * weight / (double)s->squares; // in [1, updates]
    const double lambda = effective / (effective + kappa);
    const double scale = lambda * unit / 65536.0;
    for (size_t i = 0; i < s->count; i++) mean[i] = (double)s->a[i] / weight * scale;
    return FL_OK;
}

static const struct {
    const char *name;
    size_t moments;
} opts[COORD_OPT_COUNT] = {
#define X(name, text, moments) {text, moments},
    COORD_OPT_LIST(X)
#undef X
};

fl_status coord_opt_parse(const char *name, coord_opt_kind *ret, fl_err *err) {
    for (size_t i = 0; i < FL_COUNT(opts); i++) {
        if (strcmp(name, opts[i].name) == 0) {
            *ret = (coord_opt_kind)i;
            return FL_OK;
        }
    }
    return FL_FAIL(err, FL_EARG,
                   "there is no optimiser \"%s\"; choose fedavg, fedavgm, fedadam or fedyogi",
                   name);
}

size_t coord_opt_moments(coord_opt_kind kind) {
    return opts[kind].moments;
}

void coord_opt_start(const coord_opt *opt, size_t count, double *moments) {
    const size_t each = coord_opt_moments(opt->kind);
    for (size_t i = 0; i < each * count; i++) moments[i] = i < count ? 0.0 : opt->tau * opt->tau;
}

typedef struct coordinate {
    double theta, m, v;
} coordinate;

static coordinate stepped(const coord_opt *opt, coordinate c, double d) {
    switch (opt->kind) {
    case COORD_FEDAVGM:
        c.m = opt->beta1 * c.m + d;
        c.theta += opt->rate * c.m;
        return c;
    case COORD_FEDADAM:
    case COORD_FEDYOGI: {
        const double d2 = d * d;
        c.m = opt->beta1 * c.m + (1.0 - opt->beta1) * d;
        if (opt->kind == COORD_FEDADAM) {
            c.v = opt->beta2 * c.v + (1.0 - opt->beta2) * d2;
        } else {
            const double sign = c.v > d2 ? 1.0 : c.v < d2 ? -1.0 : 0.0;
            c.v -= (1.0 - opt->beta2) * d2 * sign;
        }
        c.theta += opt->rate * c.m / (sqrt(c.v) + opt->tau);
        return c;
    }
    default:
        c.theta += opt->rate * d;
        return c;
    }
}

static coordinate coordinate_at(size_t each, size_t count, const float *theta,
                                const double *moments, size_t i) {
    return (coordinate){.theta = (double)theta[i],
                        .m = each > 0 ? moments[i] : 0.0,
                        .v = each > 1 ? moments[count + i] : 0.0};
}

fl_status coord_opt_step(const coord_opt *opt, size_t count, const double *delta, float *theta,
                         double *moments, fl_err *err) {
    const size_t each = coord_opt_moments(opt->kind);
    // Two passes, so that a result that cannot be stored leaves nothing half stepped.
    for (size_t i = 0; i < count; i++) {
        const coordinate c = stepped(opt, coordinate_at(each, count, theta, moments, i), delta[i]);
        if (!isfinite((float)c.theta) || !isfinite(c.m) || !isfinite(c.v))
            return FL_FAIL(err, FL_ELIMIT,
                           "the step would leave value %zu not finite; lower the server's "
                           "learning rate",
                           i);
    }
    for (size_t i = 0; i < count; i++) {
        const coordinate c = stepped(opt, coordinate_at(each, count, theta, moments, i), delta[i]);
        theta[i] = (float)c.theta;
        if (each > 0) moments[i] = c.m;
        if (each > 1) moments[count + i] = c.v;
    }
    return FL_OK;
}

void coord_norms_add(coord_norms *n, double norm) {
    n->ring[n->next] = norm;
    n->next = (n->next + 1) % COORD_NORMS_MAX;
    if (n->count < COORD_NORMS_MAX) n->count++;
}

static int by_value(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double coord_norms_median(const coord_norms *n) {
    if (n->count == 0) return 0.0;
    double sorted[COORD_NORMS_MAX];
    memcpy(sorted, n->ring, n->count * sizeof(sorted[0]));
    qsort(sorted, n->count, sizeof(sorted[0]), by_value);
    return sorted[(n->count - 1) / 2];
}

fl_status coord_gate_norm(const coord_gate *gate, const coord_norms *n, double norm,
                          uint32_t *ret_clip, fl_err *err) {
    if (!isfinite(norm)) return FL_FAIL(err, FL_ELIMIT, "the update's norm is not finite");
    *ret_clip = COORD_ONE;
    const double median = coord_norms_median(n);
    if (n->count < gate->norms_min || median <= 0.0) return FL_OK;
    if (norm > gate->refuse_factor * median)
        return FL_FAIL(err, FL_ELIMIT,
                       "norm %.4g is more than %.4g times the layer's running median %.4g", norm,
                       gate->refuse_factor, median);
    if (norm > gate->clip_factor * median)
        *ret_clip = (uint32_t)floor(gate->clip_factor * median / norm * COORD_ONE);
    return FL_OK;
}
