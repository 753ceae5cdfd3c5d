// Goal: every message comes out as it went in, and no bytes of a peer give more than a status and
// more memory than the arena. Method: samples with every field set, every truncation and flipped
// byte, hand-made wire bytes for what an encoder of ours would never write.
#include "proto/codec.h"
#include "tests/check.h"
#include "tests/sample_msgs.h"

static uint8_t block_out[FL_CODEC_ARENA], block_in[FL_CODEC_ARENA], block_again[FL_CODEC_ARENA];

static bool same_lists(const fl_msg *a, const fl_msg *b) {
    switch (a->type) {
    case FL_MSG_TASK_REQUEST:
        return memcmp(a->task_request.layers, b->task_request.layers,
                      a->task_request.layer_count * sizeof(fl_layer_version)) == 0;
    case FL_MSG_TASK:
        return memcmp(a->task.bases, b->task.bases,
                      a->task.base_count * sizeof(fl_layer_version)) == 0 &&
               memcmp(a->task.objects, b->task.objects,
                      a->task.object_count * sizeof(fl_layer_object)) == 0;
    case FL_MSG_CHUNK:
        return memcmp(a->chunk.data.data, b->chunk.data.data, a->chunk.data.size) == 0;
    case FL_MSG_UPDATE_CHUNK:
        return memcmp(a->update_chunk.data.data, b->update_chunk.data.data,
                      a->update_chunk.data.size) == 0;
    default:
        return true;
    }
}

static void hide_pointers(fl_msg *m) {
    if (m->type == FL_MSG_TASK_REQUEST) m->task_request.layers = NULL;
    if (m->type == FL_MSG_TASK) m->task.bases = NULL, m->task.objects = NULL;
    if (m->type == FL_MSG_CHUNK) m->chunk.data.data = NULL;
    if (m->type == FL_MSG_UPDATE_CHUNK) m->update_chunk.data.data = NULL;
}

// The body of m in exact, guarded memory.
static uint8_t *encode(const fl_msg *m, size_t *ret_size) {
    fl_arena a;
    fl_bytes body;
    fl_err err;
    fl_arena_init(&a, block_out, sizeof(block_out));
    T_OK(fl_msg_encode(m, &a, &body, &err), err);
    uint8_t *p = t_guarded(body.size + (body.size == 0));
    memcpy(p, body.data, body.size);
    *ret_size = body.size;
    return p;
}

static void round_trip(fl_msg *m) {
    fl_arena in;
    fl_msg back;
    fl_err err;
    size_t size;
    uint8_t *p = encode(m, &size);
    fl_arena_init(&in, block_in, sizeof(block_in));
    memset(&back, 0, sizeof(back));
    T_OK(fl_msg_decode(m->type, (fl_bytes){p, size}, &in, &back, &err), err);
    T_CHECK(same_lists(m, &back), "%s: lists or bytes", fl_msg_name(m->type));
    fl_msg a = *m;
    hide_pointers(&a), hide_pointers(&back);
    T_CHECK(memcmp(&a, &back, sizeof(a)) == 0, "%s: fields", fl_msg_name(m->type));
    t_guarded_free(p, size + (size == 0));
}

static void test_every_message(void) {
    for (size_t i = 0; i < FL_COUNT(sample_types); i++) {
        fl_msg m = sample_msg(sample_types[i]);
        round_trip(&m);
    }
}

static void test_largest_messages(void) {
    fl_msg m = sample_msg(FL_MSG_TASK);
    m.task = sample_task(FL_LAYERS_MAX);
    m.task.exit_count = FL_EXITS_MAX;
    m.task.vote.count = FL_EXITS_MAX;
    for (uint32_t i = 0; i < FL_EXITS_MAX; i++) {
        m.task.exit_layers[i] = FL_LAYERS_MAX - FL_EXITS_MAX + i;
        m.task.vote.weights[i] = 1.0f / FL_EXITS_MAX;
        m.task.vote.temperatures[i] = 1.0f;
    }
    round_trip(&m);
    m = sample_msg(FL_MSG_TASK_REQUEST);
    sample_layer_versions(0, FL_LAYERS_MAX);
    m.task_request.layer_count = FL_LAYERS_MAX;
    round_trip(&m);
    m = sample_msg(FL_MSG_CHUNK);
    m.chunk.data.size = FL_CHUNK_MAX;
    m.chunk.offset = FL_OBJECT_MAX - FL_CHUNK_MAX;
    m.chunk.total = FL_OBJECT_MAX;
    round_trip(&m);
    m = sample_msg(FL_MSG_UPDATE_CHUNK);
    m.update_chunk.data.size = FL_UPLOAD_CHUNK_MAX;
    m.update_chunk.key = (fl_update_key){FL_LAYERS_MAX - 1, UINT64_MAX, UINT64_MAX};
    round_trip(&m);
    m = sample_msg(FL_MSG_REPORT);
    m.report.tokens = FL_UPDATE_TOKENS_MAX;
    m.report.exit_count = FL_EXITS_MAX;
    for (size_t i = 0; i < FL_EXITS_MAX; i++)
        m.report.exits[i] =
            (fl_exit_sums){-((int64_t)1 << 62), m.report.tokens << 16, m.report.tokens};
    round_trip(&m);
    m = sample_msg(FL_MSG_JOIN_REQUEST);
    memset(m.join_request.name, 'x', FL_NAME_MAX);
    memset(m.join_request.software, 'y', FL_NAME_MAX);
    round_trip(&m);
    m = sample_msg(FL_MSG_UPDATE_ACK);
    memset(m.update_ack.text, 'z', FL_TEXT_MAX);
    round_trip(&m);
    m = sample_msg(FL_MSG_ERROR);
    memset(m.error.text, '~', FL_TEXT_MAX);
    round_trip(&m);
}

// What decodes is legal, so it encodes again; what does not leaves arena and result alone.
static void decode_anything(fl_msg_type type, const uint8_t *p, size_t size, const char *what) {
    fl_arena in, again;
    fl_msg m;
    fl_bytes body;
    memset(&m, 0x5a, sizeof(m));
    fl_arena_init(&in, block_in, sizeof(block_in));
    fl_arena_init(&again, block_again, sizeof(block_again));
    const fl_status st = fl_msg_decode(type, (fl_bytes){p, size}, &in, &m, NULL);
    if (st == FL_OK) {
        T_EQ(fl_msg_encode(&m, &again, &body, NULL), FL_OK);
        return;
    }
    T_CHECK(st == FL_EFORMAT || st == FL_ELIMIT || st == FL_ENOMEM, "%s: %s", what,
            fl_status_name(st));
    T_EQ(in.used, 0);
    const uint8_t *raw = (const uint8_t *)&m;
    T_CHECK(raw[0] == 0x5a && raw[sizeof(m) - 1] == 0x5a, "%s: written on failure", what);
}

static void test_every_truncation_and_flip(void) {
    for (size_t i = 0; i < FL_COUNT(sample_types); i++) {
        const fl_msg m = sample_msg(sample_types[i]);
        size_t size;
        uint8_t *p = encode(&m, &size);
        for (size_t n = 0; n < size; n += n < 300 ? 1 : 97) {
            uint8_t *q = t_guarded(n + (n == 0));
            memcpy(q, p, n);
            decode_anything(m.type, q, n, "truncation");
            t_guarded_free(q, n + (n == 0));
        }
        for (size_t n = 0; n < size; n += n < 300 ? 1 : 97) {
            for (int bit = 0; bit < 8; bit++) {
                p[n] ^= (uint8_t)(1 << bit);
                decode_anything(m.type, p, size, "flip");
                p[n] ^= (uint8_t)(1 << bit);
            }
        }
        t_guarded_free(p, size + (size == 0));
    }
}

static void test_every_arena_size(void) {
    for (size_t i = 0; i < FL_COUNT(sample_types); i++) {
        const fl_msg m = sample_msg(sample_types[i]);
        size_t size, want = 0;
        uint8_t *p = encode(&m, &size);
        fl_arena a;
        fl_msg back;
        fl_bytes body;
        fl_status st = FL_ENOMEM;
        for (; st == FL_ENOMEM && want < sizeof(block_in); want += 8) {
            fl_arena_init(&a, block_in, want);
            st = fl_msg_decode(m.type, (fl_bytes){p, size}, &a, &back, NULL);
            if (st != FL_OK) T_EQ(a.used, 0);
        }
        T_EQ(st, FL_OK);
        T_CHECK(want < 8192, "%s takes %zu bytes to decode", fl_msg_name(m.type), want);
        st = FL_ENOMEM;
        for (want = 0; st == FL_ENOMEM && want < sizeof(block_in); want += 8) {
            fl_arena_init(&a, block_in, want);
            st = fl_msg_encode(&m, &a, &body, NULL);
            if (st != FL_OK) T_EQ(a.used, 0);
        }
        T_EQ(st, FL_OK);
        t_guarded_free(p, size + (size == 0));
    }
}

// ---- wire bytes by hand

typedef struct wire {
    uint8_t data[70000];
    size_t size;
} wire;
static wire w;

static void varint(uint64_t v) {
    for (; v >= 0x80; v >>= 7) w.data[w.size++] = (uint8_t)(v | 0x80);
    w.data[w.size++] = (uint8_t)v;
}

static void number(uint32_t field, uint64_t v) {
    varint((uint64_t)field << 3);
    varint(v);
}

static void bytes(uint32_t field, const void *data, size_t size) {
    varint((uint64_t)field << 3 | 2);
    varint(size);
    memcpy(w.data + w.size, data, size);
    w.size += size;
}

static fl_status decode_wire(fl_msg_type type, fl_msg *ret, fl_arena *a) {
    uint8_t *p = t_guarded(w.size + (w.size == 0));
    memcpy(p, w.data, w.size);
    fl_arena_init(a, block_in, sizeof(block_in));
    const fl_status st = fl_msg_decode(type, (fl_bytes){p, w.size}, a, ret, NULL);
    t_guarded_free(p, w.size + (w.size == 0));
    return st;
}

static void test_bombs(void) {
    fl_arena a;
    fl_msg m;
    w.size = 0; // as many empty sub-messages as a TASK may carry
    while (w.size + 2 <= 65536) bytes(16, "", 0);
    const fl_status objects = decode_wire(FL_MSG_TASK, &m, &a);
    T_CHECK(objects == FL_ENOMEM || objects == FL_ELIMIT, "%s", fl_status_name(objects));
    w.size = 0; // a packed list that would be 512 KiB
    static const uint8_t ones[60000] = {1};
    uint8_t adapter[60010];
    memcpy(adapter, "\x22\xe0\xd4\x03", 4); // field 4, 60000 bytes
    memcpy(adapter + 4, ones, 60000);
    bytes(6, adapter, 60004);
    const fl_status list = decode_wire(FL_MSG_TASK, &m, &a);
    T_CHECK(list == FL_ENOMEM || list == FL_ELIMIT || list == FL_EFORMAT, "%s",
            fl_status_name(list));
    w.size = 0; // the same sub-message again and again: merged each time
    while (w.size + 4 <= 512) bytes(1, "\x08\x01", 2);
    decode_anything(FL_MSG_HEARTBEAT, w.data, w.size, "merged");
    w.size = 0;
    number(1, 1);
    T_EQ(fl_msg_decode(FL_MSG_HEARTBEAT, (fl_bytes){w.data, 513}, &a, &m, NULL), FL_ELIMIT);
}

static void test_unknown_fields_and_codes(void) {
    fl_arena a;
    fl_msg m;
    w.size = 0;
    number(1, 4000000000u); // a reason of the future
    number(2, 1000);
    bytes(3, "later", 5);
    number(40, 1);
    bytes(69, "xyz", 3);
    bytes(536870911, "far", 3);
    T_EQ(decode_wire(FL_MSG_WAIT, &m, &a), FL_OK);
    T_EQ(m.wait.reason, FL_CODE_NONE);
    T_EQ(m.wait.retry_after_ms, 1000);
    T_STR(m.wait.text, "later");
    T_EQ(fl_msg_decode((fl_msg_type)99, (fl_bytes){w.data, 1}, &a, &m, NULL), FL_EUNSUPPORTED);
}

static void test_empty_messages_are_refused(void) {
    for (size_t i = 0; i < FL_COUNT(sample_types); i++) {
        fl_arena a;
        fl_msg m;
        fl_arena_init(&a, block_in, sizeof(block_in));
        const fl_status st = fl_msg_decode(sample_types[i], (fl_bytes){NULL, 0}, &a, &m, NULL);
        const bool may = sample_types[i] == FL_MSG_ERROR;
        T_CHECK(may ? st == FL_OK : st == FL_EFORMAT || st == FL_ELIMIT, "%s: %s",
                fl_msg_name(sample_types[i]), fl_status_name(st));
    }
}

// Each line makes a sample illegal; encoding refuses it, and decoding uses the same check.
#define REFUSED(T, change)                                                                         \
    do {                                                                                           \
        fl_msg m = sample_msg(FL_MSG_##T);                                                         \
        fl_arena a;                                                                                \
        fl_bytes body;                                                                             \
        change;                                                                                    \
        fl_arena_init(&a, block_out, sizeof(block_out));                                           \
        T_CHECK(fl_msg_encode(&m, &a, &body, NULL) == FL_EARG, "%s: %s", #T, #change);             \
        T_EQ(a.used, 0);                                                                           \
    } while (0)

static void test_limits_of_clear_messages(void) {
    REFUSED(JOIN_REQUEST, m.join_request.name[0] = '\0');
    REFUSED(JOIN_REQUEST, m.join_request.name[2] = ' ');
    REFUSED(JOIN_REQUEST, m.join_request.name[2] = '<');
    REFUSED(JOIN_REQUEST, m.join_request.name[2] = '\n');
    REFUSED(JOIN_REQUEST, m.join_request.name[2] = (char)0xc3);
    REFUSED(JOIN_REQUEST, memset(m.join_request.name, 'x', FL_NAME_MAX + 1));
    REFUSED(JOIN_REQUEST, m.join_request.software[0] = '\0');
    REFUSED(JOIN_REQUEST, memset(m.join_request.identity_key, 0, FL_KEY_SIZE));
    REFUSED(JOIN_REQUEST, m.join_request.capability.tokens_per_second = NAN);
    REFUSED(JOIN_REQUEST, m.join_request.capability.tokens_per_second = INFINITY);
    REFUSED(JOIN_REQUEST, m.join_request.capability.tokens_per_second = -1.0f);
    REFUSED(JOIN_REQUEST, m.join_request.capability.temperature_mc = 1000001);
    REFUSED(JOIN_REQUEST, m.join_request.capability.window_max = FL_LAYERS_MAX + 1);
    REFUSED(JOIN_REPLY, m.join_reply.verdict = FL_VERDICT_DUPLICATE);
    REFUSED(JOIN_REPLY, m.join_reply.verdict = (fl_verdict)0);
    REFUSED(JOIN_REPLY, m.join_reply.code = (fl_code)9999);
    REFUSED(JOIN_REPLY, m.join_reply.text[0] = '\033');
    REFUSED(JOIN_REPLY, memset(m.join_reply.text, 'x', FL_TEXT_MAX + 1));
    REFUSED(HELLO, m.hello.software[0] = '\0');
    REFUSED(HELLO_REPLY, m.hello_reply.session = 0);
    REFUSED(HELLO_FINISH, m.hello_finish.session = 0);
    REFUSED(ERROR, m.error.text[0] = '\r');
}

static void test_limits_of_tasks(void) {
    REFUSED(TASK_REQUEST, m.task_request.layer_count = FL_LAYERS_MAX + 1);
    REFUSED(TASK_REQUEST, sample_layers[2].layer = 3);
    REFUSED(TASK_REQUEST, sample_layers[4].layer = FL_LAYERS_MAX);
    REFUSED(TASK_REQUEST, m.task_request.tokens_local = FL_TOKENS_MAX + 1);
    REFUSED(TASK, m.task.kind = (fl_task_kind)3);
    REFUSED(TASK, m.task.task_id = 0);
    REFUSED(TASK, m.task.model_size = 0);
    REFUSED(TASK, m.task.model_size = FL_OBJECT_MAX + 1);
    REFUSED(TASK, m.task.rank = 0);
    REFUSED(TASK, m.task.rank = FL_TASK_RANK_MAX + 1);
    REFUSED(TASK, m.task.alpha = NAN);
    REFUSED(TASK, m.task.alpha = 0.0f);
    REFUSED(TASK, m.task.exit_count = 0);
    REFUSED(TASK, m.task.exit_count = FL_EXITS_MAX + 1);
    REFUSED(TASK, m.task.exit_layers[1] = 3);
    REFUSED(TASK, m.task.exit_layer = 4);
    REFUSED(TASK, m.task.layer_first = 5);
    REFUSED(TASK, m.task.exit_layer = 2);
    REFUSED(TASK, m.task.layer_last = FL_LAYERS_MAX);
    REFUSED(TASK, m.task.steps = 0);
    REFUSED(TASK, m.task.steps = FL_STEPS_MAX + 1);
    REFUSED(TASK, m.task.sequence = 0);
    REFUSED(TASK, m.task.micro_batch = FL_MICRO_BATCH_MAX + 1);
    REFUSED(TASK, m.task.learning_rate = 0.0f);
    REFUSED(TASK, m.task.learning_rate = NAN);
    REFUSED(TASK, m.task.base_count = 3);
    REFUSED(TASK, sample_layers[1].layer = 2);
    REFUSED(TASK, m.task.object_count = FL_LAYERS_MAX + 1);
    REFUSED(TASK, sample_objects[1].version = 0);
    REFUSED(TASK, sample_objects[1].size = FL_UPDATE_MAX + 1);
    REFUSED(TASK, sample_objects[3].layer = 2);
    REFUSED(TASK, m.task.vote.count = 1);
    REFUSED(TASK, m.task.vote.weights[0] = -0.1f);
    REFUSED(TASK, m.task.vote.weights[0] = NAN);
    REFUSED(TASK, m.task.vote.weights[0] = 0.3f);
    REFUSED(TASK, m.task.vote.temperatures[1] = 0.0f);
    REFUSED(TASK, m.task.vote.mode = (fl_vote_mode)0);
    REFUSED(TASK, m.task.deadline_ms = 0);
    REFUSED(TASK, m.task.encoding = 3);
    REFUSED(TASK, m.task.encoding_most = 6);
    REFUSED(TASK, m.task.keep_ppm = 1000001);
    REFUSED(TASK, m.task.kind = FL_TASK_EVAL); // with steps and bases
    REFUSED(WAIT, m.wait.retry_after_ms = 0);
    REFUSED(WAIT, m.wait.retry_after_ms = FL_WAIT_MS_MAX + 1);
    fl_msg m = sample_msg(FL_MSG_TASK);
    m.task.kind = FL_TASK_EVAL;
    m.task.steps = 0;
    m.task.base_count = 0;
    round_trip(&m);
}

static void test_limits_of_transfers(void) {
    REFUSED(CHUNK_REQUEST, m.chunk_request.size = 0);
    REFUSED(CHUNK_REQUEST, m.chunk_request.size = FL_CHUNK_MAX + 1);
    REFUSED(CHUNK_REQUEST, m.chunk_request.offset = FL_OBJECT_MAX);
    REFUSED(CHUNK, m.chunk.data.size = 0);
    REFUSED(CHUNK, m.chunk.data.size = FL_CHUNK_MAX + 1);
    REFUSED(CHUNK, m.chunk.total = (1 << 20) + 999);
    REFUSED(CHUNK, m.chunk.offset = UINT64_MAX);
    REFUSED(CHUNK, m.chunk.total = 10);
    REFUSED(UPDATE_BEGIN, m.update_begin.key.sequence = 0);
    REFUSED(UPDATE_BEGIN, m.update_begin.key.layer = FL_LAYERS_MAX);
    REFUSED(UPDATE_BEGIN, m.update_begin.tokens = 0);
    REFUSED(UPDATE_BEGIN, m.update_begin.tokens = FL_UPDATE_TOKENS_MAX + 1);
    REFUSED(UPDATE_BEGIN, m.update_begin.size = FL_UPDATE_MAX + 1);
    REFUSED(UPDATE_WANT, m.update_want.offset = FL_UPDATE_MAX + 1);
    REFUSED(UPDATE_CHUNK, m.update_chunk.offset = FL_UPDATE_MAX - 998);
    REFUSED(UPDATE_CHUNK, m.update_chunk.offset = UINT64_MAX);
    REFUSED(UPDATE_CHUNK, m.update_chunk.data.size = 0);
    REFUSED(UPDATE_CHUNK, m.update_chunk.data.size = FL_UPLOAD_CHUNK_MAX + 1);
    REFUSED(UPDATE_COMMIT, m.update_commit.key.sequence = 0);
    REFUSED(UPDATE_ACK, m.update_ack.verdict = FL_VERDICT_PENDING);
    REFUSED(HEARTBEAT, m.heartbeat.state = (fl_node_state)0);
    REFUSED(HEARTBEAT, m.heartbeat.loss = NAN);
    REFUSED(HEARTBEAT, m.heartbeat.step = 31);
    REFUSED(HEARTBEAT_ACK, m.heartbeat_ack.order = (fl_order)3);
    REFUSED(REPORT, m.report.sequence = 0);
    REFUSED(REPORT, m.report.tokens = 0);
    REFUSED(REPORT, m.report.nll_voted_q20 = INT64_MIN);
    REFUSED(REPORT, m.report.nll_base_q20 = (int64_t)1001 << 30);
    REFUSED(REPORT, m.report.exit_count = FL_EXITS_MAX + 1);
    REFUSED(REPORT, m.report.exits[0].correct = 1001);
    REFUSED(REPORT, m.report.exits[0].responsibility_q20 = UINT64_MAX);
    REFUSED(REPORT, m.report.exits[0].responsibility_q20 = 0);
    REFUSED(REPORT_ACK, m.report_ack.verdict = FL_VERDICT_PENDING);
}

static void test_codes_have_names(void) {
    T_STR(fl_code_name(FL_CODE_NONE), "NONE");
    T_STR(fl_code_name(FL_CODE_NOT_ASSIGNED), "NOT_ASSIGNED");
    T_STR(fl_code_name(12345), "UNKNOWN");
    T_CHECK(strlen(fl_code_text(FL_CODE_BASE)) > 10, "text");
}

T_MAIN({"every_message", test_every_message}, {"largest_messages", test_largest_messages},
       {"every_truncation_and_flip", test_every_truncation_and_flip},
       {"every_arena_size", test_every_arena_size}, {"bombs", test_bombs},
       {"unknown_fields_and_codes", test_unknown_fields_and_codes},
       {"empty_messages_are_refused", test_empty_messages_are_refused},
       {"limits_of_clear_messages", test_limits_of_clear_messages},
       {"limits_of_tasks", test_limits_of_tasks}, {"limits_of_transfers", test_limits_of_transfers},
       {"codes_have_names", test_codes_have_names})
