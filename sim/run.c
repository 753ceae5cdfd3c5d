// One seed, from its first event to its last.
#include "sim/state.h"

#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

void sim_fail(sim *s, const char *fmt, ...) {
    va_list ap;
    if (s->result.failed) return;
    va_start(ap, fmt);
    vsnprintf(s->result.problem, sizeof(s->result.problem), fmt, ap);
    va_end(ap);
    s->result.failed = true;
}

// FNV-1a over what happened: the same for the same run.
static void digest_add(uint64_t *digest, const void *data, size_t size) {
    const uint8_t *p = data;
    for (size_t i = 0; i < size; i++) *digest = (*digest ^ p[i]) * 0x100000001b3u;
}

void sim_trace(sim *s, const char *what, uint32_t node, uint64_t a, uint64_t b) {
    const uint64_t numbers[] = {s->now_ms, node, a, b};
    digest_add(&s->result.digest, what, strlen(what));
    digest_add(&s->result.digest, numbers, sizeof(numbers));
    if (s->opts.trace != NULL)
        fprintf(s->opts.trace, "%9.3f s  %-10s %3u  %llu %llu\n", (double)s->now_ms / 1000.0, what,
                node, (unsigned long long)a, (unsigned long long)b);
}

static void schedule(sim *s, sim_event_kind kind, uint32_t node, uint64_t after_ms) {
    sim_push(&s->queue, (sim_event){.at_ms = s->now_ms + after_ms, .kind = kind, .node = node});
}

static void draw_fleet(sim *s) {
    sim_rng *r = &s->rng;
    s->layers = (uint32_t)sim_between(r, 3, 6);
    s->exits = (uint32_t)sim_between(r, 1, 3);
    s->pinned = sim_chance(r, 0.5);
    for (uint32_t l = 0; l < s->layers; l++)
        s->counts[l] = (uint32_t)sim_between(r, 8, SIM_VALUES_MAX - 8);
    sim_fill(r, s->run_id, sizeof(s->run_id));
}

static fl_status set_up(sim *s, fl_err *err) {
    const size_t scratch = 2 * FL_CODEC_ARENA;
    s->rng.key = fl_rng_key(s->opts.seed, 0, 0);
    s->result.digest = 0xcbf29ce484222325u;
    s->calm_ms = (uint64_t)s->opts.rounds * 60000;
    s->limit_ms = s->calm_ms + (uint64_t)s->opts.rounds * 200000 + 3600000;
    draw_fleet(s);
    fl_arena_init(&s->scratch, malloc(scratch), scratch);
    s->plain = malloc(FL_BODY_MAX);
    s->frame = malloc(FL_FRAME_MAX);
    s->nodes = calloc(s->opts.nodes, sizeof(*s->nodes));
    if (s->scratch.base == NULL || s->plain == NULL || s->frame == NULL || s->nodes == NULL)
        return FL_FAIL(err, FL_ENOMEM, "no memory for %u nodes", s->opts.nodes);
    sim_truth_init(s);
    for (uint32_t i = 0; i < s->opts.nodes; i++) FL_TRY(sim_node_init(s, i, err));
    FL_TRY(sim_host_init(s, err));
    schedule(s, SIM_EV_BOOT, 0, 0);
    schedule(s, SIM_EV_OWNER, 0, sim_between(&s->rng, 5000, 60000));
    schedule(s, SIM_EV_COMPARE, 0, sim_between(&s->rng, 1000, 60000));
    schedule(s, SIM_EV_NODE_CRASH, 0, sim_between(&s->rng, 1000, 60000));
    for (uint32_t i = 0; i < s->opts.nodes; i++)
        schedule(s, SIM_EV_NODE_BOOT, i, sim_between(&s->rng, 0, 5000));
    return FL_OK;
}

static void tear_down(sim *s) {
    sim_host_done(s);
    for (uint32_t i = 0; s->nodes != NULL && i < s->opts.nodes; i++) sim_node_done(&s->nodes[i]);
    sim_truth_done(&s->truth);
    sim_queue_done(&s->queue);
    free(s->nodes);
    free(s->scratch.base);
    free(s->plain);
    free(s->frame);
}

// A node dies, or its line does, and the next such thing is planned.
static void harm_a_node(sim *s) {
    sim_node *n = &s->nodes[sim_between(&s->rng, 0, s->opts.nodes - 1)];
    if (s->now_ms >= s->calm_ms) return;
    schedule(s, SIM_EV_NODE_CRASH, 0, sim_between(&s->rng, 1000, 120000));
    if (sim_chance(&s->rng, 0.5)) {
        n->path.cut_until_ms = s->now_ms + sim_between(&s->rng, 1000, 90000);
        sim_trace(s, "cut", n->index, n->path.cut_until_ms, 0);
        return;
    }
    sim_trace(s, "crash", n->index, n->boot, n->spool_count);
    sim_node_crash(n);
    sim_push(&s->queue, (sim_event){.at_ms = s->now_ms + sim_between(&s->rng, 500, 60000),
                                    .kind = SIM_EV_NODE_BOOT,
                                    .node = n->index,
                                    .boot = n->boot});
}

static void happen(sim *s, sim_event *ev) {
    static const char *const names[] = {"to-coord", "to-node", "tick",    "trained",
                                        "boot",     "harm",    "step",    "poll",
                                        "start",    "compare", "owner"};
    sim_host *h = &s->host;
    sim_node *n = &s->nodes[ev->node];
    const bool same_life = ev->boot == h->boot && h->loop != NULL;
    if (ev->frame != NULL) digest_add(&s->result.digest, ev->frame, ev->size);
    sim_trace(s, names[ev->kind], ev->node, ev->size, ev->boot);
    switch (ev->kind) {
    case SIM_EV_TO_COORDINATOR:
        sim_host_receive(s, *ev);
        ev->frame = NULL;
        return;
    case SIM_EV_TO_NODE:
        sim_node_frame(n, (fl_bytes){ev->frame, ev->size});
        return;
    case SIM_EV_NODE_TICK:
        if (n->boot == ev->boot) sim_node_tick(n);
        return;
    case SIM_EV_NODE_TRAINED:
        if (n->boot == ev->boot && n->up && n->trainings == ev->size) sim_node_trained(n);
        return;
    case SIM_EV_NODE_BOOT:
        if (n->boot == ev->boot) sim_node_boot(n);
        return;
    case SIM_EV_NODE_CRASH:
        harm_a_node(s);
        return;
    case SIM_EV_STEP:
        if (same_life) sim_host_step(s);
        return;
    case SIM_EV_POLL:
        if (!same_life) return;
        sim_push(&s->queue, (sim_event){.at_ms = s->now_ms + SIM_POLL_MS,
                                        .kind = SIM_EV_POLL,
                                        .boot = h->boot});
        if (!h->step_due) sim_host_step(s);
        return;
    case SIM_EV_BOOT:
        if (ev->boot == h->boot) sim_host_boot(s);
        return;
    case SIM_EV_COMPARE:
        schedule(s, SIM_EV_COMPARE, 0, // a large fleet's disk takes long to copy
                 sim_between(&s->rng, 30000, 200000) * (1 + s->opts.nodes / 100));
        sim_check_compare(s);
        return;
    case SIM_EV_OWNER:
        sim_host_owner(s);
        return;
    }
}

// Nodes hear of the end, and score the last layers; a while is enough.
static bool is_over(const sim *s) {
    if (s->host.loop == NULL || s->host.loop->round.phase != COORD_FINISHED) return false;
    for (uint32_t i = 0; i < s->opts.nodes; i++) {
        if (!s->nodes[i].done && !s->nodes[i].revoked) return false;
    }
    return true;
}

static void live(sim *s) {
    sim_event ev;
    uint64_t sealed_ms = 0;
    while (!s->result.failed && sim_pop(&s->queue, &ev)) {
        s->host.wall_ms += ev.at_ms - s->now_ms;
        s->now_ms = ev.at_ms;
        s->result.events++;
        happen(s, &ev);
        free(ev.frame);
        const bool finished = s->host.loop != NULL && s->host.loop->round.phase == COORD_FINISHED;
        if (finished && sealed_ms == 0) sealed_ms = s->now_ms;
        if (finished && (s->now_ms > sealed_ms + 60000 || is_over(s))) break;
        if (s->now_ms > s->limit_ms) {
            sim_fail(s, "the run does not end: round %lld of %u after %llu s",
                     (long long)s->truth.round, s->opts.rounds,
                     (unsigned long long)(s->now_ms / 1000));
            return;
        }
    }
}

fl_status sim_run(const sim_opts *opts, sim_result *ret, fl_err *err) {
    sim *s = calloc(1, sizeof(*s));
    if (s == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory for a simulation");
    s->opts = *opts;
    const fl_status st = set_up(s, err);
    if (st == FL_OK) {
        live(s);
        if (!s->result.failed) sim_check_compare(s);
        s->result.virtual_ms = s->now_ms;
        *ret = s->result;
    }
    tear_down(s);
    free(s);
    return st;
}
