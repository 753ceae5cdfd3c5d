// Training, as far as the federation sees it: an update is a small vector that follows from node,
// layer and sequence, and an attacker's is that with something wrong about it.
#include "sim/state.h"

#include "proto/update.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static sim_made *new_made(sim_node *n) {
    if (n->made_count == n->made_room) {
        n->made_room = n->made_room == 0 ? 64 : 2 * n->made_room;
        n->made = realloc(n->made, n->made_room * sizeof(*n->made));
        FL_ASSERT(n->made != NULL);
    }
    sim_made *m = &n->made[n->made_count++];
    *m = (sim_made){.valid = true};
    return m;
}

static void into_spool(sim_node *n, uint64_t sequence) {
    if (n->spool_count == n->spool_room) {
        n->spool_room = n->spool_room == 0 ? 16 : 2 * n->spool_room;
        n->spool = realloc(n->spool, n->spool_room * sizeof(*n->spool));
        FL_ASSERT(n->spool != NULL);
    }
    n->spool[n->spool_count++] = sequence;
}

sim_made *sim_made_of(sim_node *n, uint64_t sequence) {
    return sequence >= 1 && sequence <= n->made_count ? &n->made[sequence - 1] : NULL;
}

static void draw_values(sim_node *n, float *values, uint32_t count) {
    const bool large = sim_chance(&n->rng, 0.05); // honest, and to be clipped
    const float scale = n->malice == SIM_HUGE ? 60.0f : large ? 0.1f : 0.01f;
    for (uint32_t i = 0; i < count; i++) {
        const float unit = (float)(sim_draw(&n->rng) >> 40) * 0x1p-24f; // [0, 1)
        values[i] = scale * (n->malice == SIM_HUGE ? 0.5f + unit / 2 : 2.0f * unit - 1.0f);
    }
}

// What the coordinator will read of the payload.
static void remember_values(sim_made *m, fl_bytes payload) {
    fl_update u;
    if (fl_update_open(payload, &u, NULL) != FL_OK) return;
    m->count = u.info.count;
    fl_update_fixed(&u, 0, u.info.count, m->values);
    double sum = 0.0;
    for (uint32_t i = 0; i < m->count; i++) {
        const double v = (double)m->values[i] * 0x1p-32;
        sum += v * v;
    }
    m->norm = sqrt(sum);
}

// Spoils the clear payload. *size may shrink.
static void spoil_payload(sim_malice malice, uint8_t *payload, size_t *size) {
    static const uint8_t nan_bits[4] = {0, 0, 0xc0, 0x7f};
    if (malice == SIM_NAN) memcpy(payload + FL_UPDATE_HEAD, nan_bits, sizeof(nan_bits));
    if (malice == SIM_WRONG_LAYER) payload[8] ^= 1;
    if (malice == SIM_WRONG_SIZE) *size -= 2;
}

static bool must_be_refused(sim_malice malice) {
    return malice != SIM_HONEST && malice != SIM_HUGE && malice != SIM_TWICE &&
           malice != SIM_OLDER;
}

static void seal(sim_node *n, sim_made *m, fl_bytes payload) {
    fl_update_begin *b = &m->begin;
    fl_seal_label label = {.round = b->round, .key = b->key, .tokens = b->tokens};
    memcpy(label.run_id, b->run_id, sizeof(label.run_id));
    memcpy(label.node_key, n->identity_key, FL_KEY_SIZE);
    b->size = payload.size + FL_SEAL_EXTRA;
    m->sealed = malloc((size_t)b->size);
    FL_ASSERT(m->sealed != NULL);
    sim_seal(&label, payload, m->sealed);
    if (n->malice == SIM_FORGED) m->sealed[b->size - FL_SIGNATURE_SIZE] ^= 1;
    fl_hash((fl_bytes){m->sealed, (size_t)b->size}, b->digest);
    if (n->malice == SIM_DAMAGED) b->digest[0] ^= 1;
}

sim_made *sim_make_update(sim_node *n, uint32_t layer, uint64_t base, uint64_t tokens) {
    sim *s = n->sim;
    const fl_task *t = &n->client->task;
    const uint32_t count = s->counts[layer];
    uint8_t payload[FL_UPDATE_HEAD + 4 + 2 * SIM_VALUES_MAX];
    float values[SIM_VALUES_MAX];
    fl_err err;
    sim_made *m = new_made(n);
    fl_update_begin *b = &m->begin;
    *b = (fl_update_begin){.key = {.layer = layer, .base_version = base, .sequence = n->made_count},
                           .round = t->round,
                           .task_id = t->task_id,
                           .tokens = tokens};
    memcpy(b->run_id, t->run_id, sizeof(b->run_id));
    if (n->malice == SIM_OLDER && base > 0)
        b->key.base_version = base -= sim_between(&n->rng, 1, base < 4 ? base : 4);
    if (n->malice == SIM_WRONG_BASE) b->key.base_version = base += 1000;
    const fl_update_info info = {.encoding = (fl_update_encoding)t->encoding,
                                 .layer = layer,
                                 .count = count,
                                 .base_version = base,
                                 .tokens = tokens};
    size_t size = fl_update_size(count, info.encoding);
    draw_values(n, values, count);
    const fl_status st =
        fl_update_encode(&info, values, sim_draw(&n->rng), payload, size, NULL, &err);
    FL_ASSERT(st == FL_OK && size <= sizeof(payload));
    spoil_payload(n->malice, payload, &size);
    m->valid = !must_be_refused(n->malice);
    remember_values(m, (fl_bytes){payload, size});
    seal(n, m, (fl_bytes){payload, size});
    into_spool(n, b->key.sequence);
    return m;
}

fl_report sim_make_report(sim_node *n, const fl_task *task) {
    const uint64_t tokens = sim_between(&n->rng, 16, 512);
    fl_report r = {.round = task->round,
                   .task_id = task->task_id,
                   .sequence = ++n->reports,
                   .vote_version = n->client->vote_version,
                   .tokens = tokens,
                   .nll_base_q20 = (int64_t)(3 * tokens << 20),
                   .nll_local_q20 = (int64_t)(2 * tokens << 20),
                   .nll_voted_q20 = (int64_t)(2 * tokens << 20),
                   .exit_count = task->exit_count,
                   .peak_rss_bytes = 1 << 20};
    memcpy(r.run_id, task->run_id, sizeof(r.run_id));
    const uint64_t whole = tokens << 20;
    uint64_t left = whole;
    for (size_t t = 0; t < r.exit_count; t++) {
        const bool last = t + 1 == r.exit_count;
        const uint64_t part = last ? left : sim_between(&n->rng, 0, left);
        r.exits[t] = (fl_exit_sums){.nll_q20 = (int64_t)(2 * tokens << 20),
                                    .responsibility_q20 = part};
        left -= part;
    }
    return r;
}
