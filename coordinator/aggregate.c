#include "coordinator/aggregate.h"

#include "coordinator/registry.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static int largest_first(const void *a, const void *b) {
    const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x < y) - (x > y);
}

// The largest c with c <= share * sum of min(weight, c): with k nodes at the cap and the others
// together r, that is share * r / (1 - k * share).
static uint64_t cap_of(const uint64_t *sorted, size_t nodes, uint64_t sum, uint32_t share) {
    coord_uwide rest = sum;
    if ((coord_uwide)share * nodes <= COORD_ONE) return sorted[nodes - 1];
    for (size_t k = 0; k < nodes && k * share < COORD_ONE; k++) {
        const coord_uwide cap = share * rest / (COORD_ONE - k * share);
        if (cap >= sorted[k]) return (uint64_t)cap;
        rest -= sorted[k];
    }
    return sorted[0];
}

void coord_share_cap(const uint64_t *weight, size_t nodes, uint32_t share, uint64_t *ret) {
    uint64_t sorted[COORD_NODES_MAX], sum = 0;
    FL_ASSERT(nodes <= COORD_NODES_MAX);
    memcpy(ret, weight, nodes * sizeof(*ret));
    if (nodes < COORD_SHARE_NODES) return;
    memcpy(sorted, weight, nodes * sizeof(*sorted));
    qsort(sorted, nodes, sizeof(*sorted), largest_first);
    for (size_t i = 0; i < nodes; i++) sum += weight[i];
    const uint64_t cap = cap_of(sorted, nodes, sum, share);
    for (size_t i = 0; i < nodes; i++) ret[i] = weight[i] < cap ? weight[i] : cap;
}

uint64_t coord_share_of(uint64_t weight, uint64_t cap, uint64_t sum) {
    const uint64_t part = (uint64_t)((coord_uwide)weight * cap / sum);
    return part == 0 ? 1 : part;
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
