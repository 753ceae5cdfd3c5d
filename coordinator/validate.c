#include "coordinator/validate.h"

#include "common/checked.h"
#include "coordinator/robust_tile.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static int by_nats(const void *a, const void *b) {
    const coord_change *x = a, *y = b;
    return (x->nats > y->nats) - (x->nats < y->nats);
}

// What a node's change is above for certain.
static double certain(const coord_change *c) {
    return c->nats - 1.0 / sqrt((double)c->tokens);
}

static int by_certain(const void *a, const void *b) {
    const double x = certain(a), y = certain(b);
    return (x > y) - (x < y);
}

coord_judgement coord_validate(coord_change *changes, uint32_t n, uint32_t members,
                               double byzantine, double tolerance, double *ret_change) {
    uint32_t known = 0;
    for (uint32_t i = 0; i < n; i++) {
        if (isfinite(changes[i].nats) && changes[i].tokens > 0) changes[known++] = changes[i];
    }
    n = known;
    *ret_change = 0.0;
    const uint32_t f = coord_byzantine(byzantine, n);
    if (n < COORD_CHANGES_MIN || n <= 2 * f || (uint64_t)n * 2 < members) return COORD_UNKNOWN;
    const uint32_t low = (n - f - 1) / 2;
    qsort(changes, n, sizeof(*changes), by_certain);
    *ret_change = changes[low].nats;
    if (certain(&changes[low]) > tolerance) return COORD_WORSE;
    qsort(changes, n, sizeof(*changes), by_nats);
    *ret_change = changes[n - 1 - low].nats;
    return *ret_change < 0.0 ? COORD_BETTER : COORD_NO_WORSE;
}

bool coord_good_judged(coord_good *good, coord_judgement judgement, int64_t round) {
    if (judgement == COORD_UNKNOWN) {
        if (good->known && round - good->last > COORD_GOOD_FORGET) good->known = false;
        return false;
    }
    good->last = round;
    if (judgement == COORD_WORSE) return false;
    return judgement == COORD_BETTER || !good->known || round - good->round >= COORD_GOOD_AGE;
}

static size_t put_double(uint8_t *out, double v) {
    uint64_t bits;
    memcpy(&bits, &v, sizeof(bits));
    fl_put_u64(out, bits);
    return 8;
}

static double get_double(const uint8_t *in) {
    const uint64_t bits = fl_get_u64(in);
    double v;
    memcpy(&v, &bits, sizeof(v));
    return v;
}

size_t coord_good_encode(const coord_good *good, uint8_t out[COORD_GOOD_BYTES]) {
    fl_put_u64(out, good->known);
    fl_put_u64(out + 8, (uint64_t)good->round);
    fl_put_u64(out + 16, (uint64_t)good->last);
    fl_put_u64(out + 24, good->layers);
    fl_put_u64(out + 32, good->exits);
    size_t at = 40;
    for (uint32_t l = 0; l < good->layers; l++, at += 8)
        fl_put_u64(out + at, (uint64_t)good->version[l]);
    for (uint32_t t = 0; t < good->exits; t++) at += put_double(out + at, good->vote[t]);
    return at;
}

fl_status coord_good_decode(fl_bytes in, coord_good *ret, fl_err *err) {
    coord_good g = {0};
    const bool head = in.size >= 40;
    const uint64_t layers = head ? fl_get_u64(in.data + 24) : 0;
    const uint64_t exits = head ? fl_get_u64(in.data + 32) : 0;
    if (!head || fl_get_u64(in.data) > 1 || layers > COORD_GOOD_LAYERS || exits > COORD_EXITS_MAX ||
        in.size != 40 + 8 * (layers + exits))
        return FL_FAIL(err, FL_EFORMAT, "the record of the last good layers is damaged");
    g.known = fl_get_u64(in.data) == 1;
    g.round = (int64_t)fl_get_u64(in.data + 8);
    g.last = (int64_t)fl_get_u64(in.data + 16);
    g.layers = (uint32_t)layers;
    g.exits = (uint32_t)exits;
    for (uint32_t l = 0; l < g.layers; l++)
        g.version[l] = (int64_t)fl_get_u64(in.data + 40 + 8 * l);
    for (uint32_t t = 0; t < g.exits; t++)
        g.vote[t] = get_double(in.data + 40 + 8 * (size_t)(g.layers + t));
    *ret = g;
    return FL_OK;
}

// ---- conduct

static coord_conduct *find(const coord_conducts *c, int64_t node) {
    for (uint32_t i = 0; i < c->count; i++)
        if (c->rows[i].node == node) return &c->rows[i];
    return NULL;
}

coord_conduct *coord_conduct_of(coord_conducts *c, int64_t node) {
    coord_conduct *row = find(c, node);
    if (row != NULL || c->count == COORD_CONDUCT_MAX) return row;
    row = &c->rows[c->count++];
    *row = (coord_conduct){.node = node};
    return row;
}

bool coord_is_quarantined(const coord_conducts *c, int64_t node, int64_t round) {
    const coord_conduct *row = find(c, node);
    return row != NULL && row->until >= round;
}

void coord_conduct_note(coord_conducts *c, int64_t node, double cosine) {
    coord_conduct *row = coord_conduct_of(c, node);
    if (row == NULL || !isfinite(cosine)) return;
    row->cosines += cosine;
    row->voices++;
}

double coord_conduct_score(const coord_conduct *row) {
    return row->weight > 0.0 ? row->sum / row->weight : 0.0;
}

static int64_t sentence(uint32_t times) {
    int64_t rounds = COORD_QUARANTINE;
    for (uint32_t i = 0; i < times && rounds < COORD_QUARANTINE_MAX; i++) rounds *= 2;
    return rounds;
}

static void remember(coord_conduct *row) {
    if (row->voices == 0) return;
    row->sum = COORD_SCORE_FORGET * row->sum + row->cosines / row->voices;
    row->weight = COORD_SCORE_FORGET * row->weight + 1.0;
    if (row->seen < COORD_SEEN_MIN) row->seen++;
    row->cosines = 0.0;
    row->voices = 0;
}

// The score below which a node is an outlier; -2, which no score is, when too few are known.
static double limit_of(const coord_conducts *c) {
    double sorted[COORD_CONDUCT_MAX];
    uint32_t n = 0;
    for (uint32_t i = 0; i < c->count; i++)
        if (c->rows[i].seen >= COORD_SEEN_MIN) sorted[n++] = coord_conduct_score(&c->rows[i]);
    if (n < COORD_ROBUST_MIN) return -2.0;
    const double median = coord_lower_median(sorted, n);
    for (uint32_t i = 0; i < n; i++) sorted[i] = fabs(sorted[i] - median);
    const double limit = median - 3.0 * 1.4826 * coord_lower_median(sorted, n);
    return limit < COORD_SCORE_LOW ? limit : COORD_SCORE_LOW;
}

static coord_conduct *worst(const coord_conducts *c, double limit) {
    coord_conduct *found = NULL;
    for (uint32_t i = 0; i < c->count; i++) {
        coord_conduct *row = &c->rows[i];
        if (row->until != 0 || row->seen < COORD_SEEN_MIN || coord_conduct_score(row) >= limit)
            continue;
        if (found == NULL || coord_conduct_score(row) < coord_conduct_score(found)) found = row;
    }
    return found;
}

void coord_conducts_close(coord_conducts *c, int64_t round, uint32_t quarantined_max,
                          coord_conduct_fn fn, void *ctx) {
    uint32_t held = 0;
    for (uint32_t i = 0; i < c->count; i++) remember(&c->rows[i]);
    const double limit = limit_of(c);
    for (uint32_t i = 0; i < c->count; i++) {
        coord_conduct *row = &c->rows[i];
        if (row->until == 0) continue;
        if (row->until > round) {
            held++;
        } else if (coord_conduct_score(row) < limit && held < quarantined_max) {
            row->until = round + sentence(row->times++);
            held++;
            fn(ctx, row, COORD_CONDUCT_QUARANTINED);
        } else {
            row->until = 0;
            fn(ctx, row, COORD_CONDUCT_RELEASED);
        }
    }
    for (coord_conduct *row; held < quarantined_max && (row = worst(c, limit)) != NULL; held++) {
        row->until = round + sentence(row->times++);
        fn(ctx, row, COORD_CONDUCT_QUARANTINED);
    }
}

size_t coord_conducts_encode(const coord_conducts *c, uint8_t *out) {
    for (uint32_t i = 0; i < c->count; i++) {
        const coord_conduct *row = &c->rows[i];
        uint8_t *at = out + (size_t)i * COORD_CONDUCT_BYTES;
        fl_put_u64(at, (uint64_t)row->node);
        fl_put_u64(at + 8, (uint64_t)row->until);
        put_double(at + 16, row->sum);
        put_double(at + 24, row->weight);
        fl_put_u64(at + 32, row->seen);
        fl_put_u64(at + 40, row->times);
    }
    return (size_t)c->count * COORD_CONDUCT_BYTES;
}

fl_status coord_conducts_decode(fl_bytes in, coord_conducts *c, fl_err *err) {
    if (in.size % COORD_CONDUCT_BYTES != 0 || in.size / COORD_CONDUCT_BYTES > COORD_CONDUCT_MAX)
        return FL_FAIL(err, FL_EFORMAT, "the record of the nodes' conduct is damaged");
    c->count = (uint32_t)(in.size / COORD_CONDUCT_BYTES);
    for (uint32_t i = 0; i < c->count; i++) {
        const uint8_t *at = in.data + (size_t)i * COORD_CONDUCT_BYTES;
        coord_conduct row = {.node = (int64_t)fl_get_u64(at),
                             .until = (int64_t)fl_get_u64(at + 8),
                             .sum = get_double(at + 16),
                             .weight = get_double(at + 24),
                             .seen = (uint32_t)fl_get_u64(at + 32),
                             .times = (uint32_t)fl_get_u64(at + 40)};
        if (!isfinite(row.sum) || !isfinite(row.weight)) row.sum = row.weight = 0.0;
        c->rows[i] = row;
    }
    return FL_OK;
}
