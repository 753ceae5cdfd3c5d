// Goal: rounds count every update once, in the right buffer, with the right staleness, and come
// back the same after a restart.
// Method: small scenes for every rule; then thousands of random events against a plain model that
// keeps everything it ever saw, with a restart from that record after every flush and in between.
#include "coordinator/round.h"
#include "tests/check.h"

enum { NODES = 5, LAYERS = 12, EXITS = 3, RECORDS = 20000 };

static _Alignas(64) uint8_t block[1 << 16], block2[1 << 16];

static coord_round_opts opts_of(void) {
    return (coord_round_opts){.nodes_max = NODES,
                              .layers = LAYERS,
                              .exits = EXITS,
                              .exit_layers = {3, 7, 11},
                              .shares = {1, 1, 2},
                              .updates = 3,
                              .updates_min = 2,
                              .deadline_ms = 1000,
                              .staleness_max = 2,
                              .retry_ms = 100};
}

static void start(coord_round *r, const coord_round_opts *opts) {
    fl_arena arena;
    fl_err err;
    T_NEED(coord_round_size(opts) <= sizeof(block), "block");
    fl_arena_init(&arena, block, coord_round_size(opts));
    T_OK(coord_round_init(r, opts, 1, 0, &arena, &err), err);
}

static coord_effect step(coord_round *r, coord_event ev) {
    coord_effect fx;
    fl_err err;
    T_OK(coord_round_step(r, &ev, &fx, &err), err);
    return fx;
}

static coord_effect request(coord_round *r, uint32_t node, uint32_t window_max) {
    return step(r, (coord_event){.kind = COORD_EV_REQUEST, .node = node, .window_max = window_max});
}

static coord_effect update(coord_round *r, uint32_t node, uint32_t layer, uint64_t base) {
    return step(r, (coord_event){.kind = COORD_EV_UPDATE,
                                 .node = node,
                                 .task = r->slots[node].task,
                                 .layer = layer,
                                 .base = base});
}

static void join_all(coord_round *r) {
    for (uint32_t n = 0; n < r->opts.nodes_max; n++)
        step(r, (coord_event){.kind = COORD_EV_JOIN, .node = n});
}

// The node sends every layer of its task at today's versions; the last effect is returned.
static coord_effect contribute(coord_round *r, uint32_t node) {
    coord_effect fx = {0};
    const coord_slot s = r->slots[node];
    for (uint32_t l = s.first; l <= s.last; l++) fx = update(r, node, l, r->version[l]);
    return fx;
}

static void test_options_that_contradict(void) {
    fl_arena arena;
    coord_round r;
    fl_err err;
    for (int bad = 0; bad < 9; bad++) {
        coord_round_opts o = opts_of();
        switch (bad) {
        case 0:
            o.exits = 0;
            break;
        case 1:
            o.exit_layers[2] = LAYERS;
            break;
        case 2:
            o.exit_layers[1] = 3;
            break;
        case 3:
            o.shares[0] = o.shares[1] = o.shares[2] = 0;
            break;
        case 4:
            o.updates_min = 0;
            break;
        case 5:
            o.updates = 1;
            break;
        case 6:
            o.deadline_ms = 0;
            break;
        case 7:
            o.layers = FL_LAYERS_MAX + 1;
            break;
        case 8:
            o.exits = FL_EXITS_MAX + 1;
            break;
        default:
            break;
        }
        fl_arena_init(&arena, block, sizeof(block));
        T_CHECK(coord_round_init(&r, &o, 1, 0, &arena, &err) == FL_EARG, "option %d", bad);
    }
    const coord_round_opts o = opts_of();
    fl_arena_init(&arena, block, 64);
    T_EQ(coord_round_init(&r, &o, 1, 0, &arena, &err), FL_ENOMEM);
}

static void test_tasks_follow_shares_and_capability(void) {
    coord_round r;
    const coord_round_opts o = opts_of();
    start(&r, &o);
    T_EQ(request(&r, 0, 9).code, FL_CODE_PENDING); // not a member
    join_all(&r);
    T_EQ(request(&r, 0, 0).code, FL_CODE_TOO_SMALL);
    coord_effect fx = request(&r, 0, 9);
    T_CHECK(fx.new_task && fx.task == 1, "task %d", (int)fx.task);
    T_EQ(r.slots[0].exit, 2); // twice the share: first
    T_EQ(r.slots[0].first, 8);
    fx = request(&r, 0, 9); // the answer was lost: the same task
    T_CHECK(!fx.new_task && fx.task == 1, "task %d", (int)fx.task);
    fx = request(&r, 1, 2); // a small node: the two layers below the exit
    T_EQ(r.slots[1].last - r.slots[1].first, 1);
    for (uint32_t n = 2; n < 4; n++) request(&r, n, 9);
    uint64_t given[EXITS];
    memcpy(given, r.given, sizeof(given));
    T_CHECK(given[0] == 1 && given[1] == 1 && given[2] == 2, "%d %d %d", (int)given[0],
            (int)given[1], (int)given[2]);
}

static void test_round_flushes_when_full(void) {
    coord_round r;
    const coord_round_opts o = opts_of();
    start(&r, &o);
    join_all(&r);
    for (uint32_t n = 0; n < 3; n++) {
        request(&r, n, 9);
        const coord_effect fx = contribute(&r, n);
        T_EQ(fx.flush, n == 2 ? COORD_FLUSH_FULL : COORD_FLUSH_NO);
        T_CHECK(fx.task_ended && fx.counted == 1, "its task is over and counts");
    }
    fl_err err;
    coord_effect fx;
    const coord_event ev = {.kind = COORD_EV_UPDATE};
    T_EQ(coord_round_step(&r, &ev, &fx, &err), FL_ESTATE); // not while it is being flushed
    T_EQ(request(&r, 3, 9).code, FL_CODE_ROUND_CLOSING);
    step(&r, (coord_event){.kind = COORD_EV_FLUSHED, .now_ms = 5});
    T_EQ(r.round, 2);
    T_EQ(r.version[11], 1);
    T_EQ(r.contributions, 0);
    T_EQ(r.opened_ms, 5);
}

static void test_one_update_for_each_version(void) {
    coord_round r;
    coord_round_opts o = opts_of();
    o.shares[0] = o.shares[1] = 0; // only the last window
    start(&r, &o);
    join_all(&r);
    request(&r, 0, 9);
    T_EQ(update(&r, 0, 8, 0).code, FL_CODE_NONE);
    T_EQ(update(&r, 0, 8, 0).code, FL_CODE_NOT_ASSIGNED); // answered
    T_EQ(update(&r, 0, 7, 0).code, FL_CODE_NOT_ASSIGNED); // not in the window
    T_EQ(update(&r, 0, 99, 0).code, FL_CODE_NOT_ASSIGNED);
    T_EQ(update(&r, 0, 9, 1).code, FL_CODE_BASE); // a version that is not there yet
    T_EQ(update(&r, 1, 9, 0).code, FL_CODE_NOT_ASSIGNED);
    for (uint32_t l = 9; l < 12; l++) T_EQ(update(&r, 0, l, 0).code, FL_CODE_NONE);
    T_EQ(r.contributions, 1);
    T_EQ(request(&r, 0, 9).code, FL_CODE_NO_WORK); // it sent all it may for these versions
    for (uint32_t n = 1; n < 3; n++) request(&r, n, 9), contribute(&r, n);
    step(&r, (coord_event){.kind = COORD_EV_FLUSHED});
    T_CHECK(request(&r, 0, 9).new_task, "new versions, new task");
}

static void test_late_updates_count_in_the_next_round(void) {
    coord_round r;
    const coord_round_opts o = opts_of();
    start(&r, &o);
    join_all(&r);
    request(&r, 4, 9); // the slow one: takes the last window
    for (int round = 0; round < 3; round++) {
        for (uint32_t n = 0; n < 3; n++) request(&r, n, 4), contribute(&r, n);
        T_EQ(r.phase, COORD_FLUSHING);
        step(&r, (coord_event){.kind = COORD_EV_FLUSHED});
        const uint32_t l = 8 + (uint32_t)round;
        const coord_effect offered = step(
            &r, (coord_event){.kind = COORD_EV_OFFER, .node = 4, .task = 1, .layer = l, .base = 0});
        T_CHECK(offered.staleness == r.version[l], "versions of that layer: %d",
                (int)offered.staleness);
        const coord_effect fx = update(&r, 4, l, 0);
        T_EQ(fx.code, r.version[l] > 2 ? FL_CODE_LATE : FL_CODE_NONE);
        T_EQ(fx.staleness, r.version[l]);
    }
}

static void test_deadline_needs_the_minimum(void) {
    coord_round r;
    const coord_round_opts o = opts_of();
    start(&r, &o);
    join_all(&r);
    request(&r, 0, 9), contribute(&r, 0);
    coord_event tick = {.kind = COORD_EV_TICK, .now_ms = 5000};
    T_EQ(step(&r, tick).flush, COORD_FLUSH_NO); // one is below the minimum of two
    request(&r, 1, 9);
    T_EQ(contribute(&r, 1).flush, COORD_FLUSH_NO); // no time was given with it
    tick.now_ms = 999;
    T_EQ(step(&r, tick).flush, COORD_FLUSH_NO);
    tick.now_ms = 1000;
    T_EQ(step(&r, tick).flush, COORD_FLUSH_DEADLINE);
}

static void test_all_active_nodes_by_default(void) {
    coord_round r;
    coord_round_opts o = opts_of();
    o.updates = 0;
    start(&r, &o);
    for (uint32_t n = 0; n < 3; n++) step(&r, (coord_event){.kind = COORD_EV_JOIN, .node = n});
    for (uint32_t n = 0; n < 2; n++) {
        request(&r, n, 9);
        T_EQ(contribute(&r, n).flush, COORD_FLUSH_NO);
    }
    // The third is revoked: nobody is left to wait for.
    T_EQ(step(&r, (coord_event){.kind = COORD_EV_LEAVE, .node = 2}).flush, COORD_FLUSH_FULL);
}

static void test_refused_layers_are_answers_too(void) {
    coord_round r;
    const coord_round_opts o = opts_of();
    start(&r, &o);
    join_all(&r);
    request(&r, 0, 2);
    request(&r, 1, 1);
    coord_event refused = {.kind = COORD_EV_REFUSED, .node = 0, .task = 1, .layer = 10};
    T_CHECK(!step(&r, refused).task_ended, "a layer is still awaited");
    step(&r, refused); // twice changes nothing
    coord_effect fx = update(&r, 0, 11, 0);
    T_CHECK(fx.task_ended && fx.counted == 1, "one layer of two counts");
    refused =
        (coord_event){.kind = COORD_EV_REFUSED, .node = 1, .task = 2, .layer = r.slots[1].first};
    fx = step(&r, refused);
    T_CHECK(fx.task_ended && fx.counted == 0, "nothing of it counts");
    T_EQ(r.contributions, 1);
}

// A node learns only from a task how much it can hold; what it cannot must not stay its task.
static void test_a_task_that_is_too_large_is_taken_back(void) {
    coord_round r;
    const coord_round_opts o = opts_of();
    start(&r, &o);
    join_all(&r);
    const uint64_t first = request(&r, 0, FL_LAYERS_MAX).task;
    const uint32_t size = r.slots[0].last - r.slots[0].first + 1;
    T_CHECK(first != 0 && size > 1, "a window of %u layers", size);
    T_EQ(request(&r, 0, size).task, first); // lost on the way: the same again
    const coord_effect taken = request(&r, 0, size - 1);
    T_CHECK(taken.task_ended && taken.task == first && taken.counted == 0, "it is taken back");
    T_EQ(taken.code, FL_CODE_NO_WORK);
    const coord_effect smaller = request(&r, 0, size - 1);
    T_CHECK(smaller.new_task && smaller.task != first, "another one");
    T_EQ(r.slots[0].last - r.slots[0].first + 1, size - 1);
    const coord_effect none = request(&r, 0, 0);
    T_CHECK(none.task_ended && none.code == FL_CODE_TOO_SMALL, "nothing fits, or it may not now");
    T_EQ(request(&r, 0, 0).code, FL_CODE_TOO_SMALL);
}

static void test_the_run_ends(void) {
    coord_round r;
    coord_round_opts o = opts_of();
    o.rounds = 1;
    start(&r, &o);
    join_all(&r);
    for (uint32_t n = 0; n < 3; n++) request(&r, n, 9), contribute(&r, n);
    step(&r, (coord_event){.kind = COORD_EV_FLUSHED});
    T_EQ(r.phase, COORD_FINISHED);
    T_EQ(request(&r, 0, 9).code, FL_CODE_FINISHED);
    T_EQ(update(&r, 0, 11, 1).code, FL_CODE_FINISHED);
}

// ---- random events against a record of everything

typedef struct record {
    uint32_t node, layer;
    uint64_t base, task, weight, round; // round: 0 while in the open buffer
} record;
typedef struct task_record {
    uint32_t node, exit, first, last;
    uint64_t task, counted;
    bool open;
} task_record;
static record records[RECORDS];
static task_record tasks[RECORDS];
static size_t record_count, task_count;
static uint64_t versions[LAYERS];

// Builds the state again from the record, as the loop does from the store, and compares.
static void check_restart(const coord_round *r, uint64_t now_ms) {
    coord_round again;
    fl_arena arena;
    fl_err err;
    fl_arena_init(&arena, block2, sizeof(block2));
    T_OK(coord_round_init(&again, &r->opts, r->round, now_ms, &arena, &err), err);
    memcpy(again.version, versions, sizeof(versions));
    memcpy(again.changed, r->changed, sizeof(r->changed));
    memcpy(again.given, r->given, sizeof(r->given));
    again.next_task = task_count + 1;
    again.opened_ms = r->opened_ms;
    for (uint32_t n = 0; n < NODES; n++) {
        const coord_event ev = {.kind = COORD_EV_JOIN, .node = n};
        coord_effect fx;
        if (r->slots[n].member) T_OK(coord_round_step(&again, &ev, &fx, &err), err);
    }
    for (size_t i = 0; i < record_count; i++) {
        const record *c = &records[i];
        T_OK(coord_round_restore_last(&again, c->node, c->layer, c->base, &err), err);
        if (c->round == 0) T_OK(coord_round_restore_update(&again, c->layer, &err), err);
        T_OK(coord_round_restore_cover(&again, c->round == 0 ? r->round : c->round, c->layer,
                                       c->weight, &err),
             err);
    }
    for (size_t i = 0; i < task_count; i++) {
        const task_record *t = &tasks[i];
        if (!t->open && t->counted != r->round) continue;
        T_OK(coord_round_restore_task(&again, t->node, t->task, t->exit, t->first, t->last, t->open,
                                      t->counted, &err),
             err);
        for (size_t k = 0; t->open && k < record_count; k++) {
            if (records[k].task == t->task)
                T_OK(coord_round_restore_answer(&again, t->node, t->task, records[k].layer, &err),
                     err);
        }
    }
    T_EQ(again.contributions, r->contributions);
    T_EQ(again.updates, r->updates);
    T_EQ(again.members, r->members);
    T_EQ(again.next_task, r->next_task);
    T_CHECK(memcmp(again.touched, r->touched, sizeof(r->touched)) == 0, "touched");
    T_CHECK(memcmp(again.version, r->version, sizeof(r->version)) == 0, "versions");
    T_CHECK(memcmp(again.cover, r->cover, sizeof(uint64_t) * COORD_COVER_ROUNDS * LAYERS) == 0,
            "what layers received");
    T_CHECK(memcmp(again.last, r->last, sizeof(uint64_t) * NODES * LAYERS) == 0, "last");
    for (uint32_t n = 0; n < NODES; n++) {
        const coord_slot *a = &again.slots[n], *b = &r->slots[n];
        T_EQ(a->task, b->task);
        if (a->task == 0) continue;
        T_EQ(a->awaited, b->awaited);
        T_EQ(a->admitted, b->admitted);
        T_CHECK(memcmp(a->answered, b->answered, sizeof(a->answered)) == 0, "answered");
    }
}

static void note_task(const coord_round *r, uint32_t node, const coord_effect *fx) {
    const coord_slot *s = &r->slots[node];
    if (fx->new_task && task_count < RECORDS) {
        T_EQ(fx->task, task_count + 1);
        tasks[task_count++] = (task_record){.node = node,
                                            .exit = s->exit,
                                            .first = s->first,
                                            .last = s->last,
                                            .task = fx->task,
                                            .open = true};
    }
    if (fx->task_ended) {
        tasks[fx->task - 1].open = false;
        tasks[fx->task - 1].counted = fx->counted;
    }
}

static void random_update(coord_round *r, uint32_t node, coord_effect *fx) {
    const coord_slot *slot = &r->slots[node];
    const uint32_t layer =
        t_rand() % 8 == 0 ? (uint32_t)(t_rand() % (LAYERS + 1))
                          : slot->first + (uint32_t)(t_rand() % (slot->last - slot->first + 1));
    const uint64_t newest = layer < LAYERS ? versions[layer] : 0;
    const uint64_t back = t_rand() % 2 == 0 ? 0 : t_rand() % 4,
                   base = back == 3 ? newest + 1 : newest - (back % (newest + 1));
    const uint64_t task = t_rand() % 8 == 0 ? t_rand() % 5 : r->slots[node].task;
    const coord_event ev = {
        .kind = COORD_EV_UPDATE, .node = node, .task = task, .layer = layer, .base = base,
        .tokens = t_rand() % 5000};
    *fx = step(r, ev);
    if (fx->code != FL_CODE_NONE) return;
    T_CHECK(base <= newest && newest - base <= r->opts.staleness_max, "base");
    T_EQ(fx->staleness, newest - base);
    const task_record *t = &tasks[task - 1];
    T_CHECK(t->open && t->node == node && layer >= t->first && layer <= t->last, "assigned");
    for (size_t i = 0; i < record_count; i++)
        T_CHECK(records[i].node != node || records[i].layer != layer || records[i].base < base,
                "one for each node, layer and version");
    T_NEED(record_count < RECORDS, "room");
    records[record_count++] = (record){
        .node = node, .layer = layer, .base = base, .task = task, .weight = fx->weight};
}

static void flush_model(coord_round *r, uint64_t now_ms) {
    bool touched[LAYERS] = {false};
    uint32_t counted = 0;
    bool seen[NODES] = {false};
    for (size_t i = 0; i < record_count; i++) {
        if (records[i].round != 0) continue;
        touched[records[i].layer] = true;
        records[i].round = r->round;
    }
    for (size_t i = 0; i < task_count; i++) {
        if (tasks[i].counted != r->round || seen[tasks[i].node]) continue;
        seen[tasks[i].node] = true;
        counted++;
    }
    T_EQ(counted, r->contributions);
    T_CHECK(counted >= r->opts.updates_min, "the minimum holds");
    for (uint32_t l = 0; l < LAYERS; l++) versions[l] += touched[l];
    step(r, (coord_event){.kind = COORD_EV_FLUSHED, .now_ms = now_ms});
    T_CHECK(memcmp(versions, r->version, sizeof(versions)) == 0, "only touched layers move");
}

static void test_random_events_against_a_record(void) {
    coord_round r;
    const coord_round_opts o = opts_of();
    uint64_t now = 0;
    start(&r, &o);
    for (int i = 0; i < 8000; i++) {
        const uint32_t node = (uint32_t)(t_rand() % NODES);
        coord_effect fx = {0};
        switch (t_rand() % 16) {
        case 0:
            fx = step(&r, (coord_event){.kind = COORD_EV_JOIN, .node = node});
            break;
        case 1:
            if (t_rand() % 4 == 0)
                fx = step(&r, (coord_event){.kind = COORD_EV_LEAVE, .node = node, .now_ms = now});
            break;
        case 2:
            now += t_rand() % 400;
            fx = step(&r, (coord_event){.kind = COORD_EV_TICK, .now_ms = now});
            break;
        case 3:
        case 4:
            fx = request(&r, node, (uint32_t)(t_rand() % 5));
            break;
        default:
            random_update(&r, node, &fx);
            break;
        }
        note_task(&r, node, &fx);
        if (i % 40 == 0 && fx.flush == COORD_FLUSH_NO) check_restart(&r, now);
        if (fx.flush == COORD_FLUSH_NO) continue;
        flush_model(&r, now);
        check_restart(&r, now);
    }
    T_CHECK(r.round > 20, "only %d rounds", (int)r.round);
    T_CHECK(record_count > 500, "only %zu updates", record_count);
}

static void test_restore_refuses_damage(void) {
    coord_round r;
    fl_err err;
    const coord_round_opts o = opts_of();
    start(&r, &o);
    T_EQ(coord_round_restore_last(&r, NODES, 0, 0, &err), FL_EFORMAT);
    T_EQ(coord_round_restore_last(&r, 0, LAYERS, 0, &err), FL_EFORMAT);
    T_EQ(coord_round_restore_last(&r, 0, 0, 1, &err), FL_EFORMAT);
    T_EQ(coord_round_restore_update(&r, LAYERS, &err), FL_EFORMAT);
    T_EQ(coord_round_restore_task(&r, 0, 1, EXITS, 0, 3, true, 0, &err), FL_EFORMAT);
    T_EQ(coord_round_restore_task(&r, 0, 1, 0, 0, 4, true, 0, &err), FL_EFORMAT);
    T_EQ(coord_round_restore_task(&r, 0, 1, 0, 4, 3, true, 0, &err), FL_EFORMAT);
    T_OK(coord_round_restore_task(&r, 0, 1, 0, 2, 3, true, 0, &err), err);
    T_EQ(coord_round_restore_answer(&r, 0, 1, 1, &err), FL_EFORMAT);
    T_EQ(coord_round_restore_answer(&r, 0, 2, 2, &err), FL_EFORMAT);
    T_OK(coord_round_restore_answer(&r, 0, 1, 2, &err), err);
    T_EQ(coord_round_restore_answer(&r, 0, 1, 2, &err), FL_EFORMAT);
}

T_MAIN({"options_that_contradict", test_options_that_contradict},
       {"tasks_follow_shares_and_capability", test_tasks_follow_shares_and_capability},
       {"round_flushes_when_full", test_round_flushes_when_full},
       {"one_update_for_each_version", test_one_update_for_each_version},
       {"late_updates_count_in_the_next_round", test_late_updates_count_in_the_next_round},
       {"deadline_needs_the_minimum", test_deadline_needs_the_minimum},
       {"all_active_nodes_by_default", test_all_active_nodes_by_default},
       {"refused_layers_are_answers_too", test_refused_layers_are_answers_too},
       {"a_task_that_is_too_large_is_taken_back", test_a_task_that_is_too_large_is_taken_back},
       {"the_run_ends", test_the_run_ends},
       {"random_events_against_a_record", test_random_events_against_a_record},
       {"restore_refuses_damage", test_restore_refuses_damage})
