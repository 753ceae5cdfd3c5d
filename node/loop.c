#include "node/loop.h"

#include "common/clock.h"
#include "common/json.h"
#include "common/log.h"
#include "node/client/peer.h"
#include "node/commands/setup.h"
#include "node/schedule/probe.h"
#include "proto/link.h"

#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

enum { STEP_MS = 200, RULES_MS = 1000, STATUS_MS = 2000 };

static volatile sig_atomic_t stop_requested;

void node_loop_stop(int signal) {
    (void)signal;
    stop_requested = 1;
}

typedef struct loop {
    const node_loop_opts *o;
    node_client client;
    node_peer peer;
    fl_channel *channel;
    fl_link *link;
    fl_arena scratch;
    uint8_t *block, *plain, *frame; // scratch memory, an opened body, a frame to send
    fl_link_status link_state;
    uint32_t hellos; // sent since there was a session
    node_may may;
    uint64_t rules_ms, status_ms;
    node_client_phase shown;
    uint64_t peak_rss_bytes;
    node_upload_choice upload; // of the last task; bytes 0: none yet
    bool ended;
    fl_code end_code;
} loop;

static void feed(loop *l, const node_client_event *ev);

static void event(loop *l, node_client_event_kind kind) {
    feed(l, &(node_client_event){.kind = kind, .now_ms = fl_clock_ms()});
}

static void drop_session(loop *l) {
    node_peer_drop(&l->peer);
    if (l->client.online) event(l, NODE_EV_SESSION_DOWN);
}

static void send_frame(loop *l, size_t size) {
    if (size == 0) return;
    fl_err err;
    if (fl_link_send(l->link, 0, (fl_bytes){l->frame, size}, &err) == FL_OK)
        l->client.bytes_up += size;
    // A full queue or a lost link: the client asks again when no answer comes.
}

static void send_message(loop *l, const fl_msg *m) {
    size_t size;
    fl_err err;
    if (!l->peer.up) return;
    const fl_status st = node_peer_send(&l->peer, m, &l->scratch, l->frame, &size, &err);
    if (st == FL_OK) {
        send_frame(l, size);
        return;
    }
    fl_log(FL_LOG_ERROR, "send.failed", "%s: %s", fl_msg_name(m->type), err.text);
    if (m->type == FL_MSG_REPORT) l->client.has_report = false; // never sent like this, then
    drop_session(l);
}

// ---- effects

static void store_chunk(loop *l, const node_client_effect *e) {
    fl_err err;
    node_client_event ev = {.kind = NODE_EV_STORED, .now_ms = fl_clock_ms()};
    fl_status st = node_state_store(l->o->state, &e->object, e->offset, e->chunk, &err);
    ev.stored = e->offset + e->chunk.size;
    if (st == FL_OK && ev.stored == e->object.size) {
        st = node_state_fetch_done(l->o->state, &e->object, &err);
        if (st == FL_EAUTH) ev.kind = NODE_EV_OBJECT_BAD;
        if (st == FL_OK && e->object.model)
            fl_log(FL_LOG_INFO, "model.fetched", "%.1f MB", (double)e->object.size / 1e6);
    }
    if (st != FL_OK) fl_log(FL_LOG_ERROR, "fetch.failed", "%s", err.text);
    if (st == FL_OK || ev.kind == NODE_EV_OBJECT_BAD) feed(l, &ev);
    // A full disk: nothing is stored, the chunk is asked for again after a while.
}

static void fetch_begin(loop *l, const node_client_effect *e) {
    fl_err err;
    node_client_event ev = {.kind = NODE_EV_STORED, .now_ms = fl_clock_ms()};
    fl_status st = FL_OK;
    if (e->object.model)
        st = node_state_begin_run(l->o->state, l->client.run_id, e->object.digest, &err);
    if (st == FL_OK) st = node_state_fetched(l->o->state, &e->object, &ev.stored, &err);
    if (st == FL_OK && ev.stored == e->object.size &&
        node_state_fetch_done(l->o->state, &e->object, &err) != FL_OK)
        ev.stored = 0;
    if (st != FL_OK) fl_log(FL_LOG_ERROR, "fetch.failed", "%s", err.text);
    feed(l, &ev);
}

static void start_training(loop *l) {
    fl_err err;
    const fl_task *t = &l->client.task;
    const uint8_t *update_key = fl_channel_update_key(l->channel);
    const uint64_t now_ms = fl_clock_ms();
    const uint64_t left_ms = l->client.deadline_ms > now_ms ? l->client.deadline_ms - now_ms : 0;
    const node_worker_upload upload = {.rule = l->o->upload,
                                       .uplink = l->client.uplink,
                                       .left_s = (double)left_ms * 1e-3};
    fl_status st = update_key == NULL
                       ? FL_FAIL(&err, FL_ESTATE, "no session")
                       : node_worker_start(l->o->worker, t, update_key, &upload, &err);
    if (st == FL_OK) {
        fl_log(FL_LOG_INFO, "task.started",
               "round %llu: layers %u to %u at the exit after layer %u, %u steps",
               (unsigned long long)t->round, t->layer_first, t->layer_last, t->exit_layer,
               t->steps);
        return;
    }
    fl_log(FL_LOG_ERROR, "task.failed", "%s", err.text);
    event(l, NODE_EV_TRAIN_FAILED);
}

static void send_chunk(loop *l, const node_client_effect *e) {
    fl_err err;
    uint8_t *piece = malloc(e->size);
    fl_status st = piece == NULL ? FL_FAIL(&err, FL_ENOMEM, "no memory for a piece of an update")
                                 : node_state_spool_read(l->o->state, e->key.sequence, e->offset,
                                                         e->size, piece, &err);
    if (st == FL_OK) {
        const fl_msg m = {.type = FL_MSG_UPDATE_CHUNK,
                          .update_chunk = {e->key, e->offset, {piece, e->size}}};
        send_message(l, &m);
    } else {
        fl_log(FL_LOG_ERROR, "update.unreadable", "%s", err.text);
    }
    free(piece);
}

static void drop_update(loop *l, const node_client_effect *e) {
    static const char *const fates[] = {
        [NODE_RESIDUAL_KEEP] = "",
        [NODE_RESIDUAL_RETURN] = "its content goes with the next",
        [NODE_RESIDUAL_DROP] = "its content is dropped, and what was kept of the layer"};
    const node_residual_fate fate = node_residual_judge(e->verdict, e->code);
    node_state_spool_end(l->o->state, &e->key, fate);
    if (e->verdict == FL_VERDICT_REFUSED)
        fl_log(FL_LOG_WARN, "update.refused", "layer %u: %s; %s", e->key.layer,
               fl_code_text(e->code), fates[fate]);
    else
        fl_log(FL_LOG_INFO, "update.acknowledged", "layer %u of version %llu", e->key.layer,
               (unsigned long long)e->key.base_version);
}

static void carry_out(loop *l, const node_client_effect *e) {
    switch (e->kind) {
    case NODE_FX_SEND:
        send_message(l, &e->message);
        return;
    case NODE_FX_FETCH_BEGIN:
        fetch_begin(l, e);
        return;
    case NODE_FX_STORE:
        store_chunk(l, e);
        return;
    case NODE_FX_TRAIN:
        start_training(l);
        return;
    case NODE_FX_ABANDON:
        node_worker_stop(l->o->worker);
        return;
    case NODE_FX_SEND_CHUNK:
        send_chunk(l, e);
        return;
    case NODE_FX_DROP:
        drop_update(l, e);
        return;
    case NODE_FX_SHAKE_HANDS:
        node_peer_drop(&l->peer);
        return;
    case NODE_FX_VOTE:
        node_worker_set_vote(l->o->worker, &l->client.task.vote);
        return;
    case NODE_FX_END:
        l->ended = true;
        l->end_code = e->code;
        return;
    }
}

static void feed(loop *l, const node_client_event *ev) {
    node_client_effects fx;
    node_client_step(&l->client, ev, &fx);
    for (size_t i = 0; i < fx.count; i++) carry_out(l, &fx.list[i]);
}

// ---- what happens

static void receive_frame(loop *l, const fl_link_message *in) {
    fl_err err;
    fl_msg m;
    size_t size;
    node_peer_got got;
    fl_arena_rewind(&l->scratch, 0);
    l->client.bytes_down += in->frame.size;
    const fl_status st = node_peer_receive(&l->peer, in->frame, &l->scratch, l->plain, l->frame,
                                           &size, &m, &got, &err);
    if (st != FL_OK) {
        fl_log(FL_LOG_DEBUG, "frame.dropped", "%s", err.text);
        return;
    }
    send_frame(l, size);
    const size_t mark = l->scratch.used;
    if (got == NODE_PEER_UP) {
        fl_log(FL_LOG_INFO, "session.up", "with %s:%lld", l->o->state->host,
               (long long)l->o->state->port);
        event(l, NODE_EV_SESSION_UP);
    } else if (got == NODE_PEER_MESSAGE) {
        feed(l,
             &(node_client_event){.kind = NODE_EV_MESSAGE, .now_ms = fl_clock_ms(), .message = &m});
    } else if (got == NODE_PEER_HINT && m.error.code == FL_CODE_SESSION &&
               m.error.session == fl_channel_session(l->channel)) {
        drop_session(l); // a forged hint costs one handshake
    }
    fl_arena_rewind(&l->scratch, mark);
}

static void watch_link(loop *l) {
    static const char *const texts[] = {
        [FL_LINK_CONNECTING] = "no answer from the coordinator yet, trying again",
        [FL_LINK_UP] = "connected",
        [FL_LINK_REFUSED] =
            "the coordinator does not admit this node: not approved yet, or revoked",
        [FL_LINK_MISMATCH] = "something else answers at the coordinator's address"};
    const fl_link_status now = fl_link_state(l->link);
    if (now != l->link_state) {
        fl_log(now == FL_LINK_UP ? FL_LOG_INFO : FL_LOG_WARN, "link", "%s", texts[now]);
        if (now != FL_LINK_UP) drop_session(l);
        l->link_state = now;
    }
    if (l->peer.up) l->hellos = 0;
    if (now != FL_LINK_UP || l->peer.up) return;
    uint8_t random[FL_CHANNEL_RANDOM];
    size_t size = 0;
    fl_err err;
    fl_random(random, sizeof(random));
    if (node_peer_tick(&l->peer, fl_clock_ms(), random, &l->scratch, l->frame, &size, &err) !=
        FL_OK)
        fl_log(FL_LOG_ERROR, "handshake", "%s", err.text);
    fl_wipe(random, sizeof(random));
    send_frame(l, size);
    if (size != 0 && l->hellos++ == 1)
        fl_log(FL_LOG_WARN, "link",
               "connected, but the coordinator starts no session: this node waits for the owner's "
               "approval, or was revoked");
}

static node_observed observe(const loop *l, node_work work) {
    struct statvfs disk;
    const time_t now = (time_t)fl_clock_wall_s();
    struct tm local;
    localtime_r(&now, &local);
    node_observed o = {.temperature_c = node_facts_temperature(""),
                       .throttle_bits = node_facts_throttle_bits(""),
                       .busy_others = NAN,
                       .hour = (uint32_t)local.tm_hour,
                       .disk_free = UINT64_MAX,
                       .on_mains = true};
    // While a task runs its updates are still to be made, and the books are the worker's.
    if (work != NODE_WORK_BUSY)
        o.upload_spent = node_upload_waits(&l->o->state->upload, &l->o->upload, (int64_t)now);
    if (statvfs(l->o->state->folder, &disk) == 0)
        o.disk_free = (uint64_t)disk.f_bavail * disk.f_frsize;
    return o;
}

static void ask_rules(loop *l, node_work work, const node_progress *p) {
    const node_observed o = observe(l, work);
    const node_may may = node_policy_ask(&l->o->rules, &o, l->may);
    if (may != l->may) fl_log(FL_LOG_INFO, "policy", "%s", node_may_text(may));
    l->may = may;
    node_worker_pause(l->o->worker, may != NODE_MAY_TRAIN);
    fl_capability *c = &l->client.capability;
    *c = (fl_capability){.memory_bytes = l->o->memory_bytes,
                         .disk_free_bytes = o.disk_free == UINT64_MAX ? 0 : o.disk_free,
                         .tokens_per_second = p->tokens_per_second,
                         .flags = o.throttle_bits & 0xf,
                         .cores = (uint32_t)sysconf(_SC_NPROCESSORS_ONLN),
                         .window_max = may == NODE_MAY_TRAIN ? p->window_max : 0};
    if (!isnan(o.temperature_c)) {
        c->flags |= FL_HAS_TEMPERATURE;
        c->temperature_mc = (int32_t)(o.temperature_c * 1000.0);
    }
    if (may != NODE_MAY_TRAIN) c->flags |= FL_OWNER_BUSY;
    l->client.tokens_local = p->tokens_local;
}

static void log_upload(loop *l, const node_work_result *r) {
    if (r->update_count == 0) return;
    const node_upload_choice *c = &r->upload;
    l->upload = *c;
    fl_log(FL_LOG_INFO, "upload", "%s, %.2f %% of the values, %llu bytes: %s; link %.0f kB/s",
           fl_update_encoding_name(c->encoding), c->keep_ppm * 1e-4, (unsigned long long)r->bytes,
           node_upload_why_text(c->why), l->client.uplink.bytes_per_s * 1e-3);
}

static void watch_worker(loop *l, uint64_t now_ms) {
    node_progress p;
    const node_work work = node_worker_poll(l->o->worker, &p);
    l->client.step = p.step;
    l->client.tokens = p.tokens;
    l->client.loss = p.loss;
    if (now_ms - l->rules_ms >= RULES_MS || l->rules_ms == 0) {
        l->rules_ms = now_ms;
        ask_rules(l, work, &p);
    }
    if (work == NODE_WORK_FAILED) {
        fl_log(FL_LOG_WARN, "task.failed", "%s", node_worker_error(l->o->worker)->text);
        event(l, NODE_EV_TRAIN_FAILED);
    } else if (work == NODE_WORK_DONE) {
        const node_work_result *r = node_worker_result(l->o->worker);
        fl_log(FL_LOG_INFO, "task.done", "round %llu: loss %.3f, %zu layers to send",
               (unsigned long long)l->client.task.round, (double)p.loss, r->update_count);
        log_upload(l, r);
        feed(l, &(node_client_event){.kind = NODE_EV_TRAINED,
                                     .now_ms = now_ms,
                                     .updates = r->updates,
                                     .update_count = r->update_count,
                                     .report = r->has_report ? &r->report : NULL});
    }
}

static void write_status(loop *l, uint64_t now_ms) {
    const node_client *c = &l->client;
    if (now_ms - l->status_ms < STATUS_MS && l->shown == c->phase) return;
    l->status_ms = now_ms;
    l->shown = c->phase;
    char path[NODE_PATH_MAX], *text = NULL;
    size_t size = 0;
    FILE *out = open_memstream(&text, &size);
    if (out == NULL) return;
    fl_json *root = fl_json_object();
    fl_json_set_string(root, "name", l->o->state->name);
    fl_json_set_string(root, "phase", node_client_phase_name(c->phase));
    fl_json_set_bool(root, "online", c->online);
    fl_json_set_string(root, "policy", node_may_text(l->may));
    fl_json_set_integer(root, "round", (int64_t)c->task.round);
    fl_json_set_integer(root, "step", c->step);
    fl_json_set_integer(root, "steps", c->steps);
    fl_json_set_number(root, "loss", (double)c->loss);
    fl_json_set_integer(root, "bytes_up", (int64_t)c->bytes_up);
    fl_json_set_integer(root, "bytes_down", (int64_t)c->bytes_down);
    fl_json_set_integer(root, "updates_waiting", (int64_t)c->spool_count);
    fl_json_set_number(root, "uplink_bytes_per_s", c->uplink.bytes_per_s);
    if (l->upload.bytes > 0) {
        fl_json_set_string(root, "upload", fl_update_encoding_name(l->upload.encoding));
        fl_json_set_number(root, "upload_density", l->upload.keep_ppm * 1e-6);
        fl_json_set_string(root, "upload_reason", node_upload_why_text(l->upload.why));
    }
    fl_json_set_integer(root, "peak_rss_bytes", (int64_t)l->peak_rss_bytes);
    fl_json_set_integer(root, "process", getpid());
    fl_json_set_integer(root, "written", fl_clock_wall_s());
    fl_err err;
    const fl_status st = fl_json_print(root, out, &err);
    fl_json_free(root);
    fclose(out);
    node_state_path(l->o->state, NODE_STATUS_FILE, path);
    if (st != FL_OK ||
        fl_file_replace(path, (fl_bytes){(const uint8_t *)text, size}, &err) != FL_OK)
        fl_log(FL_LOG_WARN, "status.unwritten", "%s", err.text);
    free(text);
}

// ---- life

static fl_status begin(loop *l, fl_err *err) {
    const node_state *s = l->o->state;
    node_spooled *spool = calloc(FL_LAYERS_MAX, sizeof(*spool));
    size_t count = 0;
    l->block = malloc(FL_CODEC_ARENA);
    l->plain = malloc(FL_BODY_MAX);
    l->frame = malloc(FL_FRAME_MAX);
    fl_status st = FL_OK;
    if (spool == NULL || l->block == NULL || l->plain == NULL || l->frame == NULL) {
        st = FL_FAIL(err, FL_ENOMEM, "no memory for the messages");
        goto out;
    }
    fl_arena_init(&l->scratch, l->block, FL_CODEC_ARENA);
    st = node_state_spool_list(s, spool, &count, err);
    if (st != FL_OK) goto out;
    node_client_init(&l->client, spool, count);
    l->client.has_model = node_state_has_model(s);
    memcpy(l->client.run_id, s->run_id, FL_ID_SIZE);
    memcpy(l->client.model_digest, s->model_digest, FL_DIGEST_SIZE);
    st = node_state_held(s, l->client.held, &l->client.held_count, err);
    if (st != FL_OK) goto out;
    const fl_channel_opts channel = {.role = FL_CHANNEL_NODE,
                                     .identity = s->identity,
                                     .identity_key = s->identity_key,
                                     .peer_key = s->coordinator_identity};
    st = fl_channel_open(&channel, &l->channel, err);
    if (st != FL_OK) goto out;
    node_peer_init(&l->peer, l->channel);
    char endpoint[600];
    snprintf(endpoint, sizeof(endpoint),
             strchr(s->host, ':') != NULL ? "tcp://[%s]:%lld" : "tcp://%s:%lld", s->host,
             (long long)s->port);
    const fl_link_opts link = {.endpoint = endpoint,
                               .curve_secret = fl_secret_view(s->curve).data,
                               .curve_key = s->curve_key,
                               .coordinator_key = s->coordinator_curve};
    st = fl_link_dial(&link, &l->link, err);
out:
    free(spool);
    return st;
}

fl_status node_loop_run(const node_loop_opts *opts, fl_err *err) {
    loop *l = calloc(1, sizeof(*l));
    if (l == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory for the agent");
    l->o = opts;
    fl_status st = begin(l, err);
    while (st == FL_OK && !l->ended && !stop_requested) {
        fl_link_message in;
        if (fl_link_receive(l->link, STEP_MS, &in, NULL) == FL_OK) receive_frame(l, &in);
        const uint64_t now_ms = fl_clock_ms();
        watch_link(l);
        watch_worker(l, now_ms);
        event(l, NODE_EV_TICK);
        l->peak_rss_bytes = node_rss_peak();
        write_status(l, now_ms);
    }
    if (st == FL_OK && l->ended && l->end_code == FL_CODE_REVOKED)
        st = FL_FAIL(err, FL_EAUTH, "this node was revoked by the fleet's owner");
    if (st == FL_OK) write_status(l, UINT64_MAX);
    fl_link_close(l->link);
    fl_channel_close(l->channel);
    free(l->block);
    free(l->plain);
    free(l->frame);
    free(l);
    return st;
}
