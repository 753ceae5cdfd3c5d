#include "node/client/client.h"

#include <string.h>

const char *node_client_phase_name(node_client_phase phase) {
    static const char *const names[] = {"offline",  "asking",  "waiting",   "fetching",
                                        "training", "sending", "reporting", "finished"};
    return names[phase];
}

static node_client_effect *effect(node_client_effects *fx, node_client_effect_kind kind) {
    FL_ASSERT(fx->count < NODE_CLIENT_EFFECTS_MAX);
    node_client_effect *e = &fx->list[fx->count++];
    *e = (node_client_effect){.kind = kind};
    return e;
}

static fl_msg *send(node_client_effects *fx, fl_msg_type type) {
    fl_msg *m = &effect(fx, NODE_FX_SEND)->message;
    m->type = type;
    return m;
}

void node_client_init(node_client *c, const node_spooled *spool, size_t count) {
    FL_ASSERT(count <= FL_LAYERS_MAX);
    memset(c, 0, sizeof(*c));
    for (size_t i = 0; i < count; i++) c->spool[i] = spool[i];
    c->spool_count = count;
}

// ---- what is asked for, one function a phase; each (re)sends the phase's request.

static void ask_task(node_client *c, node_client_effects *fx) {
    fl_task_request *r = &send(fx, FL_MSG_TASK_REQUEST)->task_request;
    r->capability = c->capability;
    r->has_run = c->has_model;
    memcpy(r->run_id, c->run_id, sizeof(r->run_id));
    memcpy(r->model_digest, c->model_digest, sizeof(r->model_digest));
    r->layer_count = c->held_count;
    r->layers = c->held;
    r->vote_version = c->vote_version;
    r->tokens_local = c->tokens_local;
}

static node_object object_at(const node_client *c, size_t index) {
    node_object o = {.model = index == 0};
    if (o.model) {
        memcpy(o.digest, c->task.model_digest, sizeof(o.digest));
        o.size = c->task.model_size;
        return o;
    }
    const fl_layer_object *l = &c->objects[index - 1];
    memcpy(o.digest, l->digest, sizeof(o.digest));
    o.size = l->size;
    o.layer = l->layer;
    o.version = l->version;
    return o;
}

static void ask_chunk(node_client *c, node_client_effects *fx) {
    const node_object o = object_at(c, c->fetch_next);
    fl_chunk_request *r = &send(fx, FL_MSG_CHUNK_REQUEST)->chunk_request;
    memcpy(r->digest, o.digest, sizeof(r->digest));
    r->offset = c->fetched;
    const uint64_t left = o.size - c->fetched;
    r->size = left < FL_CHUNK_MAX ? (uint32_t)left : FL_CHUNK_MAX;
}

static void ask_update(node_client *c, node_client_effects *fx) {
    const fl_update_begin *b = &c->spool[0].begin;
    if (!c->begun) {
        send(fx, FL_MSG_UPDATE_BEGIN)->update_begin = *b;
    } else if (c->sent < b->size) {
        node_client_effect *e = effect(fx, NODE_FX_SEND_CHUNK);
        const uint64_t left = b->size - c->sent;
        e->key = b->key;
        e->offset = c->sent;
        e->size = left < FL_UPLOAD_CHUNK_MAX ? (uint32_t)left : FL_UPLOAD_CHUNK_MAX;
    } else {
        fl_update_commit *m = &send(fx, FL_MSG_UPDATE_COMMIT)->update_commit;
        m->key = b->key;
        memcpy(m->digest, b->digest, sizeof(m->digest));
    }
}

static void ask(node_client *c, uint64_t now_ms, node_client_effects *fx) {
    c->asked_ms = now_ms;
    switch (c->phase) {
    case NODE_CLIENT_ASKING:
        ask_task(c, fx);
        return;
    case NODE_CLIENT_FETCHING:
        ask_chunk(c, fx);
        return;
    case NODE_CLIENT_SENDING:
        ask_update(c, fx);
        return;
    case NODE_CLIENT_REPORTING:
        send(fx, FL_MSG_REPORT)->report = c->report;
        return;
    case NODE_CLIENT_OFFLINE:
    case NODE_CLIENT_WAITING:
    case NODE_CLIENT_TRAINING:
    case NODE_CLIENT_FINISHED:
        return; // nothing is under way
    }
}

static void enter(node_client *c, node_client_phase phase, uint64_t now_ms,
                  node_client_effects *fx) {
    c->phase = phase;
    c->resends = 0;
    ask(c, now_ms, fx);
}

// What comes first now: old updates, then an old report, then a new task.
static void next_job(node_client *c, uint64_t now_ms, node_client_effects *fx) {
    c->begun = false;
    c->sent = 0;
    if (!c->online) {
        c->phase = NODE_CLIENT_OFFLINE;
        return;
    }
    enter(c,
          c->spool_count > 0 ? NODE_CLIENT_SENDING
          : c->has_report    ? NODE_CLIENT_REPORTING
                             : NODE_CLIENT_ASKING,
          now_ms, fx);
}

// ---- fetching

static bool held_at(const node_client *c, uint32_t layer, uint64_t version) {
    for (size_t i = 0; i < c->held_count; i++) {
        if (c->held[i].layer == layer) return c->held[i].version == version;
    }
    return false;
}

static void hold(node_client *c, uint32_t layer, uint64_t version) {
    size_t i = 0;
    while (i < c->held_count && c->held[i].layer < layer) i++;
    if (i == c->held_count || c->held[i].layer != layer) {
        FL_ASSERT(c->held_count < FL_LAYERS_MAX);
        memmove(&c->held[i + 1], &c->held[i], (c->held_count - i) * sizeof(c->held[0]));
        c->held_count++;
    }
    c->held[i] = (fl_layer_version){layer, version};
}

static bool have_object(const node_client *c, size_t index) {
    if (index == 0)
        return c->has_model &&
               memcmp(c->model_digest, c->task.model_digest, sizeof(c->model_digest)) == 0;
    return held_at(c, c->objects[index - 1].layer, c->objects[index - 1].version);
}

static void fetch_or_train(node_client *c, node_client_effects *fx) {
    while (c->fetch_next <= c->task.object_count && have_object(c, c->fetch_next)) c->fetch_next++;
    c->fetched = 0;
    if (c->fetch_next <= c->task.object_count) {
        c->phase = NODE_CLIENT_FETCHING;
        effect(fx, NODE_FX_FETCH_BEGIN)->object = object_at(c, c->fetch_next);
        return;
    }
    c->phase = NODE_CLIENT_TRAINING;
    c->step = 0;
    effect(fx, NODE_FX_TRAIN);
}

// ---- messages

static void on_task(node_client *c, const node_client_event *ev, node_client_effects *fx) {
    const fl_task *t = &ev->message->task;
    if (c->phase != NODE_CLIENT_ASKING) return;
    if (c->has_model && memcmp(c->run_id, t->run_id, sizeof(c->run_id)) != 0) {
        c->has_model = false; // another run: nothing of the old one's layers holds any more
        c->held_count = 0;
        c->vote_version = 0;
    }
    c->task = *t;
    memcpy(c->run_id, t->run_id, sizeof(c->run_id));
    for (size_t i = 0; i < t->base_count; i++) c->bases[i] = t->bases[i];
    for (size_t i = 0; i < t->object_count; i++) c->objects[i] = t->objects[i];
    c->task.bases = c->bases;
    c->task.objects = c->objects;
    c->deadline_ms = ev->now_ms + t->deadline_ms;
    c->steps = t->steps;
    c->fetch_next = 0;
    if (t->vote.version > c->vote_version) {
        c->vote_version = t->vote.version;
        effect(fx, NODE_FX_VOTE);
    }
    fetch_or_train(c, fx);
}

static void end(node_client *c, fl_code code, node_client_effects *fx) {
    c->phase = NODE_CLIENT_FINISHED;
    effect(fx, NODE_FX_END)->code = code;
}

static void on_wait(node_client *c, const node_client_event *ev, node_client_effects *fx) {
    const fl_wait *w = &ev->message->wait;
    if (c->phase != NODE_CLIENT_ASKING) return;
    if (w->reason == FL_CODE_FINISHED) {
        end(c, w->reason, fx);
        return;
    }
    c->phase = NODE_CLIENT_WAITING;
    c->wake_ms = ev->now_ms + w->retry_after_ms;
}

static void on_chunk(node_client *c, const node_client_event *ev, node_client_effects *fx) {
    const fl_chunk *m = &ev->message->chunk;
    if (c->phase != NODE_CLIENT_FETCHING) return;
    const node_object o = object_at(c, c->fetch_next);
    if (memcmp(m->digest, o.digest, sizeof(o.digest)) != 0 || m->offset != c->fetched ||
        m->total != o.size)
        return; // the answer to an older request
    node_client_effect *e = effect(fx, NODE_FX_STORE);
    e->object = o;
    e->chunk = m->data;
    e->offset = m->offset;
    c->asked_ms = ev->now_ms;
}

static bool same_key(const fl_update_key *a, const fl_update_key *b) {
    return a->layer == b->layer && a->base_version == b->base_version && a->sequence == b->sequence;
}

// The answer to what was sent once: to UPDATE_BEGIN, or to a chunk that came as a whole.
static void measure(node_client *c, uint64_t offset, uint64_t ms) {
    if (!c->begun)
        node_uplink_small(&c->uplink, ms);
    else if (offset > c->sent && offset - c->sent <= FL_CHUNK_MAX)
        node_uplink_chunk(&c->uplink, (uint32_t)(offset - c->sent), ms);
}

static void on_want(node_client *c, const node_client_event *ev, node_client_effects *fx) {
    const fl_update_want *m = &ev->message->update_want;
    if (c->phase != NODE_CLIENT_SENDING || !same_key(&m->key, &c->spool[0].begin.key)) return;
    if (m->offset > c->spool[0].begin.size) return;
    if (c->resends == 0) measure(c, m->offset, ev->now_ms - c->asked_ms);
    c->begun = true;
    c->sent = m->offset;
    c->resends = 0;
    ask(c, ev->now_ms, fx);
}

static void on_ack(node_client *c, const node_client_event *ev, node_client_effects *fx) {
    const fl_update_ack *m = &ev->message->update_ack;
    if (c->phase != NODE_CLIENT_SENDING || !same_key(&m->key, &c->spool[0].begin.key)) return;
    node_client_effect *e = effect(fx, NODE_FX_DROP);
    e->key = m->key;
    e->verdict = m->verdict;
    e->code = m->code;
    memmove(&c->spool[0], &c->spool[1], (c->spool_count - 1) * sizeof(c->spool[0]));
    c->spool_count--;
    next_job(c, ev->now_ms, fx);
}

static void on_report_ack(node_client *c, const node_client_event *ev, node_client_effects *fx) {
    const fl_report_ack *m = &ev->message->report_ack;
    if (c->phase != NODE_CLIENT_REPORTING || m->sequence != c->report.sequence) return;
    c->has_report = false;
    next_job(c, ev->now_ms, fx);
}

static void on_heartbeat_ack(node_client *c, const node_client_event *ev, node_client_effects *fx) {
    const fl_heartbeat_ack *m = &ev->message->heartbeat_ack;
    if (m->order != FL_ORDER_ABANDON || c->phase != NODE_CLIENT_TRAINING) return;
    if (m->task_id != c->task.task_id) return;
    effect(fx, NODE_FX_ABANDON);
}

// A task that is being trained goes on without a session; its updates go to the spool.
static void give_up_session(node_client *c, node_client_effects *fx) {
    c->online = false;
    if (c->phase != NODE_CLIENT_TRAINING) c->phase = NODE_CLIENT_OFFLINE;
    effect(fx, NODE_FX_SHAKE_HANDS);
}

static void on_error(node_client *c, const node_client_event *ev, node_client_effects *fx) {
    const fl_code code = ev->message->error.code;
    if (code == FL_CODE_REVOKED) {
        end(c, code, fx);
    } else if (code == FL_CODE_SESSION) {
        give_up_session(c, fx);
    } else if (code == FL_CODE_NO_OBJECT && c->phase == NODE_CLIENT_FETCHING) {
        enter(c, NODE_CLIENT_ASKING, ev->now_ms, fx); // superseded while we fetched it
    }
    // Anything else: the request stays under way and is sent again when its time is up.
}

static void on_message(node_client *c, const node_client_event *ev, node_client_effects *fx) {
    switch (ev->message->type) {
    case FL_MSG_TASK:
        on_task(c, ev, fx);
        return;
    case FL_MSG_WAIT:
        on_wait(c, ev, fx);
        return;
    case FL_MSG_CHUNK:
        on_chunk(c, ev, fx);
        return;
    case FL_MSG_UPDATE_WANT:
        on_want(c, ev, fx);
        return;
    case FL_MSG_UPDATE_ACK:
        on_ack(c, ev, fx);
        return;
    case FL_MSG_REPORT_ACK:
        on_report_ack(c, ev, fx);
        return;
    case FL_MSG_HEARTBEAT_ACK:
        on_heartbeat_ack(c, ev, fx);
        return;
    case FL_MSG_ERROR:
        on_error(c, ev, fx);
        return;
    default:
        return; // not for a node; the frame check has refused those already
    }
}

// ---- the other events

static void on_session_up(node_client *c, const node_client_event *ev, node_client_effects *fx) {
    c->online = true;
    if (c->phase == NODE_CLIENT_OFFLINE) next_job(c, ev->now_ms, fx);
}

static void on_session_down(node_client *c, const node_client_event *ev, node_client_effects *fx) {
    (void)ev, (void)fx;
    c->online = false;
    if (c->phase != NODE_CLIENT_TRAINING && c->phase != NODE_CLIENT_FINISHED)
        c->phase = NODE_CLIENT_OFFLINE;
}

static void send_heartbeat(node_client *c, uint64_t now_ms, node_client_effects *fx) {
    static const fl_node_state states[] = {FL_NODE_IDLE,       FL_NODE_IDLE,     FL_NODE_IDLE,
                                           FL_NODE_FETCHING,   FL_NODE_TRAINING, FL_NODE_SENDING,
                                           FL_NODE_EVALUATING, FL_NODE_IDLE};
    fl_heartbeat *h = &send(fx, FL_MSG_HEARTBEAT)->heartbeat;
    h->capability = c->capability;
    h->state = states[c->phase];
    h->task_id = c->phase == NODE_CLIENT_TRAINING ? c->task.task_id : 0;
    h->step = c->step;
    h->steps = c->steps;
    h->tokens = c->tokens;
    h->loss = c->loss;
    h->bytes_up = c->bytes_up;
    h->bytes_down = c->bytes_down;
    c->heartbeat_ms = now_ms;
}

static void on_tick(node_client *c, const node_client_event *ev, node_client_effects *fx) {
    const uint64_t now = ev->now_ms;
    if (c->phase == NODE_CLIENT_OFFLINE || c->phase == NODE_CLIENT_FINISHED) return;
    if (c->online && now - c->heartbeat_ms >= NODE_CLIENT_HEARTBEAT_MS) send_heartbeat(c, now, fx);
    if (c->phase == NODE_CLIENT_TRAINING) {
        if (now >= c->deadline_ms) effect(fx, NODE_FX_ABANDON);
    } else if (c->phase == NODE_CLIENT_WAITING) {
        if (now >= c->wake_ms) enter(c, NODE_CLIENT_ASKING, now, fx);
    } else if (now - c->asked_ms >= NODE_CLIENT_REPLY_MS) {
        if (c->resends++ < NODE_CLIENT_RESENDS) {
            ask(c, now, fx);
        } else {
            give_up_session(c, fx);
        }
    }
}

static void on_stored(node_client *c, const node_client_event *ev, node_client_effects *fx) {
    if (c->phase != NODE_CLIENT_FETCHING) return;
    const node_object o = object_at(c, c->fetch_next);
    c->fetched = ev->stored < o.size ? ev->stored : o.size;
    if (c->fetched < o.size) {
        c->resends = 0;
        ask(c, ev->now_ms, fx);
        return;
    }
    if (o.model) {
        c->has_model = true;
        memcpy(c->model_digest, o.digest, sizeof(c->model_digest));
    } else {
        hold(c, o.layer, o.version);
    }
    fetch_or_train(c, fx);
}

static void on_object_bad(node_client *c, const node_client_event *ev, node_client_effects *fx) {
    if (c->phase != NODE_CLIENT_FETCHING) return;
    c->fetched = 0;
    ask(c, ev->now_ms, fx);
}

static void on_trained(node_client *c, const node_client_event *ev, node_client_effects *fx) {
    if (c->phase != NODE_CLIENT_TRAINING) return;
    for (size_t i = 0; i < ev->update_count && c->spool_count < FL_LAYERS_MAX; i++)
        c->spool[c->spool_count++] = ev->updates[i];
    c->has_report = ev->report != NULL;
    if (c->has_report) c->report = *ev->report;
    next_job(c, ev->now_ms, fx);
}

static void on_train_failed(node_client *c, const node_client_event *ev, node_client_effects *fx) {
    (void)fx;
    if (c->phase != NODE_CLIENT_TRAINING) return;
    c->phase = NODE_CLIENT_WAITING;
    c->wake_ms = ev->now_ms + NODE_CLIENT_REPLY_MS;
}

void node_client_step(node_client *c, const node_client_event *ev, node_client_effects *ret) {
    static void (*const handlers[NODE_EV_COUNT])(node_client *, const node_client_event *,
                                                 node_client_effects *) = {
        [NODE_EV_SESSION_UP] = on_session_up, [NODE_EV_SESSION_DOWN] = on_session_down,
        [NODE_EV_MESSAGE] = on_message,       [NODE_EV_TICK] = on_tick,
        [NODE_EV_STORED] = on_stored,         [NODE_EV_OBJECT_BAD] = on_object_bad,
        [NODE_EV_TRAINED] = on_trained,       [NODE_EV_TRAIN_FAILED] = on_train_failed,
    };
    FL_ASSERT((unsigned)ev->kind < NODE_EV_COUNT);
    ret->count = 0;
    handlers[ev->kind](c, ev, ret);
}
