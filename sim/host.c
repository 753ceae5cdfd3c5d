// The coordinator's machine: a disk, a clock, a network card, and coordinator/loop.c running on it
// until its disk stops; then it starts again from what is left.
#include "sim/state.h"

#include "common/checked.h"
#include "common/plant.h"

#include <stdlib.h>
#include <string.h>

#define WALL_START_MS 1700000000000u

// ---- the world of the loop

static uint64_t world_now(void *ctx) {
    const sim *s = ctx;
    return s->now_ms - s->host.born_ms + 1000;
}

static int64_t world_wall(void *ctx) {
    const sim *s = ctx;
    return (int64_t)(s->host.wall_ms / 1000);
}

static void world_random(void *ctx, void *out, size_t size) {
    sim *s = ctx;
    sim_fill(&s->rng, out, size);
}

static fl_status world_receive(void *ctx, uint32_t timeout_ms, fl_link_message *ret, fl_err *err) {
    sim *s = ctx;
    sim_host *h = &s->host;
    (void)timeout_ms;
    free(h->current);
    h->current = NULL;
    if (h->inbox_next == h->inbox_count) return FL_FAIL(err, FL_ETIME, "nothing came");
    const sim_event ev = h->inbox[h->inbox_next++];
    const sim_node *n = &s->nodes[ev.node];
    h->current = ev.frame;
    *ret = (fl_link_message){.peer = (fl_link_peer)ev.node + 1,
                             .from = n->admitted ? FL_LINK_ADMITTED : FL_LINK_ENROL,
                             .frame = {ev.frame, ev.size}};
    memcpy(ret->key, n->curve_key, sizeof(ret->key));
    return FL_OK;
}

static fl_status world_send(void *ctx, fl_link_peer peer, fl_bytes frame, fl_err *err) {
    sim *s = ctx;
    if (sim_disk_dead(s->host.disk)) return FL_FAIL(err, FL_ENOENT, "the machine is off");
    sim_send_to_node(s, (uint32_t)(peer - 1), frame);
    return FL_OK;
}

static fl_status world_admit(void *ctx, const uint8_t key[FL_LINK_KEY], fl_err *err) {
    sim *s = ctx;
    const uint32_t node = sim_node_of_key(s, key);
    if (node == COORD_NOBODY) return FL_FAIL(err, FL_EARG, "a key that no node has");
    s->nodes[node].admitted = true;
    return FL_OK;
}

static void world_revoke(void *ctx, const uint8_t key[FL_LINK_KEY]) {
    (void)ctx, (void)key; // what it sends still arrives: the loop must refuse it by itself
}

static void world_enrolment(void *ctx, bool open) {
    (void)ctx, (void)open;
}

static void world_stats(void *ctx, fl_link_stats *ret) {
    (void)ctx;
    *ret = (fl_link_stats){0};
}

// ---- making it

// Most nodes stay, and so does the last.
static bool may_revoke(const sim *s, uint32_t node) {
    return node % 8 == 0 && node + 1 < s->opts.nodes;
}

// Nodes that will go on sending what counts: a round that needs more of them never ends, and must
// not. The last node is one of them.
static uint32_t reliable(sim *s) {
    uint32_t count = 0;
    s->nodes[s->opts.nodes - 1].malice = SIM_HONEST;
    for (uint32_t i = 0; i < s->opts.nodes; i++)
        count += s->nodes[i].malice == SIM_HONEST && !may_revoke(s, i);
    return count;
}

static void draw_settings(sim *s) {
    const uint64_t honest = reliable(s);
    coord_settings *c = &s->host.settings;
    sim_rng *r = &s->rng;
    fl_setting_defaults(coord_setting_table, coord_setting_count, c);
    c->nodes_max = s->opts.nodes;
    c->rounds = s->opts.rounds;
    c->exits = s->exits;
    c->rule = COORD_RULE_MEAN; // the exact sum is what is checked
    c->rollback = 0.0;
    c->micro_batch = 32; // a task of as many tokens as the drawn updates say
    c->windows = (int64_t)sim_between(r, 0, 2);
    c->window = (int64_t)sim_between(r, 0, 3);
    c->updates = (int64_t)sim_between(r, 1 + s->opts.nodes / 4, s->opts.nodes);
    uint64_t min = c->updates < 3 ? (uint64_t)c->updates : 3;
    if (min > honest) min = honest;
    c->updates_min = (int64_t)sim_between(r, 1, min);
    c->deadline_s = (int64_t)sim_between(r, 10, 90);
    c->staleness_max = (int64_t)sim_between(r, 0, 6);
    c->steps = 32;
    c->task_deadline_s = 600;
    c->encoding = (int64_t)sim_between(r, 0, 1);
    c->optimiser = (int64_t)sim_between(r, 0, 3);
    c->server_rate = c->optimiser >= 2 ? 0.01 : 1.0;
    c->shrink = sim_chance(r, 0.5) ? 0.0 : 2.0;
    c->norms_min = (int64_t)sim_between(r, 2, 8);
    c->versions_kept = (int64_t)sim_between(r, 1, 4);
    c->uploads_max = 1 << 20;
}

static fl_status make_keys(sim *s, fl_err *err) {
    coord_keys *k = &s->host.keys;
    fl_secret **const secrets[] = {&k->identity, &k->transport, &k->update};
    uint8_t *const keys[] = {k->identity_key, k->transport_key, k->update_key};
    for (size_t i = 0; i < FL_COUNT(secrets); i++) {
        uint8_t seed[FL_SEED_SIZE];
        sim_fill(&s->rng, seed, sizeof(seed));
        sim_public(seed, keys[i]);
        FL_TRY(fl_secret_copy((fl_bytes){seed, sizeof(seed)}, secrets[i], err));
    }
    return FL_OK;
}

static fl_status put_number(coord_store *st, const char *key, uint64_t value, fl_err *err) {
    uint8_t bytes[8];
    fl_put_u64(bytes, value);
    return coord_store_put_value(st, key, (fl_bytes){bytes, sizeof(bytes)}, err);
}

static fl_status add_nodes(sim *s, coord_store *st, fl_err *err) {
    for (uint32_t i = 0; i < s->opts.nodes; i++) {
        const sim_node *n = &s->nodes[i];
        if (!n->enrolled) continue;
        coord_node_row row = {.state = COORD_NODE_ACTIVE, .joined_s = 1, .seen_s = 1};
        snprintf(row.name, sizeof(row.name), "node%u", i);
        memcpy(row.sign_key, n->identity_key, sizeof(row.sign_key));
        memcpy(row.transport_key, n->curve_key, sizeof(row.transport_key));
        FL_TRY(coord_store_add_node(st, &row, &row.id, err));
    }
    return FL_OK;
}

// What `init`, `token` and `join` would have made: commands/init.c.
static fl_status fill(sim *s, coord_store *st, fl_err *err) {
    uint8_t model[300];
    sim_fill(&s->rng, model, sizeof(model));
    s->model_size = sizeof(model);
    FL_TRY(coord_store_put_object(st, (fl_bytes){model, sizeof(model)}, s->model_digest, err));
    FL_TRY(coord_store_begin(st, err));
    FL_TRY(coord_store_put_value(st, "run_id", (fl_bytes){s->run_id, FL_ID_SIZE}, err));
    FL_TRY(coord_store_put_value(st, "model_digest",
                                 (fl_bytes){s->model_digest, FL_DIGEST_SIZE}, err));
    FL_TRY(put_number(st, "model_size", s->model_size, err));
    FL_TRY(put_number(st, "a_seed", 7, err));
    FL_TRY(put_number(st, "exits", s->exits, err));
    FL_TRY(put_number(st, "rank", (uint64_t)s->host.settings.rank, err));
    FL_TRY(coord_store_add_layers(st, s->layers, err));
    for (uint32_t l = 0; s->pinned && l < s->layers; l++)
        FL_TRY(coord_store_pin_layer(st, l, s->counts[l], err));
    FL_TRY(coord_store_open_round(st, 1, 1, err));
    FL_TRY(add_nodes(s, st, err));
    FL_TRY(sim_join_token(s, st, err));
    return coord_store_commit(st, err);
}

fl_status sim_host_init(sim *s, fl_err *err) {
    sim_host *h = &s->host;
    coord_store *st = NULL;
    h->wall_ms = WALL_START_MS;
    h->disk = sim_disk_new(s->opts.seed, &h->wall_ms);
    sim_disk_lie(h->disk, (sim_disk_lies){.spool_sync = fl_plant(LOST_SPOOL_SYNC),
                                          .log_sync = fl_plant(LOST_LOG_SYNC),
                                          .object_sync = fl_plant(LOST_OBJECT_SYNC),
                                          .folder_sync = fl_plant(LOST_FOLDER_SYNC)});
    draw_settings(s);
    sim_join_draw(s);
    FL_TRY(make_keys(s, err));
    h->world = (coord_world){
        .ctx = s,
        .now_ms = world_now,
        .wall_s = world_wall,
        .random = world_random,
        .disk = sim_disk_table(h->disk),
        .pk = &sim_pk,
        .unseal = sim_unseal,
        .receive = world_receive,
        .send = world_send,
        .admit = world_admit,
        .revoke = world_revoke,
        .enrolment = world_enrolment,
        .stats = world_stats,
    };
    FL_TRY(coord_store_create_on(h->world.disk, SIM_DIR, err));
    FL_TRY(coord_store_open_on(h->world.disk, SIM_DIR, &st, err));
    const fl_status filled = fill(s, st, err);
    coord_store_close(st);
    return filled;
}

static void forget_inbox(sim_host *h) {
    for (; h->inbox_next < h->inbox_count; h->inbox_next++) free(h->inbox[h->inbox_next].frame);
    h->inbox_count = h->inbox_next = 0;
    free(h->current);
    h->current = NULL;
}

void sim_host_done(sim *s) {
    sim_host *h = &s->host;
    coord_loop_close(h->loop);
    forget_inbox(h);
    free(h->inbox);
    coord_keys_close(&h->keys);
    sim_disk_free(h->disk);
}

// ---- life and death

static void crash(sim *s) {
    sim_host *h = &s->host;
    const bool power_cut = sim_disk_dead(h->disk) && sim_chance(&s->rng, 0.6);
    sim_trace(s, power_cut ? "power" : "killed", 0, sim_disk_changes(h->disk), h->boot);
    s->result.crashes++;
    s->result.power_cuts += power_cut;
    coord_loop_close(h->loop);
    h->loop = NULL;
    h->boot++;
    forget_inbox(h);
    sim_disk_restart(h->disk, power_cut);
    sim_push(&s->queue, (sim_event){.at_ms = s->now_ms + sim_between(&s->rng, 200, 20000),
                                    .kind = SIM_EV_BOOT,
                                    .boot = h->boot});
}

// When the next one comes, in changes of the disk: about fifty for each node and round.
static void plan_crash(sim *s) {
    sim_host *h = &s->host;
    const double mean = 50.0 * s->opts.nodes * s->opts.rounds / (s->opts.crashes + 1e-9);
    const uint64_t far = mean < 1e9 ? (uint64_t)(2.0 * mean) + 1 : 0;
    const bool calm = s->now_ms >= s->calm_ms || far == 0;
    // Now and then the next one comes during the recovery itself.
    const uint64_t at = sim_between(&s->rng, 1, sim_chance(&s->rng, 0.2) ? 30 : far + 1);
    const bool only_fails = sim_chance(&s->rng, 0.2);
    sim_disk_arm(h->disk, calm || only_fails ? 0 : at);
    sim_disk_fail(h->disk, calm || !only_fails ? 0 : at);
}

void sim_host_boot(sim *s) {
    sim_host *h = &s->host;
    fl_err err;
    const coord_loop_opts opts = {
        .dir = SIM_DIR, .world = &h->world, .settings = &h->settings, .keys = &h->keys};
    plan_crash(s);
    h->born_ms = s->now_ms;
    h->step_due = false;
    for (uint32_t i = 0; i < s->opts.nodes; i++) s->nodes[i].admitted = false;
    const fl_status st = coord_loop_open_in(&opts, &h->loop, &err);
    sim_trace(s, "recovered", 0, (uint64_t)st, h->boot);
    if (sim_disk_dead(h->disk) || (st != FL_OK && sim_disk_failed(h->disk))) {
        crash(s);
        return;
    }
    if (st != FL_OK) {
        sim_fail(s, "the coordinator does not start again: %s", err.text);
        return;
    }
    sim_check_recovered(s);
    sim_push(&s->queue, (sim_event){.at_ms = s->now_ms + SIM_POLL_MS,
                                    .kind = SIM_EV_POLL,
                                    .boot = h->boot});
}

void sim_host_receive(sim *s, sim_event ev) {
    sim_host *h = &s->host;
    if (h->loop == NULL) {
        free(ev.frame);
        return;
    }
    if (h->inbox_next == h->inbox_count) h->inbox_next = h->inbox_count = 0;
    if (h->inbox_count == h->inbox_room) {
        h->inbox_room = h->inbox_room == 0 ? 64 : 2 * h->inbox_room;
        h->inbox = realloc(h->inbox, h->inbox_room * sizeof(*h->inbox));
        FL_ASSERT(h->inbox != NULL);
    }
    h->inbox[h->inbox_count++] = ev;
    if (h->step_due) return;
    h->step_due = true;
    sim_push(&s->queue, (sim_event){.at_ms = s->now_ms + sim_between(&s->rng, 0, 12),
                                    .kind = SIM_EV_STEP,
                                    .boot = h->boot});
}

// True when the loop goes on.
static bool lives(sim *s, fl_status st, const fl_err *err) {
    sim_host *h = &s->host;
    if (sim_disk_dead(h->disk) || (st != FL_OK && sim_disk_failed(h->disk))) {
        crash(s);
        return false;
    }
    if (st != FL_OK) sim_fail(s, "the coordinator stopped: %s", err->text);
    return st == FL_OK;
}

void sim_host_step(sim *s) {
    sim_host *h = &s->host;
    fl_err err;
    h->step_due = false;
    do {
        if (!lives(s, coord_loop_step(h->loop, 0, &err), &err)) return;
        sim_check(s);
    } while (h->inbox_next < h->inbox_count && !s->result.failed);
}

// What the owner does: a node is revoked, or the clock on the wall is set.
static fl_status revoke_one(sim *s, fl_err *err) {
    sim_host *h = &s->host;
    const uint32_t node = (uint32_t)sim_between(&s->rng, 0, s->opts.nodes - 1);
    const uint32_t member =
        coord_registry_by_transport_key(&h->loop->registry, s->nodes[node].curve_key);
    if (!may_revoke(s, node) || member == COORD_NOBODY) return FL_OK;
    coord_store *st = h->loop->store;
    s->nodes[node].revoked = true;
    sim_trace(s, "revoked", node, 0, 0);
    FL_TRY(coord_store_begin(st, err));
    FL_TRY(coord_store_set_node_state(st, h->loop->registry.members[member].id,
                                      COORD_NODE_REVOKED, err));
    FL_TRY(coord_store_commit(st, err));
    FL_TRY(coord_loop_refresh(h->loop, world_now(s), err));
    return coord_loop_commit(h->loop, err);
}

void sim_host_owner(sim *s) {
    sim_host *h = &s->host;
    fl_err err;
    if (s->now_ms >= s->calm_ms) return;
    sim_push(&s->queue, (sim_event){.at_ms = s->now_ms + sim_between(&s->rng, 20000, 200000),
                                    .kind = SIM_EV_OWNER});
    if (sim_chance(&s->rng, 0.5)) {
        const uint64_t jump = sim_between(&s->rng, 0, 100000000);
        h->wall_ms = sim_chance(&s->rng, 0.5) ? h->wall_ms + jump : h->wall_ms - jump;
        return;
    }
    if (h->loop != NULL && sim_chance(&s->rng, 0.3) && lives(s, revoke_one(s, &err), &err))
        sim_check(s);
}
