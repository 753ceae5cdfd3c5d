// A node: the protocol core of node/client with a spool and a clock around it. Follows node/loop.c.
#include "sim/state.h"

#include "common/checked.h"
#include "proto/update.h"

#include <stdlib.h>
#include <string.h>

static uint64_t clock_of(const sim_node *n) { // monotonic since its boot
    return n->sim->now_ms - n->born_ms + 1;
}

static void feed(sim_node *n, const node_client_event *ev);

static void event(sim_node *n, node_client_event_kind kind) {
    feed(n, &(node_client_event){.kind = kind, .now_ms = clock_of(n)});
}

static void drop_session(sim_node *n) {
    node_peer_drop(&n->peer);
    if (n->client->online) event(n, NODE_EV_SESSION_DOWN);
}

static void send_frame(sim_node *n, size_t size) {
    if (size != 0)
        sim_send_to_coordinator(n->sim, n->index, (fl_bytes){n->sim->frame, size});
}

static void send_message(sim_node *n, const fl_msg *m) {
    sim *s = n->sim;
    size_t size;
    fl_err err;
    if (!n->peer.up) return;
    const fl_status st = node_peer_send(&n->peer, m, &s->scratch, s->frame, &size, &err);
    if (st == FL_OK)
        send_frame(n, size);
    else if (st == FL_ESTATE)
        drop_session(n);
    else
        sim_fail(s, "node %u cannot send %s: %s", n->index, fl_msg_name(m->type), err.text);
}

// ---- effects

static void fetch_begin(sim_node *n, const node_client_effect *e) {
    const bool there = e->object.model && n->has_model;
    n->fetched_size = 0;
    feed(n, &(node_client_event){.kind = NODE_EV_STORED,
                                 .now_ms = clock_of(n),
                                 .stored = there ? e->object.size : 0});
}

// The whole object is there: is it what was asked for?
static bool fetch_done(sim_node *n, const node_object *o) {
    uint8_t digest[FL_DIGEST_SIZE];
    fl_layer layer;
    fl_hash((fl_bytes){n->fetched, (size_t)o->size}, digest);
    if (memcmp(digest, o->digest, sizeof(digest)) != 0) return false;
    if (o->model) {
        n->has_model = true;
        return true;
    }
    if (fl_layer_open((fl_bytes){n->fetched, (size_t)o->size}, &layer, NULL) != FL_OK ||
        layer.layer != o->layer || layer.version != o->version)
        sim_fail(n->sim, "node %u fetched layer %u version %llu and got another one", n->index,
                 o->layer, (unsigned long long)o->version);
    sim_check_object(n->sim, o->layer, o->version, digest);
    return true;
}

static void store_chunk(sim_node *n, const node_client_effect *e) {
    node_client_event ev = {.kind = NODE_EV_STORED, .now_ms = clock_of(n)};
    const size_t end = (size_t)e->offset + e->chunk.size;
    if (end > n->fetched_size) {
        n->fetched = realloc(n->fetched, end);
        FL_ASSERT(n->fetched != NULL);
        n->fetched_size = end;
    }
    memcpy(n->fetched + e->offset, e->chunk.data, e->chunk.size);
    ev.stored = end;
    if (end == e->object.size && !fetch_done(n, &e->object)) {
        sim_fail(n->sim, "node %u was given an object with another digest", n->index);
        ev.kind = NODE_EV_OBJECT_BAD;
    }
    feed(n, &ev);
}

static void end_training_at(sim_node *n, uint64_t at_ms) {
    sim_push(&n->sim->queue, (sim_event){.at_ms = at_ms,
                                         .kind = SIM_EV_NODE_TRAINED,
                                         .node = n->index,
                                         .boot = n->boot,
                                         .size = n->trainings});
}

static void start_training(sim_node *n) {
    const fl_task *t = &n->client->task;
    n->trainings++;
    n->training = fl_channel_update_key(n->channel) != NULL;
    const uint64_t steps = t->kind == FL_TASK_TRAIN ? t->steps : 1;
    const uint64_t layers = t->layer_last - t->layer_first + 1;
    const uint64_t takes = n->training ? 1 + steps * layers * n->step_ms : 1;
    end_training_at(n, n->sim->now_ms + takes);
}

static void stop_training(sim_node *n) {
    n->training = false;
    end_training_at(n, n->sim->now_ms + 1);
}

static void send_chunk(sim_node *n, const node_client_effect *e) {
    const sim_made *m = sim_made_of(n, e->key.sequence);
    FL_ASSERT(m != NULL && m->sealed != NULL && e->offset + e->size <= m->begin.size);
    const fl_msg msg = {.type = FL_MSG_UPDATE_CHUNK,
                        .update_chunk = {e->key, e->offset, {m->sealed + e->offset, e->size}}};
    send_message(n, &msg);
}

static void release_sealed(sim_node *n, uint64_t sequence) {
    sim_made *m = sim_made_of(n, sequence);
    if (m == NULL) return;
    free(m->sealed);
    m->sealed = NULL;
}

static void drop_update(sim_node *n, const node_client_effect *e) {
    sim *s = n->sim;
    size_t at = 0;
    while (at < n->spool_count && n->spool[at] != e->key.sequence) at++;
    sim_made *m = sim_made_of(n, e->key.sequence);
    if (m == NULL || at == n->spool_count) {
        sim_fail(s, "node %u drops an update that is not in its spool", n->index);
        return;
    }
    if (n->dropped != e->key.sequence) release_sealed(n, n->dropped);
    n->dropped = e->key.sequence;
    memmove(&n->spool[at], &n->spool[at + 1], (n->spool_count - at - 1) * sizeof(n->spool[0]));
    n->spool_count--;
    if (e->verdict == FL_VERDICT_REFUSED) {
        m->refused = true;
        s->result.refused++;
        if (m->row != 0 && s->host.loop != NULL)
            sim_fail(s, "node %u was told that update %llu does not count, and it does", n->index,
                     (unsigned long long)e->key.sequence);
        return;
    }
    if (!m->acknowledged) s->result.acknowledged++;
    m->acknowledged = true;
    if (m->row == 0 && s->host.loop != NULL)
        sim_fail(s, "node %u was told that update %llu counts, and it is not in the ledger",
                 n->index, (unsigned long long)e->key.sequence);
}

static void carry_out(sim_node *n, const node_client_effect *e) {
    switch (e->kind) {
    case NODE_FX_SEND:
        send_message(n, &e->message);
        return;
    case NODE_FX_FETCH_BEGIN:
        fetch_begin(n, e);
        return;
    case NODE_FX_STORE:
        store_chunk(n, e);
        return;
    case NODE_FX_TRAIN:
        start_training(n);
        return;
    case NODE_FX_ABANDON:
        stop_training(n);
        return;
    case NODE_FX_SEND_CHUNK:
        send_chunk(n, e);
        return;
    case NODE_FX_DROP:
        drop_update(n, e);
        return;
    case NODE_FX_SHAKE_HANDS:
        node_peer_drop(&n->peer);
        return;
    case NODE_FX_VOTE:
        return;
    case NODE_FX_END:
        n->done = true;
        return;
    }
}

static void feed(sim_node *n, const node_client_event *ev) {
    node_client_effects fx;
    node_client_step(n->client, ev, &fx);
    for (size_t i = 0; i < fx.count; i++) carry_out(n, &fx.list[i]);
}

// ---- what happens

void sim_node_frame(sim_node *n, fl_bytes frame) {
    sim *s = n->sim;
    fl_msg m;
    size_t size;
    node_peer_got got;
    if (!n->up || n->done) return;
    fl_arena_rewind(&s->scratch, 0);
    if (!n->enrolled) {
        sim_join_answer(n, frame);
        return;
    }
    if (node_peer_receive(&n->peer, frame, &s->scratch, s->plain, s->frame, &size, &m, &got,
                          NULL) != FL_OK)
        return; // late, twice, or of a session that is over
    send_frame(n, size);
    if (got == NODE_PEER_UP)
        event(n, NODE_EV_SESSION_UP);
    else if (got == NODE_PEER_MESSAGE)
        feed(n, &(node_client_event){
                    .kind = NODE_EV_MESSAGE, .now_ms = clock_of(n), .message = &m});
    else if (got == NODE_PEER_HINT && m.error.code == FL_CODE_SESSION &&
             m.error.session == fl_channel_session(n->channel))
        drop_session(n);
}

void sim_node_tick(sim_node *n) {
    sim *s = n->sim;
    uint8_t random[FL_CHANNEL_RANDOM];
    size_t size = 0;
    fl_err err;
    if (!n->up || n->done) return;
    fl_arena_rewind(&s->scratch, 0);
    if (!n->enrolled) {
        if (sim_chance(&n->rng, 0.3)) sim_join_ask(n);
    } else if (!n->peer.up) {
        sim_fill(&n->rng, random, sizeof(random));
        if (node_peer_tick(&n->peer, clock_of(n), random, &s->scratch, s->frame, &size, &err) !=
            FL_OK)
            sim_fail(s, "node %u cannot shake hands: %s", n->index, err.text);
        send_frame(n, size);
    }
    event(n, NODE_EV_TICK);
    uint64_t pause = SIM_TICK_MS;
    if (s->now_ms < s->calm_ms && sim_chance(&n->rng, 0.002)) // the machine slept
        pause += sim_between(&n->rng, 1000, 60000);
    sim_push(&s->queue, (sim_event){.at_ms = s->now_ms + pause,
                                    .kind = SIM_EV_NODE_TICK,
                                    .node = n->index,
                                    .boot = n->boot});
}

static void crash_for_a_while(sim_node *n) {
    sim_node_crash(n);
    sim_push(&n->sim->queue,
             (sim_event){.at_ms = n->sim->now_ms + sim_between(&n->rng, 500, 30000),
                         .kind = SIM_EV_NODE_BOOT,
                         .node = n->index,
                         .boot = n->boot});
}

void sim_node_trained(sim_node *n) {
    sim *s = n->sim;
    const fl_task *t = &n->client->task;
    node_spooled updates[2 * SIM_LAYERS_MAX];
    size_t count = 0;
    n->trainings++; // what else was planned for this training is void
    if (n->client->phase != NODE_CLIENT_TRAINING) return;
    if (!n->training) {
        event(n, NODE_EV_TRAIN_FAILED);
        return;
    }
    n->training = false;
    const bool twice = n->malice == SIM_TWICE;
    const bool crashes = s->now_ms < s->calm_ms && sim_chance(&n->rng, 0.01);
    for (size_t i = 0; t->kind == FL_TASK_TRAIN && i < t->base_count; i++) {
        if (crashes && sim_chance(&n->rng, 0.5)) break; // some are in the spool, and no more
        const uint64_t tokens = sim_between(&n->rng, 1, 100000);
        for (int k = 0; k < (twice ? 2 : 1); k++)
            updates[count++].begin =
                sim_make_update(n, t->bases[i].layer, t->bases[i].version, tokens)->begin;
    }
    if (crashes) {
        crash_for_a_while(n);
        return;
    }
    const bool reports = t->kind == FL_TASK_EVAL || sim_chance(&n->rng, 0.7);
    const fl_report report = reports ? sim_make_report(n, t) : (fl_report){0};
    feed(n, &(node_client_event){.kind = NODE_EV_TRAINED,
                                 .now_ms = clock_of(n),
                                 .updates = updates,
                                 .update_count = count,
                                 .report = reports ? &report : NULL});
}

// ---- life and death

static fl_status open_channel(sim_node *n, fl_err *err) {
    const fl_channel_opts opts = {.role = FL_CHANNEL_NODE,
                                  .identity = n->identity,
                                  .identity_key = n->identity_key,
                                  .peer_key = n->sim->host.keys.identity_key,
                                  .pk = &sim_pk};
    return fl_channel_open(&opts, &n->channel, err);
}

void sim_node_boot(sim_node *n) {
    sim *s = n->sim;
    fl_err err;
    node_spooled spool[FL_LAYERS_MAX];
    if (n->up || n->done) return;
    n->up = true;
    n->boot++;
    n->born_ms = s->now_ms;
    n->training = false;
    const size_t count = n->spool_count < FL_LAYERS_MAX ? n->spool_count : FL_LAYERS_MAX;
    for (size_t i = 0; i < count; i++) spool[i].begin = sim_made_of(n, n->spool[i])->begin;
    if (open_channel(n, &err) != FL_OK) {
        sim_fail(s, "node %u: %s", n->index, err.text);
        return;
    }
    node_peer_init(&n->peer, n->channel);
    node_client_init(n->client, spool, count);
    n->client->capability = (fl_capability){.memory_bytes = 1 << 28,
                                            .tokens_per_second = 100.0f,
                                            .cores = 4,
                                            .window_max = n->window_max};
    if (n->has_model) {
        n->client->has_model = true;
        memcpy(n->client->run_id, s->run_id, FL_ID_SIZE);
        memcpy(n->client->model_digest, s->model_digest, FL_DIGEST_SIZE);
    }
    sim_push(&s->queue, (sim_event){.at_ms = s->now_ms + sim_between(&n->rng, 1, SIM_TICK_MS),
                                    .kind = SIM_EV_NODE_TICK,
                                    .node = n->index,
                                    .boot = n->boot});
}

void sim_node_crash(sim_node *n) {
    sim_made *last = sim_made_of(n, n->dropped);
    if (!n->up) return;
    n->up = false;
    n->boot++;
    n->sim->result.node_crashes++;
    fl_channel_close(n->channel);
    n->channel = NULL;
    // The file was removed, and the folder not synced: it may be there again.
    if (last != NULL && last->sealed != NULL && sim_chance(&n->rng, 0.3)) {
        FL_ASSERT(n->spool_count < n->spool_room);
        memmove(&n->spool[1], &n->spool[0], n->spool_count * sizeof(n->spool[0]));
        n->spool[0] = n->dropped;
        n->spool_count++;
        n->dropped = 0;
    }
}

static void draw_profile(sim_node *n) {
    static const uint64_t step_ms[] = {20, 100, 100, 300, 300, 2000};
    sim_rng *r = &n->rng;
    sim *s = n->sim;
    const double worst = s->opts.loss;
    n->path = (sim_path){.delay_ms = sim_between(r, 1, 150),
                         .jitter_ms = sim_between(r, 1, 400),
                         .loss = worst * (double)sim_between(r, 0, 100) / 100.0,
                         .twice = worst * (double)sim_between(r, 0, 50) / 100.0,
                         .late = worst * (double)sim_between(r, 0, 20) / 100.0};
    n->step_ms = step_ms[sim_between(r, 0, FL_COUNT(step_ms) - 1)];
    n->window_max = (uint32_t)sim_between(r, 1, s->layers);
    if (sim_chance(r, s->opts.attackers))
        n->malice = (sim_malice)sim_between(r, SIM_HONEST + 1, SIM_MALICE_COUNT - 1);
}

fl_status sim_node_init(sim *s, uint32_t index, fl_err *err) {
    sim_node *n = &s->nodes[index];
    uint8_t seed[FL_SEED_SIZE];
    *n = (sim_node){.sim = s, .index = index, .rng = {.key = fl_rng_key(s->opts.seed, 1, index)}};
    draw_profile(n);
    sim_fill(&n->rng, seed, sizeof(seed));
    sim_fill(&n->rng, n->curve_key, sizeof(n->curve_key));
    fl_put_u32(n->curve_key, index);
    sim_public(seed, n->identity_key);
    n->client = malloc(sizeof(*n->client));
    if (n->client == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory for %u nodes", s->opts.nodes);
    return fl_secret_copy((fl_bytes){seed, sizeof(seed)}, &n->identity, err);
}

void sim_node_done(sim_node *n) {
    for (size_t i = 0; i < n->made_count; i++) free(n->made[i].sealed);
    fl_channel_close(n->channel);
    fl_secret_close(n->identity);
    free(n->client);
    free(n->made);
    free(n->spool);
    free(n->fetched);
}
