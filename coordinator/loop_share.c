// No node weighs more than a set share of a layer. It is settled when the buffer is sealed, from
// the weights of all its updates: the order in which they came does not matter.
#include "coordinator/loop_state.h"
#include "proto/update.h"

#include <math.h>
#include <stdlib.h>

typedef struct ledger {
    coord_update_row *rows;
    size_t count, max;
} ledger;

static fl_status collect(void *ctx, const coord_update_row *row, fl_err *err) {
    ledger *l = ctx;
    if (l->count == l->max) {
        const size_t max = l->max == 0 ? 64 : 2 * l->max;
        coord_update_row *rows = realloc(l->rows, max * sizeof(*rows));
        if (rows == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory for the buffer's updates");
        l->rows = rows;
        l->max = max;
    }
    l->rows[l->count++] = *row;
    return FL_OK;
}

// The spooled update counts with another weight.
static fl_status reweigh(coord_loop *loop, const coord_update_row *row, uint64_t weight,
                         fl_err *err) {
    const uint32_t count = (uint32_t)loop->sum[row->layer].count;
    fl_update update;
    uint8_t *data = malloc((size_t)row->at.size);
    int64_t *values = malloc(count * sizeof(*values));
    fl_status st = data == NULL || values == NULL
                       ? FL_FAIL(err, FL_ENOMEM, "no memory to weigh an update again")
                       : coord_store_unspool(loop->store, &row->at, data, err);
    if (st == FL_OK) st = fl_update_open((fl_bytes){data, (size_t)row->at.size}, &update, err);
    if (st == FL_OK && update.info.count != count)
        st = FL_FAIL(err, FL_EFORMAT, "update %lld is not what its row says", (long long)row->id);
    if (st == FL_OK) {
        fl_update_fixed(&update, 0, count, values);
        st = coord_sum_reweigh(&loop->sum[row->layer], values, count, (uint64_t)row->weight, weight,
                               row->clip, err);
    }
    free(values);
    free(data);
    return st;
}

static fl_status cap_layer(coord_loop *loop, uint32_t layer, uint32_t share, const ledger *l,
                           fl_err *err) {
    uint64_t sent[COORD_NODES_MAX] = {0}, sum[COORD_NODES_MAX] = {0};
    uint64_t capped[COORD_NODES_MAX];
    uint32_t who[COORD_NODES_MAX], nodes = 0;
    for (size_t i = 0; i < l->count; i++) {
        const uint32_t node = coord_registry_by_id(&loop->registry, l->rows[i].node);
        if (l->rows[i].layer != layer || node == COORD_NOBODY) continue;
        if (sent[node] == 0) who[nodes++] = node;
        sent[node] += (uint64_t)l->rows[i].weight;
    }
    for (uint32_t n = 0; n < nodes; n++) sum[n] = sent[who[n]];
    coord_share_cap(sum, nodes, share, capped);
    for (uint32_t n = 0; n < nodes; n++) {
        if (capped[n] == sum[n]) continue;
        for (size_t i = 0; i < l->count; i++) {
            const coord_update_row *row = &l->rows[i];
            if (row->layer != layer || row->node != loop->registry.members[who[n]].id) continue;
            FL_TRY(reweigh(loop, row, coord_share_of((uint64_t)row->weight, capped[n], sum[n]),
                           err));
        }
        FL_TRY(coord_loop_event(loop, "update.capped", who[n], err,
                                "layer %u: weighs %.1f tokens of %.1f, no more than %.3g of all",
                                layer, (double)capped[n] / COORD_ONE, (double)sum[n] / COORD_ONE,
                                loop->settings.share_cap));
    }
    return FL_OK;
}

fl_status coord_loop_cap_shares(coord_loop *loop, fl_err *err) {
    const uint32_t share = (uint32_t)floor(loop->settings.share_cap * COORD_ONE);
    ledger l = {0};
    if (share >= COORD_ONE) return FL_OK;
    fl_status st = coord_store_each_open_update(loop->store, collect, &l, err);
    for (uint32_t layer = 0; layer < loop->layers && st == FL_OK; layer++) {
        if (loop->sum[layer].updates >= COORD_SHARE_NODES)
            st = cap_layer(loop, layer, share, &l, err);
    }
    free(l.rows);
    return st;
}
