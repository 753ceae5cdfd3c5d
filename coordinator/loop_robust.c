// A layer's step by a robust rule: the open buffer's updates of the layer, read back from the spool
// tile by tile. Their sealed bytes are the same whoever reads them and in whatever order they came,
// so a flush that was killed gives the same layer when it is done again.
#include "common/fault.h"
#include "common/log.h"
#include "coordinator/loop_state.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// Payloads of one layer that stay opened between passes; those beyond are read again for each tile.
enum { KEPT_BYTES = 32 << 20 };

typedef struct source {
    coord_update_row row;
    uint8_t *data; // NULL: not kept
    fl_update update;
} source;

typedef struct reading {
    coord_loop *loop;
    const coord_layer_row *layer;
    source *sources;
    uint32_t count, room;
    size_t kept;
} reading;

static fl_status collect(void *ctx, const coord_update_row *row, fl_err *err) {
    reading *r = ctx;
    if (row->layer != r->layer->layer) return FL_OK;
    if (row->at.size <= 0 || row->at.size > (int64_t)FL_UPDATE_MAX)
        return FL_FAIL(err, FL_EFORMAT, "update %lld has an impossible size", (long long)row->id);
    if (r->count == r->room) {
        const uint32_t room = r->room == 0 ? 32 : 2 * r->room;
        source *more = fl_fault() ? NULL : realloc(r->sources, room * sizeof(*more));
        if (more == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory for a layer's updates");
        r->sources = more;
        r->room = room;
    }
    r->sources[r->count++] = (source){.row = *row};
    return FL_OK;
}

static fl_status open_source(reading *r, const source *s, uint8_t **ret_data, fl_update *ret,
                             fl_err *err) {
    const size_t size = (size_t)s->row.at.size;
    uint8_t *data = fl_fault() ? NULL : malloc(size);
    if (data == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory for an update");
    fl_status st = coord_store_unspool(r->loop->store, &s->row.at, data, err);
    if (st == FL_OK) st = fl_update_open((fl_bytes){data, size}, ret, err);
    if (st == FL_OK && (ret->info.layer != s->row.layer || ret->info.count != r->layer->count))
        st = FL_FAIL(err, FL_EFORMAT, "update %lld is not what its row says",
                     (long long)s->row.id);
    if (st != FL_OK) {
        free(data);
        return st;
    }
    *ret_data = data;
    return FL_OK;
}

static fl_status read_source(void *ctx, uint32_t index, size_t first, size_t n, int64_t *out,
                             fl_err *err) {
    reading *r = ctx;
    source *s = &r->sources[index];
    if (s->data == NULL) {
        uint8_t *data = NULL;
        fl_update update;
        FL_TRY(open_source(r, s, &data, &update, err));
        if (r->kept + (size_t)s->row.at.size > KEPT_BYTES) {
            fl_update_fixed(&update, (uint32_t)first, (uint32_t)n, out);
            free(data);
            return FL_OK;
        }
        r->kept += (size_t)s->row.at.size;
        s->data = data;
        s->update = update;
    }
    fl_update_fixed(&s->update, (uint32_t)first, (uint32_t)n, out);
    return FL_OK;
}

static void reading_done(reading *r, coord_ballot *b) {
    for (uint32_t i = 0; i < r->count; i++) free(r->sources[i].data);
    free(r->sources);
    free(b->rows);
    free(b->voices);
    free(b->first);
}

static fl_status make_ballot(reading *r, coord_ballot *b, fl_err *err) {
    const size_t n = r->count;
    *b = (coord_ballot){.row_count = r->count, .read = read_source, .ctx = r};
    b->rows = fl_fault() ? NULL : malloc((n + 1) * sizeof(*b->rows));
    b->voices = malloc((n + 1) * sizeof(*b->voices));
    b->first = malloc((n + 1) * sizeof(*b->first));
    if (b->rows == NULL || b->voices == NULL || b->first == NULL)
        return FL_FAIL(err, FL_ENOMEM, "no memory for %zu updates of a layer", n);
    for (uint32_t i = 0; i < r->count; i++) {
        const coord_update_row *row = &r->sources[i].row;
        b->rows[i] = (coord_ballot_row){.node = row->node,
                                        .base = row->base,
                                        .weight = (uint64_t)row->weight,
                                        .clip = row->clip,
                                        .source = i};
    }
    coord_ballot_sort(b);
    return FL_OK;
}

// A quarantined node's voice is judged and does not count. How many do.
static uint32_t silence(const coord_loop *loop, coord_ballot *b) {
    uint32_t heard = 0;
    for (uint32_t v = 0; v < b->voice_count; v++) {
        const int64_t node = b->rows[b->first[v]].node;
        if (coord_is_quarantined(&loop->conducts, node, (int64_t)loop->round.round))
            b->voices[v].weight = 0;
        heard += b->voices[v].weight > 0;
    }
    return heard;
}

// No voice that is heard weighs more than the set share of them all.
static fl_status cap_voices(const coord_loop *loop, coord_ballot *b, fl_err *err) {
    const uint32_t share = (uint32_t)floor(loop->settings.share_cap * COORD_ONE);
    const size_t n = b->voice_count;
    size_t heard = 0;
    if (share >= COORD_ONE) return FL_OK;
    uint64_t *weight = fl_fault() ? NULL : malloc(2 * n * sizeof(*weight));
    if (weight == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory to weigh %zu nodes", n);
    uint64_t *capped = weight + n;
    for (size_t v = 0; v < n; v++) {
        if (b->voices[v].weight > 0) weight[heard++] = b->voices[v].weight;
    }
    coord_share_cap(weight, heard, share, capped);
    for (size_t v = n; v-- > 0;) {
        if (b->voices[v].weight > 0) b->voices[v].weight = capped[--heard];
    }
    free(weight);
    return FL_OK;
}

static uint32_t root_of(const coord_loop *loop, const coord_ballot *b) {
    const coord_registry *g = &loop->registry;
    for (uint32_t i = 0; i < g->count && loop->settings.root_node[0] != '\0'; i++) {
        if (strcmp(g->members[i].name, loop->settings.root_node) == 0)
            return coord_ballot_voice(b, g->members[i].id);
    }
    return COORD_NO_ROOT;
}

// Another rule than asked for is an event: once, until the reason changes.
static fl_status tell_rule(coord_loop *loop, uint32_t layer, const coord_robust_result *r,
                           fl_err *err) {
    if (strcmp(r->reason, loop->rule_told) == 0) return FL_OK;
    snprintf(loop->rule_told, sizeof(loop->rule_told), "%s", r->reason);
    if (r->reason[0] == '\0')
        return coord_loop_event(loop, "rule.restored", COORD_NOBODY, err, "layer %u: %s", layer,
                                coord_rule_text(r->used));
    return coord_loop_event(loop, "rule.fallback", COORD_NOBODY, err, "layer %u: %s", layer,
                            r->reason);
}

static fl_status vote_on(reading *r, coord_ballot *b, double *mean, bool *ret_heard, fl_err *err) {
    coord_loop *loop = r->loop;
    const coord_settings *s = &loop->settings;
    coord_robust_result result;
    *ret_heard = silence(loop, b) > 0;
    if (!*ret_heard) return FL_OK;
    FL_TRY(cap_voices(loop, b, err));
    const coord_robust_opts opts = {.rule = (coord_rule)s->rule,
                                    .byzantine = s->byzantine,
                                    .clip = s->batch_clip,
                                    .filter = true,
                                    .iterations = COORD_CLIP_ITERATIONS,
                                    .root = root_of(loop, b),
                                    .unit = ldexp(1.0, -FL_UPDATE_FIXED_BITS),
                                    .kappa = s->shrink};
    coord_opinion *opinions = fl_fault() ? NULL : malloc(b->voice_count * sizeof(*opinions));
    if (opinions == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory to judge %u nodes", r->count);
    fl_status st = coord_robust_run(&opts, b->voices, b->voice_count, (size_t)r->layer->count,
                                    coord_ballot_read, b, mean, opinions, &result, err);
    for (uint32_t v = 0; v < b->voice_count && st == FL_OK; v++)
        coord_conduct_note(&loop->conducts, b->rows[b->first[v]].node, opinions[v].cosine);
    free(opinions);
    return st == FL_OK ? tell_rule(loop, r->layer->layer, &result, err) : st;
}

fl_status coord_loop_robust(coord_loop *loop, const coord_layer_row *layer, double *mean,
                            bool *ret_heard, fl_err *err) {
    reading r = {.loop = loop, .layer = layer};
    coord_ballot b = {0};
    memset(mean, 0, (size_t)layer->count * sizeof(*mean)); // the centre of centred clipping
    fl_status st = coord_store_each_open_update(loop->store, collect, &r, err);
    if (st == FL_OK) st = make_ballot(&r, &b, err);
    if (st == FL_OK) st = vote_on(&r, &b, mean, ret_heard, err);
    reading_done(&r, &b);
    return st;
}
