#include "proto/codec_internal.h"

#include <math.h>
#include <string.h>

#define NEED(cond, st, ...)                                                                        \
    do {                                                                                           \
        if (!(cond)) return FL_FAIL(err, st, __VA_ARGS__);                                         \
    } while (0)

// Names are shown in logs, tables and pages: nothing that any of these could take for markup.
static bool name_ok(const char *s) {
    const size_t n = strnlen(s, FL_NAME_MAX + 1);
    if (n == 0 || n > FL_NAME_MAX) return false;
    for (size_t i = 0; i < n; i++) {
        const char c = s[i];
        const bool ok = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
                        (c >= '0' && c <= '9') || c == '.' || c == '_' || c == '-';
        if (!ok) return false;
    }
    return true;
}

static bool text_ok(const char *s) {
    const size_t n = strnlen(s, FL_TEXT_MAX + 1);
    if (n > FL_TEXT_MAX) return false;
    for (size_t i = 0; i < n; i++) {
        if (s[i] < ' ' || s[i] > '~') return false;
    }
    return true;
}

static bool zero(const uint8_t *p, size_t size) {
    uint8_t any = 0;
    for (size_t i = 0; i < size; i++) any |= p[i];
    return any == 0;
}

static bool code_ok(fl_code code) {
    return strcmp(fl_code_name((uint32_t)code), "UNKNOWN") != 0;
}

static fl_status check_capability(const fl_capability *c, fl_err *err) {
    NEED(isfinite(c->tokens_per_second) && c->tokens_per_second >= 0.0f, FL_ELIMIT,
         "tokens per second is not a finite number >= 0");
    NEED(c->temperature_mc >= -100000 && c->temperature_mc <= 1000000, FL_ELIMIT,
         "temperature of %d thousandths of a degree", c->temperature_mc);
    NEED(c->cores <= 65536, FL_ELIMIT, "%u cores", c->cores);
    NEED(c->window_max <= FL_LAYERS_MAX, FL_ELIMIT, "window of %u layers", c->window_max);
    return FL_OK;
}

static fl_status check_layer(uint32_t layer, fl_err *err) {
    NEED(layer < FL_LAYERS_MAX, FL_ELIMIT, "layer %u; the last possible is %d", layer,
         FL_LAYERS_MAX - 1);
    return FL_OK;
}

static fl_status check_key(const fl_update_key *k, fl_err *err) {
    NEED(k->sequence != 0, FL_ELIMIT, "update without a sequence number");
    return check_layer(k->layer, err);
}

static fl_status check_join_request(const fl_join_request *m, fl_err *err) {
    NEED(name_ok(m->name), FL_EFORMAT, "name must be 1 to 63 of A-Z a-z 0-9 . _ -");
    NEED(name_ok(m->software), FL_EFORMAT, "software's name must be 1 to 63 of A-Z a-z 0-9 . _ -");
    NEED(!zero(m->identity_key, FL_KEY_SIZE) && !zero(m->curve_key, FL_KEY_SIZE), FL_EFORMAT,
         "a key is all zeros");
    return check_capability(&m->capability, err);
}

static fl_status check_join_reply(const fl_join_reply *m, fl_err *err) {
    NEED(m->verdict == FL_VERDICT_ACCEPTED || m->verdict == FL_VERDICT_PENDING ||
             m->verdict == FL_VERDICT_REFUSED,
         FL_ELIMIT, "verdict %d", m->verdict);
    NEED(code_ok(m->code), FL_ELIMIT, "reason code %d", m->code);
    NEED(text_ok(m->text), FL_EFORMAT, "text is not printable");
    return FL_OK;
}

static fl_status check_hello(const fl_hello *m, fl_err *err) {
    NEED(name_ok(m->software), FL_EFORMAT, "software's name must be 1 to 63 of A-Z a-z 0-9 . _ -");
    return FL_OK;
}

static fl_status check_hello_reply(const fl_hello_reply *m, fl_err *err) {
    NEED(m->session != 0, FL_ELIMIT, "session 0");
    return FL_OK;
}

static fl_status check_error(const fl_error *m, fl_err *err) {
    NEED(code_ok(m->code), FL_ELIMIT, "reason code %d", m->code);
    NEED(text_ok(m->text), FL_EFORMAT, "text is not printable");
    return FL_OK;
}

static fl_status check_task_request(const fl_task_request *m, fl_err *err) {
    NEED(m->layer_count <= FL_LAYERS_MAX, FL_ELIMIT, "%zu layers", m->layer_count);
    for (size_t i = 0; i < m->layer_count; i++) {
        FL_TRY(check_layer(m->layers[i].layer, err));
        NEED(i == 0 || m->layers[i - 1].layer < m->layers[i].layer, FL_EFORMAT,
             "layers are not in ascending order");
    }
    NEED(m->tokens_local <= FL_TOKENS_MAX, FL_ELIMIT, "too many tokens");
    return check_capability(&m->capability, err);
}

static fl_status check_vote(const fl_vote *v, size_t exits, fl_err *err) {
    NEED(v->mode >= FL_VOTE_MIXTURE && v->mode <= FL_VOTE_LAST, FL_ELIMIT, "vote mode %d", v->mode);
    NEED(v->count == exits, FL_EFORMAT, "vote of %zu exits for a task of %zu", v->count, exits);
    double sum = 0.0;
    for (size_t i = 0; i < v->count; i++) {
        NEED(v->weights[i] >= 0.0f && v->weights[i] <= 1.001f, FL_ELIMIT,
             "weight of exit %zu is not in 0..1", i);
        NEED(v->temperatures[i] >= 0.01f && v->temperatures[i] <= 100.0f, FL_ELIMIT,
             "temperature of exit %zu is not in 0.01..100", i);
        sum += (double)v->weights[i];
    }
    NEED(fabs(sum - 1.0) <= 1e-3, FL_ELIMIT, "the vote's weights do not sum to 1");
    return FL_OK;
}

static fl_status check_task_shape(const fl_task *m, fl_err *err) {
    NEED(m->rank >= 1 && m->rank <= FL_TASK_RANK_MAX, FL_ELIMIT, "rank %u", m->rank);
    NEED(isfinite(m->alpha) && m->alpha > 0.0f, FL_ELIMIT, "alpha is not above 0");
    NEED(m->exit_count >= 1 && m->exit_count <= FL_EXITS_MAX, FL_ELIMIT, "%zu exits",
         m->exit_count);
    bool found = false;
    for (size_t i = 0; i < m->exit_count; i++) {
        FL_TRY(check_layer(m->exit_layers[i], err));
        NEED(i == 0 || m->exit_layers[i - 1] < m->exit_layers[i], FL_EFORMAT,
             "exits are not in ascending order");
        found |= m->exit_layers[i] == m->exit_layer;
    }
    NEED(found, FL_EFORMAT, "layer %u has no exit", m->exit_layer);
    NEED(m->layer_first <= m->layer_last && m->layer_last <= m->exit_layer, FL_EFORMAT,
         "window %u..%u does not end at or below exit %u", m->layer_first, m->layer_last,
         m->exit_layer);
    NEED(m->sequence >= 1 && m->sequence <= FL_SEQUENCE_MAX, FL_ELIMIT, "sequence of %u tokens",
         m->sequence);
    NEED(m->micro_batch >= 1 && m->micro_batch <= FL_MICRO_BATCH_MAX, FL_ELIMIT,
         "micro-batch of %u", m->micro_batch);
    NEED(m->learning_rate > 0.0f && m->learning_rate <= 1.0f, FL_ELIMIT,
         "learning rate is not in 0..1");
    return FL_OK;
}

static fl_status check_task_lists(const fl_task *m, fl_err *err) {
    const bool train = m->kind == FL_TASK_TRAIN;
    const size_t window = train ? m->layer_last - m->layer_first + 1 : 0;
    NEED(m->base_count == window, FL_EFORMAT, "%zu base versions for a window of %zu",
         m->base_count, window);
    for (size_t i = 0; i < m->base_count; i++)
        NEED(m->bases[i].layer == m->layer_first + i, FL_EFORMAT, "base versions skip a layer");
    NEED(m->object_count <= FL_LAYERS_MAX, FL_ELIMIT, "%zu objects", m->object_count);
    for (size_t i = 0; i < m->object_count; i++) {
        const fl_layer_object *o = &m->objects[i];
        FL_TRY(check_layer(o->layer, err));
        NEED(i == 0 || m->objects[i - 1].layer < o->layer, FL_EFORMAT,
             "objects are not in ascending order");
        NEED(o->version != 0 && o->size != 0 && o->size <= FL_UPDATE_MAX, FL_ELIMIT,
             "object of layer %u is empty, too large or without a version", o->layer);
    }
    return FL_OK;
}

static fl_status check_task(const fl_task *m, fl_err *err) {
    NEED(m->kind == FL_TASK_TRAIN || m->kind == FL_TASK_EVAL, FL_ELIMIT, "task of kind %d",
         m->kind);
    NEED(m->task_id != 0, FL_ELIMIT, "task without a number");
    NEED(m->model_size != 0 && m->model_size <= FL_OBJECT_MAX, FL_ELIMIT, "size of the model");
    NEED(m->kind == FL_TASK_TRAIN ? m->steps >= 1 && m->steps <= FL_STEPS_MAX : m->steps == 0,
         FL_ELIMIT, "%u steps", m->steps);
    NEED(m->deadline_ms != 0 && m->deadline_ms <= FL_DEADLINE_MS_MAX, FL_ELIMIT, "deadline");
    NEED(m->encoding == 1 || m->encoding == 2, FL_ELIMIT, "update encoding %u", m->encoding);
    NEED(m->encoding_most <= FL_TASK_ENCODINGS, FL_ELIMIT, "encoding %u", m->encoding_most);
    NEED(m->keep_ppm <= 1000000, FL_ELIMIT, "%u of a million values", m->keep_ppm);
    FL_TRY(check_task_shape(m, err));
    FL_TRY(check_task_lists(m, err));
    return check_vote(&m->vote, m->exit_count, err);
}

static fl_status check_wait(const fl_wait *m, fl_err *err) {
    NEED(code_ok(m->reason), FL_ELIMIT, "reason code %d", m->reason);
    NEED(m->retry_after_ms != 0 && m->retry_after_ms <= FL_WAIT_MS_MAX, FL_ELIMIT, "waiting time");
    NEED(text_ok(m->text), FL_EFORMAT, "text is not printable");
    return FL_OK;
}

static fl_status check_chunk_request(const fl_chunk_request *m, fl_err *err) {
    NEED(m->offset < FL_OBJECT_MAX, FL_ELIMIT, "offset beyond any object");
    NEED(m->size != 0 && m->size <= FL_CHUNK_MAX, FL_ELIMIT, "chunk of %u bytes", m->size);
    return FL_OK;
}

static fl_status check_chunk(const fl_chunk *m, fl_err *err) {
    NEED(m->data.size != 0 && m->data.size <= FL_CHUNK_MAX, FL_ELIMIT, "chunk of %zu bytes",
         m->data.size);
    NEED(m->total <= FL_OBJECT_MAX && m->data.size <= m->total &&
             m->offset <= m->total - m->data.size,
         FL_ELIMIT, "chunk lies outside its object");
    return FL_OK;
}

static fl_status check_update_begin(const fl_update_begin *m, fl_err *err) {
    NEED(m->tokens != 0 && m->tokens <= FL_UPDATE_TOKENS_MAX, FL_ELIMIT, "number of tokens");
    NEED(m->size != 0 && m->size <= FL_UPDATE_MAX, FL_ELIMIT, "size of the update");
    return check_key(&m->key, err);
}

static fl_status check_update_want(const fl_update_want *m, fl_err *err) {
    NEED(m->offset <= FL_UPDATE_MAX, FL_ELIMIT, "offset beyond any update");
    return check_key(&m->key, err);
}

static fl_status check_update_chunk(const fl_update_chunk *m, fl_err *err) {
    NEED(m->data.size != 0 && m->data.size <= FL_UPLOAD_CHUNK_MAX, FL_ELIMIT,
         "chunk of %zu bytes", m->data.size);
    NEED(m->offset <= FL_UPDATE_MAX - m->data.size, FL_ELIMIT, "chunk lies outside any update");
    return check_key(&m->key, err);
}

static fl_status check_update_ack(const fl_update_ack *m, fl_err *err) {
    NEED(m->verdict == FL_VERDICT_ACCEPTED || m->verdict == FL_VERDICT_DUPLICATE ||
             m->verdict == FL_VERDICT_REFUSED,
         FL_ELIMIT, "verdict %d", m->verdict);
    NEED(code_ok(m->code), FL_ELIMIT, "reason code %d", m->code);
    NEED(text_ok(m->text), FL_EFORMAT, "text is not printable");
    return check_key(&m->key, err);
}

static fl_status check_heartbeat(const fl_heartbeat *m, fl_err *err) {
    NEED(m->state >= FL_NODE_IDLE && m->state <= FL_NODE_PAUSED, FL_ELIMIT, "state %d", m->state);
    NEED(isfinite(m->loss), FL_ELIMIT, "loss is not finite");
    NEED(m->steps <= FL_STEPS_MAX && m->step <= m->steps, FL_ELIMIT, "step %u of %u", m->step,
         m->steps);
    NEED(m->tokens <= FL_TOKENS_MAX, FL_ELIMIT, "number of tokens");
    return check_capability(&m->capability, err);
}

static fl_status check_heartbeat_ack(const fl_heartbeat_ack *m, fl_err *err) {
    NEED(m->order == FL_ORDER_CONTINUE || m->order == FL_ORDER_ABANDON, FL_ELIMIT, "order %d",
         m->order);
    return FL_OK;
}

// Sums below 2^62 here, and 4096 nodes' sums of honest size, stay clear of the end of 64 bits
// because one token's loss is below 2^10 nats: |sum| <= tokens * 2^30 with tokens < 2^32.
static bool nll_ok(int64_t q20, uint64_t tokens) {
    const uint64_t size = q20 < 0 ? -(uint64_t)q20 : (uint64_t)q20;
    return size >> 30 <= tokens;
}

static fl_status check_report(const fl_report *m, fl_err *err) {
    NEED(m->sequence != 0, FL_ELIMIT, "report without a sequence number");
    NEED(m->tokens != 0 && m->tokens <= FL_UPDATE_TOKENS_MAX, FL_ELIMIT, "number of tokens");
    NEED(nll_ok(m->nll_base_q20, m->tokens) && nll_ok(m->nll_local_q20, m->tokens) &&
             nll_ok(m->nll_voted_q20, m->tokens),
         FL_ELIMIT, "a loss is above 1024 nats a token");
    NEED(m->exit_count <= FL_EXITS_MAX, FL_ELIMIT, "%zu exits", m->exit_count);
    uint64_t sum = 0;
    for (size_t i = 0; i < m->exit_count; i++) {
        const fl_exit_sums *e = &m->exits[i];
        NEED(nll_ok(e->nll_q20, m->tokens), FL_ELIMIT, "a loss is above 1024 nats a token");
        NEED(e->responsibility_q20 <= m->tokens << 20 && e->correct <= m->tokens, FL_ELIMIT,
             "sums of exit %zu are above the number of tokens", i);
        sum += e->responsibility_q20; // 16 * 2^52 at most
    }
    // Every token's responsibilities sum to 1; rounding may cost each exit one unit a token.
    const uint64_t whole = m->tokens << 20, slack = m->tokens * FL_EXITS_MAX;
    NEED(m->exit_count == 0 || (sum <= whole + slack && whole <= sum + slack), FL_ELIMIT,
         "responsibilities do not sum to the number of tokens");
    return FL_OK;
}

static fl_status check_report_ack(const fl_report_ack *m, fl_err *err) {
    NEED(m->verdict == FL_VERDICT_ACCEPTED || m->verdict == FL_VERDICT_DUPLICATE ||
             m->verdict == FL_VERDICT_REFUSED,
         FL_ELIMIT, "verdict %d", m->verdict);
    NEED(code_ok(m->code), FL_ELIMIT, "reason code %d", m->code);
    return FL_OK;
}

fl_status fl_codec_check(const fl_msg *m, fl_err *err) {
    switch (m->type) {
    case FL_MSG_JOIN_REQUEST:
        return check_join_request(&m->join_request, err);
    case FL_MSG_JOIN_REPLY:
        return check_join_reply(&m->join_reply, err);
    case FL_MSG_HELLO:
        return check_hello(&m->hello, err);
    case FL_MSG_HELLO_REPLY:
        return check_hello_reply(&m->hello_reply, err);
    case FL_MSG_HELLO_FINISH:
        NEED(m->hello_finish.session != 0, FL_ELIMIT, "session 0");
        return FL_OK;
    case FL_MSG_ERROR:
        return check_error(&m->error, err);
    case FL_MSG_TASK_REQUEST:
        return check_task_request(&m->task_request, err);
    case FL_MSG_TASK:
        return check_task(&m->task, err);
    case FL_MSG_WAIT:
        return check_wait(&m->wait, err);
    case FL_MSG_CHUNK_REQUEST:
        return check_chunk_request(&m->chunk_request, err);
    case FL_MSG_CHUNK:
        return check_chunk(&m->chunk, err);
    case FL_MSG_UPDATE_BEGIN:
        return check_update_begin(&m->update_begin, err);
    case FL_MSG_UPDATE_WANT:
        return check_update_want(&m->update_want, err);
    case FL_MSG_UPDATE_CHUNK:
        return check_update_chunk(&m->update_chunk, err);
    case FL_MSG_UPDATE_COMMIT:
        return check_key(&m->update_commit.key, err);
    case FL_MSG_UPDATE_ACK:
        return check_update_ack(&m->update_ack, err);
    case FL_MSG_HEARTBEAT:
        return check_heartbeat(&m->heartbeat, err);
    case FL_MSG_HEARTBEAT_ACK:
        return check_heartbeat_ack(&m->heartbeat_ack, err);
    case FL_MSG_REPORT:
        return check_report(&m->report, err);
    case FL_MSG_REPORT_ACK:
        return check_report_ack(&m->report_ack, err);
    }
    return FL_FAIL(err, FL_EUNSUPPORTED, "message type %d is unknown", m->type);
}
