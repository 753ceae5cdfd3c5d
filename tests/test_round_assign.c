// Goal: every layer of the plan is trained in proportion to what the plan wants, by nodes that can,
// and nobody waits for a slow one.
// Method: small scenes whose answer is plain; then random fleets in virtual time, with what must
// always hold checked after every task.
#include "coordinator/round_assign.h"
#include "tests/check.h"

enum { NODES = 6, LAYERS = 30 };

static _Alignas(64) uint8_t block[1 << 17];

static coord_round_opts opts_of(void) {
    return (coord_round_opts){.nodes_max = NODES,
                              .layers = LAYERS,
                              .exits = 4,
                              .exit_layers = {7, 14, 22, 29},
                              .shares = {0, 0, 0, 1},
                              .updates_min = 1,
                              .deadline_ms = 60000,
                              .task_deadline_ms = 600000,
                              .staleness_max = 8,
                              .steps = 32,
                              .step_tokens = 128,
                              .retry_ms = 100};
}

static coord_effect step(coord_round *r, coord_event ev) {
    coord_effect fx;
    fl_err err;
    T_OK(coord_round_step(r, &ev, &fx, &err), err);
    return fx;
}

static void start(coord_round *r, const coord_round_opts *opts) {
    fl_arena arena;
    fl_err err;
    T_NEED(coord_round_size(opts) <= sizeof(block), "block");
    fl_arena_init(&arena, block, coord_round_size(opts));
    memset(block, 0, sizeof(block));
    T_OK(coord_round_init(r, opts, 1, 0, &arena, &err), err);
    for (uint32_t n = 0; n < opts->nodes_max; n++)
        step(r, (coord_event){.kind = COORD_EV_JOIN, .node = n});
}

static coord_effect ask(coord_round *r, uint32_t node, uint32_t window_max, uint64_t speed,
                        uint64_t now_ms) {
    return step(r, (coord_event){.kind = COORD_EV_REQUEST,
                                 .node = node,
                                 .window_max = window_max,
                                 .speed = speed,
                                 .now_ms = now_ms});
}

// The node sends all of its task; the last effect is returned. Flushes are carried out.
static bool answer(coord_round *r, uint32_t node, uint64_t now_ms) {
    const coord_slot s = r->slots[node];
    bool flushed = false;
    for (uint32_t l = s.first; l <= s.last; l++) {
        const coord_effect fx = step(r, (coord_event){.kind = COORD_EV_UPDATE,
                                                      .node = node,
                                                      .task = s.task,
                                                      .layer = l,
                                                      .base = r->version[l],
                                                      .tokens = (uint64_t)s.steps * 128,
                                                      .now_ms = now_ms});
        T_EQ(fx.code, FL_CODE_NONE);
        T_EQ(fx.weight, (uint64_t)s.steps * 128 * COORD_ONE);
        if (fx.flush == COORD_FLUSH_NO) continue;
        flushed = true;
        step(r, (coord_event){.kind = COORD_EV_FLUSHED, .now_ms = now_ms});
    }
    return flushed;
}

static void test_small_nodes_stay_near_the_exit(void) {
    coord_round r;
    coord_round_opts o = opts_of();
    o.window = 3;
    start(&r, &o);
    ask(&r, 0, 2, 0, 0);
    T_CHECK(r.slots[0].first == 28 && r.slots[0].last == 29, "%u..%u", r.slots[0].first,
            r.slots[0].last);
    ask(&r, 1, 30, 0, 0); // the layers below, to which nothing is promised yet
    T_CHECK(r.slots[1].last < 28 && r.slots[1].first >= 23, "%u..%u", r.slots[1].first,
            r.slots[1].last);
    T_EQ(r.slots[1].last - r.slots[1].first, 2);
    T_EQ(r.slots[1].exit, 3);
    ask(&r, 2, 5, 0, 0); // as far as it reaches: from the exit down to layer 25
    T_CHECK(r.slots[2].first >= 25, "%u", r.slots[2].first);
}

static void test_largest_debt_goes_first(void) {
    coord_round r;
    coord_round_opts o = opts_of();
    fl_err err;
    int64_t debt[LAYERS], sum = 0;
    o.window = 1;
    start(&r, &o);
    for (uint32_t l = 23; l < 30; l++) // layer 26 had least
        T_OK(coord_round_restore_cover(&r, 1, l, (l == 26 ? 100ull : 900ull) * COORD_ONE, &err),
             err);
    coord_assign_debts(&r, 0, debt);
    for (uint32_t l = 0; l < LAYERS; l++) sum += debt[l];
    T_CHECK(sum >= -(int64_t)LAYERS && sum <= LAYERS, "debts cancel but for rounding: %lld",
            (long long)sum);
    T_EQ(debt[26], (6 * 900 + 100) / 7 - 100);
    T_EQ(debt[3], 0); // not in the plan
    ask(&r, 0, 30, 0, 0);
    T_CHECK(r.slots[0].first == 26 && r.slots[0].last == 26, "%u", r.slots[0].first);
    T_EQ(coord_round_restore_cover(&r, 2, 0, 1, &err), FL_EFORMAT);
    T_EQ(coord_round_restore_cover(&r, 1, LAYERS, 1, &err), FL_EFORMAT);
}

// What is promised by a node that never comes back does not count for ever.
static void test_promises_end(void) {
    coord_round r;
    coord_round_opts o = opts_of();
    o.window = 4;
    start(&r, &o);
    ask(&r, 0, 30, 0, 0);
    const uint32_t first = r.slots[0].first;
    ask(&r, 1, 30, 0, 1000);
    T_CHECK(r.slots[1].first != first, "other layers while the first are on their way");
    answer(&r, 1, 2000);
    int64_t before[LAYERS], after[LAYERS];
    coord_assign_debts(&r, o.task_deadline_ms, before);
    coord_assign_debts(&r, o.task_deadline_ms + 1, after);
    T_EQ(before[29], 4096 * 8 / 7 - 4096); // a task of 4096 tokens, its four layers and four more
    T_EQ(after[29], 4096 * 4 / 7);
    ask(&r, 2, 30, 0, o.task_deadline_ms + 1);
    T_EQ(r.slots[2].first, first);
}

static void test_steps_fit_the_deadline(void) {
    coord_round_opts o = opts_of();
    T_EQ(coord_assign_steps(&o, 0), 32);                // not measured
    T_EQ(coord_assign_steps(&o, 1000ull * 1000), 32);   // 1000 tokens a second
    T_EQ(coord_assign_steps(&o, 50ull * 1000), 11);     // 30 s of 50 tokens: 1500 tokens
    T_EQ(coord_assign_steps(&o, 1), 1);                 // hopeless, but not sent away
    T_EQ(coord_assign_steps(&o, UINT64_MAX), 32);
    for (uint64_t speed = 1000; speed < 1000000; speed += 777) {
        const uint32_t steps = coord_assign_steps(&o, speed);
        const double seconds = steps * 128.0 / ((double)speed / 1000);
        T_CHECK(steps == 1 || seconds <= 30.0, "%u steps take %.1f s", steps, seconds);
    }
}

static void test_link_limits_the_window(void) {
    coord_round r;
    coord_round_opts o = opts_of();
    o.layer_bytes = 100000;
    start(&r, &o);
    const coord_event slow = {
        .kind = COORD_EV_REQUEST, .node = 0, .window_max = 30, .link_bytes_s = 20000};
    step(&r, slow); // 15 s of it carry three layers
    T_EQ(r.slots[0].last - r.slots[0].first + 1, 3);
    const coord_event slowest = {
        .kind = COORD_EV_REQUEST, .node = 1, .window_max = 30, .link_bytes_s = 1};
    step(&r, slowest);
    T_EQ(r.slots[1].last - r.slots[1].first + 1, 1);
    const coord_event fast = {
        .kind = COORD_EV_REQUEST, .node = 2, .window_max = 30, .link_bytes_s = UINT64_MAX};
    step(&r, fast);
    T_EQ(r.slots[2].last - r.slots[2].first + 1, 7);
}

// ---- random fleets

typedef struct device {
    uint32_t window_max;
    uint64_t speed;   // tokens in 1000 s
    uint64_t done_ms; // of its task; 0: it asks next
} device;

static uint64_t next_event(const device *d, uint64_t now, uint32_t *ret_node) {
    uint64_t first = UINT64_MAX;
    for (uint32_t n = 0; n < NODES; n++) {
        const uint64_t at = d[n].done_ms > now ? d[n].done_ms : now;
        if (at < first) first = at, *ret_node = n;
    }
    return first;
}

static void check_task(const coord_round *r, const device *d, uint32_t node) {
    const coord_slot *s = &r->slots[node];
    const uint32_t end = r->opts.exit_layers[s->exit], most = r->opts.window;
    T_CHECK(s->last <= end && s->first <= s->last, "%u..%u", s->first, s->last);
    T_CHECK(end - s->first < d->window_max, "layers %u..%u of a node that holds %u", s->first, end,
            d->window_max);
    T_CHECK(most == 0 || s->last - s->first < most, "%u..%u", s->first, s->last);
    T_CHECK(r->opts.shares[s->exit] > 0, "exit %u is not in the plan", s->exit);
}

// Every layer that a node of the fleet can reach is in some task of any `bound` tasks in a row.
static void run_fleet(const coord_round_opts *o, device *d, uint32_t tasks, uint32_t bound) {
    coord_round r;
    uint32_t since[LAYERS] = {0}, given = 0, node = 0, widest = 0;
    uint64_t now = 1;
    start(&r, o);
    for (uint32_t n = 0; n < NODES; n++) {
        if (d[n].window_max > widest) widest = d[n].window_max;
    }
    while (given < tasks) {
        now = next_event(d, now, &node);
        if (r.slots[node].task != 0) answer(&r, node, now);
        const coord_effect fx = ask(&r, node, d[node].window_max, d[node].speed, now);
        d[node].done_ms = now + 100; // asks again
        if (fx.code == FL_CODE_NO_WORK) {
            const coord_event tick = {.kind = COORD_EV_TICK, .now_ms = now};
            if (step(&r, tick).flush != COORD_FLUSH_NO)
                step(&r, (coord_event){.kind = COORD_EV_FLUSHED, .now_ms = now});
            continue;
        }
        T_NEED(fx.new_task, "a task, not code %d", (int)fx.code);
        check_task(&r, &d[node], node);
        const coord_slot *s = &r.slots[node];
        d[node].done_ms = now + s->steps * 128ull * 1000000 / d[node].speed + 1;
        given++;
        for (uint32_t e = 0; e < o->exits; e++) {
            if (o->shares[e] == 0) continue;
            const uint32_t below = e == 0 ? 0 : o->exit_layers[e - 1] + 1;
            for (uint32_t l = below; l <= o->exit_layers[e]; l++) {
                since[l] = l >= s->first && l <= s->last ? 0 : since[l] + 1;
                const bool reached = o->exit_layers[e] - l < widest;
                T_CHECK(!reached || since[l] <= bound, "layer %u waits for %u tasks", l, since[l]);
            }
        }
    }
}

static void test_every_layer_is_covered(void) {
    for (int trial = 0; trial < 60; trial++) {
        coord_round_opts o = opts_of();
        device d[NODES];
        o.window = (uint32_t)(t_rand() % 5);
        o.updates = t_rand() % 2 == 0 ? 0 : 1 + (uint32_t)(t_rand() % NODES);
        const bool even = t_rand() % 2 == 0;
        for (uint32_t e = 0; e < 3; e++) o.shares[e] = even;
        for (uint32_t n = 0; n < NODES; n++)
            d[n] = (device){.window_max = 1 + (uint32_t)(t_rand() % 12),
                            .speed = 100000 + t_rand() % 400000};
        d[0].window_max = 12; // one that reaches every layer of a range, and is not the slowest
        d[0].speed = 600000;
        // A layer that only one node in six reaches waits for its turn among the layers that this
        // node must serve alone: at most all of the plan, one by one.
        run_fleet(&o, d, 1500, NODES * (even ? LAYERS : 7) * 2);
    }
}

static void test_shares_are_kept(void) {
    coord_round r;
    coord_round_opts o = opts_of();
    static const uint32_t shares[4] = {1, 1, 1, 5};
    memcpy(o.shares, shares, sizeof(shares));
    o.updates = 2;
    start(&r, &o);
    for (uint32_t k = 0; k < 800; k++) {
        const uint32_t n = k % NODES;
        if (ask(&r, n, 30, 0, k).code == FL_CODE_NONE) answer(&r, n, k);
    }
    uint64_t all = 0;
    for (uint32_t e = 0; e < 4; e++) all += r.given[e];
    for (uint32_t e = 0; e < 4; e++)
        T_NEAR((double)r.given[e] / (double)all, shares[e] / 8.0, 0.02, "exit %u", e);
}

// Five fast nodes and one that is 20 times slower, in virtual time: rounds end at K updates or at
// the deadline, the slow one counts all the same.
static void slow_node(uint32_t updates, double longest_s) {
    coord_round r;
    coord_round_opts o = opts_of();
    device d[NODES];
    uint64_t now = 1, counted = 0;
    uint32_t node = 0;
    o.updates = updates;
    start(&r, &o);
    for (uint32_t n = 0; n < NODES; n++)
        d[n] = (device){.window_max = 7, .speed = n == 0 ? 20000 : 400000};
    while (r.round < 60) {
        now = next_event(d, now, &node);
        const uint64_t opened = r.opened_ms;
        bool flushed = false;
        if (r.slots[node].task != 0) {
            const uint64_t before = r.slots[node].counted;
            flushed = answer(&r, node, now);
            counted += node == 0 && r.slots[node].counted != before;
        }
        if (!flushed && step(&r, (coord_event){.kind = COORD_EV_TICK, .now_ms = now}).flush) {
            step(&r, (coord_event){.kind = COORD_EV_FLUSHED, .now_ms = now});
            flushed = true;
        }
        if (flushed) {
            const double seconds = (double)(now - opened) / 1000;
            T_CHECK(seconds <= longest_s, "round %d took %.1f s", (int)r.round, seconds);
        }
        const coord_effect fx = ask(&r, node, 7, d[node].speed, now);
        d[node].done_ms = fx.code != FL_CODE_NONE
                              ? now + 100
                              : now + r.slots[node].steps * 128ull * 1000000 / d[node].speed;
    }
    T_CHECK(counted >= 10, "the slow node counted in %d rounds", (int)counted);
}

static void test_a_slow_node_is_not_waited_for(void) {
    slow_node(0, 60.2); // all are wanted: half the deadline is enough for it
    slow_node(4, 22.0); // K = 4 of the fast: 32 steps of 128 tokens at 400 a second, twice
}

T_MAIN({"small_nodes_stay_near_the_exit", test_small_nodes_stay_near_the_exit},
       {"largest_debt_goes_first", test_largest_debt_goes_first},
       {"promises_end", test_promises_end},
       {"steps_fit_the_deadline", test_steps_fit_the_deadline},
       {"link_limits_the_window", test_link_limits_the_window},
       {"every_layer_is_covered", test_every_layer_is_covered},
       {"shares_are_kept", test_shares_are_kept},
       {"a_slow_node_is_not_waited_for", test_a_slow_node_is_not_waited_for})
