// A start is a recovery: everything in memory is made from what is durable.
#include "common/checked.h"
#include "common/log.h"
#include "common/plant.h"
#include "coordinator/loop_state.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct recovery {
    coord_loop *loop;
    uint64_t now_ms;
    uint32_t layer;
} recovery;

static fl_status read_fact(coord_loop *loop, const char *key, void *data, size_t size,
                           fl_err *err) {
    size_t got = 0;
    FL_TRY(coord_store_get_value(loop->store, key, data, size, &got, err));
    return got == size ? FL_OK : FL_FAIL(err, FL_EFORMAT, "\"%s\" in the state is damaged", key);
}

static fl_status read_facts(coord_loop *loop, fl_err *err) {
    uint8_t size[8], seed[8], exits[8], rank[8];
    size_t count = 0;
    FL_TRY(read_fact(loop, "run_id", loop->run_id, FL_ID_SIZE, err));
    FL_TRY(read_fact(loop, "model_digest", loop->model_digest, FL_DIGEST_SIZE, err));
    FL_TRY(read_fact(loop, "model_size", size, sizeof(size), err));
    FL_TRY(read_fact(loop, "a_seed", seed, sizeof(seed), err));
    FL_TRY(read_fact(loop, "exits", exits, sizeof(exits), err));
    loop->model_size = fl_get_u64(size);
    loop->a_seed = fl_get_u64(seed);
    if (fl_get_u64(exits) != (uint64_t)loop->settings.exits)
        return FL_FAIL(err, FL_EARG, "this run was made with %d exits; set exits back to that",
                       (int)fl_get_u64(exits));
    FL_TRY(read_fact(loop, "rank", rank, sizeof(rank), err));
    if (fl_get_u64(rank) != (uint64_t)loop->settings.rank)
        return FL_FAIL(err, FL_EARG, "this run was made with rank %d; set rank back to that",
                       (int)fl_get_u64(rank));
    FL_TRY(coord_store_layers(loop->store, loop->layer, COORD_LAYERS_MAX, &count, err));
    loop->layers = (uint32_t)count;
    return FL_OK;
}

// The open round, made if this is the first start.
static fl_status open_round(coord_loop *loop, uint64_t *ret, fl_err *err) {
    coord_round_row row;
    size_t count = 0;
    FL_TRY(coord_store_rounds(loop->store, &row, 1, &count, err));
    if (count == 1 && row.closed_s != 0)
        return FL_FAIL(err, FL_EFORMAT, "the state has no open round");
    *ret = count == 1 ? (uint64_t)row.round : 1;
    return count == 1 ? FL_OK
                      : coord_store_open_round(loop->store, 1,
                                               loop->world.wall_s(loop->world.ctx), err);
}

static fl_status start_round(coord_loop *loop, uint64_t now_ms, fl_err *err) {
    coord_round_opts opts;
    uint64_t round = 0;
    int64_t last_task = 0;
    FL_TRY(coord_settings_round(&loop->settings, loop->layers, &opts, err));
    FL_TRY(open_round(loop, &round, err));
    const size_t size = coord_round_size(&opts) + coord_registry_size(opts.nodes_max);
    fl_arena_init(&loop->memory, calloc(size, 1), size);
    loop->sessions = calloc(opts.nodes_max, sizeof(*loop->sessions));
    if (loop->memory.base == NULL || loop->sessions == NULL)
        return FL_FAIL(err, FL_ENOMEM, "no memory for %u nodes", opts.nodes_max);
    FL_TRY(coord_registry_init(&loop->registry, opts.nodes_max, &loop->memory, err));
    FL_TRY(coord_round_init(&loop->round, &opts, round, now_ms, &loop->memory, err));
    for (uint32_t l = 0; l < loop->layers; l++) {
        loop->round.version[l] = (uint64_t)loop->layer[l].version;
        loop->round.changed[l] = (uint64_t)loop->layer[l].round;
    }
    FL_TRY(coord_store_task_counts(loop->store, loop->round.given, opts.exits, err));
    FL_TRY(coord_store_last_task(loop->store, &last_task, err));
    loop->round.next_task = (uint64_t)last_task + (fl_plant(TASK_NUMBER_REUSED) ? 0 : 1);
    return FL_OK;
}

// Unknown nodes become COORD_NOBODY, which no row of a whole state has.
static fl_status node_of(const coord_loop *loop, int64_t id, uint32_t *ret, fl_err *err) {
    *ret = coord_registry_by_id(&loop->registry, id);
    return *ret != COORD_NOBODY
               ? FL_OK
               : FL_FAIL(err, FL_EFORMAT, "the state names node %lld, which is not in it",
                         (long long)id);
}

static fl_status restore_last(void *ctx, const coord_update_row *row, fl_err *err) {
    coord_loop *loop = ctx;
    uint32_t node;
    FL_TRY(node_of(loop, row->node, &node, err));
    return coord_round_restore_last(&loop->round, node, row->layer, (uint64_t)row->base, err);
}

// Folds a spooled update again, with the weight and the clip that were decided when it came.
static fl_status restore_update(void *ctx, const coord_update_row *row, fl_err *err) {
    coord_loop *loop = ctx;
    fl_update update;
    if (row->at.size <= 0 || row->at.size > (int64_t)FL_UPDATE_MAX)
        return FL_FAIL(err, FL_EFORMAT, "update %lld has an impossible size", (long long)row->id);
    uint8_t *data = malloc((size_t)row->at.size);
    if (data == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory for an update");
    fl_status st = coord_store_unspool(loop->store, &row->at, data, err);
    if (st == FL_OK) st = fl_update_open((fl_bytes){data, (size_t)row->at.size}, &update, err);
    if (st == FL_OK && (update.info.layer != row->layer || row->layer >= loop->layers ||
                        update.info.count != loop->layer[row->layer].count))
        st = FL_FAIL(err, FL_EFORMAT, "update %lld is not what its row says", (long long)row->id);
    const uint32_t clip = fl_plant(CLIP_FORGOTTEN) ? COORD_ONE : row->clip;
    if (st == FL_OK) st = coord_loop_fold(loop, &update, (uint64_t)row->weight, clip, err);
    if (st == FL_OK && fl_plant(FOLD_TWICE))
        st = coord_loop_fold(loop, &update, (uint64_t)row->weight, clip, err);
    if (st == FL_OK) st = coord_round_restore_update(&loop->round, row->layer, err);
    free(data);
    return st;
}

static fl_status restore_cover(void *ctx, int64_t round, uint32_t layer, int64_t weight,
                               fl_err *err) {
    coord_loop *loop = ctx;
    return coord_round_restore_cover(&loop->round, (uint64_t)round, layer, (uint64_t)weight, err);
}

static fl_status restore_norm(void *ctx, const coord_update_row *row, fl_err *err) {
    recovery *r = ctx;
    (void)err;
    if (fl_plant(NORMS_OF_OLDEST) && r->loop->norms[r->layer].count == 8) return FL_OK;
    coord_norms_add(&r->loop->norms[r->layer], row->norm);
    return FL_OK;
}

static fl_status restore_answer(void *ctx, const coord_update_row *row, fl_err *err) {
    coord_loop *loop = ctx;
    uint32_t node;
    FL_TRY(node_of(loop, row->node, &node, err));
    return coord_round_restore_answer(&loop->round, node, (uint64_t)row->task, row->layer, err);
}

typedef struct task_list {
    coord_task_row *rows;
    size_t count, max;
} task_list;

static fl_status collect_task(void *ctx, const coord_task_row *row, fl_err *err) {
    task_list *list = ctx;
    if (list->count == list->max) {
        const size_t max = list->max == 0 ? 64 : 2 * list->max;
        coord_task_row *rows = realloc(list->rows, max * sizeof(*rows));
        if (rows == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory for the tasks");
        list->rows = rows;
        list->max = max;
    }
    list->rows[list->count++] = *row;
    return FL_OK;
}

static fl_status restore_task(coord_loop *loop, const coord_task_row *row, fl_err *err) {
    uint32_t node;
    FL_TRY(node_of(loop, row->node, &node, err));
    FL_TRY(coord_round_restore_task(&loop->round, node, (uint64_t)row->task, row->exit, row->first,
                                    row->last, row->open, (uint64_t)row->counted, err));
    if (!row->open) return FL_OK;
    return coord_store_each_task_update(loop->store, row->task, restore_answer, loop, err);
}

static fl_status restore_tasks(coord_loop *loop, fl_err *err) {
    task_list list = {0};
    fl_status st =
        coord_store_each_task(loop->store, (int64_t)loop->round.round, collect_task, &list, err);
    for (size_t i = 0; i < list.count && st == FL_OK; i++)
        st = restore_task(loop, &list.rows[i], err);
    free(list.rows);
    return st;
}

static fl_status restore_report(void *ctx, const coord_report_row *row, fl_err *err) {
    coord_loop *loop = ctx;
    uint32_t node;
    FL_TRY(node_of(loop, row->node, &node, err));
    loop->sessions[node].reported = row->round;
    return FL_OK;
}

static fl_status restore_vote(coord_loop *loop, fl_err *err) {
    coord_vote_row row;
    coord_vote_start(&loop->vote, loop->round.opts.exits);
    const fl_status st = coord_store_last_vote(loop->store, &row, err);
    if (st == FL_ENOENT) return FL_OK;
    FL_TRY(st);
    if (row.exits != loop->round.opts.exits)
        return FL_FAIL(err, FL_EFORMAT, "the stored vote is for %u exits", row.exits);
    loop->vote.version = (uint64_t)row.version;
    memcpy(loop->vote.weight, row.weights, sizeof(loop->vote.weight));
    return FL_OK;
}

// What is read at a start may be in the system's memory only: a process that was killed between
// the write of a commit and its sync leaves it there, SQLite's recovery takes it for committed and
// syncs nothing, and a power cut takes it away. So nothing is answered from it (a DUPLICATE is an
// acknowledgement, too) before a commit of our own has synced the log. Found by `simulate`.
static fl_status settle(coord_loop *loop, fl_err *err) {
    uint8_t start[16]; // never twice the same: SQLite does not write what does not change
    loop->world.random(loop->world.ctx, start, sizeof(start));
    FL_TRY(coord_store_begin(loop->store, err));
    FL_TRY(coord_store_put_value(loop->store, "start", (fl_bytes){start, sizeof(start)}, err));
    return coord_store_commit(loop->store, err);
}

fl_status coord_loop_recover(coord_loop *loop, uint64_t now_ms, fl_err *err) {
    FL_TRY(read_facts(loop, err));
    FL_TRY(start_round(loop, now_ms, err));
    FL_TRY(coord_loop_refresh(loop, now_ms, err));
    if (!fl_plant(BASES_NOT_RESTORED))
        FL_TRY(coord_store_each_last_update(loop->store, restore_last, loop, err));
    FL_TRY(coord_store_each_open_update(loop->store, restore_update, loop, err));
    FL_TRY(coord_store_each_cover(loop->store, (int64_t)loop->round.round, COORD_COVER_ROUNDS,
                                  restore_cover, loop, err));
    if (!fl_plant(TASK_NOT_RESTORED)) FL_TRY(restore_tasks(loop, err));
    for (uint32_t l = 0; l < loop->layers; l++) {
        recovery r = {.loop = loop, .now_ms = now_ms, .layer = l};
        FL_TRY(
            coord_store_each_recent_update(loop->store, l, COORD_NORMS_MAX, restore_norm, &r, err));
    }
    FL_TRY(restore_vote(loop, err));
    FL_TRY(coord_store_each_last_report(loop->store, restore_report, loop, err));
    if (!fl_plant(NO_SETTLE)) FL_TRY(settle(loop, err));
    return coord_store_sweep(loop->store, err);
}

static coord_member member_of(const coord_node_row *row) {
    static const coord_member_state states[COORD_NODE_STATE_COUNT] = {
        [COORD_NODE_PENDING] = COORD_MEMBER_PENDING,
        [COORD_NODE_ACTIVE] = COORD_MEMBER_ACTIVE,
        [COORD_NODE_REVOKED] = COORD_MEMBER_REVOKED,
    };
    coord_member m = {.id = row->id, .state = states[row->state]};
    snprintf(m.name, sizeof(m.name), "%.*s", (int)sizeof(m.name) - 1, row->name);
    memcpy(m.sign_key, row->sign_key, sizeof(m.sign_key));
    memcpy(m.transport_key, row->transport_key, sizeof(m.transport_key));
    return m;
}

// One row of the registry as it is now; what changed takes effect here.
static fl_status refresh_node(void *ctx, const coord_node_row *row, fl_err *err) {
    recovery *r = ctx;
    coord_loop *loop = r->loop;
    const uint32_t known = coord_registry_by_id(&loop->registry, row->id);
    const bool was_active = known != COORD_NOBODY && loop->round.slots[known].member;
    const coord_member m = member_of(row);
    uint32_t node;
    coord_effect fx;
    FL_TRY(coord_registry_put(&loop->registry, &m, &node, err));
    const bool active = m.state == COORD_MEMBER_ACTIVE;
    if (active == was_active) return FL_OK;
    if (!active) return coord_loop_expel(loop, node, r->now_ms, err);
    const coord_event ev = {.kind = COORD_EV_JOIN, .node = node, .now_ms = r->now_ms};
    FL_TRY(coord_round_step(&loop->round, &ev, &fx, err));
    return !loop->listening ? FL_OK : loop->world.admit(loop->world.ctx, m.transport_key, err);
}

fl_status coord_loop_refresh(coord_loop *loop, uint64_t now_ms, fl_err *err) {
    recovery r = {.loop = loop, .now_ms = now_ms};
    bool enrolling = false;
    FL_TRY(coord_store_each_node(loop->store, refresh_node, &r, err));
    FL_TRY(coord_store_enrolling(loop->store, &enrolling, err));
    if (loop->listening) loop->world.enrolment(loop->world.ctx, enrolling);
    return FL_OK;
}
