// What watches over the fleet's model: were the newest layers worse for the nodes' held-out text,
// what is then put back, and which nodes are put away. All that it decides is written in the
// transaction of the flush, so it happens once.
#include "common/checked.h"
#include "common/fault.h"
#include "common/log.h"
#include "coordinator/loop_state.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

_Static_assert((int)COORD_GOOD_LAYERS >= (int)COORD_LAYERS_MAX &&
                   (int)COORD_EXITS_MAX >= (int)COORD_SUMS_MAX,
               "the last good layers can be remembered");

static fl_status take(coord_loop *loop, const char *key, uint8_t *data, size_t size_max,
                      size_t *ret_size, fl_err *err) {
    const fl_status st = coord_store_get_value(loop->store, key, data, size_max, ret_size, err);
    if (st != FL_ENOENT) return st;
    *ret_size = 0; // a first start
    return FL_OK;
}

fl_status coord_loop_guard_open(coord_loop *loop, fl_err *err) {
    const size_t room = COORD_CONDUCT_MAX * COORD_CONDUCT_BYTES;
    size_t size = 0;
    loop->conducts.rows = fl_fault() ? NULL : calloc(COORD_CONDUCT_MAX, sizeof(coord_conduct));
    uint8_t *data = malloc(room > COORD_GOOD_BYTES ? room : COORD_GOOD_BYTES);
    fl_status st = loop->conducts.rows != NULL && data != NULL
                       ? take(loop, "conduct", data, room, &size, err)
                       : FL_FAIL(err, FL_ENOMEM, "no memory for the nodes' conduct");
    if (st == FL_OK) st = coord_conducts_decode((fl_bytes){data, size}, &loop->conducts, err);
    if (st == FL_OK) st = take(loop, "good", data, COORD_GOOD_BYTES, &size, err);
    if (st == FL_OK && size > 0) st = coord_good_decode((fl_bytes){data, size}, &loop->good, err);
    free(data);
    if (st == FL_OK && loop->good.known &&
        (loop->good.layers != loop->layers || loop->good.exits != loop->round.opts.exits))
        loop->good.known = false;
    return st;
}

void coord_loop_guard_close(coord_loop *loop) {
    free(loop->conducts.rows);
    loop->conducts = (coord_conducts){0};
}

// ---- judgement

typedef struct measured { // by one node
    bool before, now;
    double was, is; // nats a token above the model's own loss on the same text
    uint64_t tokens;
} measured;

typedef struct census {
    const coord_loop *loop;
    measured *nodes; // [nodes_max]
    bool now;
} census;

static fl_status take_report(void *ctx, const coord_report_row *row, fl_err *err) {
    census *c = ctx;
    const uint32_t node = coord_registry_by_id(&c->loop->registry, row->node);
    (void)err;
    if (node == COORD_NOBODY || row->tokens <= 0 ||
        c->loop->registry.members[node].state != COORD_MEMBER_ACTIVE)
        return FL_OK;
    measured *m = &c->nodes[node];
    const double loss =
        (double)(row->nll_voted - row->nll_base) * COORD_VOTE_UNIT / (double)row->tokens;
    if (c->now) {
        m->now = true;
        m->is = loss;
    } else {
        m->before = true;
        m->was = loss;
    }
    if (m->tokens == 0 || (uint64_t)row->tokens < m->tokens) m->tokens = (uint64_t)row->tokens;
    return FL_OK;
}

// The reports of this round measured the layers that the last flush made.
static fl_status judge(coord_loop *loop, coord_judgement *ret, coord_verdict_text text,
                       fl_err *err) {
    const uint32_t room = loop->round.opts.nodes_max;
    const int64_t round = (int64_t)loop->round.round;
    census c = {.loop = loop, .nodes = calloc(room, sizeof(measured)), .now = true};
    coord_change *changes = calloc(room, sizeof(*changes));
    uint32_t n = 0;
    double change = 0.0;
    fl_status st = c.nodes != NULL && changes != NULL
                       ? coord_store_each_report(loop->store, round, take_report, &c, err)
                       : FL_FAIL(err, FL_ENOMEM, "no memory to compare reports");
    c.now = false;
    if (st == FL_OK && loop->good.known)
        st = coord_store_each_report(loop->store, loop->good.round, take_report, &c, err);
    for (uint32_t i = 0; i < room && st == FL_OK; i++) {
        const measured *m = &c.nodes[i];
        if (!m->now || (loop->good.known && !m->before)) continue;
        changes[n++] = (coord_change){.nats = loop->good.known ? m->is - m->was : 0.0,
                                      .tokens = m->tokens};
    }
    if (st == FL_OK) {
        *ret = coord_validate(changes, n, loop->round.members, loop->settings.byzantine,
                              loop->settings.rollback, &change);
        snprintf(text, sizeof(coord_verdict_text),
                 "%+.4f nats a token on %u nodes since round %lld", change, n,
                 (long long)loop->good.round);
    }
    free(changes);
    free(c.nodes);
    return st;
}

static void take_as_good(coord_loop *loop, int64_t round) {
    coord_good *g = &loop->good;
    g->known = true;
    g->round = g->last = round;
    g->layers = loop->layers;
    g->exits = loop->vote.exits;
    for (uint32_t l = 0; l < loop->layers; l++) g->version[l] = loop->layer[l].version;
    memcpy(g->vote, loop->vote.weight, sizeof(g->vote));
}

fl_status coord_loop_judge(coord_loop *loop, bool *ret_undo, fl_err *err) {
    coord_judgement judgement = COORD_UNKNOWN;
    coord_verdict_text text;
    const int64_t round = (int64_t)loop->round.round;
    *ret_undo = false;
    if (loop->settings.rollback <= 0.0) {
        loop->good.known = false;
        return FL_OK;
    }
    FL_TRY(judge(loop, &judgement, text, err));
    if (coord_good_judged(&loop->good, judgement, round)) take_as_good(loop, round);
    *ret_undo = judgement == COORD_WORSE && loop->good.known;
    if (!*ret_undo) return FL_OK;
    return coord_loop_event(loop, "model.rollback", COORD_NOBODY, err,
                            "held-out loss %s: the layers of that round are put back, and %u "
                            "updates that came since do not count",
                            text, loop->round.updates);
}

// ---- putting back

// The values of the good version; zeros at version 0.
static fl_status load_good(coord_loop *loop, const coord_layer_row *row, float *theta,
                           fl_err *err) {
    uint8_t digest[COORD_DIGEST], *data = NULL;
    size_t size = 0;
    fl_layer layer;
    const int64_t version = loop->good.version[row->layer];
    if (version == 0) return FL_OK;
    FL_TRY(coord_store_find_layer(loop->store, row->layer, version, digest, err));
    fl_status st = coord_store_get_object(loop->store, digest, FL_UPDATE_MAX, &data, &size, err);
    if (st == FL_OK) st = fl_layer_open((fl_bytes){data, size}, &layer, err);
    if (st == FL_OK && (layer.count != row->count || layer.layer != row->layer))
        st = FL_FAIL(err, FL_EFORMAT, "the file of layer %u is of another one", row->layer);
    if (st == FL_OK) fl_layer_values(&layer, 0, layer.count, theta);
    free(data);
    return st;
}

fl_status coord_loop_put_back(coord_loop *loop, coord_layer_row *row, fl_err *err) {
    const size_t size = fl_layer_size((uint32_t)row->count);
    float *theta = fl_fault() ? NULL : calloc((size_t)row->count, sizeof(*theta));
    uint8_t *bytes = malloc(size);
    fl_status st = theta != NULL && bytes != NULL
                       ? load_good(loop, row, theta, err)
                       : FL_FAIL(err, FL_ENOMEM, "no memory to put layer %u back", row->layer);
    row->version++;
    row->round = (int64_t)loop->round.round;
    row->size = (int64_t)size;
    row->has_moments = false; // they led here
    if (st == FL_OK)
        st = fl_layer_encode(row->layer, (uint64_t)row->version, theta, (uint32_t)row->count, bytes,
                             size, err);
    if (st == FL_OK)
        st = coord_store_put_object(loop->store, (fl_bytes){bytes, size}, row->digest, err);
    free(bytes);
    free(theta);
    return st;
}

fl_status coord_loop_put_vote_back(coord_loop *loop, coord_vote *vote, fl_err *err) {
    const size_t size = vote->exits * sizeof(vote->weight[0]);
    if (memcmp(vote->weight, loop->good.vote, size) == 0) return FL_OK;
    memcpy(vote->weight, loop->good.vote, size);
    vote->version++;
    coord_vote_row row = {.version = (int64_t)vote->version,
                          .round = (int64_t)loop->round.round,
                          .exits = vote->exits};
    memcpy(row.weights, vote->weight, sizeof(row.weights));
    return coord_store_add_vote(loop->store, &row, err);
}

int64_t coord_loop_versions_kept(const coord_loop *loop, const coord_layer_row *next) {
    int64_t keep = loop->settings.versions_kept;
    for (uint32_t l = 0; l < loop->layers && loop->good.known; l++) {
        const int64_t behind = next[l].version - loop->good.version[l] + 1;
        keep = behind > keep ? behind : keep;
    }
    return keep;
}

// ---- conduct

typedef struct telling {
    coord_loop *loop;
    fl_status st;
    fl_err *err;
} telling;

static void tell_conduct(void *ctx, const coord_conduct *row, coord_conduct_change change) {
    telling *t = ctx;
    const uint32_t node = coord_registry_by_id(&t->loop->registry, row->node);
    if (t->st != FL_OK || node == COORD_NOBODY) return;
    t->st = change == COORD_CONDUCT_QUARANTINED
                ? coord_loop_event(t->loop, "node.quarantined", node, t->err,
                                   "its updates point away from the others' (%.2f): they do not "
                                   "count up to round %lld",
                                   coord_conduct_score(row), (long long)row->until)
                : coord_loop_event(t->loop, "node.released", node, t->err,
                                   "its updates count again (%.2f)", coord_conduct_score(row));
}

fl_status coord_loop_guard_save(coord_loop *loop, fl_err *err) {
    uint8_t good[COORD_GOOD_BYTES];
    telling t = {.loop = loop, .err = err};
    const uint32_t bad = coord_byzantine(loop->settings.byzantine, loop->round.members);
    if (loop->settings.rollback > 0.0)
        FL_TRY(coord_store_put_value(loop->store, "good",
                                     (fl_bytes){good, coord_good_encode(&loop->good, good)}, err));
    if (loop->settings.rule == COORD_RULE_MEAN) return FL_OK; // it judges nobody
    coord_conducts_close(&loop->conducts, (int64_t)loop->round.round, bad, tell_conduct, &t);
    FL_TRY(t.st);
    uint8_t *rows = malloc((size_t)loop->conducts.count * COORD_CONDUCT_BYTES + 1);
    if (rows == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory for the nodes' conduct");
    const size_t size = coord_conducts_encode(&loop->conducts, rows);
    const fl_status st =
        coord_store_put_value(loop->store, "conduct", (fl_bytes){rows, size}, err);
    free(rows);
    return st;
}

fl_status coord_loop_guard_mark(const coord_loop *loop, coord_guard_mark *ret, fl_err *err) {
    const size_t size = loop->conducts.count * sizeof(coord_conduct);
    *ret = (coord_guard_mark){.good = loop->good, .count = loop->conducts.count};
    ret->rows = malloc(size + 1);
    if (ret->rows == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory to remember conduct");
    memcpy(ret->rows, loop->conducts.rows, size);
    return FL_OK;
}

void coord_loop_guard_rewind(coord_loop *loop, coord_guard_mark *mark, bool failed) {
    if (failed) {
        loop->good = mark->good;
        loop->conducts.count = mark->count;
        memcpy(loop->conducts.rows, mark->rows, mark->count * sizeof(coord_conduct));
    }
    free(mark->rows);
    mark->rows = NULL;
}
