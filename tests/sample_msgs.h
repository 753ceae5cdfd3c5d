// sample_msgs.h: one legal message of every type with every field set to something that shows, for
// tests of whatever carries messages. The arrays are static: one sample is in use at a time.
#ifndef FL_TESTS_SAMPLE_MSGS_H
#define FL_TESTS_SAMPLE_MSGS_H

#include "proto/codec.h"

#include <string.h>

static const fl_msg_type sample_types[] = {
#define X(name, number, from, form, body_max) FL_MSG_##name,
    FL_MSG_LIST(X)
#undef X
};

static fl_layer_version sample_layers[FL_LAYERS_MAX];
static fl_layer_object sample_objects[FL_LAYERS_MAX];
static uint8_t sample_data[FL_CHUNK_MAX];

static inline void sample_bytes(uint8_t *p, size_t size, unsigned start) {
    for (size_t i = 0; i < size; i++) p[i] = (uint8_t)(start + i * 7 + 1);
}

static inline fl_capability sample_capability(void) {
    return (fl_capability){
        (uint64_t)3 << 33, 1234567890123, 17.25f, 61250, FL_THROTTLE_CAPPED, 4, 6};
}

static inline void sample_layer_versions(uint32_t first, size_t count) {
    for (size_t i = 0; i < count; i++)
        sample_layers[i] = (fl_layer_version){first + (uint32_t)i, UINT64_MAX - i};
}

// `window` layers and as many objects.
static inline fl_task sample_task(uint32_t window) {
    fl_task t = {
        .kind = FL_TASK_TRAIN,
        .round = 12,
        .task_id = 345,
        .model_size = 70000000,
        .rank = 8,
        .alpha = 16.0f,
        .a_seed = 0xfedcba9876543210u,
        .exit_count = 2,
        .exit_layers = {3, FL_LAYERS_MAX - 1},
        .layer_last = window - 1,
        .exit_layer = FL_LAYERS_MAX - 1,
        .steps = 30,
        .sequence = 256,
        .micro_batch = 2,
        .learning_rate = 1e-3f,
        .seed = 99,
        .base_count = window,
        .bases = sample_layers,
        .object_count = window,
        .objects = sample_objects,
        .vote = {7, FL_VOTE_MIXTURE, 2, {0.25f, 0.75f}, {1.5f, 1.0f}},
        .deadline_ms = 600000,
        .encoding = 1,
        .encoding_most = 5,
        .keep_ppm = 50000,
        .eval_tokens = 2048,
    };
    sample_bytes(t.run_id, FL_ID_SIZE, 1);
    sample_bytes(t.model_digest, FL_DIGEST_SIZE, 2);
    sample_layer_versions(0, window);
    for (uint32_t i = 0; i < window; i++) {
        sample_objects[i] =
            (fl_layer_object){.layer = i, .version = UINT64_MAX - i, .size = 1 << 20};
        sample_bytes(sample_objects[i].digest, FL_DIGEST_SIZE, i);
    }
    return t;
}

static inline fl_report sample_report(void) {
    fl_report r = {
        .round = 2,
        .task_id = 3,
        .sequence = 4,
        .vote_version = 5,
        .tokens = 1000,
        .nll_base_q20 = 3500 * (int64_t)1048576,
        .nll_local_q20 = 3400 * (int64_t)1048576,
        .nll_voted_q20 = -17,
        .exit_count = 2,
        .exits = {{123456789, 300 << 20, 400}, {-5, 700 << 20, 1000}},
        .peak_rss_bytes = 200000000,
    };
    sample_bytes(r.run_id, FL_ID_SIZE, 3);
    sample_bytes(r.layers_digest, FL_DIGEST_SIZE, 4);
    return r;
}

static inline void sample_clear(fl_msg *m) { // messages that travel before there is a session
    switch (m->type) {
    case FL_MSG_JOIN_REQUEST:
        m->join_request =
            (fl_join_request){.name = "pi-kitchen", .protocol = 1, .software = "v0.1"};
        m->join_request.capability = sample_capability();
        sample_bytes(m->join_request.token_id, FL_TOKEN_ID_SIZE, 1);
        sample_bytes(m->join_request.identity_key, FL_KEY_SIZE, 2);
        sample_bytes(m->join_request.curve_key, FL_KEY_SIZE, 3);
        sample_bytes(m->join_request.nonce, FL_KEY_SIZE, 4);
        sample_bytes(m->join_request.proof, FL_KEY_SIZE, 5);
        return;
    case FL_MSG_JOIN_REPLY:
        m->join_reply =
            (fl_join_reply){FL_VERDICT_PENDING, FL_CODE_PENDING, "ask the owner", {0}, {0}, {0}};
        sample_bytes(m->join_reply.identity_key, FL_KEY_SIZE, 6);
        sample_bytes(m->join_reply.node_id, FL_ID_SIZE, 7);
        sample_bytes(m->join_reply.proof, FL_KEY_SIZE, 8);
        return;
    case FL_MSG_HELLO:
        m->hello = (fl_hello){.protocol = 1, .software = "fleetune-0.1"};
        sample_bytes(m->hello.identity_key, FL_KEY_SIZE, 9);
        sample_bytes(m->hello.ephemeral_key, FL_KEY_SIZE, 10);
        sample_bytes(m->hello.nonce, FL_KEY_SIZE, 11);
        return;
    case FL_MSG_HELLO_REPLY:
        m->hello_reply = (fl_hello_reply){.protocol = 1, .session = UINT64_MAX};
        sample_bytes(m->hello_reply.ephemeral_key, FL_KEY_SIZE, 12);
        sample_bytes(m->hello_reply.nonce, FL_KEY_SIZE, 13);
        sample_bytes(m->hello_reply.update_key, FL_KEY_SIZE, 14);
        sample_bytes(m->hello_reply.signature, FL_SIGNATURE_SIZE, 15);
        return;
    case FL_MSG_HELLO_FINISH:
        m->hello_finish.session = 77;
        sample_bytes(m->hello_finish.signature, FL_SIGNATURE_SIZE, 16);
        return;
    default:
        m->error = (fl_error){FL_CODE_SESSION, "shake hands again", 77};
    }
}

static inline fl_msg sample_msg(fl_msg_type type) {
    fl_msg m;
    memset(&m, 0, sizeof(m)); // padding too: tests compare whole messages
    m.type = type;
    const fl_update_key key = {29, 17, 5};
    sample_bytes(sample_data, sizeof(sample_data), 3);
    switch (type) {
    case FL_MSG_TASK_REQUEST:
        sample_layer_versions(2, 5);
        m.task_request =
            (fl_task_request){sample_capability(), true, {0}, {0}, 5, sample_layers, 8, 9};
        sample_bytes(m.task_request.run_id, FL_ID_SIZE, 17);
        sample_bytes(m.task_request.model_digest, FL_DIGEST_SIZE, 18);
        break;
    case FL_MSG_TASK:
        m.task = sample_task(4);
        break;
    case FL_MSG_WAIT:
        m.wait = (fl_wait){FL_CODE_NO_WORK, 5000, "next round soon"};
        break;
    case FL_MSG_CHUNK_REQUEST:
        m.chunk_request = (fl_chunk_request){.offset = 1 << 20, .size = FL_CHUNK_MAX};
        sample_bytes(m.chunk_request.digest, FL_DIGEST_SIZE, 19);
        break;
    case FL_MSG_CHUNK:
        m.chunk = (fl_chunk){{0}, 1 << 20, 3 << 20, {sample_data, 1000}};
        sample_bytes(m.chunk.digest, FL_DIGEST_SIZE, 20);
        break;
    case FL_MSG_UPDATE_BEGIN:
        m.update_begin = (fl_update_begin){key, {0}, 3, 4, 5000, 83000, {0}};
        sample_bytes(m.update_begin.run_id, FL_ID_SIZE, 21);
        sample_bytes(m.update_begin.digest, FL_DIGEST_SIZE, 22);
        break;
    case FL_MSG_UPDATE_WANT:
        m.update_want = (fl_update_want){key, 262144};
        break;
    case FL_MSG_UPDATE_CHUNK:
        m.update_chunk = (fl_update_chunk){key, 262144, {sample_data, 999}};
        break;
    case FL_MSG_UPDATE_COMMIT:
        m.update_commit = (fl_update_commit){.key = key};
        sample_bytes(m.update_commit.digest, FL_DIGEST_SIZE, 23);
        break;
    case FL_MSG_UPDATE_ACK:
        m.update_ack = (fl_update_ack){key, FL_VERDICT_REFUSED, FL_CODE_BASE, "base 17 is gone"};
        break;
    case FL_MSG_HEARTBEAT:
        m.heartbeat =
            (fl_heartbeat){sample_capability(), FL_NODE_TRAINING, 345, 7, 30, 4096, 2.5f, 1, 2};
        break;
    case FL_MSG_HEARTBEAT_ACK:
        m.heartbeat_ack = (fl_heartbeat_ack){FL_ORDER_ABANDON, 345};
        break;
    case FL_MSG_REPORT:
        m.report = sample_report();
        break;
    case FL_MSG_REPORT_ACK:
        m.report_ack = (fl_report_ack){4, FL_VERDICT_DUPLICATE, FL_CODE_LATE};
        break;
    default:
        sample_clear(&m);
    }
    return m;
}

#endif
