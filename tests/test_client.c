// Goal: the node's state machine finishes its tasks over a network that loses, repeats and delays
// everything, and no acknowledged update is ever sent as a new one. Method: a small coordinator in
// the test that answers by the protocol and keeps a ledger; a seeded network between the two; the
// node is killed at random and begun again from its spool.
#include "node/client/client.h"
#include "tests/check.h"

enum { MODEL_SIZE = 600000, LAYER_SIZE = 300, UPDATE_SIZE = 300000, WINDOW = 3, TASKS = 4 };

// What a node keeps on its disk.
typedef struct disk {
    node_spooled spool[FL_LAYERS_MAX];
    size_t spool_count;
    uint64_t sequence;
    uint64_t object_bytes; // of the object being fetched
    bool model;
} disk;

// The coordinator: how much of each update it has, and how often each was counted.
typedef struct ledger_row {
    fl_update_key key;
    uint64_t have;
    uint32_t counted;
} ledger_row;

typedef struct world {
    node_client client;
    disk disk;
    ledger_row ledger[64];
    size_t ledger_count;
    uint64_t tasks, reports, now_ms;
    fl_msg wire[8]; // to the node, in order
    size_t wire_count;
    fl_layer_version bases[WINDOW];
    fl_layer_object objects[WINDOW];
    unsigned loss_percent;
    bool training, ended;
    uint32_t kills;
} world;

static bool lost(const world *w) {
    return t_rand() % 100 < w->loss_percent;
}

static void reply(world *w, fl_msg_type type, fl_msg m) {
    m.type = type;
    for (unsigned copies = lost(w) ? 2 : 1; copies > 0; copies--) { // some arrive twice
        if (!lost(w) && w->wire_count < FL_COUNT(w->wire)) w->wire[w->wire_count++] = m;
    }
}

static ledger_row *row_of(world *w, const fl_update_key *key) {
    for (size_t i = 0; i < w->ledger_count; i++) {
        if (memcmp(&w->ledger[i].key, key, sizeof(*key)) == 0) return &w->ledger[i];
    }
    T_NEED(w->ledger_count < FL_COUNT(w->ledger), "more updates than were ever made");
    w->ledger[w->ledger_count] = (ledger_row){.key = *key};
    return &w->ledger[w->ledger_count++];
}

static void answer_task(world *w) {
    fl_msg m = {0};
    if (w->tasks == TASKS) {
        m.wait = (fl_wait){.reason = FL_CODE_FINISHED, .retry_after_ms = 1};
        reply(w, FL_MSG_WAIT, m);
        return;
    }
    fl_task *t = &m.task;
    *t = (fl_task){.kind = FL_TASK_TRAIN,
                   .task_id = w->tasks + 1,
                   .model_size = MODEL_SIZE,
                   .steps = 2,
                   .deadline_ms = 1000000,
                   .base_count = WINDOW,
                   .object_count = w->tasks == 0 ? 0 : WINDOW,
                   .vote = {.version = w->tasks}};
    memset(t->model_digest, 7, sizeof(t->model_digest));
    for (uint32_t i = 0; i < WINDOW; i++) {
        w->bases[i] = (fl_layer_version){i + 1, w->tasks};
        w->objects[i] = (fl_layer_object){.layer = i + 1, .version = w->tasks, .size = LAYER_SIZE};
        memset(w->objects[i].digest, (int)(10 * w->tasks + i), sizeof(w->objects[i].digest));
    }
    t->bases = w->bases;
    t->objects = w->objects;
    reply(w, FL_MSG_TASK, m);
}

static void coordinator(world *w, const fl_msg *in) {
    static uint8_t zeros[FL_CHUNK_MAX];
    fl_msg m = {0};
    if (lost(w)) return;
    if (in->type == FL_MSG_TASK_REQUEST) {
        answer_task(w);
    } else if (in->type == FL_MSG_CHUNK_REQUEST) {
        const fl_chunk_request *r = &in->chunk_request;
        const uint64_t total = r->digest[0] == 7 ? MODEL_SIZE : LAYER_SIZE;
        T_NEED(r->offset < total && r->size > 0 && r->size <= FL_CHUNK_MAX, "chunk request");
        const uint64_t left = total - r->offset;
        m.chunk = (fl_chunk){
            .offset = r->offset, .total = total, .data = {zeros, left < r->size ? left : r->size}};
        memcpy(m.chunk.digest, r->digest, sizeof(m.chunk.digest));
        reply(w, FL_MSG_CHUNK, m);
    } else if (in->type == FL_MSG_UPDATE_BEGIN) {
        ledger_row *row = row_of(w, &in->update_begin.key);
        if (row->counted > 0) {
            m.update_ack = (fl_update_ack){.key = row->key, .verdict = FL_VERDICT_DUPLICATE};
            reply(w, FL_MSG_UPDATE_ACK, m);
        } else {
            m.update_want = (fl_update_want){row->key, row->have};
            reply(w, FL_MSG_UPDATE_WANT, m);
        }
    } else if (in->type == FL_MSG_UPDATE_CHUNK) {
        ledger_row *row = row_of(w, &in->update_chunk.key);
        if (in->update_chunk.offset == row->have) row->have += in->update_chunk.data.size;
        m.update_want = (fl_update_want){row->key, row->have};
        reply(w, FL_MSG_UPDATE_WANT, m);
    } else if (in->type == FL_MSG_UPDATE_COMMIT) {
        ledger_row *row = row_of(w, &in->update_commit.key);
        T_EQ(row->have, UPDATE_SIZE);
        m.update_ack = (fl_update_ack){.key = row->key,
                                       .verdict = row->counted > 0 ? FL_VERDICT_DUPLICATE
                                                                   : FL_VERDICT_ACCEPTED};
        row->counted = 1; // the ledger's unique key
        reply(w, FL_MSG_UPDATE_ACK, m);
    } else if (in->type == FL_MSG_REPORT) {
        w->reports |= 1u << in->report.sequence;
        m.report_ack = (fl_report_ack){in->report.sequence, FL_VERDICT_ACCEPTED, FL_CODE_NONE};
        reply(w, FL_MSG_REPORT_ACK, m);
    } else {
        T_EQ(in->type, FL_MSG_HEARTBEAT);
    }
}

static void feed(world *w, const node_client_event *ev);

static void carry_out(world *w, const node_client_effect *e) {
    static uint8_t zeros[FL_CHUNK_MAX];
    if (e->kind == NODE_FX_SEND) {
        coordinator(w, &e->message);
    } else if (e->kind == NODE_FX_FETCH_BEGIN) {
        w->disk.object_bytes = 0;
        feed(w, &(node_client_event){.kind = NODE_EV_STORED, .now_ms = w->now_ms});
    } else if (e->kind == NODE_FX_STORE) {
        T_EQ(e->offset, w->disk.object_bytes);
        w->disk.object_bytes += e->chunk.size;
        const bool whole = w->disk.object_bytes == e->object.size;
        if (whole && t_rand() % 8 == 0) { // the digest does not hold: from the start
            w->disk.object_bytes = 0;
            feed(w, &(node_client_event){.kind = NODE_EV_OBJECT_BAD, .now_ms = w->now_ms});
            return;
        }
        w->disk.model |= whole && e->object.model;
        feed(w, &(node_client_event){
                    .kind = NODE_EV_STORED, .now_ms = w->now_ms, .stored = w->disk.object_bytes});
    } else if (e->kind == NODE_FX_TRAIN) {
        T_CHECK(w->disk.model, "training without a model");
        w->training = true;
    } else if (e->kind == NODE_FX_SEND_CHUNK) {
        const fl_msg m = {.type = FL_MSG_UPDATE_CHUNK,
                          .update_chunk = {e->key, e->offset, {zeros, e->size}}};
        coordinator(w, &m);
    } else if (e->kind == NODE_FX_DROP) {
        T_EQ(row_of(w, &e->key)->counted, 1); // acknowledged means counted
        T_CHECK(memcmp(&w->disk.spool[0].begin.key, &e->key, sizeof(e->key)) == 0, "oldest first");
        w->disk.spool_count--;
        memmove(&w->disk.spool[0], &w->disk.spool[1],
                w->disk.spool_count * sizeof(w->disk.spool[0]));
    } else if (e->kind == NODE_FX_END) {
        T_EQ(e->code, FL_CODE_FINISHED);
        w->ended = true;
    } else if (e->kind == NODE_FX_SHAKE_HANDS) {
        w->wire_count = 0; // frames of the old session do not open in the new one
        feed(w, &(node_client_event){.kind = NODE_EV_SESSION_UP, .now_ms = w->now_ms});
    }
}

static void feed(world *w, const node_client_event *ev) {
    node_client_effects fx;
    node_client_step(&w->client, ev, &fx);
    for (size_t i = 0; i < fx.count; i++) carry_out(w, &fx.list[i]);
}

static void finish_training(world *w) {
    node_spooled made[WINDOW];
    w->training = false;
    w->tasks++;
    for (uint32_t i = 0; i < WINDOW; i++) {
        made[i].begin =
            (fl_update_begin){.key = {w->bases[i].layer, w->bases[i].version, ++w->disk.sequence},
                              .tokens = 1,
                              .size = UPDATE_SIZE};
        w->disk.spool[w->disk.spool_count++] = made[i];
    }
    const fl_report report = {.sequence = w->tasks, .tokens = 1};
    feed(w, &(node_client_event){.kind = NODE_EV_TRAINED,
                                 .now_ms = w->now_ms,
                                 .updates = made,
                                 .update_count = WINDOW,
                                 .report = &report});
}

static void kill_and_restart(world *w) {
    w->training = false;
    w->wire_count = 0;
    w->kills++;
    node_client_init(&w->client, w->disk.spool, w->disk.spool_count);
    feed(w, &(node_client_event){.kind = NODE_EV_SESSION_UP, .now_ms = w->now_ms});
}

static void run_world(unsigned loss_percent, unsigned kill_every) {
    static world w;
    memset(&w, 0, sizeof(w));
    w.loss_percent = loss_percent;
    w.now_ms = 1;
    node_client_init(&w.client, NULL, 0);
    feed(&w, &(node_client_event){.kind = NODE_EV_SESSION_UP, .now_ms = w.now_ms});
    for (uint32_t i = 0; i < 200000 && !w.ended; i++) {
        w.now_ms += 100;
        if (kill_every != 0 && t_rand() % kill_every == 0) kill_and_restart(&w);
        if (w.training && t_rand() % 4 == 0) finish_training(&w);
        if (w.wire_count > 0) {
            const fl_msg m = w.wire[0];
            memmove(&w.wire[0], &w.wire[1], --w.wire_count * sizeof(w.wire[0]));
            feed(&w,
                 &(node_client_event){.kind = NODE_EV_MESSAGE, .now_ms = w.now_ms, .message = &m});
        } else {
            feed(&w, &(node_client_event){.kind = NODE_EV_TICK, .now_ms = w.now_ms});
        }
    }
    T_CHECK(w.ended, "loss %u%%, kills %u: not finished", loss_percent, w.kills);
    T_EQ(w.disk.spool_count, 0);
    T_EQ(w.ledger_count, TASKS * WINDOW);
    for (size_t i = 0; i < w.ledger_count; i++) T_EQ(w.ledger[i].counted, 1);
    if (kill_every == 0) T_EQ(w.reports, (1u << (TASKS + 1)) - 2); // every report arrived
}

static void test_finishes_on_a_good_network(void) {
    run_world(0, 0);
}

static void test_finishes_on_bad_networks(void) {
    for (unsigned i = 0; i < 60; i++) run_world(i % 45, 0);
}

static void test_survives_kills(void) {
    for (unsigned i = 0; i < 60; i++) run_world(i % 20, 40 + 5 * i);
}

static void test_late_answers_are_ignored(void) {
    node_client c;
    node_client_effects fx;
    node_client_init(&c, NULL, 0);
    for (unsigned type = 0; type < 64; type++) { // every message, before anything was asked
        const fl_msg m = {.type = (fl_msg_type)type};
        const node_client before = c;
        node_client_step(&c, &(node_client_event){.kind = NODE_EV_MESSAGE, .message = &m}, &fx);
        T_CHECK(fx.count == 0 && memcmp(&before, &c, sizeof(c)) == 0, "type %u", type);
    }
}

static void test_abandons_at_the_deadline(void) {
    static world w;
    memset(&w, 0, sizeof(w));
    w.disk.model = true;
    node_client_init(&w.client, NULL, 0);
    feed(&w, &(node_client_event){.kind = NODE_EV_SESSION_UP, .now_ms = 1});
    fl_task task = {.kind = FL_TASK_TRAIN, .task_id = 1, .deadline_ms = 500};
    w.client.has_model = true;
    const fl_msg m = {.type = FL_MSG_TASK, .task = task};
    node_client_effects fx;
    node_client_step(
        &w.client, &(node_client_event){.kind = NODE_EV_MESSAGE, .now_ms = 1, .message = &m}, &fx);
    T_EQ(fx.count, 1);
    T_EQ(fx.list[0].kind, NODE_FX_TRAIN);
    node_client_step(&w.client, &(node_client_event){.kind = NODE_EV_TICK, .now_ms = 500}, &fx);
    T_EQ(fx.count, 0);
    node_client_step(&w.client, &(node_client_event){.kind = NODE_EV_TICK, .now_ms = 501}, &fx);
    T_EQ(fx.count, 1);
    T_EQ(fx.list[0].kind, NODE_FX_ABANDON);
}

T_MAIN({"finishes_on_a_good_network", test_finishes_on_a_good_network},
       {"finishes_on_bad_networks", test_finishes_on_bad_networks},
       {"survives_kills", test_survives_kills},
       {"late_answers_are_ignored", test_late_answers_are_ignored},
       {"abandons_at_the_deadline", test_abandons_at_the_deadline})
