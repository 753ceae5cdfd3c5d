#include "node/outbox.h"

#include "common/checked.h"
#include "proto/seal.h"

#include <stdlib.h>
#include <string.h>

node_upload_choice node_outbox_choose(node_state *s, const fl_task *t,
                                      const node_outbox_terms *terms, const uint32_t *counts,
                                      uint32_t layers) {
    node_upload_roll(&s->upload, terms->now_s);
    const node_upload_ask ask = {
        .rule = terms->rule,
        .only = t->encoding,
        .most = t->encoding_most,
        .keep_ppm = t->keep_ppm,
        .counts = counts,
        .layers = layers,
        .bytes_per_s = terms->uplink.bytes_per_s,
        .rtt_s = terms->uplink.rtt_s,
        .work_s = terms->work_s,
        .left_s = terms->left_s,
        .budget_left = node_upload_left(&s->upload, &terms->rule),
        .budget_share =
            node_upload_share(&s->upload, &terms->rule, terms->now_s, terms->work_s),
    };
    const node_upload_choice c = node_upload_choose(&ask);
    s->upload.least = (int64_t)c.least;
    return c;
}

// What earlier updates of the layer left, or zeros: nothing was kept, it cannot be read, or it is
// of a layer of another shape. A rest that is lost costs some of the training, never correctness.
static fl_status load_rest(const node_state *s, uint32_t layer, uint64_t base, uint32_t count,
                           int64_t *sum, fl_err *err) {
    uint8_t *bytes = NULL;
    size_t size = 0;
    bool whole = false;
    node_residual rest;
    memset(sum, 0, count * sizeof(*sum));
    const fl_status there = node_state_rest(s, layer, &bytes, &size, &whole, err);
    if (there == FL_ENOENT) return FL_OK;
    FL_TRY(there);
    const fl_status st = node_residual_read(bytes, size, layer, count, whole, s->identity,
                                            s->run_id, &rest, sum, NULL);
    free(bytes);
    if (st != FL_OK || rest.base_version > base) // a coordinator that was put back to a backup
        memset(sum, 0, count * sizeof(*sum));
    else
        node_residual_age(sum, count, base - rest.base_version);
    return FL_OK;
}

typedef struct draft {
    int64_t *sum;   // [count] what is to be sent, then what is left of it
    uint8_t *plain; // the payload; the memory of what is kept with it follows the sealed one
    uint8_t *sealed, *rest;
    size_t plain_max, plain_size, rest_size;
} draft;

static void free_draft(draft *d) {
    if (d->plain != NULL) fl_wipe(d->plain, d->plain_max);
    free(d->sum);
    free(d->plain);
    free(d->sealed);
    free(d->rest);
}

// The payload, and the sum without what the coordinator will read of it.
static fl_status encode(const node_outbox *o, const fl_update_begin *b, const float *delta,
                        uint32_t count, draft *d, fl_err *err) {
    const fl_update_info info = {.encoding = o->choice.encoding,
                                 .layer = b->key.layer,
                                 .count = count,
                                 .base_version = b->key.base_version,
                                 .tokens = b->tokens};
    const uint32_t keep = node_upload_keep(count, o->choice.keep_ppm);
    d->plain_max = fl_update_size_max(count, info.encoding, keep);
    d->sum = calloc(count, sizeof(*d->sum));
    d->plain = malloc(d->plain_max);
    if (d->plain_max == 0 || d->sum == NULL || d->plain == NULL)
        return FL_FAIL(err, FL_ENOMEM, "no memory for the update of layer %u", info.layer);
    FL_TRY(load_rest(o->state, info.layer, info.base_version, count, d->sum, err));
    bool kept;
    FL_TRY(node_residual_add(delta, count, d->sum, &kept, err));
    uint8_t random[8];
    fl_random(random, sizeof(random));
    FL_TRY(fl_update_encode_fixed(&info, keep, d->sum, fl_get_u64(random), d->plain, d->plain_max,
                                  &d->plain_size, err));
    fl_update sent;
    FL_TRY(fl_update_open((fl_bytes){d->plain, d->plain_size}, &sent, err));
    node_residual_take(&sent, d->sum);
    return FL_OK;
}

static fl_status seal(const node_outbox *o, fl_update_begin *b, uint32_t count, draft *d,
                      fl_err *err) {
    const node_state *s = o->state;
    fl_seal_label label = {.round = b->round, .key = b->key, .tokens = b->tokens};
    memcpy(label.run_id, b->run_id, sizeof(label.run_id));
    memcpy(label.node_key, s->identity_key, sizeof(label.node_key));
    b->size = d->plain_size + FL_SEAL_EXTRA;
    d->rest_size = node_residual_size(count, d->plain_size);
    d->sealed = malloc(b->size);
    d->rest = malloc(d->rest_size);
    if (d->sealed == NULL || d->rest == NULL)
        return FL_FAIL(err, FL_ENOMEM, "no memory for the update of layer %u", b->key.layer);
    const fl_bytes plain = {d->plain, d->plain_size};
    uint8_t random[FL_KEY_SIZE];
    fl_random(random, sizeof(random));
    const fl_status st = fl_seal_update(&label, plain, s->identity, o->update_key, random,
                                        d->sealed, b->size, err);
    fl_wipe(random, sizeof(random));
    FL_TRY(st);
    fl_hash((fl_bytes){d->sealed, b->size}, b->digest);
    const node_residual rest = {b->key.layer, count, b->key.base_version, b->key.sequence};
    fl_random(random, FL_SEAL_NONCE);
    node_residual_write(&rest, plain, d->sum, s->identity, s->run_id, random, d->rest);
    return FL_OK;
}

fl_status node_outbox_put(node_outbox *o, uint32_t layer, uint64_t base, const float *delta,
                          uint32_t count, uint64_t tokens, fl_update_begin *ret, fl_err *err) {
    node_state *s = o->state;
    fl_update_begin b = {.round = o->task->round,
                         .task_id = o->task->task_id,
                         .tokens = tokens,
                         .key = {layer, base, (uint64_t)++s->updates_made}};
    memcpy(b.run_id, o->task->run_id, sizeof(b.run_id));
    draft d = {0};
    fl_status st = encode(o, &b, delta, count, &d, err);
    if (st == FL_OK) st = seal(o, &b, count, &d, err);
    if (st == FL_OK) {
        s->upload.bytes += (int64_t)(d.plain_size + NODE_UPLOAD_OVERHEAD);
        st = node_state_save_run(s, err); // a sequence number is never used twice
    }
    if (st == FL_OK)
        st = node_state_spool_add(s, &b, (fl_bytes){d.sealed, b.size},
                                  (fl_bytes){d.rest, d.rest_size}, err);
    free_draft(&d);
    if (st == FL_OK) *ret = b;
    return st;
}
