#include "proto/codec_internal.h"

#include <fleetune.pb-c.h>
#include <string.h>

// Fixed-size bytes, and texts that fit; anything else is not this message.
static bool fixed(const ProtobufCBinaryData *in, uint8_t *out, size_t size) {
    if (in->len != size) return false;
    memcpy(out, in->data, size);
    return true;
}

static bool text(const char *in, char *out, size_t max) {
    const size_t n = strnlen(in, max + 1);
    if (n > max) return false;
    memcpy(out, in, n);
    out[n] = '\0';
    return true;
}

#define BAD(err, what) FL_FAIL(err, FL_EFORMAT, what)

// A reason that a newer program invented is still an answer: it reads as no reason.
static fl_code code(uint32_t number) {
    return strcmp(fl_code_name(number), "UNKNOWN") == 0 ? FL_CODE_NONE : (fl_code)number;
}

static fl_status read_capability(const Fleetune__V1__Capability *p, fl_capability *ret,
                                 fl_err *err) {
    if (p == NULL) return BAD(err, "capability is missing");
    *ret = (fl_capability){
        .memory_bytes = p->memory_bytes,
        .disk_free_bytes = p->disk_free_bytes,
        .tokens_per_second = p->tokens_per_second,
        .temperature_mc = p->temperature_mc,
        .flags = p->throttle_flags,
        .cores = p->cores,
        .window_max = p->window_max,
    };
    return FL_OK;
}

static fl_status read_key(const Fleetune__V1__UpdateKey *p, fl_update_key *ret, fl_err *err) {
    if (p == NULL) return BAD(err, "update's key is missing");
    *ret = (fl_update_key){p->layer, p->base_version, p->sequence};
    return FL_OK;
}

static fl_status read_layers(Fleetune__V1__LayerVersion *const *in, size_t count, fl_arena *scratch,
                             const fl_layer_version **ret, fl_err *err) {
    if (count > FL_LAYERS_MAX) return FL_FAIL(err, FL_ELIMIT, "%zu layers", count);
    fl_layer_version *out = FL_ARENA_NEW(scratch, fl_layer_version, count);
    if (count != 0 && out == NULL) return FL_FAIL(err, FL_ENOMEM, "scratch arena is spent");
    for (size_t i = 0; i < count; i++) out[i] = (fl_layer_version){in[i]->layer, in[i]->version};
    *ret = out;
    return FL_OK;
}

static fl_status read_join_request(const Fleetune__V1__JoinRequest *p, fl_join_request *ret,
                                   fl_err *err) {
    ret->protocol = p->protocol;
    if (!fixed(&p->token_id, ret->token_id, FL_TOKEN_ID_SIZE)) return BAD(err, "token id's size");
    if (!fixed(&p->identity_key, ret->identity_key, FL_KEY_SIZE) ||
        !fixed(&p->curve_key, ret->curve_key, FL_KEY_SIZE) ||
        !fixed(&p->nonce, ret->nonce, FL_KEY_SIZE) || !fixed(&p->proof, ret->proof, FL_KEY_SIZE))
        return BAD(err, "a key, the nonce or the proof has another size");
    if (!text(p->name, ret->name, FL_NAME_MAX) || !text(p->software, ret->software, FL_NAME_MAX))
        return BAD(err, "a name is too long");
    return read_capability(p->capability, &ret->capability, err);
}

static fl_status read_join_reply(const Fleetune__V1__JoinReply *p, fl_join_reply *ret,
                                 fl_err *err) {
    ret->verdict = (fl_verdict)p->verdict;
    ret->code = code(p->code);
    if (!text(p->text, ret->text, FL_TEXT_MAX)) return BAD(err, "text is too long");
    if (!fixed(&p->identity_key, ret->identity_key, FL_KEY_SIZE) ||
        !fixed(&p->node_id, ret->node_id, FL_ID_SIZE) || !fixed(&p->proof, ret->proof, FL_KEY_SIZE))
        return BAD(err, "a key, the node's id or the proof has another size");
    return FL_OK;
}

static fl_status read_hello(const Fleetune__V1__Hello *p, fl_hello *ret, fl_err *err) {
    ret->protocol = p->protocol;
    if (!fixed(&p->identity_key, ret->identity_key, FL_KEY_SIZE) ||
        !fixed(&p->ephemeral_key, ret->ephemeral_key, FL_KEY_SIZE) ||
        !fixed(&p->nonce, ret->nonce, FL_KEY_SIZE))
        return BAD(err, "a key or the nonce has another size");
    if (!text(p->software, ret->software, FL_NAME_MAX)) return BAD(err, "a name is too long");
    return FL_OK;
}

static fl_status read_hello_reply(const Fleetune__V1__HelloReply *p, fl_hello_reply *ret,
                                  fl_err *err) {
    ret->protocol = p->protocol;
    ret->session = p->session;
    if (!fixed(&p->ephemeral_key, ret->ephemeral_key, FL_KEY_SIZE) ||
        !fixed(&p->nonce, ret->nonce, FL_KEY_SIZE) ||
        !fixed(&p->update_key, ret->update_key, FL_KEY_SIZE) ||
        !fixed(&p->signature, ret->signature, FL_SIGNATURE_SIZE))
        return BAD(err, "a key, the nonce or the signature has another size");
    return FL_OK;
}

static fl_status read_hello_finish(const Fleetune__V1__HelloFinish *p, fl_hello_finish *ret,
                                   fl_err *err) {
    ret->session = p->session;
    if (!fixed(&p->signature, ret->signature, FL_SIGNATURE_SIZE))
        return BAD(err, "the signature has another size");
    return FL_OK;
}

static fl_status read_error(const Fleetune__V1__Error *p, fl_error *ret, fl_err *err) {
    ret->code = code(p->code);
    ret->session = p->session;
    if (!text(p->text, ret->text, FL_TEXT_MAX)) return BAD(err, "text is too long");
    return FL_OK;
}

static fl_status read_task_request(const Fleetune__V1__TaskRequest *p, fl_arena *scratch,
                                   fl_task_request *ret, fl_err *err) {
    ret->has_run = p->run_id.len != 0;
    if (ret->has_run ? !fixed(&p->run_id, ret->run_id, FL_ID_SIZE) ||
                           !fixed(&p->model_digest, ret->model_digest, FL_DIGEST_SIZE)
                     : p->model_digest.len != 0)
        return BAD(err, "run id or model digest has another size");
    ret->layer_count = p->n_layers;
    ret->vote_version = p->vote_version;
    ret->tokens_local = p->tokens_local;
    FL_TRY(read_layers(p->layers, p->n_layers, scratch, &ret->layers, err));
    return read_capability(p->capability, &ret->capability, err);
}

static fl_status read_vote(const Fleetune__V1__Vote *p, fl_vote *ret, fl_err *err) {
    if (p == NULL) return BAD(err, "vote is missing");
    if (p->n_weights != p->n_temperatures || p->n_weights > FL_EXITS_MAX)
        return BAD(err, "vote's weights and temperatures do not match");
    ret->version = p->version;
    ret->mode = (fl_vote_mode)p->mode;
    ret->count = p->n_weights;
    for (size_t i = 0; i < ret->count; i++) {
        ret->weights[i] = p->weights[i];
        ret->temperatures[i] = p->temperatures[i];
    }
    return FL_OK;
}

static fl_status read_task_adapter(const Fleetune__V1__Adapter *p, fl_task *ret, fl_err *err) {
    if (p == NULL) return BAD(err, "adapter is missing");
    if (p->n_exit_layers > FL_EXITS_MAX)
        return FL_FAIL(err, FL_ELIMIT, "%zu exits", p->n_exit_layers);
    ret->rank = p->rank;
    ret->alpha = p->alpha;
    ret->a_seed = p->a_seed;
    ret->exit_count = p->n_exit_layers;
    for (size_t i = 0; i < ret->exit_count; i++) ret->exit_layers[i] = p->exit_layers[i];
    return FL_OK;
}

static fl_status read_objects(const Fleetune__V1__Task *p, fl_arena *scratch, fl_task *ret,
                              fl_err *err) {
    if (p->n_objects > FL_LAYERS_MAX) return FL_FAIL(err, FL_ELIMIT, "%zu objects", p->n_objects);
    fl_layer_object *out = FL_ARENA_NEW(scratch, fl_layer_object, p->n_objects);
    if (p->n_objects != 0 && out == NULL) return FL_FAIL(err, FL_ENOMEM, "scratch arena is spent");
    for (size_t i = 0; i < p->n_objects; i++) {
        const Fleetune__V1__LayerObject *o = p->objects[i];
        out[i].layer = o->layer;
        out[i].version = o->version;
        out[i].size = o->size;
        if (!fixed(&o->digest, out[i].digest, FL_DIGEST_SIZE))
            return BAD(err, "an object's digest has another size");
    }
    ret->objects = out;
    ret->object_count = p->n_objects;
    return FL_OK;
}

static fl_status read_task(const Fleetune__V1__Task *p, fl_arena *scratch, fl_task *ret,
                           fl_err *err) {
    ret->kind = (fl_task_kind)p->kind;
    ret->round = p->round;
    ret->task_id = p->task_id;
    ret->model_size = p->model_size;
    ret->layer_first = p->layer_first;
    ret->layer_last = p->layer_last;
    ret->exit_layer = p->exit_layer;
    ret->steps = p->steps;
    ret->sequence = p->sequence;
    ret->micro_batch = p->micro_batch;
    ret->learning_rate = p->learning_rate;
    ret->seed = p->seed;
    ret->deadline_ms = p->deadline_ms;
    ret->encoding = p->encoding;
    ret->encoding_most = p->encoding_most <= FL_TASK_ENCODINGS ? p->encoding_most : 0;
    ret->keep_ppm = p->keep_ppm;
    ret->eval_tokens = p->eval_tokens;
    ret->base_count = p->n_bases;
    if (!fixed(&p->run_id, ret->run_id, FL_ID_SIZE) ||
        !fixed(&p->model_digest, ret->model_digest, FL_DIGEST_SIZE))
        return BAD(err, "run id or model digest has another size");
    FL_TRY(read_task_adapter(p->adapter, ret, err));
    FL_TRY(read_layers(p->bases, p->n_bases, scratch, &ret->bases, err));
    FL_TRY(read_objects(p, scratch, ret, err));
    return read_vote(p->vote, &ret->vote, err);
}

static fl_status read_wait(const Fleetune__V1__Wait *p, fl_wait *ret, fl_err *err) {
    ret->reason = code(p->reason);
    ret->retry_after_ms = p->retry_after_ms;
    if (!text(p->text, ret->text, FL_TEXT_MAX)) return BAD(err, "text is too long");
    return FL_OK;
}

static fl_status read_chunk_request(const Fleetune__V1__ChunkRequest *p, fl_chunk_request *ret,
                                    fl_err *err) {
    ret->offset = p->offset;
    ret->size = p->size;
    if (!fixed(&p->digest, ret->digest, FL_DIGEST_SIZE)) return BAD(err, "digest's size");
    return FL_OK;
}

static fl_status read_chunk(const Fleetune__V1__Chunk *p, fl_chunk *ret, fl_err *err) {
    ret->offset = p->offset;
    ret->total = p->total;
    ret->data = (fl_bytes){p->data.data, p->data.len};
    if (!fixed(&p->digest, ret->digest, FL_DIGEST_SIZE)) return BAD(err, "digest's size");
    return FL_OK;
}

static fl_status read_update_begin(const Fleetune__V1__UpdateBegin *p, fl_update_begin *ret,
                                   fl_err *err) {
    ret->round = p->round;
    ret->task_id = p->task_id;
    ret->tokens = p->tokens;
    ret->size = p->size;
    if (!fixed(&p->run_id, ret->run_id, FL_ID_SIZE) ||
        !fixed(&p->digest, ret->digest, FL_DIGEST_SIZE))
        return BAD(err, "run id or digest has another size");
    return read_key(p->key, &ret->key, err);
}

static fl_status read_update_want(const Fleetune__V1__UpdateWant *p, fl_update_want *ret,
                                  fl_err *err) {
    ret->offset = p->offset;
    return read_key(p->key, &ret->key, err);
}

static fl_status read_update_chunk(const Fleetune__V1__UpdateChunk *p, fl_update_chunk *ret,
                                   fl_err *err) {
    ret->offset = p->offset;
    ret->data = (fl_bytes){p->data.data, p->data.len};
    return read_key(p->key, &ret->key, err);
}

static fl_status read_update_commit(const Fleetune__V1__UpdateCommit *p, fl_update_commit *ret,
                                    fl_err *err) {
    if (!fixed(&p->digest, ret->digest, FL_DIGEST_SIZE)) return BAD(err, "digest's size");
    return read_key(p->key, &ret->key, err);
}

static fl_status read_update_ack(const Fleetune__V1__UpdateAck *p, fl_update_ack *ret,
                                 fl_err *err) {
    ret->verdict = (fl_verdict)p->verdict;
    ret->code = code(p->code);
    if (!text(p->text, ret->text, FL_TEXT_MAX)) return BAD(err, "text is too long");
    return read_key(p->key, &ret->key, err);
}

static fl_status read_heartbeat(const Fleetune__V1__Heartbeat *p, fl_heartbeat *ret, fl_err *err) {
    *ret = (fl_heartbeat){
        .state = (fl_node_state)p->state,
        .task_id = p->task_id,
        .step = p->step,
        .steps = p->steps,
        .tokens = p->tokens,
        .loss = p->loss,
        .bytes_up = p->bytes_up,
        .bytes_down = p->bytes_down,
    };
    return read_capability(p->capability, &ret->capability, err);
}

static fl_status read_report(const Fleetune__V1__Report *p, fl_report *ret, fl_err *err) {
    ret->round = p->round;
    ret->task_id = p->task_id;
    ret->sequence = p->sequence;
    ret->vote_version = p->vote_version;
    ret->tokens = p->tokens;
    ret->nll_base_q20 = p->nll_base_q20;
    ret->nll_local_q20 = p->nll_local_q20;
    ret->nll_voted_q20 = p->nll_voted_q20;
    ret->peak_rss_bytes = p->peak_rss_bytes;
    ret->exit_count = p->n_exits;
    if (!fixed(&p->run_id, ret->run_id, FL_ID_SIZE) ||
        !fixed(&p->layers_digest, ret->layers_digest, FL_DIGEST_SIZE))
        return BAD(err, "run id or digest has another size");
    if (p->n_exits > FL_EXITS_MAX) return FL_FAIL(err, FL_ELIMIT, "%zu exits", p->n_exits);
    for (size_t i = 0; i < p->n_exits; i++) {
        const Fleetune__V1__ExitSums *e = p->exits[i];
        ret->exits[i] = (fl_exit_sums){e->nll_q20, e->responsibility_q20, e->correct};
    }
    return FL_OK;
}

fl_status fl_codec_read(const struct ProtobufCMessage *pb, fl_arena *scratch, fl_msg *ret,
                        fl_err *err) {
    const void *p = pb; // of the type that ret->type says: the descriptor was chosen by it
    const Fleetune__V1__HeartbeatAck *order = p;
    const Fleetune__V1__ReportAck *ack = p;
    switch (ret->type) {
    case FL_MSG_JOIN_REQUEST:
        return read_join_request(p, &ret->join_request, err);
    case FL_MSG_JOIN_REPLY:
        return read_join_reply(p, &ret->join_reply, err);
    case FL_MSG_HELLO:
        return read_hello(p, &ret->hello, err);
    case FL_MSG_HELLO_REPLY:
        return read_hello_reply(p, &ret->hello_reply, err);
    case FL_MSG_HELLO_FINISH:
        return read_hello_finish(p, &ret->hello_finish, err);
    case FL_MSG_ERROR:
        return read_error(p, &ret->error, err);
    case FL_MSG_TASK_REQUEST:
        return read_task_request(p, scratch, &ret->task_request, err);
    case FL_MSG_TASK:
        return read_task(p, scratch, &ret->task, err);
    case FL_MSG_WAIT:
        return read_wait(p, &ret->wait, err);
    case FL_MSG_CHUNK_REQUEST:
        return read_chunk_request(p, &ret->chunk_request, err);
    case FL_MSG_CHUNK:
        return read_chunk(p, &ret->chunk, err);
    case FL_MSG_UPDATE_BEGIN:
        return read_update_begin(p, &ret->update_begin, err);
    case FL_MSG_UPDATE_WANT:
        return read_update_want(p, &ret->update_want, err);
    case FL_MSG_UPDATE_CHUNK:
        return read_update_chunk(p, &ret->update_chunk, err);
    case FL_MSG_UPDATE_COMMIT:
        return read_update_commit(p, &ret->update_commit, err);
    case FL_MSG_UPDATE_ACK:
        return read_update_ack(p, &ret->update_ack, err);
    case FL_MSG_HEARTBEAT:
        return read_heartbeat(p, &ret->heartbeat, err);
    case FL_MSG_HEARTBEAT_ACK:
        ret->heartbeat_ack = (fl_heartbeat_ack){(fl_order)order->order, order->task_id};
        return FL_OK;
    case FL_MSG_REPORT:
        return read_report(p, &ret->report, err);
    case FL_MSG_REPORT_ACK:
        ret->report_ack = (fl_report_ack){ack->sequence, (fl_verdict)ack->verdict, code(ack->code)};
        return FL_OK;
    }
    return FL_FAIL(err, FL_EUNSUPPORTED, "message type %d is unknown", ret->type);
}
