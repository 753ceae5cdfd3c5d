// The invariants, held against a second account of everything: what nodes made, and what the ledger
// must have made of it. Nothing here is computed by the code that is looked at, except the
// optimiser's step, which is the same function on independently added sums.
#include "sim/state.h"

#include "proto/update.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

void sim_truth_init(sim *s) {
    s->truth.round = 1;
    s->truth.open_first = 1;
    s->truth.last = calloc((size_t)s->opts.nodes * s->layers, sizeof(uint64_t));
    FL_ASSERT(s->truth.last != NULL);
    for (uint32_t l = 0; l < s->layers; l++) s->truth.layer[l].count = s->counts[l];
}

void sim_truth_done(sim_truth *t) {
    free(t->rows);
    free(t->last);
}

static bool holds(sim *s, bool ok) {
    s->result.checks++;
    return ok;
}

// ---- one row of the ledger

// round(2^16 / sqrt(1 + tau)), in long double.
static uint64_t staleness_of(uint64_t tau) {
    return (uint64_t)llroundl(65536.0L / sqrtl(1.0L + (long double)tau));
}

static int by_value(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// What the gate must say of a norm: the clip, or 0 for a refusal.
static uint32_t clip_of(const sim *s, const sim_layer *t, double norm) {
    const coord_settings *c = &s->host.settings;
    double sorted[COORD_NORMS_MAX];
    if (t->norms_count < (uint32_t)c->norms_min) return 65536;
    memcpy(sorted, t->norms, t->norms_count * sizeof(sorted[0]));
    qsort(sorted, t->norms_count, sizeof(sorted[0]), by_value);
    const double median = sorted[(t->norms_count - 1) / 2];
    if (median <= 0.0) return 65536;
    if (norm > c->refuse * median) return 0;
    return norm > c->clip * median ? (uint32_t)floor(c->clip * median / norm * 65536.0) : 65536;
}

static void add_norm(sim_layer *t, double norm) {
    if (t->norms_count == COORD_NORMS_MAX)
        memmove(&t->norms[0], &t->norms[1], (COORD_NORMS_MAX - 1) * sizeof(t->norms[0]));
    else
        t->norms_count++;
    t->norms[t->norms_count - 1] = norm;
}

// COORD_NOBODY: of no node that there is.
static uint32_t node_of_row(const sim *s, const coord_update_row *row) {
    const coord_registry *r = &s->host.loop->registry;
    const uint32_t member = coord_registry_by_id(r, row->node);
    return member == COORD_NOBODY ? COORD_NOBODY
                                  : sim_node_of_key(s, r->members[member].transport_key);
}

// Is this row what its update, the versions and the gate make of it?
static void check_row(sim *s, const coord_update_row *row, uint32_t node, const sim_made *m) {
    const long long id = (long long)row->id;
    const fl_update_begin *b = &m->begin;
    const sim_layer *t = &s->truth.layer[row->layer];
    uint64_t *last = &s->truth.last[(size_t)node * s->layers + row->layer];
    const uint64_t base = (uint64_t)row->base, tau = t->version - base;
    if (!holds(s, m->row == 0)) sim_fail(s, "row %lld: counted before as row %lld", id,
                                         (long long)m->row);
    if (!holds(s, m->valid)) sim_fail(s, "row %lld: an update that must be refused", id);
    if (!holds(s, !m->refused)) sim_fail(s, "row %lld: its node was told it was refused", id);
    if (!holds(s, b->key.layer == row->layer && b->key.base_version == base &&
                      (int64_t)b->tokens == row->tokens && (int64_t)b->task_id == row->task))
        sim_fail(s, "row %lld is not the update that its node made", id);
    if (!holds(s, base <= t->version && *last <= base))
        sim_fail(s, "row %lld: version %lld, of which node %u has one that counts", id,
                 (long long)row->base, node);
    if (!holds(s, tau <= (uint64_t)s->host.settings.staleness_max))
        sim_fail(s, "row %lld is %llu versions late", id, (unsigned long long)tau);
    if (!holds(s, (uint64_t)row->weight == b->tokens * staleness_of(tau)))
        sim_fail(s, "row %lld weighs %lld at %llu tokens, %llu versions late", id,
                 (long long)row->weight, (unsigned long long)b->tokens, (unsigned long long)tau);
    if (!holds(s, fabs(row->norm - m->norm) <= 1e-6 * m->norm))
        sim_fail(s, "row %lld: norm %g, its values have %g", id, row->norm, m->norm);
    if (!holds(s, row->clip == clip_of(s, t, row->norm)))
        sim_fail(s, "row %lld: clip %u, the gate says %u", id, row->clip,
                 clip_of(s, t, row->norm));
    *last = base + 1;
}

static void add_row(sim *s, const coord_update_row *row, uint32_t node, sim_made *m) {
    sim_truth *t = &s->truth;
    sim_layer *layer = &t->layer[row->layer];
    if (t->rows_count == t->rows_room) {
        t->rows_room = t->rows_room == 0 ? 256 : 2 * t->rows_room;
        t->rows = realloc(t->rows, t->rows_room * sizeof(*t->rows));
        FL_ASSERT(t->rows != NULL);
    }
    t->rows[t->rows_count++] = (sim_row){.node = node,
                                          .layer = row->layer,
                                          .clip = row->clip,
                                          .weight = (uint64_t)row->weight,
                                          .sequence = (uint64_t)row->sequence};
    m->row = row->id;
    add_norm(layer, row->norm);
    const uint64_t weight = (uint64_t)row->weight;
    for (uint32_t i = 0; i < m->count; i++)
        layer->sum[i] += (coord_wide)weight * row->clip * m->values[i];
    layer->weight += weight;
    layer->squares += (coord_uwide)weight * weight;
    layer->updates++;
    s->result.updates++;
}

// ---- a round that was sealed

// The largest weight that no node has more than its share of the layer with: found by halving.
static uint64_t cap_of(const sim *s, const uint64_t *sent) {
    const uint64_t share = (uint64_t)floor(s->host.settings.share_cap * 65536.0);
    uint64_t low = 0, high = 0, nodes = 0;
    for (uint32_t n = 0; n < s->opts.nodes; n++) {
        high = sent[n] > high ? sent[n] : high;
        nodes += sent[n] != 0;
    }
    if (nodes < 3 || share >= 65536) return high;
    while (low < high) {
        const uint64_t cap = high - (high - low) / 2;
        coord_uwide all = 0;
        for (uint32_t n = 0; n < s->opts.nodes; n++) all += sent[n] < cap ? sent[n] : cap;
        if ((coord_uwide)cap * 65536 <= all * share)
            low = cap;
        else
            high = cap - 1;
    }
    return low;
}

// Updates of nodes above their share of the layer count for less.
static void cap_shares(sim *s, uint32_t l) {
    sim_layer *t = &s->truth.layer[l];
    uint64_t *sent = calloc(s->opts.nodes, sizeof(*sent));
    FL_ASSERT(sent != NULL);
    for (size_t i = (size_t)s->truth.open_first - 1; i < s->truth.rows_count; i++) {
        const sim_row *r = &s->truth.rows[i];
        if (r->layer == l) sent[r->node] += r->weight;
    }
    const uint64_t cap = cap_of(s, sent);
    for (size_t i = (size_t)s->truth.open_first - 1; i < s->truth.rows_count; i++) {
        const sim_row *r = &s->truth.rows[i];
        if (r->layer != l || sent[r->node] <= cap) continue;
        uint64_t less = (uint64_t)((coord_uwide)r->weight * cap / sent[r->node]);
        less += less == 0;
        const sim_made *m = sim_made_of(&s->nodes[r->node], r->sequence);
        for (uint32_t k = 0; k < m->count; k++)
            t->sum[k] -= (coord_wide)(r->weight - less) * r->clip * m->values[k];
        t->weight -= r->weight - less;
        t->squares -= (coord_uwide)r->weight * r->weight - (coord_uwide)less * less;
    }
    free(sent);
}

static void step_layer(sim *s, uint32_t l) {
    cap_shares(s, l);
    sim_layer *t = &s->truth.layer[l];
    const coord_settings *c = &s->host.settings;
    const coord_opt opt = {.kind = (coord_opt_kind)c->optimiser,
                           .rate = c->server_rate,
                           .beta1 = c->beta1,
                           .beta2 = c->beta2,
                           .tau = c->tau};
    double mean[SIM_VALUES_MAX];
    uint8_t bytes[FL_LAYER_HEAD + 4 * SIM_VALUES_MAX], kept[FL_DIGEST_SIZE];
    const double w = (double)t->weight, n = w * w / (double)t->squares;
    const double scale = n / (n + c->shrink) * 0x1p-32 / 65536.0;
    for (uint32_t i = 0; i < t->count; i++) mean[i] = (double)t->sum[i] / w * scale;
    if (!t->started) coord_opt_start(&opt, t->count, t->moments);
    t->started = true;
    fl_status st = coord_opt_step(&opt, t->count, mean, t->theta, t->moments, NULL);
    t->version++;
    const size_t size = fl_layer_size(t->count);
    if (st == FL_OK)
        st = fl_layer_encode(l, t->version, t->theta, t->count, bytes, size, NULL);
    FL_ASSERT(st == FL_OK && t->version < SIM_VERSIONS_MAX);
    uint8_t *digest = t->digests[t->version];
    fl_hash((fl_bytes){bytes, size}, digest);
    st = coord_store_find_layer(s->host.loop->store, l, (int64_t)t->version, kept, NULL);
    if (!holds(s, st == FL_ENOENT || (st == FL_OK && memcmp(kept, digest, sizeof(kept)) == 0)))
        sim_fail(s, "layer %u version %llu is not the sum of the %lld updates that it lists", l,
                 (unsigned long long)t->version, (long long)t->updates);
    memset(t->sum, 0, sizeof(t->sum));
    t->weight = 0;
    t->squares = 0;
    t->updates = 0;
}

static void seal_round(sim *s) {
    sim_truth *t = &s->truth;
    bool any = false;
    for (uint32_t l = 0; l < s->layers; l++) {
        if (t->layer[l].updates == 0) continue;
        any = true;
        step_layer(s, l);
    }
    if (!holds(s, any)) sim_fail(s, "round %lld was sealed and lists nothing", (long long)t->round);
    t->round++;
    t->open_first = (int64_t)t->rows_count + 1;
    s->result.rounds++;
}

// ---- the whole ledger

typedef struct scan {
    sim *s;
    int64_t round; // that the ledger has open
    int64_t next;  // row that must come
} scan;

// A row of the buffer that was open at the last look, or a new one.
static fl_status on_row(void *ctx, const coord_update_row *row, fl_err *err) {
    scan *c = ctx;
    sim *s = c->s;
    sim_truth *t = &s->truth;
    (void)err;
    if (s->result.failed) return FL_OK;
    if (!holds(s, row->id == c->next++))
        sim_fail(s, "row %lld is missing from the ledger", (long long)c->next - 1);
    if (row->round != 0)
        while (t->round < row->round && t->round < c->round && !s->result.failed) seal_round(s);
    else
        while (t->round < c->round && !s->result.failed) seal_round(s);
    const bool known = row->id <= (int64_t)t->rows_count;
    const uint32_t node = node_of_row(s, row);
    sim_made *m = node == COORD_NOBODY
                      ? NULL
                      : sim_made_of(&s->nodes[node], (uint64_t)row->sequence);
    if (!holds(s, m != NULL && row->layer < s->layers)) {
        sim_fail(s, "row %lld is an update that nobody made", (long long)row->id);
        return FL_OK;
    }
    const bool fits = row->round == 0 ? t->round == c->round : row->round == t->round;
    const bool old = row->round != 0 && row->round < t->round; // of a round sealed before
    if (!holds(s, fits || (known && old)))
        sim_fail(s, "row %lld is of round %lld, round %lld is open", (long long)row->id,
                 (long long)row->round, (long long)t->round);
    if (known) {
        const sim_row *seen = &t->rows[row->id - 1];
        if (!holds(s, seen->node == node && seen->sequence == (uint64_t)row->sequence))
            sim_fail(s, "row %lld has changed", (long long)row->id);
        return FL_OK;
    }
    check_row(s, row, node, m);
    if (!s->result.failed) add_row(s, row, node, m);
    return FL_OK;
}

static void scan_ledger(sim *s, int64_t after) {
    fl_err err;
    coord_loop *loop = s->host.loop;
    scan c = {.s = s, .round = (int64_t)loop->round.round, .next = after + 1};
    const fl_status st = coord_store_each_update_after(loop->store, after, on_row, &c, &err);
    if (!holds(s, st == FL_OK)) sim_fail(s, "the ledger cannot be read: %s", err.text);
    if (s->result.failed) return;
    if (!holds(s, c.next == (int64_t)s->truth.rows_count + 1))
        sim_fail(s, "rows of the ledger are gone: %lld of %zu are there", (long long)c.next - 1,
                 s->truth.rows_count);
    while (s->truth.round < c.round && !s->result.failed) seal_round(s);
    if (!holds(s, s->truth.round == c.round))
        sim_fail(s, "round %lld is open, it was %lld before", (long long)c.round,
                 (long long)s->truth.round);
}

// Memory says the same as the ledger.
static void check_memory(sim *s) {
    const coord_loop *loop = s->host.loop;
    for (uint32_t l = 0; l < s->layers && !s->result.failed; l++) {
        const sim_layer *t = &s->truth.layer[l];
        const coord_sum *sum = &loop->sum[l];
        if (!holds(s, loop->round.version[l] == t->version &&
                          (uint64_t)loop->layer[l].version == t->version))
            sim_fail(s, "layer %u is at version %llu, it must be at %llu", l,
                     (unsigned long long)loop->round.version[l], (unsigned long long)t->version);
        if (t->version > 0 &&
            !holds(s, memcmp(loop->layer[l].digest, t->digests[t->version], FL_DIGEST_SIZE) == 0))
            sim_fail(s, "layer %u has other bytes than its version", l);
        bool same = (int64_t)sum->updates == t->updates && sum->weight == t->weight;
        if (t->updates > 0)
            for (uint32_t i = 0; same && i < t->count; i++)
                same = coord_sum_at(sum, i) == t->sum[i];
        if (!holds(s, same)) sim_fail(s, "the open sum of layer %u is not that of its updates", l);
    }
}

void sim_check(sim *s) {
    const bool sealed = (int64_t)s->host.loop->round.round != s->truth.round;
    scan_ledger(s, sealed ? s->truth.open_first - 1 : (int64_t)s->truth.rows_count);
    if (!s->result.failed) check_memory(s);
}

void sim_check_recovered(sim *s) {
    scan_ledger(s, 0);
    for (uint32_t i = 0; i < s->opts.nodes && !s->result.failed; i++) {
        const sim_node *n = &s->nodes[i];
        for (size_t k = 0; k < n->made_count; k++) {
            const sim_made *m = &n->made[k];
            if (!holds(s, !m->acknowledged || m->row != 0))
                sim_fail(s, "update %zu of node %u was acknowledged and is gone", k + 1, i);
            if (!holds(s, !m->refused || m->row == 0))
                sim_fail(s, "update %zu of node %u was refused and counts", k + 1, i);
        }
    }
    if (!s->result.failed) check_memory(s);
    if (!s->result.failed) sim_join_check(s);
}

void sim_check_object(sim *s, uint32_t layer, uint64_t version,
                      const uint8_t digest[FL_DIGEST_SIZE]) {
    // A version that was published while the coordinator went down is not in the account yet.
    if (layer >= s->layers || version > s->truth.layer[layer].version) {
        if (!holds(s, s->host.loop == NULL && layer < s->layers))
            sim_fail(s, "layer %u version %llu was given out and does not exist", layer,
                     (unsigned long long)version);
        return;
    }
    if (!holds(s, memcmp(digest, s->truth.layer[layer].digests[version], FL_DIGEST_SIZE) == 0))
        sim_fail(s, "version %llu of layer %u was two different things",
                 (unsigned long long)version, layer);
}
