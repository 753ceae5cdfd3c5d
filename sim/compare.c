// What is in memory must be what a start would make of the disk: a copy of the disk is recovered
// beside the running coordinator, and the two are compared, field by field.
#include "sim/state.h"

#include <string.h>

static uint32_t norms_at(const coord_norms *n, uint32_t i) {
    return (n->next + COORD_NORMS_MAX - n->count + i) % COORD_NORMS_MAX;
}

static const char *differ_in_layers(const coord_loop *a, const coord_loop *b) {
    for (uint32_t l = 0; l < a->layers; l++) {
        const coord_norms *x = &a->norms[l], *y = &b->norms[l];
        if (a->layer[l].count != b->layer[l].count) return "the size of a layer";
        if (memcmp(a->layer[l].digest, b->layer[l].digest, FL_DIGEST_SIZE) != 0)
            return "a layer's object";
        if (a->layer[l].has_moments != b->layer[l].has_moments ||
            memcmp(a->layer[l].moments, b->layer[l].moments, FL_DIGEST_SIZE) != 0)
            return "an optimiser's object";
        if (x->count != y->count) return "the number of norms";
        for (uint32_t i = 0; i < x->count; i++) {
            if (x->ring[norms_at(x, i)] < y->ring[norms_at(y, i)] ||
                x->ring[norms_at(x, i)] > y->ring[norms_at(y, i)])
                return "the norms of a layer";
        }
        if (a->sum[l].updates != b->sum[l].updates || a->sum[l].weight != b->sum[l].weight)
            return "the weight of an open sum";
        if (a->sum[l].updates > 0 &&
            memcmp(a->sum[l].a, b->sum[l].a, a->sum[l].count * sizeof(a->sum[l].a[0])) != 0)
            return "an open sum";
    }
    return NULL;
}

// Refusals are not in the ledger: a task of which a layer was refused may wait for it again.
static bool same_task(const coord_slot *a, const coord_slot *b) {
    if (a->task != b->task) return false;
    if (a->task == 0) return true;
    if (a->exit != b->exit || a->first != b->first || a->last != b->last ||
        a->admitted != b->admitted || a->awaited > b->awaited)
        return false;
    for (size_t i = 0; i < sizeof(a->answered); i++) {
        if ((b->answered[i] & ~a->answered[i]) != 0) return false;
    }
    return true;
}

static const char *differ_in_round(const coord_round *a, const coord_round *b) {
    if (a->round != b->round || a->phase != b->phase) return "the round";
    if (a->contributions != b->contributions) return "the contributions";
    if (a->updates != b->updates) return "the number of open updates";
    if (a->members != b->members) return "the number of members";
    if (a->next_task != b->next_task) return "the next task";
    if (memcmp(a->given, b->given, sizeof(a->given)) != 0) return "the tasks given out";
    if (memcmp(a->version, b->version, sizeof(a->version)) != 0) return "the versions";
    if (memcmp(a->changed, b->changed, sizeof(a->changed)) != 0) return "when layers changed";
    if (memcmp(a->touched, b->touched, sizeof(a->touched)) != 0) return "the touched layers";
    for (uint32_t n = 0; n < a->opts.nodes_max; n++) {
        if (a->slots[n].member != b->slots[n].member) return "a membership";
        if (!same_task(&a->slots[n], &b->slots[n])) return "the task of a node";
        const bool counted = a->slots[n].counted == a->round;
        if (counted != (b->slots[n].counted == b->round)) return "who counted in this round";
    }
    const size_t bases = (size_t)a->opts.nodes_max * a->opts.layers * sizeof(a->last[0]);
    return memcmp(a->last, b->last, bases) == 0 ? NULL : "the newest base of a node";
}

static const char *differ(const coord_loop *a, const coord_loop *b) {
    const char *what = differ_in_layers(a, b);
    if (what == NULL) what = differ_in_round(&a->round, &b->round);
    if (what == NULL && (a->vote.version != b->vote.version ||
                         memcmp(a->vote.weight, b->vote.weight, sizeof(a->vote.weight)) != 0))
        what = "the vote";
    return what;
}

void sim_check_compare(sim *s) {
    sim_host *h = &s->host;
    if (h->loop == NULL || h->loop->store == NULL) return;
    sim_disk *copy = sim_disk_clone(h->disk);
    coord_loop *second = NULL;
    coord_world world = h->world;
    fl_err err;
    world.disk = sim_disk_table(copy);
    world.receive = NULL;
    const coord_loop_opts opts = {
        .dir = SIM_DIR, .world = &world, .settings = &h->settings, .keys = &h->keys};
    s->result.checks++;
    s->result.recoveries_compared++;
    const fl_status st = coord_loop_open_in(&opts, &second, &err);
    const char *what = st == FL_OK ? differ(h->loop, second) : NULL;
    if (st != FL_OK)
        sim_fail(s, "a second coordinator does not start from this disk: %s", err.text);
    else if (what != NULL)
        sim_fail(s, "a recovery differs from the running coordinator in %s", what);
    coord_verified whole = {0};
    if (st == FL_OK && (coord_store_verify(second->store, NULL, NULL, &whole, &err) != FL_OK ||
                        whole.problems != 0))
        sim_fail(s, "verify finds %lld problems", (long long)whole.problems);
    coord_loop_close(second);
    sim_disk_free(copy);
}
