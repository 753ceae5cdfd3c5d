// A full buffer becomes new layer versions, and new voting weights when they are certain to help.
// All of it is one transaction: a kill before the commit leaves the buffer as it was, and the same
// buffer gives the same bytes again.
#include "common/checked.h"
#include "common/log.h"
#include "common/plant.h"
#include "coordinator/loop_state.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct step { // what one layer's step works on
    float *theta;
    double *mean, *moments;
    uint8_t *bytes;
} step;

static void step_free(step *s) {
    free(s->theta);
    free(s->mean);
    free(s->moments);
    free(s->bytes);
}

static fl_status step_alloc(step *s, size_t count, size_t moments, fl_err *err) {
    s->theta = calloc(count, sizeof(float));
    s->mean = malloc(count * sizeof(double));
    s->moments = malloc(count * moments * sizeof(double) + 1);
    s->bytes = malloc(fl_layer_size((uint32_t)count) + count * moments * sizeof(double));
    const bool all = s->theta != NULL && s->mean != NULL && s->moments != NULL && s->bytes != NULL;
    return all ? FL_OK : FL_FAIL(err, FL_ENOMEM, "no memory to step a layer of %zu values", count);
}

// The layer as it is: zeros at version 0.
static fl_status load_theta(coord_loop *loop, const coord_layer_row *row, float *theta,
                            fl_err *err) {
    uint8_t *data = NULL;
    size_t size = 0;
    fl_layer layer;
    if (row->version == 0) return FL_OK;
    fl_status st =
        coord_store_get_object(loop->store, row->digest, FL_UPDATE_MAX, &data, &size, err);
    if (st == FL_OK) st = fl_layer_open((fl_bytes){data, size}, &layer, err);
    if (st == FL_OK && (layer.count != row->count || layer.layer != row->layer ||
                        layer.version != (uint64_t)row->version))
        st = FL_FAIL(err, FL_EFORMAT, "the file of layer %u is of another one", row->layer);
    if (st == FL_OK) fl_layer_values(&layer, 0, layer.count, theta);
    free(data);
    return st;
}

static fl_status load_moments(coord_loop *loop, const coord_layer_row *row, size_t doubles,
                              double *moments, fl_err *err) {
    uint8_t *data = NULL;
    size_t size = 0;
    if (doubles == 0) return FL_OK;
    if (!row->has_moments || fl_plant(MOMENTS_LOST)) { // first step, or first with this optimiser
        coord_opt_start(&loop->opt, (size_t)row->count, moments);
        return FL_OK;
    }
    FL_TRY(coord_store_get_object(loop->store, row->moments, doubles * 8, &data, &size, err));
    if (size != doubles * 8) {
        coord_opt_start(&loop->opt, (size_t)row->count, moments); // the optimiser was changed
    } else {
        for (size_t i = 0; i < doubles; i++) {
            const uint64_t bits = fl_get_u64(data + 8 * i);
            memcpy(&moments[i], &bits, sizeof(bits));
        }
    }
    free(data);
    return FL_OK;
}

static fl_status save(coord_loop *loop, const step *s, size_t doubles, coord_layer_row *row,
                      fl_err *err) {
    const size_t size = fl_layer_size((uint32_t)row->count);
    uint64_t version = (uint64_t)row->version;
    if (fl_plant(VERSION_REUSED) && version > 1) version--;
    FL_TRY(fl_layer_encode(row->layer, version, s->theta, (uint32_t)row->count, s->bytes, size,
                           err));
    row->size = (int64_t)size;
    FL_TRY(coord_store_put_object(loop->store, (fl_bytes){s->bytes, size}, row->digest, err));
    row->has_moments = doubles > 0;
    if (doubles == 0) return FL_OK;
    for (size_t i = 0; i < doubles; i++) {
        uint64_t bits;
        memcpy(&bits, &s->moments[i], sizeof(bits));
        fl_put_u64(s->bytes + 8 * i, bits);
    }
    return coord_store_put_object(loop->store, (fl_bytes){s->bytes, doubles * 8}, row->moments,
                                  err);
}

// row: the layer as stored; becomes its next version, whose objects are durable.
static fl_status step_layer(coord_loop *loop, coord_layer_row *row, fl_err *err) {
    const coord_sum *sum = &loop->sum[row->layer];
    const size_t count = sum->count, doubles = coord_opt_moments(loop->opt.kind) * count;
    step s = {0};
    fl_status st = step_alloc(&s, count, coord_opt_moments(loop->opt.kind), err);
    if (st == FL_OK) st = load_theta(loop, row, s.theta, err);
    if (st == FL_OK) st = load_moments(loop, row, doubles, s.moments, err);
    if (st == FL_OK)
        st = coord_sum_mean(sum, ldexp(1.0, -FL_UPDATE_FIXED_BITS), loop->settings.shrink, s.mean,
                            err);
    if (st == FL_OK) st = coord_opt_step(&loop->opt, count, s.mean, s.theta, s.moments, err);
    row->version++;
    row->round = (int64_t)loop->round.round;
    if (st == FL_OK) st = save(loop, &s, doubles, row, err);
    step_free(&s);
    return st;
}

typedef struct pool {
    coord_loop *loop;
    coord_vote_sums total;
    uint32_t nodes;
} pool;

static fl_status pool_report(void *ctx, const coord_report_row *r, fl_err *err) {
    pool *p = ctx;
    coord_vote_sums sums = {.version = (uint64_t)r->vote,
                            .exits = r->exits,
                            .tokens = (uint64_t)r->tokens,
                            .nll = r->nll_voted};
    const uint32_t node = coord_registry_by_id(&p->loop->registry, r->node);
    (void)err;
    if (node == COORD_NOBODY || p->loop->registry.members[node].state != COORD_MEMBER_ACTIVE)
        return FL_OK;
    memcpy(sums.share, r->share, sizeof(sums.share));
    if (coord_vote_check(&p->loop->vote, &sums, NULL) != FL_OK) return FL_OK; // old, or no sums
    coord_vote_add(&p->total, &sums);
    p->nodes++;
    return FL_OK;
}

// *ret_loss: of the vote, pooled over the nodes that reported under it; NaN when none did.
static fl_status step_vote(coord_loop *loop, coord_vote *next, double *ret_loss, fl_err *err) {
    pool p = {.loop = loop};
    double gain = 0.0;
    *ret_loss = (double)NAN;
    FL_TRY(coord_store_each_last_report(loop->store, pool_report, &p, err));
    if (p.nodes == 0) return FL_OK;
    *ret_loss = coord_vote_loss(&p.total);
    if (p.nodes < loop->round.opts.updates_min ||
        coord_vote_step(&loop->vote, &p.total, loop->settings.vote_gain, next, &gain, NULL) !=
            FL_OK)
        return FL_OK;
    coord_vote_row row = {.version = (int64_t)next->version,
                          .round = (int64_t)loop->round.round,
                          .tokens = (int64_t)p.total.tokens,
                          .exits = next->exits,
                          .loss = *ret_loss,
                          .gain = gain};
    memcpy(row.weights, next->weight, sizeof(row.weights));
    FL_TRY(coord_store_add_vote(loop->store, &row, err));
    return coord_loop_event(loop, "vote.published", COORD_NOBODY, err,
                            "version %llu, at least %.5f nats a token better",
                            (unsigned long long)next->version, gain);
}

static fl_status close_round(coord_loop *loop, int64_t layers, double loss, fl_err *err) {
    coord_round_row row = {.round = (int64_t)loop->round.round,
                           .closed_s = loop->world.wall_s(loop->world.ctx),
                           .contributions = loop->round.contributions,
                           .updates = loop->round.updates,
                           .layers = layers,
                           .loss = loss};
    snprintf(row.reason, sizeof(row.reason), "%s",
             loop->flush_due == COORD_FLUSH_DEADLINE ? "deadline" : "full");
    FL_TRY(coord_store_spooled_bytes(loop->store, &row.bytes_up, err));
    FL_TRY(coord_store_fold_updates(loop->store, row.round, err));
    FL_TRY(coord_store_close_round(loop->store, &row, err));
    FL_TRY(coord_store_open_round(loop->store, row.round + 1, row.closed_s, err));
    FL_TRY(coord_store_trim_layers(loop->store, loop->settings.versions_kept, err));
    FL_TRY(coord_store_trim_events(loop->store, COORD_EVENTS_KEPT, err));
    return coord_loop_event(loop, "round.closed", COORD_NOBODY, err,
                            "round %lld (%s): %lld nodes, %lld updates, %lld layers changed",
                            (long long)row.round, row.reason, (long long)row.contributions,
                            (long long)row.updates, (long long)layers);
}

fl_status coord_loop_flush(coord_loop *loop, uint64_t now_ms, fl_err *err) {
    coord_layer_row next[COORD_LAYERS_MAX];
    coord_vote vote = loop->vote;
    coord_effect fx;
    double loss;
    int64_t changed = 0;
    FL_TRY(coord_loop_commit(loop, err)); // what was acknowledged does not wait for the flush
    memcpy(next, loop->layer, sizeof(next));
    FL_TRY(coord_loop_cap_shares(loop, err));
    for (uint32_t l = 0; l < loop->layers; l++) {
        if (loop->sum[l].updates != 0) FL_TRY(step_layer(loop, &next[l], err));
    }
    FL_TRY(coord_store_begin(loop->store, err));
    for (uint32_t l = 0; l < loop->layers; l++) {
        if (loop->sum[l].updates == 0) continue;
        FL_TRY(coord_store_set_layer(loop->store, &next[l], loop->sum[l].updates, err));
        changed++;
    }
    if (fl_plant(SEAL_IN_TWO)) FL_TRY(coord_loop_commit(loop, err));
    FL_TRY(step_vote(loop, &vote, &loss, err));
    FL_TRY(close_round(loop, changed, loss, err));
    FL_TRY(coord_loop_commit(loop, err));
    // Durable: now memory follows.
    memcpy(loop->layer, next, sizeof(next));
    loop->vote = vote;
    for (uint32_t l = 0; l < loop->layers; l++) {
        if (loop->sum[l].updates != 0 && !fl_plant(SUM_NOT_RESET)) coord_sum_reset(&loop->sum[l]);
    }
    const coord_event ev = {.kind = COORD_EV_FLUSHED, .now_ms = now_ms};
    FL_TRY(coord_round_step(&loop->round, &ev, &fx, err));
    loop->flush_due = COORD_FLUSH_NO;
    if (loop->round.phase == COORD_FINISHED)
        fl_log(FL_LOG_INFO, "run.finished", "%llu rounds are done",
               (unsigned long long)loop->round.opts.rounds);
    return coord_store_sweep(loop->store, err);
}
