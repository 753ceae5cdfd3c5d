// fleet.h: the nodes of fleet_nodes.h, and the proof that layers are the exact mean of what they
// sent.
#ifndef FL_TESTS_FLEET_H
#define FL_TESTS_FLEET_H

#include "tests/fleet_nodes.h"

// ---- the proof: layers are exactly the mean of what was acknowledged

typedef struct ledger {
    coord_update_row rows[SENT_MAX];
    size_t count;
} ledger;
static ledger book;

static fl_status collect(void *ctx, const coord_update_row *row, fl_err *err) {
    ledger *l = ctx;
    (void)err;
    T_NEED(l->count < SENT_MAX, "room");
    l->rows[l->count++] = *row;
    return FL_OK;
}

static const sent *recall(const coord_update_row *row) {
    const sent *found = NULL;
    for (size_t i = 0; i < remembered; i++) {
        const sent *s = &memory[i];
        if (s->node_id != row->node || s->key.layer != row->layer ||
            s->key.base_version != (uint64_t)row->base ||
            s->key.sequence != (uint64_t)row->sequence)
            continue;
        found = s;
    }
    return found;
}

// Versions of the layer before this round: one for each earlier round that has updates of it.
static uint64_t version_before(uint32_t layer, int64_t round) {
    uint64_t versions = 0;
    for (int64_t r = 1; r < round; r++) {
        bool touched = false;
        for (size_t i = 0; i < book.count && !touched; i++)
            touched = book.rows[i].layer == layer && book.rows[i].round == r;
        versions += touched;
    }
    return versions;
}

// The definition of a layer's step, from the rows of one round.
static void brute_step(uint32_t layer, int64_t round, float *theta) {
    coord_wide sum[COUNT] = {0};
    uint64_t weight = 0;
    for (size_t i = 0; i < book.count; i++) {
        const coord_update_row *r = &book.rows[i];
        if (r->layer != layer || r->round != round) continue;
        const sent *s = recall(r);
        T_NEED(s != NULL, "the ledger has an update that nobody sent");
        const uint64_t tau = version_before(layer, round) - (uint64_t)r->base;
        T_EQ(r->weight, coord_weight(s->tokens, tau));
        for (int k = 0; k < COUNT; k++) sum[k] += (coord_wide)s->values[k] * r->weight * r->clip;
        weight += (uint64_t)r->weight;
    }
    if (weight == 0) return;
    for (int k = 0; k < COUNT; k++) {
        const double mean =
            (double)sum[k] / (double)weight * (ldexp(1.0, -FL_UPDATE_FIXED_BITS) / 65536.0);
        theta[k] = (float)((double)theta[k] + mean);
    }
}

static void check_ledger(void) {
    for (size_t i = 0; i < remembered; i++) {
        unsigned times = 0;
        for (size_t k = 0; k < book.count; k++)
            times += book.rows[k].node == memory[i].node_id &&
                     book.rows[k].layer == memory[i].key.layer &&
                     (uint64_t)book.rows[k].base == memory[i].key.base_version &&
                     (uint64_t)book.rows[k].sequence == memory[i].key.sequence;
        T_CHECK(times == 1 || (times == 0 && memory[i].unanswered),
                "acknowledged update %zu is %u times in the ledger", i, times);
    }
}

// Returns the number of closed rounds.
static int64_t check_whole_history(void) {
    coord_store *s = NULL;
    coord_layer_row layers[LAYERS];
    static coord_round_row rounds[1000];
    size_t count = 0, round_count = 0;
    fl_err err;
    T_EQ(COMMAND(NULL, 0, "verify", dir), 0);
    T_OK(coord_store_open(dir, &s, &err), err);
    T_OK(coord_store_layers(s, layers, LAYERS, &count, &err), err);
    T_OK(coord_store_rounds(s, rounds, 1000, &round_count, &err), err);
    book.count = 0;
    for (uint32_t l = 0; l < LAYERS; l++)
        T_OK(coord_store_each_recent_update(s, l, SENT_MAX, collect, &book, &err), err);
    check_ledger();
    for (uint32_t l = 0; l < LAYERS; l++) {
        float theta[COUNT] = {0}, got[COUNT];
        uint8_t *data = NULL;
        size_t size = 0;
        fl_layer layer;
        for (size_t r = 0; r + 1 < round_count; r++) brute_step(l, rounds[r].round, theta);
        if (layers[l].version == 0) continue;
        T_OK(coord_store_get_object(s, layers[l].digest, 1 << 20, &data, &size, &err), err);
        T_OK(fl_layer_open((fl_bytes){data, size}, &layer, &err), err);
        fl_layer_values(&layer, 0, COUNT, got);
        T_CHECK(memcmp(got, theta, sizeof(theta)) == 0, "layer %u is not the exact mean: %a %a", l,
                (double)got[0], (double)theta[0]);
        free(data);
    }
    coord_store_close(s);
    return round_count == 0 ? 0 : rounds[round_count - 1].round - 1;
}

static bool has_event(const char *kind, const char *text) {
    static coord_event_row events[2000];
    coord_store *s = NULL;
    size_t count = 0;
    fl_err err;
    bool found = false;
    T_OK(coord_store_open(dir, &s, &err), err);
    T_OK(coord_store_events(s, events, 2000, &count, &err), err);
    coord_store_close(s);
    for (size_t i = 0; i < count; i++)
        found =
            found || (strcmp(events[i].kind, kind) == 0 && strstr(events[i].text, text) != NULL);
    return found;
}

static void open_fleet(node nodes[NODES]) {
    char url[FL_INVITE_URL_MAX + 2];
    token(url, sizeof(url), "3", true);
    for (int i = 0; i < NODES; i++) {
        char name[24];
        snprintf(name, sizeof(name), "node-%d", i + 1);
        node_open(&nodes[i], name);
        const fl_join_reply r = node_join(&nodes[i], url);
        T_EQ(r.verdict, FL_VERDICT_ACCEPTED);
        T_NEED(node_session(&nodes[i], PATIENCE_MS), "a session for node %d", i);
    }
}

#endif
