// Updates: from the first byte offered to a durable, counted contribution. Every refusal is an
// event with its reason, and leaves the model as it was.
#include "common/fault.h"
#include "common/log.h"
#include "common/plant.h"
#include "coordinator/loop_state.h"
#include "proto/seal.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void coord_loop_drop_upload(coord_loop *loop, uint32_t node) {
    coord_upload *u = &loop->sessions[node].upload;
    if (u->active) loop->uploads -= u->begin.size;
    free(u->data);
    *u = (coord_upload){0};
}

static fl_status answer_ack(coord_loop *loop, uint32_t node, const fl_update_key *key,
                            fl_verdict verdict, fl_code code, const char *text, fl_err *err) {
    fl_msg m = {.type = FL_MSG_UPDATE_ACK,
                .update_ack = {.key = *key, .verdict = verdict, .code = code}};
    snprintf(m.update_ack.text, sizeof(m.update_ack.text), "%.*s", FL_TEXT_MAX, text);
    return coord_loop_answer(loop, node, &m, err);
}

static fl_status refuse(coord_loop *loop, uint32_t node, const fl_update_key *key, fl_code code,
                        const char *why, fl_err *err) {
    FL_TRY(coord_loop_event(loop, "update.refused", node, err, "layer %u, base %llu: %s: %s",
                            key->layer, (unsigned long long)key->base_version, fl_code_name(code),
                            why));
    return answer_ack(loop, node, key, FL_VERDICT_REFUSED, code, why, err);
}

static fl_status answer_want(coord_loop *loop, uint32_t node, const coord_upload *u, fl_err *err) {
    const fl_msg m = {.type = FL_MSG_UPDATE_WANT,
                      .update_want = {.key = u->begin.key, .offset = u->received}};
    return coord_loop_answer(loop, node, &m, err);
}

fl_status coord_loop_effect(coord_loop *loop, uint32_t node, const coord_effect *fx, fl_err *err) {
    (void)node;
    if (fx->flush != COORD_FLUSH_NO) loop->flush_due = fx->flush;
    if (!fx->task_ended) return FL_OK;
    return coord_store_close_task(loop->store, (int64_t)fx->task, (int64_t)fx->counted, err);
}

static bool same_key(const fl_update_key *a, const fl_update_key *b) {
    return a->layer == b->layer && a->base_version == b->base_version && a->sequence == b->sequence;
}

// May this update come at all? FL_CODE_NONE, or why not. *ret_duplicate: it is in the ledger.
static fl_status judge_offer(coord_loop *loop, uint32_t node, const fl_update_begin *b,
                             uint64_t now_ms, bool *ret_duplicate, fl_code *ret, fl_err *err) {
    coord_seen seen = COORD_SEEN_NEW;
    coord_effect fx;
    *ret_duplicate = false;
    if (memcmp(b->run_id, loop->run_id, FL_ID_SIZE) != 0) {
        *ret = FL_CODE_RUN;
        return FL_OK;
    }
    *ret = FL_CODE_BASE;
    if (b->key.base_version > INT64_MAX || b->key.sequence > INT64_MAX) return FL_OK;
    FL_TRY(coord_store_seen_update(loop->store, loop->registry.members[node].id, b->key.layer,
                                   (int64_t)b->key.base_version, (int64_t)b->key.sequence, &seen,
                                   err));
    *ret_duplicate = seen == COORD_SEEN_SAME ||
                     (fl_plant(OTHER_IS_SAME) && seen == COORD_SEEN_OTHER);
    if (seen != COORD_SEEN_NEW) return FL_OK; // OTHER: one update for each version, and it came
    const coord_event ev = {.kind = COORD_EV_OFFER,
                            .now_ms = now_ms,
                            .node = node,
                            .task = b->task_id,
                            .layer = b->key.layer,
                            .base = b->key.base_version};
    FL_TRY(coord_round_step(&loop->round, &ev, &fx, err));
    *ret = fx.code;
    return FL_OK;
}

// Is this a size that an update of the layer can have?
static bool size_fits(const coord_loop *loop, const fl_update_begin *b) {
    const int64_t count = loop->layer[b->key.layer].count;
    if (count == 0) return b->size > FL_SEAL_EXTRA + FL_UPDATE_HEAD && b->size <= FL_UPDATE_MAX;
    return b->size == fl_update_size((uint32_t)count, FL_UPDATE_INT16) + FL_SEAL_EXTRA ||
           b->size == fl_update_size((uint32_t)count, FL_UPDATE_INT8) + FL_SEAL_EXTRA;
}

fl_status coord_loop_on_begin(coord_loop *loop, uint32_t node, const fl_msg *msg, uint64_t now_ms,
                              fl_err *err) {
    const fl_update_begin *b = &msg->update_begin;
    coord_upload *u = &loop->sessions[node].upload;
    bool duplicate;
    fl_code code;
    FL_TRY(judge_offer(loop, node, b, now_ms, &duplicate, &code, err));
    if (duplicate)
        return answer_ack(loop, node, &b->key, FL_VERDICT_DUPLICATE, FL_CODE_NONE, "", err);
    if (code != FL_CODE_NONE) return refuse(loop, node, &b->key, code, fl_code_text(code), err);
    if (!size_fits(loop, b))
        return refuse(loop, node, &b->key, FL_CODE_SHAPE, fl_code_text(FL_CODE_SHAPE), err);
    if (u->active && same_key(&u->begin.key, &b->key) && u->begin.size == b->size &&
        memcmp(u->begin.digest, b->digest, FL_DIGEST_SIZE) == 0)
        return answer_want(loop, node, u, err); // goes on where it was
    coord_loop_drop_upload(loop, node);
    const bool room = b->size <= loop->settings.uploads_max - loop->uploads;
    u->data = room && !fl_fault() ? malloc((size_t)b->size) : NULL;
    if (u->data == NULL) {
        const fl_msg m = {.type = FL_MSG_ERROR,
                          .error = {.code = FL_CODE_QUOTA, .text = "too many uploads at once"}};
        return coord_loop_answer(loop, node, &m, err);
    }
    u->active = true;
    u->began_ms = now_ms;
    u->begin = *b;
    loop->uploads += b->size;
    return answer_want(loop, node, u, err);
}

fl_status coord_loop_on_update_chunk(coord_loop *loop, uint32_t node, const fl_msg *msg,
                                     uint64_t now_ms, fl_err *err) {
    const fl_update_chunk *c = &msg->update_chunk;
    coord_upload *u = &loop->sessions[node].upload;
    (void)now_ms;
    if (!u->active || !same_key(&u->begin.key, &c->key)) {
        const fl_msg m = {.type = FL_MSG_ERROR,
                          .error = {.code = FL_CODE_STATE, .text = "begin this update first"}};
        return coord_loop_answer(loop, node, &m, err);
    }
    // Only the next bytes count; a repeated or early chunk is answered with what is wanted.
    if (c->offset == u->received && c->data.size <= u->begin.size - u->received) {
        memcpy(u->data + u->received, c->data.data, c->data.size);
        u->received += c->data.size;
    }
    return answer_want(loop, node, u, err);
}

fl_status coord_loop_fold(coord_loop *loop, const fl_update *update, uint64_t weight, uint32_t clip,
                          fl_err *err) {
    coord_sum *sum = &loop->sum[update->info.layer];
    const uint32_t count = update->info.count;
    if (sum->count == 0) FL_TRY(coord_sum_init(sum, count, err));
    int64_t *values = malloc(count * sizeof(*values));
    if (values == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory for an update");
    fl_update_fixed(update, 0, count, values);
    const fl_status st = coord_sum_fold(sum, values, count, weight, clip, err);
    free(values);
    return st;
}

// What the bytes must be before they may touch anything. On FL_CODE_NONE *ret_update borrows from
// u->data, which then holds the opened payload of *ret_size bytes.
static fl_code open_payload(coord_loop *loop, uint32_t node, coord_upload *u, fl_update *ret_update,
                            fl_bytes *ret_payload, fl_err *why) {
    const fl_update_begin *b = &u->begin;
    uint8_t digest[FL_DIGEST_SIZE];
    fl_seal_label label = {.round = b->round, .key = b->key, .tokens = b->tokens};
    memcpy(label.run_id, b->run_id, sizeof(label.run_id));
    memcpy(label.node_key, loop->registry.members[node].sign_key, FL_KEY_SIZE);
    fl_hash((fl_bytes){u->data, (size_t)b->size}, digest);
    if (memcmp(digest, b->digest, sizeof(digest)) != 0 && !fl_plant(NO_DIGEST)) {
        (void)FL_FAIL(why, FL_EAUTH, "%s", fl_code_text(FL_CODE_DIGEST));
        return FL_CODE_DIGEST;
    }
    const size_t size = (size_t)b->size - FL_SEAL_EXTRA;
    uint8_t *payload = malloc(size);
    if (payload == NULL) {
        (void)FL_FAIL(why, FL_ENOMEM, "no memory to open the update");
        return FL_CODE_INTERNAL;
    }
    const fl_status st =
        loop->world.unseal(&label, (fl_bytes){u->data, (size_t)b->size}, loop->keys.update,
                           loop->keys.update_key, payload, size, ret_payload, why);
    if (st == FL_OK) memcpy(u->data, payload, size);
    free(payload);
    if (st != FL_OK) return FL_CODE_SIGNATURE;
    ret_payload->data = u->data;
    const fl_status opened = fl_update_open(*ret_payload, ret_update, why);
    if (opened != FL_OK) return opened == FL_ELIMIT ? FL_CODE_NOT_FINITE : FL_CODE_MALFORMED;
    const fl_update_info *info = &ret_update->info;
    const int64_t count = loop->layer[b->key.layer].count;
    if (fl_plant(NO_SHAPE)) return FL_CODE_NONE;
    if (info->layer != b->key.layer || info->base_version != b->key.base_version ||
        info->tokens != b->tokens || (count != 0 && info->count != count)) {
        (void)FL_FAIL(why, FL_EARG, "%s", fl_code_text(FL_CODE_SHAPE));
        return FL_CODE_SHAPE;
    }
    return FL_CODE_NONE;
}

typedef struct admission {
    fl_update update;
    fl_bytes payload;
    double norm;
    uint32_t clip;
    uint64_t weight;
} admission;

static fl_status admit(coord_loop *loop, uint32_t node, const fl_update_begin *b,
                       const admission *a, fl_err *err) {
    const uint32_t layer = b->key.layer;
    coord_update_row row = {.task = (int64_t)b->task_id,
                            .node = loop->registry.members[node].id,
                            .layer = layer,
                            .base = (int64_t)b->key.base_version,
                            .sequence = (int64_t)b->key.sequence,
                            .tokens = (int64_t)b->tokens,
                            .weight = (int64_t)a->weight,
                            .clip = a->clip,
                            .norm = a->norm};
    FL_TRY(coord_store_spool(loop->store, (int64_t)loop->round.round, a->payload, &row.at, err));
    FL_TRY(coord_store_pin_layer(loop->store, layer, a->update.info.count, err));
    FL_TRY(coord_store_add_update(loop->store, &row, err));
    FL_TRY(coord_loop_fold(loop, &a->update, a->weight, a->clip, err));
    loop->layer[layer].count = a->update.info.count;
    coord_norms_add(&loop->norms[layer], a->norm);
    return coord_loop_event(loop, "update.accepted", node, err,
                            "layer %u, base %llu, %llu tokens, norm %.4g%s", layer,
                            (unsigned long long)b->key.base_version, (unsigned long long)b->tokens,
                            a->norm, a->clip < COORD_ONE ? ", clipped" : "");
}

// How fast the upload came. Clocks count milliseconds: a short one says little, and nothing then.
static void note_link(coord_session *s, uint64_t now_ms) {
    const coord_upload *u = &s->upload;
    const uint64_t ms = now_ms > u->began_ms ? now_ms - u->began_ms : 0;
    s->link_bytes_s = ms < 20 ? 0 : u->begin.size * 1000 / ms;
}

// The update is complete: every check, then the ledger, then the sum. Ends the upload.
static fl_status conclude(coord_loop *loop, uint32_t node, uint64_t now_ms, fl_err *err) {
    coord_upload *u = &loop->sessions[node].upload;
    const fl_update_begin b = u->begin;
    admission a = {.clip = COORD_ONE};
    coord_effect fx = {0};
    fl_err why = {.text = ""};
    coord_event ev = {.kind = COORD_EV_UPDATE,
                      .now_ms = now_ms,
                      .node = node,
                      .task = b.task_id,
                      .layer = b.key.layer,
                      .base = b.key.base_version,
                      .tokens = b.tokens};
    note_link(&loop->sessions[node], now_ms);
    FL_TRY(coord_store_begin(loop->store, err));
    fl_code code = open_payload(loop, node, u, &a.update, &a.payload, &why);
    if (code == FL_CODE_NONE) {
        a.norm = sqrt(fl_update_norm2(&a.update));
        if (coord_gate_norm(&loop->gate, &loop->norms[b.key.layer], a.norm, &a.clip, &why) != FL_OK)
            code = FL_CODE_NORM;
        if (code != FL_CODE_NONE && fl_plant(NORM_OF_REFUSED))
            coord_norms_add(&loop->norms[b.key.layer], a.norm);
        if (fl_plant(NO_CLIP)) a.clip = COORD_ONE;
    }
    if (code == FL_CODE_INTERNAL || code == FL_CODE_DIGEST) {
        coord_loop_drop_upload(loop, node); // not the update's fault: it may come again
        return refuse(loop, node, &b.key, code, why.text, err);
    }
    if (code != FL_CODE_NONE) ev.kind = COORD_EV_REFUSED;
    fl_status st = coord_round_step(&loop->round, &ev, &fx, err);
    if (st == FL_OK && code == FL_CODE_NONE && fx.code != FL_CODE_NONE) {
        code = fx.code; // changed since it was offered
        (void)FL_FAIL(&why, FL_ESTATE, "%s", fl_code_text(code));
    }
    if (st == FL_OK && code == FL_CODE_NONE) {
        a.weight = fx.weight;
        st = admit(loop, node, &b, &a, err);
    }
    coord_loop_drop_upload(loop, node);
    FL_TRY(st);
    FL_TRY(coord_loop_effect(loop, node, &fx, err));
    if (code != FL_CODE_NONE) return refuse(loop, node, &b.key, code, why.text, err);
    return answer_ack(loop, node, &b.key, FL_VERDICT_ACCEPTED, FL_CODE_NONE, "", err);
}

fl_status coord_loop_on_commit(coord_loop *loop, uint32_t node, const fl_msg *msg, uint64_t now_ms,
                               fl_err *err) {
    const fl_update_commit *c = &msg->update_commit;
    const coord_upload *u = &loop->sessions[node].upload;
    coord_seen seen = COORD_SEEN_NEW;
    if (c->key.base_version <= INT64_MAX && c->key.sequence <= INT64_MAX)
        FL_TRY(coord_store_seen_update(loop->store, loop->registry.members[node].id, c->key.layer,
                                       (int64_t)c->key.base_version, (int64_t)c->key.sequence,
                                       &seen, err));
    if (seen == COORD_SEEN_SAME) // the acknowledgement was lost
        return answer_ack(loop, node, &c->key, FL_VERDICT_DUPLICATE, FL_CODE_NONE, "", err);
    if (!u->active || !same_key(&u->begin.key, &c->key) ||
        memcmp(u->begin.digest, c->digest, FL_DIGEST_SIZE) != 0) {
        const fl_msg m = {.type = FL_MSG_ERROR,
                          .error = {.code = FL_CODE_STATE, .text = "begin this update first"}};
        return coord_loop_answer(loop, node, &m, err);
    }
    if (u->received < u->begin.size) return answer_want(loop, node, u, err);
    return conclude(loop, node, now_ms, err);
}
