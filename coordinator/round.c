#include "coordinator/round.h"

#include "common/plant.h"
#include "coordinator/round_assign.h"

#include <string.h>

size_t coord_round_size(const coord_round_opts *opts) {
    return (size_t)opts->nodes_max * (sizeof(coord_slot) + opts->layers * sizeof(uint64_t)) +
           (size_t)COORD_COVER_ROUNDS * opts->layers * sizeof(uint64_t) + 192;
}

static fl_status check_opts(const coord_round_opts *o, fl_err *err) {
    uint32_t given_out = 0;
    if (o->nodes_max == 0 || o->layers == 0 || o->layers > FL_LAYERS_MAX)
        return FL_FAIL(err, FL_EARG, "a model of %u layers; 1 to %d are possible", o->layers,
                       FL_LAYERS_MAX);
    if (o->exits == 0 || o->exits > FL_EXITS_MAX || o->exits > o->layers)
        return FL_FAIL(err, FL_EARG, "%u exits; a model of %u layers can have 1 to %u", o->exits,
                       o->layers, o->layers < FL_EXITS_MAX ? o->layers : (uint32_t)FL_EXITS_MAX);
    for (uint32_t e = 0; e < o->exits; e++) {
        if (o->exit_layers[e] >= o->layers || (e > 0 && o->exit_layers[e] <= o->exit_layers[e - 1]))
            return FL_FAIL(err, FL_EARG, "exit %u sits after layer %u", e, o->exit_layers[e]);
        given_out += o->shares[e] != 0;
    }
    if (given_out == 0) return FL_FAIL(err, FL_EARG, "no exit is ever given out");
    if (o->updates_min == 0 || (o->updates != 0 && o->updates < o->updates_min))
        return FL_FAIL(err, FL_EARG, "a round of %u updates cannot need at least %u", o->updates,
                       o->updates_min);
    if (o->deadline_ms == 0) return FL_FAIL(err, FL_EARG, "a round needs a deadline");
    return FL_OK;
}

fl_status coord_round_init(coord_round *r, const coord_round_opts *opts, uint64_t round,
                           uint64_t now_ms, fl_arena *arena, fl_err *err) {
    FL_TRY(check_opts(opts, err));
    *r = (coord_round){.opts = *opts, .round = round, .opened_ms = now_ms, .next_task = 1};
    r->slots = FL_ARENA_NEW(arena, coord_slot, opts->nodes_max);
    r->last = FL_ARENA_NEW(arena, uint64_t, (size_t)opts->nodes_max * opts->layers);
    r->cover = FL_ARENA_NEW(arena, uint64_t, (size_t)COORD_COVER_ROUNDS * opts->layers);
    if (r->slots == NULL || r->last == NULL || r->cover == NULL)
        return FL_FAIL(err, FL_ENOMEM, "no memory for %u nodes", opts->nodes_max);
    if (opts->rounds != 0 && round > opts->rounds) r->phase = COORD_FINISHED;
    return FL_OK;
}

static uint64_t *last_of(const coord_round *r, uint32_t node, uint32_t layer) {
    return &r->last[(size_t)node * r->opts.layers + layer];
}

static uint64_t *cover_of(const coord_round *r, uint64_t round, uint32_t layer) {
    return &r->cover[(size_t)(round % COORD_COVER_ROUNDS) * r->opts.layers + layer];
}

static bool bit(const uint8_t *bits, uint32_t i) {
    return (bits[i / 8] >> (i % 8) & 1) != 0;
}

fl_status coord_round_restore_last(coord_round *r, uint32_t node, uint32_t layer, uint64_t base,
                                   fl_err *err) {
    if (node >= r->opts.nodes_max || layer >= r->opts.layers || base > r->version[layer])
        return FL_FAIL(err, FL_EFORMAT, "an update of node %u, layer %u cannot be", node, layer);
    if (*last_of(r, node, layer) <= base) *last_of(r, node, layer) = base + 1;
    return FL_OK;
}

fl_status coord_round_restore_update(coord_round *r, uint32_t layer, fl_err *err) {
    if (layer >= r->opts.layers) return FL_FAIL(err, FL_EFORMAT, "an update of layer %u", layer);
    r->touched[layer] = !fl_plant(TOUCHED_FORGOTTEN);
    r->updates++;
    return FL_OK;
}

fl_status coord_round_restore_cover(coord_round *r, uint64_t round, uint32_t layer, uint64_t weight,
                                    fl_err *err) {
    if (layer >= r->opts.layers || round > r->round)
        return FL_FAIL(err, FL_EFORMAT, "an update of layer %u in round %llu", layer,
                       (unsigned long long)round);
    if (r->round - round < COORD_COVER_ROUNDS) *cover_of(r, round, layer) += weight;
    return FL_OK;
}

fl_status coord_round_restore_task(coord_round *r, uint32_t node, uint64_t task, uint32_t exit,
                                   uint32_t first, uint32_t last, bool open, uint64_t counted,
                                   fl_err *err) {
    if (node >= r->opts.nodes_max || exit >= r->opts.exits || first > last ||
        last > r->opts.exit_layers[exit])
        return FL_FAIL(err, FL_EFORMAT, "task %llu cannot be", (unsigned long long)task);
    coord_slot *s = &r->slots[node];
    if (counted == r->round && s->counted != counted) {
        s->counted = counted;
        r->contributions++;
    }
    if (!open) return FL_OK;
    s->task = task;
    s->exit = exit;
    s->first = first;
    s->last = last;
    s->steps = 0;
    s->given_ms = r->opened_ms;
    s->awaited = last - first + 1;
    s->admitted = 0;
    memset(s->answered, 0, sizeof(s->answered));
    return FL_OK;
}

static void answer(coord_slot *s, uint32_t layer, bool admitted) {
    s->answered[layer / 8] = (uint8_t)(s->answered[layer / 8] | 1u << (layer % 8));
    s->awaited--;
    s->admitted += admitted;
}

fl_status coord_round_restore_answer(coord_round *r, uint32_t node, uint64_t task, uint32_t layer,
                                     fl_err *err) {
    if (node >= r->opts.nodes_max || layer >= r->opts.layers)
        return FL_FAIL(err, FL_EFORMAT, "an update of node %u, layer %u cannot be", node, layer);
    coord_slot *s = &r->slots[node];
    if (s->task != task || layer < s->first || layer > s->last || bit(s->answered, layer))
        return FL_FAIL(err, FL_EFORMAT, "an update of layer %u is not of task %llu", layer,
                       (unsigned long long)task);
    answer(s, layer, true);
    return FL_OK;
}

// Contributions that flush the open round: never fewer than the minimum.
static uint32_t enough(const coord_round *r) {
    const uint32_t want = r->opts.updates != 0 ? r->opts.updates : r->members;
    return want > r->opts.updates_min ? want : r->opts.updates_min;
}

static void maybe_flush(coord_round *r, uint64_t now_ms, coord_effect *fx) {
    if (r->phase != COORD_COLLECT || r->updates == 0) return;
    const bool late = now_ms >= r->opened_ms && now_ms - r->opened_ms >= r->opts.deadline_ms &&
                      !fl_plant(DEADLINE_IGNORED);
    if (r->contributions >= enough(r))
        fx->flush = COORD_FLUSH_FULL;
    else if (late && r->contributions >= r->opts.updates_min)
        fx->flush = COORD_FLUSH_DEADLINE;
    if (fx->flush != COORD_FLUSH_NO) r->phase = COORD_FLUSHING;
}

// The task is over: with every layer answered it counts if any of them did, once a node and round.
static void end_task(coord_round *r, coord_slot *s, coord_effect *fx) {
    fx->task = s->task;
    fx->task_ended = true;
    if (s->awaited == 0 && s->admitted > 0) {
        fx->counted = r->round;
        r->contributions += fl_plant(COUNTED_TWICE) || s->counted != r->round;
        s->counted = r->round;
    }
    s->task = 0;
}

static fl_status on_tick(coord_round *r, const coord_event *ev, coord_effect *fx) {
    maybe_flush(r, ev->now_ms, fx);
    return FL_OK;
}

static fl_status on_join(coord_round *r, const coord_event *ev, coord_effect *fx) {
    (void)fx;
    r->members += !r->slots[ev->node].member;
    r->slots[ev->node].member = true;
    return FL_OK;
}

static fl_status on_leave(coord_round *r, const coord_event *ev, coord_effect *fx) {
    coord_slot *s = &r->slots[ev->node];
    r->members -= s->member;
    s->member = false;
    if (s->task != 0) end_task(r, s, fx);
    maybe_flush(r, ev->now_ms, fx); // it may have been the one that all waited for
    return FL_OK;
}

// The task it has, lost on the way or by the node: the same again.
static void repeat_task(const coord_round *r, const coord_event *ev, coord_slot *s) {
    s->given_ms = ev->now_ms;
    if (s->steps == 0) s->steps = coord_assign_steps(&r->opts, ev->speed);
}

static void give_task(coord_round *r, const coord_event *ev, const coord_window *w) {
    coord_slot *s = &r->slots[ev->node];
    *s = (coord_slot){.member = true,
                      .task = r->next_task++,
                      .exit = w->exit,
                      .first = w->first,
                      .last = w->last,
                      .steps = coord_assign_steps(&r->opts, ev->speed),
                      .given_ms = ev->now_ms,
                      .awaited = w->last - w->first + 1,
                      .counted = s->counted};
    r->given[w->exit]++;
}

static fl_status on_request(coord_round *r, const coord_event *ev, coord_effect *fx) {
    coord_slot *s = &r->slots[ev->node];
    const coord_ask ask = {.node = ev->node,
                           .window_max = ev->window_max,
                           .speed = ev->speed,
                           .link_bytes_s = ev->link_bytes_s,
                           .now_ms = ev->now_ms};
    coord_window w = {0}; // gcc 12 at -O3 does not see that the assigner fills it
    if (!s->member) {
        fx->code = FL_CODE_PENDING;
    } else if (s->task != 0 && ev->window_max > r->opts.exit_layers[s->exit] - s->first) {
        fx->task = s->task;
        repeat_task(r, ev, s);
    } else if (s->task != 0) {
        end_task(r, s, fx); // it cannot hold it: a smaller one at its next request
        fx->code = ev->window_max == 0 ? FL_CODE_TOO_SMALL : FL_CODE_NO_WORK;
    } else if (ev->window_max == 0) {
        fx->code = FL_CODE_TOO_SMALL;
    } else if (!coord_assign_window(r, &ask, &w)) {
        fx->code = FL_CODE_NO_WORK;
    } else {
        give_task(r, ev, &w);
        fx->task = s->task;
        fx->new_task = true;
    }
    return FL_OK;
}

static fl_status wait_for_flush(coord_round *r, const coord_event *ev, coord_effect *fx) {
    (void)r, (void)ev;
    fx->code = FL_CODE_ROUND_CLOSING;
    return FL_OK;
}

static fl_status tell_finished(coord_round *r, const coord_event *ev, coord_effect *fx) {
    (void)r, (void)ev;
    fx->code = FL_CODE_FINISHED;
    return FL_OK;
}

static fl_status on_offer(coord_round *r, const coord_event *ev, coord_effect *fx) {
    const coord_slot *s = &r->slots[ev->node];
    if (!s->member) {
        fx->code = FL_CODE_REVOKED;
    } else if (s->task == 0 || s->task != ev->task || ev->layer < s->first || ev->layer > s->last ||
               bit(s->answered, ev->layer)) {
        fx->code = FL_CODE_NOT_ASSIGNED;
    } else if (ev->base > r->version[ev->layer] ||
               (*last_of(r, ev->node, ev->layer) > ev->base && !fl_plant(OLDER_BASE))) {
        fx->code = FL_CODE_BASE; // from the future, or not newer than what it sent before
    } else {
        fx->staleness = r->version[ev->layer] - ev->base;
        const uint64_t extra = fl_plant(STALENESS_LIMIT) ? 1 : 0;
        if (fx->staleness > r->opts.staleness_max + extra) fx->code = FL_CODE_LATE;
        if (fl_plant(STALENESS_PLUS_ONE)) fx->staleness++;
    }
    return FL_OK;
}

static fl_status on_update(coord_round *r, const coord_event *ev, coord_effect *fx) {
    FL_TRY(on_offer(r, ev, fx));
    if (fx->code != FL_CODE_NONE) return FL_OK;
    coord_slot *s = &r->slots[ev->node];
    *last_of(r, ev->node, ev->layer) = ev->base + 1;
    fx->weight = coord_weight(ev->tokens, fx->staleness);
    *cover_of(r, r->round, ev->layer) += fx->weight;
    r->touched[ev->layer] = true;
    r->updates++;
    answer(s, ev->layer, true);
    if (s->awaited == 0) end_task(r, s, fx);
    maybe_flush(r, ev->now_ms, fx);
    return FL_OK;
}

static fl_status on_refused(coord_round *r, const coord_event *ev, coord_effect *fx) {
    coord_slot *s = &r->slots[ev->node];
    if (s->task == 0 || s->task != ev->task || ev->layer < s->first || ev->layer > s->last ||
        bit(s->answered, ev->layer))
        return FL_OK;
    answer(s, ev->layer, false);
    if (s->awaited == 0) end_task(r, s, fx);
    maybe_flush(r, ev->now_ms, fx);
    return FL_OK;
}

static fl_status on_flushed(coord_round *r, const coord_event *ev, coord_effect *fx) {
    (void)fx;
    for (uint32_t l = 0; l < r->opts.layers; l++) {
        if (!r->touched[l]) continue;
        r->touched[l] = false;
        r->version[l]++;
        r->changed[l] = r->round;
    }
    r->round++;
    for (uint32_t l = 0; l < r->opts.layers; l++) *cover_of(r, r->round, l) = 0;
    r->opened_ms = ev->now_ms;
    r->contributions = 0;
    r->updates = 0;
    r->phase = r->opts.rounds != 0 && r->round > r->opts.rounds ? COORD_FINISHED : COORD_COLLECT;
    return FL_OK;
}

static fl_status ignore(coord_round *r, const coord_event *ev, coord_effect *fx) {
    (void)r, (void)ev, (void)fx;
    return FL_OK;
}

// What happens to an event in each phase; NULL is not legal.
typedef fl_status (*handler)(coord_round *r, const coord_event *ev, coord_effect *fx);
static const handler rules[COORD_EV_COUNT][COORD_FINISHED + 1] = {
    // event              collect      flushing        finished
    [COORD_EV_TICK] = {on_tick, ignore, ignore},
    [COORD_EV_JOIN] = {on_join, on_join, on_join},
    [COORD_EV_LEAVE] = {on_leave, on_leave, on_leave},
    [COORD_EV_REQUEST] = {on_request, wait_for_flush, tell_finished},
    [COORD_EV_OFFER] = {on_offer, on_offer, tell_finished},
    [COORD_EV_UPDATE] = {on_update, NULL, tell_finished},
    [COORD_EV_REFUSED] = {on_refused, NULL, ignore},
    [COORD_EV_FLUSHED] = {NULL, on_flushed, NULL},
};

fl_status coord_round_step(coord_round *r, const coord_event *ev, coord_effect *ret_effect,
                           fl_err *err) {
    FL_ASSERT(ev->kind < COORD_EV_COUNT && ev->node < r->opts.nodes_max);
    *ret_effect = (coord_effect){.code = FL_CODE_NONE};
    const handler handle = rules[ev->kind][r->phase];
    if (handle == NULL)
        return FL_FAIL(err, FL_ESTATE, "event %d in phase %d", (int)ev->kind, (int)r->phase);
    const bool layer_matters =
        ev->kind == COORD_EV_OFFER || ev->kind == COORD_EV_UPDATE || ev->kind == COORD_EV_REFUSED;
    if (layer_matters && ev->layer >= r->opts.layers) {
        ret_effect->code = FL_CODE_NOT_ASSIGNED;
        return FL_OK;
    }
    return handle(r, ev, ret_effect);
}
