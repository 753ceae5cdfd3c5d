// Work for nodes: tasks, the bytes of objects, heartbeats, and reports of what came of it.
#include "common/log.h"
#include "common/rng.h"
#include "coordinator/loop_state.h"

#include <stdio.h>
#include <string.h>

enum { FINAL_TASKS_MAX = 5 }; // a node that cannot score itself does not try for ever

static fl_status answer_wait(coord_loop *loop, uint32_t node, fl_code code, fl_err *err) {
    fl_msg m = {.type = FL_MSG_WAIT,
                .wait = {.reason = code, .retry_after_ms = loop->round.opts.retry_ms}};
    snprintf(m.wait.text, sizeof(m.wait.text), "%s", fl_code_text(code));
    return coord_loop_answer(loop, node, &m, err);
}

// The version of a layer that the node holds; 0 when it holds none of this run's.
static uint64_t held(const coord_loop *loop, const fl_task_request *q, uint32_t layer) {
    if (!q->has_run || memcmp(q->run_id, loop->run_id, FL_ID_SIZE) != 0) return 0;
    for (size_t i = 0; i < q->layer_count; i++) {
        if (q->layers[i].layer == layer) return q->layers[i].version;
    }
    return 0;
}

static void fill_vote(const coord_loop *loop, fl_vote *ret) {
    *ret = (fl_vote){
        .version = loop->vote.version, .mode = FL_VOTE_MIXTURE, .count = loop->vote.exits};
    for (uint32_t t = 0; t < loop->vote.exits; t++) {
        ret->weights[t] = (float)loop->vote.weight[t];
        ret->temperatures[t] = 1.0f;
    }
}

// What every task says, whatever its kind.
static fl_task task_of(const coord_loop *loop, uint64_t task_id) {
    const coord_settings *s = &loop->settings;
    fl_task t = {.round = loop->round.round,
                 .task_id = task_id,
                 .model_size = loop->model_size,
                 .rank = (uint32_t)s->rank,
                 .alpha = (float)s->alpha,
                 .a_seed = loop->a_seed,
                 .exit_count = loop->round.opts.exits,
                 .sequence = (uint32_t)s->sequence,
                 .micro_batch = (uint32_t)s->micro_batch,
                 .learning_rate = (float)s->rate,
                 .seed = fl_rng_u64(loop->a_seed, task_id),
                 .deadline_ms = (uint64_t)s->task_deadline_s * 1000,
                 .encoding = s->encoding == 0 ? FL_UPDATE_INT16 : FL_UPDATE_INT8,
                 .encoding_most = (uint32_t)s->encoding + FL_UPDATE_INT16,
                 .keep_ppm = (uint32_t)(s->density * 1e6),
                 .eval_tokens = (uint32_t)s->eval_tokens};
    memcpy(t.run_id, loop->run_id, sizeof(t.run_id));
    memcpy(t.model_digest, loop->model_digest, sizeof(t.model_digest));
    memcpy(t.exit_layers, loop->round.opts.exit_layers, sizeof(t.exit_layers));
    fill_vote(loop, &t.vote);
    return t;
}

static size_t fill_objects(const coord_loop *loop, const fl_task_request *q,
                           fl_layer_object objects[FL_LAYERS_MAX]) {
    size_t n = 0;
    for (uint32_t l = 0; l < loop->layers; l++) {
        const coord_layer_row *row = &loop->layer[l];
        if (row->version == 0 || held(loop, q, l) >= (uint64_t)row->version) continue;
        objects[n] = (fl_layer_object){
            .layer = l, .version = (uint64_t)row->version, .size = (uint64_t)row->size};
        memcpy(objects[n].digest, row->digest, FL_DIGEST_SIZE);
        n++;
    }
    return n;
}

static fl_status answer_task(coord_loop *loop, uint32_t node, const fl_task_request *q,
                             fl_task *task, fl_err *err) {
    fl_layer_object objects[FL_LAYERS_MAX];
    fl_layer_version bases[FL_LAYERS_MAX];
    task->objects = objects;
    task->object_count = fill_objects(loop, q, objects);
    task->bases = bases;
    if (task->kind == FL_TASK_TRAIN) {
        for (uint32_t l = task->layer_first; l <= task->layer_last; l++)
            bases[task->base_count++] =
                (fl_layer_version){.layer = l, .version = loop->round.version[l]};
    }
    const fl_msg m = {.type = FL_MSG_TASK, .task = *task};
    return coord_loop_answer(loop, node, &m, err);
}

// The run is over: each node gets the last layers once more, to score them. Such a task is in no
// ledger: nothing is uploaded for it.
static fl_status answer_finished(coord_loop *loop, uint32_t node, const fl_task_request *q,
                                 fl_err *err) {
    coord_session *s = &loop->sessions[node];
    if (s->reported >= (int64_t)loop->round.round || s->final_tasks >= FINAL_TASKS_MAX)
        return answer_wait(loop, node, FL_CODE_FINISHED, err);
    s->final_tasks++;
    fl_task task = task_of(loop, loop->round.next_task + node);
    task.kind = FL_TASK_EVAL;
    task.exit_layer = loop->round.opts.exit_layers[loop->round.opts.exits - 1];
    task.layer_first = task.layer_last = task.exit_layer;
    return answer_task(loop, node, q, &task, err);
}

// What is known of the node's speed, in tokens a 1000 s; 0: nothing.
static uint64_t speed_of(const fl_task_request *q) {
    const float speed = q->capability.tokens_per_second;
    return speed > 0.0f && speed < 1e9f ? (uint64_t)((double)speed * 1000.0) : 0;
}

// What an update of the largest layer takes on the wire; 0: no layer's size is known yet.
static uint64_t layer_bytes(const coord_loop *loop) {
    const coord_settings *s = &loop->settings;
    int64_t most = 0;
    for (uint32_t l = 0; l < loop->layers; l++)
        most = loop->layer[l].count > most ? loop->layer[l].count : most;
    return fl_update_size_about((uint32_t)most, (fl_update_encoding)(s->encoding + FL_UPDATE_INT16),
                                (uint32_t)((double)most * s->density));
}

fl_status coord_loop_on_request(coord_loop *loop, uint32_t node, const fl_msg *msg, uint64_t now_ms,
                                fl_err *err) {
    const fl_task_request *q = &msg->task_request;
    coord_effect fx;
    const coord_event ev = {.kind = COORD_EV_REQUEST,
                            .now_ms = now_ms,
                            .node = node,
                            .window_max = q->capability.window_max,
                            .speed = speed_of(q),
                            .link_bytes_s = loop->sessions[node].link_bytes_s};
    loop->round.opts.layer_bytes = layer_bytes(loop);
    FL_TRY(coord_round_step(&loop->round, &ev, &fx, err));
    if (fx.task_ended) FL_TRY(coord_store_begin(loop->store, err));
    FL_TRY(coord_loop_effect(loop, node, &fx, err));
    if (fx.code == FL_CODE_FINISHED) return answer_finished(loop, node, q, err);
    if (fx.code != FL_CODE_NONE) return answer_wait(loop, node, fx.code, err);
    const coord_slot *slot = &loop->round.slots[node];
    if (fx.new_task) {
        const coord_task_row row = {.task = (int64_t)fx.task,
                                    .node = loop->registry.members[node].id,
                                    .round = (int64_t)loop->round.round,
                                    .exit = slot->exit,
                                    .first = slot->first,
                                    .last = slot->last};
        FL_TRY(coord_store_begin(loop->store, err));
        FL_TRY(coord_store_add_task(loop->store, &row, err));
        FL_TRY(coord_loop_event(loop, "task.given", node, err,
                                "task %llu: layers %u to %u, %u steps", (unsigned long long)fx.task,
                                slot->first, slot->last, slot->steps));
    }
    fl_task task = task_of(loop, slot->task);
    task.kind = FL_TASK_TRAIN;
    task.layer_first = slot->first;
    task.layer_last = slot->last;
    task.exit_layer = loop->round.opts.exit_layers[slot->exit];
    task.steps = slot->steps;
    return answer_task(loop, node, q, &task, err);
}

// The model, and any version of a layer that is still kept. Nothing else has a name here.
static fl_status may_fetch(coord_loop *loop, const uint8_t digest[FL_DIGEST_SIZE], bool *ret,
                           fl_err *err) {
    *ret = memcmp(digest, loop->model_digest, FL_DIGEST_SIZE) == 0;
    for (uint32_t l = 0; l < loop->layers && !*ret; l++)
        *ret = loop->layer[l].version > 0 &&
               memcmp(digest, loop->layer[l].digest, FL_DIGEST_SIZE) == 0;
    return *ret ? FL_OK : coord_store_is_layer(loop->store, digest, ret, err);
}

fl_status coord_loop_on_chunk_request(coord_loop *loop, uint32_t node, const fl_msg *msg,
                                      uint64_t now_ms, fl_err *err) {
    const fl_chunk_request *q = &msg->chunk_request;
    uint64_t total = 0;
    size_t got = 0;
    bool may = false;
    (void)now_ms;
    FL_TRY(may_fetch(loop, q->digest, &may, err));
    if (!may ||
        coord_store_read_object(loop->store, q->digest, q->offset, loop->chunk, q->size, &got,
                                &total, NULL) != FL_OK ||
        got == 0) {
        const fl_msg m = {.type = FL_MSG_ERROR,
                          .error = {.code = FL_CODE_NO_OBJECT, .text = "no such object"}};
        return coord_loop_answer(loop, node, &m, err);
    }
    fl_msg m = {.type = FL_MSG_CHUNK,
                .chunk = {.offset = q->offset, .total = total, .data = {loop->chunk, got}}};
    memcpy(m.chunk.digest, q->digest, FL_DIGEST_SIZE);
    return coord_loop_answer(loop, node, &m, err);
}

fl_status coord_loop_on_heartbeat(coord_loop *loop, uint32_t node, const fl_msg *msg,
                                  uint64_t now_ms, fl_err *err) {
    const fl_heartbeat *h = &msg->heartbeat;
    (void)now_ms;
    loop->sessions[node].heartbeat = *h;
    const bool at_work = h->state == FL_NODE_FETCHING || h->state == FL_NODE_TRAINING;
    const bool mine = !at_work || h->task_id == loop->round.slots[node].task ||
                      loop->round.phase == COORD_FINISHED;
    const fl_msg m = {.type = FL_MSG_HEARTBEAT_ACK,
                      .heartbeat_ack = {.order = mine ? FL_ORDER_CONTINUE : FL_ORDER_ABANDON,
                                        .task_id = h->task_id}};
    return coord_loop_answer(loop, node, &m, err);
}

static fl_status answer_report(coord_loop *loop, uint32_t node, const fl_report *r,
                               fl_verdict verdict, fl_code code, fl_err *err) {
    const fl_msg m = {.type = FL_MSG_REPORT_ACK,
                      .report_ack = {.sequence = r->sequence, .verdict = verdict, .code = code}};
    return coord_loop_answer(loop, node, &m, err);
}

static coord_report_row row_of(const coord_loop *loop, uint32_t node, const fl_report *r) {
    coord_report_row row = {.node = loop->registry.members[node].id,
                            .sequence = (int64_t)r->sequence,
                            .round = (int64_t)r->round,
                            .vote = (int64_t)r->vote_version,
                            .tokens = (int64_t)r->tokens,
                            .nll_base = r->nll_base_q20,
                            .nll_local = r->nll_local_q20,
                            .nll_voted = r->nll_voted_q20,
                            .peak_rss_bytes = (int64_t)r->peak_rss_bytes,
                            .exits = (uint32_t)r->exit_count};
    for (size_t t = 0; t < r->exit_count; t++) {
        row.share[t] = (int64_t)r->exits[t].responsibility_q20;
        row.nll[t] = r->exits[t].nll_q20;
    }
    return row;
}

fl_status coord_loop_on_report(coord_loop *loop, uint32_t node, const fl_msg *msg, uint64_t now_ms,
                               fl_err *err) {
    const fl_report *r = &msg->report;
    (void)now_ms;
    if (memcmp(r->run_id, loop->run_id, FL_ID_SIZE) != 0)
        return answer_report(loop, node, r, FL_VERDICT_REFUSED, FL_CODE_RUN, err);
    if (r->sequence > INT64_MAX || r->round > loop->round.round || r->tokens > INT64_MAX >> 24 ||
        r->vote_version > loop->vote.version)
        return answer_report(loop, node, r, FL_VERDICT_REFUSED, FL_CODE_MALFORMED, err);
    const coord_report_row row = row_of(loop, node, r);
    FL_TRY(coord_store_begin(loop->store, err));
    const fl_status st = coord_store_add_report(loop->store, &row, err);
    if (st == FL_ESTATE)
        return answer_report(loop, node, r, FL_VERDICT_DUPLICATE, FL_CODE_NONE, err);
    FL_TRY(st);
    if (loop->sessions[node].reported < row.round) loop->sessions[node].reported = row.round;
    const double tokens = (double)row.tokens * FL_Q20;
    FL_TRY(coord_loop_event(loop, "report", node, err,
                            "round %lld: %.4f nats a token with the base, %.4f with the vote",
                            (long long)row.round, (double)row.nll_base / tokens,
                            (double)row.nll_voted / tokens));
    return answer_report(loop, node, r, FL_VERDICT_ACCEPTED, FL_CODE_NONE, err);
}
