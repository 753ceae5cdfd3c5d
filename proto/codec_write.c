#include "proto/codec_internal.h"

#include <fleetune.pb-c.h>

// The pack functions of protobuf-c only read what these views point to.
static ProtobufCBinaryData view(const uint8_t *data, size_t size) {
    return (ProtobufCBinaryData){size, (uint8_t *)(uintptr_t)data};
}

static char *text(const char *s) {
    return (char *)(uintptr_t)s;
}

static fl_status spent(fl_err *err) {
    return FL_FAIL(err, FL_ENOMEM, "scratch arena is spent");
}

// A message of type T with the generated initialiser, in the arena; leaves the function when the
// arena is spent.
#define NEW(T, name, INIT)                                                                         \
    T *name = FL_ARENA_NEW(scratch, T, 1);                                                         \
    if (name == NULL) return spent(err);                                                           \
    *name = (T)INIT

static fl_status write_capability(const fl_capability *c, fl_arena *scratch,
                                  Fleetune__V1__Capability **ret, fl_err *err) {
    NEW(Fleetune__V1__Capability, p, FLEETUNE__V1__CAPABILITY__INIT);
    p->memory_bytes = c->memory_bytes;
    p->disk_free_bytes = c->disk_free_bytes;
    p->tokens_per_second = c->tokens_per_second;
    p->temperature_mc = c->temperature_mc;
    p->throttle_flags = c->flags;
    p->cores = c->cores;
    p->window_max = c->window_max;
    *ret = p;
    return FL_OK;
}

static fl_status write_key(const fl_update_key *k, fl_arena *scratch, Fleetune__V1__UpdateKey **ret,
                           fl_err *err) {
    NEW(Fleetune__V1__UpdateKey, p, FLEETUNE__V1__UPDATE_KEY__INIT);
    p->layer = k->layer;
    p->base_version = k->base_version;
    p->sequence = k->sequence;
    *ret = p;
    return FL_OK;
}

static fl_status write_layers(const fl_layer_version *in, size_t count, fl_arena *scratch,
                              Fleetune__V1__LayerVersion ***ret, fl_err *err) {
    Fleetune__V1__LayerVersion **list = FL_ARENA_NEW(scratch, Fleetune__V1__LayerVersion *, count);
    Fleetune__V1__LayerVersion *all = FL_ARENA_NEW(scratch, Fleetune__V1__LayerVersion, count);
    if (count != 0 && (list == NULL || all == NULL)) return spent(err);
    for (size_t i = 0; i < count; i++) {
        all[i] = (Fleetune__V1__LayerVersion)FLEETUNE__V1__LAYER_VERSION__INIT;
        all[i].layer = in[i].layer;
        all[i].version = in[i].version;
        list[i] = &all[i];
    }
    *ret = list;
    return FL_OK;
}

static fl_status write_join_request(const fl_join_request *m, fl_arena *scratch, void **ret,
                                    fl_err *err) {
    NEW(Fleetune__V1__JoinRequest, p, FLEETUNE__V1__JOIN_REQUEST__INIT);
    p->token_id = view(m->token_id, FL_TOKEN_ID_SIZE);
    p->identity_key = view(m->identity_key, FL_KEY_SIZE);
    p->curve_key = view(m->curve_key, FL_KEY_SIZE);
    p->name = text(m->name);
    p->nonce = view(m->nonce, FL_KEY_SIZE);
    p->proof = view(m->proof, FL_KEY_SIZE);
    p->protocol = m->protocol;
    p->software = text(m->software);
    *ret = p;
    return write_capability(&m->capability, scratch, &p->capability, err);
}

static fl_status write_join_reply(const fl_join_reply *m, fl_arena *scratch, void **ret,
                                  fl_err *err) {
    NEW(Fleetune__V1__JoinReply, p, FLEETUNE__V1__JOIN_REPLY__INIT);
    p->verdict = (uint32_t)m->verdict;
    p->code = (uint32_t)m->code;
    p->text = text(m->text);
    p->identity_key = view(m->identity_key, FL_KEY_SIZE);
    p->node_id = view(m->node_id, FL_ID_SIZE);
    p->proof = view(m->proof, FL_KEY_SIZE);
    *ret = p;
    return FL_OK;
}

static fl_status write_hello(const fl_hello *m, fl_arena *scratch, void **ret, fl_err *err) {
    NEW(Fleetune__V1__Hello, p, FLEETUNE__V1__HELLO__INIT);
    p->protocol = m->protocol;
    p->identity_key = view(m->identity_key, FL_KEY_SIZE);
    p->ephemeral_key = view(m->ephemeral_key, FL_KEY_SIZE);
    p->nonce = view(m->nonce, FL_KEY_SIZE);
    p->software = text(m->software);
    *ret = p;
    return FL_OK;
}

static fl_status write_hello_reply(const fl_hello_reply *m, fl_arena *scratch, void **ret,
                                   fl_err *err) {
    NEW(Fleetune__V1__HelloReply, p, FLEETUNE__V1__HELLO_REPLY__INIT);
    p->protocol = m->protocol;
    p->session = m->session;
    p->ephemeral_key = view(m->ephemeral_key, FL_KEY_SIZE);
    p->nonce = view(m->nonce, FL_KEY_SIZE);
    p->update_key = view(m->update_key, FL_KEY_SIZE);
    p->signature = view(m->signature, FL_SIGNATURE_SIZE);
    *ret = p;
    return FL_OK;
}

static fl_status write_hello_finish(const fl_hello_finish *m, fl_arena *scratch, void **ret,
                                    fl_err *err) {
    NEW(Fleetune__V1__HelloFinish, p, FLEETUNE__V1__HELLO_FINISH__INIT);
    p->session = m->session;
    p->signature = view(m->signature, FL_SIGNATURE_SIZE);
    *ret = p;
    return FL_OK;
}

static fl_status write_error(const fl_error *m, fl_arena *scratch, void **ret, fl_err *err) {
    NEW(Fleetune__V1__Error, p, FLEETUNE__V1__ERROR__INIT);
    p->code = (uint32_t)m->code;
    p->text = text(m->text);
    p->session = m->session;
    *ret = p;
    return FL_OK;
}

static fl_status write_task_request(const fl_task_request *m, fl_arena *scratch, void **ret,
                                    fl_err *err) {
    NEW(Fleetune__V1__TaskRequest, p, FLEETUNE__V1__TASK_REQUEST__INIT);
    if (m->has_run) {
        p->run_id = view(m->run_id, FL_ID_SIZE);
        p->model_digest = view(m->model_digest, FL_DIGEST_SIZE);
    }
    p->vote_version = m->vote_version;
    p->tokens_local = m->tokens_local;
    p->n_layers = m->layer_count;
    FL_TRY(write_layers(m->layers, m->layer_count, scratch, &p->layers, err));
    *ret = p;
    return write_capability(&m->capability, scratch, &p->capability, err);
}

static fl_status write_task_parts(const fl_task *m, fl_arena *scratch, Fleetune__V1__Task *p,
                                  fl_err *err) {
    NEW(Fleetune__V1__Adapter, a, FLEETUNE__V1__ADAPTER__INIT);
    a->rank = m->rank;
    a->alpha = m->alpha;
    a->a_seed = m->a_seed;
    a->n_exit_layers = m->exit_count;
    a->exit_layers = (uint32_t *)(uintptr_t)m->exit_layers;
    p->adapter = a;
    NEW(Fleetune__V1__Vote, v, FLEETUNE__V1__VOTE__INIT);
    v->version = m->vote.version;
    v->mode = (uint32_t)m->vote.mode;
    v->n_weights = v->n_temperatures = m->vote.count;
    v->weights = (float *)(uintptr_t)m->vote.weights;
    v->temperatures = (float *)(uintptr_t)m->vote.temperatures;
    p->vote = v;
    const size_t count = m->object_count;
    Fleetune__V1__LayerObject **list = FL_ARENA_NEW(scratch, Fleetune__V1__LayerObject *, count);
    Fleetune__V1__LayerObject *all = FL_ARENA_NEW(scratch, Fleetune__V1__LayerObject, count);
    if (count != 0 && (list == NULL || all == NULL)) return spent(err);
    for (size_t i = 0; i < count; i++) {
        const fl_layer_object *o = &m->objects[i];
        all[i] = (Fleetune__V1__LayerObject)FLEETUNE__V1__LAYER_OBJECT__INIT;
        all[i].layer = o->layer;
        all[i].version = o->version;
        all[i].digest = view(o->digest, FL_DIGEST_SIZE);
        all[i].size = o->size;
        list[i] = &all[i];
    }
    p->n_objects = count;
    p->objects = list;
    return FL_OK;
}

static fl_status write_task(const fl_task *m, fl_arena *scratch, void **ret, fl_err *err) {
    NEW(Fleetune__V1__Task, p, FLEETUNE__V1__TASK__INIT);
    p->kind = (uint32_t)m->kind;
    p->run_id = view(m->run_id, FL_ID_SIZE);
    p->round = m->round;
    p->task_id = m->task_id;
    p->model_digest = view(m->model_digest, FL_DIGEST_SIZE);
    p->model_size = m->model_size;
    p->layer_first = m->layer_first;
    p->layer_last = m->layer_last;
    p->exit_layer = m->exit_layer;
    p->steps = m->steps;
    p->sequence = m->sequence;
    p->micro_batch = m->micro_batch;
    p->learning_rate = m->learning_rate;
    p->seed = m->seed;
    p->deadline_ms = m->deadline_ms;
    p->encoding = m->encoding;
    p->encoding_most = m->encoding_most;
    p->keep_ppm = m->keep_ppm;
    p->eval_tokens = m->eval_tokens;
    p->n_bases = m->base_count;
    FL_TRY(write_layers(m->bases, m->base_count, scratch, &p->bases, err));
    *ret = p;
    return write_task_parts(m, scratch, p, err);
}

static fl_status write_wait(const fl_wait *m, fl_arena *scratch, void **ret, fl_err *err) {
    NEW(Fleetune__V1__Wait, p, FLEETUNE__V1__WAIT__INIT);
    p->reason = (uint32_t)m->reason;
    p->retry_after_ms = m->retry_after_ms;
    p->text = text(m->text);
    *ret = p;
    return FL_OK;
}

static fl_status write_chunk_request(const fl_chunk_request *m, fl_arena *scratch, void **ret,
                                     fl_err *err) {
    NEW(Fleetune__V1__ChunkRequest, p, FLEETUNE__V1__CHUNK_REQUEST__INIT);
    p->digest = view(m->digest, FL_DIGEST_SIZE);
    p->offset = m->offset;
    p->size = m->size;
    *ret = p;
    return FL_OK;
}

static fl_status write_chunk(const fl_chunk *m, fl_arena *scratch, void **ret, fl_err *err) {
    NEW(Fleetune__V1__Chunk, p, FLEETUNE__V1__CHUNK__INIT);
    p->digest = view(m->digest, FL_DIGEST_SIZE);
    p->offset = m->offset;
    p->total = m->total;
    p->data = view(m->data.data, m->data.size);
    *ret = p;
    return FL_OK;
}

static fl_status write_update_begin(const fl_update_begin *m, fl_arena *scratch, void **ret,
                                    fl_err *err) {
    NEW(Fleetune__V1__UpdateBegin, p, FLEETUNE__V1__UPDATE_BEGIN__INIT);
    p->run_id = view(m->run_id, FL_ID_SIZE);
    p->round = m->round;
    p->task_id = m->task_id;
    p->tokens = m->tokens;
    p->size = m->size;
    p->digest = view(m->digest, FL_DIGEST_SIZE);
    *ret = p;
    return write_key(&m->key, scratch, &p->key, err);
}

static fl_status write_update_want(const fl_update_want *m, fl_arena *scratch, void **ret,
                                   fl_err *err) {
    NEW(Fleetune__V1__UpdateWant, p, FLEETUNE__V1__UPDATE_WANT__INIT);
    p->offset = m->offset;
    *ret = p;
    return write_key(&m->key, scratch, &p->key, err);
}

static fl_status write_update_chunk(const fl_update_chunk *m, fl_arena *scratch, void **ret,
                                    fl_err *err) {
    NEW(Fleetune__V1__UpdateChunk, p, FLEETUNE__V1__UPDATE_CHUNK__INIT);
    p->offset = m->offset;
    p->data = view(m->data.data, m->data.size);
    *ret = p;
    return write_key(&m->key, scratch, &p->key, err);
}

static fl_status write_update_commit(const fl_update_commit *m, fl_arena *scratch, void **ret,
                                     fl_err *err) {
    NEW(Fleetune__V1__UpdateCommit, p, FLEETUNE__V1__UPDATE_COMMIT__INIT);
    p->digest = view(m->digest, FL_DIGEST_SIZE);
    *ret = p;
    return write_key(&m->key, scratch, &p->key, err);
}

static fl_status write_update_ack(const fl_update_ack *m, fl_arena *scratch, void **ret,
                                  fl_err *err) {
    NEW(Fleetune__V1__UpdateAck, p, FLEETUNE__V1__UPDATE_ACK__INIT);
    p->verdict = (uint32_t)m->verdict;
    p->code = (uint32_t)m->code;
    p->text = text(m->text);
    *ret = p;
    return write_key(&m->key, scratch, &p->key, err);
}

static fl_status write_heartbeat(const fl_heartbeat *m, fl_arena *scratch, void **ret,
                                 fl_err *err) {
    NEW(Fleetune__V1__Heartbeat, p, FLEETUNE__V1__HEARTBEAT__INIT);
    p->state = (uint32_t)m->state;
    p->task_id = m->task_id;
    p->step = m->step;
    p->steps = m->steps;
    p->tokens = m->tokens;
    p->loss = m->loss;
    p->bytes_up = m->bytes_up;
    p->bytes_down = m->bytes_down;
    *ret = p;
    return write_capability(&m->capability, scratch, &p->capability, err);
}

static fl_status write_heartbeat_ack(const fl_heartbeat_ack *m, fl_arena *scratch, void **ret,
                                     fl_err *err) {
    NEW(Fleetune__V1__HeartbeatAck, p, FLEETUNE__V1__HEARTBEAT_ACK__INIT);
    p->order = (uint32_t)m->order;
    p->task_id = m->task_id;
    *ret = p;
    return FL_OK;
}

static fl_status write_report(const fl_report *m, fl_arena *scratch, void **ret, fl_err *err) {
    NEW(Fleetune__V1__Report, p, FLEETUNE__V1__REPORT__INIT);
    p->run_id = view(m->run_id, FL_ID_SIZE);
    p->round = m->round;
    p->task_id = m->task_id;
    p->sequence = m->sequence;
    p->vote_version = m->vote_version;
    p->layers_digest = view(m->layers_digest, FL_DIGEST_SIZE);
    p->tokens = m->tokens;
    p->nll_base_q20 = m->nll_base_q20;
    p->nll_local_q20 = m->nll_local_q20;
    p->nll_voted_q20 = m->nll_voted_q20;
    p->peak_rss_bytes = m->peak_rss_bytes;
    const size_t count = m->exit_count;
    Fleetune__V1__ExitSums **list = FL_ARENA_NEW(scratch, Fleetune__V1__ExitSums *, count);
    Fleetune__V1__ExitSums *all = FL_ARENA_NEW(scratch, Fleetune__V1__ExitSums, count);
    if (count != 0 && (list == NULL || all == NULL)) return spent(err);
    for (size_t i = 0; i < count; i++) {
        all[i] = (Fleetune__V1__ExitSums)FLEETUNE__V1__EXIT_SUMS__INIT;
        all[i].nll_q20 = m->exits[i].nll_q20;
        all[i].responsibility_q20 = m->exits[i].responsibility_q20;
        all[i].correct = m->exits[i].correct;
        list[i] = &all[i];
    }
    p->n_exits = count;
    p->exits = list;
    *ret = p;
    return FL_OK;
}

static fl_status write_report_ack(const fl_report_ack *m, fl_arena *scratch, void **ret,
                                  fl_err *err) {
    NEW(Fleetune__V1__ReportAck, p, FLEETUNE__V1__REPORT_ACK__INIT);
    p->sequence = m->sequence;
    p->verdict = (uint32_t)m->verdict;
    p->code = (uint32_t)m->code;
    *ret = p;
    return FL_OK;
}

static fl_status write_any(const fl_msg *m, fl_arena *scratch, void **ret, fl_err *err) {
    switch (m->type) {
    case FL_MSG_JOIN_REQUEST:
        return write_join_request(&m->join_request, scratch, ret, err);
    case FL_MSG_JOIN_REPLY:
        return write_join_reply(&m->join_reply, scratch, ret, err);
    case FL_MSG_HELLO:
        return write_hello(&m->hello, scratch, ret, err);
    case FL_MSG_HELLO_REPLY:
        return write_hello_reply(&m->hello_reply, scratch, ret, err);
    case FL_MSG_HELLO_FINISH:
        return write_hello_finish(&m->hello_finish, scratch, ret, err);
    case FL_MSG_ERROR:
        return write_error(&m->error, scratch, ret, err);
    case FL_MSG_TASK_REQUEST:
        return write_task_request(&m->task_request, scratch, ret, err);
    case FL_MSG_TASK:
        return write_task(&m->task, scratch, ret, err);
    case FL_MSG_WAIT:
        return write_wait(&m->wait, scratch, ret, err);
    case FL_MSG_CHUNK_REQUEST:
        return write_chunk_request(&m->chunk_request, scratch, ret, err);
    case FL_MSG_CHUNK:
        return write_chunk(&m->chunk, scratch, ret, err);
    case FL_MSG_UPDATE_BEGIN:
        return write_update_begin(&m->update_begin, scratch, ret, err);
    case FL_MSG_UPDATE_WANT:
        return write_update_want(&m->update_want, scratch, ret, err);
    case FL_MSG_UPDATE_CHUNK:
        return write_update_chunk(&m->update_chunk, scratch, ret, err);
    case FL_MSG_UPDATE_COMMIT:
        return write_update_commit(&m->update_commit, scratch, ret, err);
    case FL_MSG_UPDATE_ACK:
        return write_update_ack(&m->update_ack, scratch, ret, err);
    case FL_MSG_HEARTBEAT:
        return write_heartbeat(&m->heartbeat, scratch, ret, err);
    case FL_MSG_HEARTBEAT_ACK:
        return write_heartbeat_ack(&m->heartbeat_ack, scratch, ret, err);
    case FL_MSG_REPORT:
        return write_report(&m->report, scratch, ret, err);
    case FL_MSG_REPORT_ACK:
        return write_report_ack(&m->report_ack, scratch, ret, err);
    }
    return FL_FAIL(err, FL_EUNSUPPORTED, "message type %d is unknown", m->type);
}

fl_status fl_codec_write(const fl_msg *m, fl_arena *scratch, struct ProtobufCMessage **ret,
                         fl_err *err) {
    void *p = NULL;
    FL_TRY(write_any(m, scratch, &p, err));
    *ret = p;
    return FL_OK;
}
