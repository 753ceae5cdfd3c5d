#include "coordinator/round_assign.h"

#include <string.h>

// So that sums of products of 256 layers, 16 exits and their shares fit 63 bits.
#define GOT_MAX ((uint64_t)1 << 36)

typedef struct ledger { // tokens, by layer
    uint64_t got[FL_LAYERS_MAX];
    uint32_t want[FL_LAYERS_MAX]; // 0: not in the plan
    uint64_t got_sum, want_sum;
} ledger;

typedef struct score {
    uint64_t got; // of the layer furthest behind, with this task
    uint32_t want;
    uint64_t age; // rounds since a layer of the window changed, at most
    int64_t owed; // debt of all its layers, times the sum of what is wanted
} score;

static uint32_t range_first(const coord_round_opts *o, uint32_t exit) {
    const uint32_t last = o->exit_layers[exit];
    const uint32_t below = exit == 0 ? 0 : o->exit_layers[exit - 1] + 1;
    if (o->window <= last + 1 - below) return below;
    return o->window > last ? 0 : last + 1 - o->window;
}

static uint64_t task_tokens(const coord_round_opts *o, uint32_t steps) {
    const uint64_t a_step = o->step_tokens == 0 ? 1 : o->step_tokens;
    return a_step * (steps != 0 ? steps : o->steps != 0 ? o->steps : 1);
}

// What tasks that are out will bring; one that is overdue brings nothing any more.
static void add_promises(const coord_round *r, uint64_t now_ms, ledger *l) {
    for (uint32_t n = 0; n < r->opts.nodes_max; n++) {
        const coord_slot *s = &r->slots[n];
        if (s->task == 0 || now_ms - s->given_ms > r->opts.task_deadline_ms) continue;
        const uint64_t tokens = task_tokens(&r->opts, s->steps);
        for (uint32_t k = s->first; k <= s->last; k++) {
            if ((s->answered[k / 8] >> (k % 8) & 1) == 0) l->got[k] += tokens;
        }
    }
}

static void take_stock(const coord_round *r, uint64_t now_ms, ledger *l) {
    const coord_round_opts *o = &r->opts;
    memset(l, 0, sizeof(*l));
    for (uint32_t e = 0; e < o->exits; e++) {
        for (uint32_t k = range_first(o, e); k <= o->exit_layers[e]; k++)
            l->want[k] += o->shares[e];
    }
    for (uint32_t k = 0; k < o->layers; k++) {
        uint64_t weight = 0;
        for (uint32_t i = 0; i < COORD_COVER_ROUNDS; i++)
            weight += r->cover[(size_t)i * o->layers + k];
        l->got[k] = weight / COORD_ONE;
    }
    add_promises(r, now_ms, l);
    for (uint32_t k = 0; k < o->layers; k++) {
        if (l->got[k] > GOT_MAX) l->got[k] = GOT_MAX;
        if (l->want[k] == 0) continue;
        l->got_sum += l->got[k];
        l->want_sum += l->want[k];
    }
}

// Debt of a layer, times want_sum.
static int64_t owed(const ledger *l, uint32_t layer) {
    return (int64_t)(l->want[layer] * l->got_sum) - (int64_t)(l->got[layer] * l->want_sum);
}

void coord_assign_debts(const coord_round *r, uint64_t now_ms, int64_t *ret) {
    ledger l;
    take_stock(r, now_ms, &l);
    for (uint32_t k = 0; k < r->opts.layers; k++)
        ret[k] = l.want[k] == 0 ? 0 : owed(&l, k) / (int64_t)l.want_sum;
}

static score score_of(const coord_round *r, const ledger *l, const coord_window *w) {
    const uint64_t task = task_tokens(&r->opts, 0);
    score s = {0};
    for (uint32_t k = w->first; k <= w->last; k++) {
        const uint64_t got = l->got[k] + task, age = r->round - r->changed[k];
        if (s.want == 0 || got * s.want < s.got * l->want[k]) {
            s.got = got;
            s.want = l->want[k];
        }
        if (age > s.age) s.age = age;
        s.owed += owed(l, k);
    }
    return s;
}

static bool is_better(const score *a, const score *b) {
    const uint64_t left = a->got * b->want, right = b->got * a->want;
    if (left != right) return left < right;
    if (a->age != b->age) return a->age > b->age;
    return a->owed > b->owed;
}

// May the node train all of it: it has sent nothing yet for these versions.
static bool is_fresh(const coord_round *r, uint32_t node, const coord_window *w) {
    const uint64_t *last = r->last + (size_t)node * r->opts.layers;
    for (uint32_t l = w->first; l <= w->last; l++) {
        if (last[l] > r->version[l]) return false;
    }
    return true;
}

// Layers whose updates the link carries in a quarter of a round, at least one.
static uint32_t link_layers(const coord_round_opts *o, const coord_ask *ask) {
    if (ask->link_bytes_s == 0 || o->layer_bytes == 0) return o->layers;
    const uint64_t seconds = o->deadline_ms / 4000;
    const uint64_t layers = ask->link_bytes_s > UINT64_MAX / (seconds + 1)
                                ? o->layers
                                : ask->link_bytes_s * seconds / o->layer_bytes;
    return layers == 0 ? 1 : layers > o->layers ? o->layers : (uint32_t)layers;
}

bool coord_assign_window(const coord_round *r, const coord_ask *ask, coord_window *ret) {
    const coord_round_opts *o = &r->opts;
    ledger l;
    score best = {0};
    bool found = false;
    take_stock(r, ask->now_ms, &l);
    for (uint32_t e = 0; e < o->exits; e++) {
        const uint32_t last = o->exit_layers[e], begin = range_first(o, e);
        if (o->shares[e] == 0 || ask->window_max == 0) continue;
        const uint32_t reach = ask->window_max > last - begin ? last + 1 - begin : ask->window_max;
        const uint32_t linked = link_layers(o, ask);
        uint32_t count = o->window != 0 && o->window < reach ? o->window : reach;
        if (linked < count) count = linked;
        for (uint32_t down = 0; down + count <= reach; down++) {
            const coord_window w = {
                .exit = e, .first = last + 1 - count - down, .last = last - down};
            if (!is_fresh(r, ask->node, &w)) continue;
            const score s = score_of(r, &l, &w);
            if (found && !is_better(&s, &best)) continue;
            found = true;
            best = s;
            *ret = w;
        }
    }
    return found;
}

uint32_t coord_assign_steps(const coord_round_opts *opts, uint64_t speed) {
    const uint32_t most = opts->steps == 0 ? 1 : opts->steps;
    const uint64_t speed_max = (uint64_t)1 << 32, a_step = task_tokens(opts, 1);
    if (speed == 0) return most;
    if (speed > speed_max) speed = speed_max;
    const uint64_t steps = speed * (opts->deadline_ms / 2) / 1000000 / a_step;
    return steps == 0 ? 1 : steps > most ? most : (uint32_t)steps;
}
