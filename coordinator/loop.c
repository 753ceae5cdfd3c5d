#include "coordinator/loop.h"

#include "common/log.h"
#include "coordinator/loop_state.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

enum {
    BATCH_MAX = 64,    // frames that share one commit
    QUEUE_FRAMES = 16, // of one node and direction; it asks for one thing of each kind at a time
};

// One process runs a folder at a time; the lock goes with the process, however it ends.
static fl_status take_lock(coord_loop *loop, fl_err *err) {
    char path[COORD_PATH_MAX];
    snprintf(path, sizeof(path), "%s/lock", loop->dir);
    loop->lock_fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (loop->lock_fd < 0) return FL_FAIL(err, FL_EIO, "cannot open %s: %s", path, strerror(errno));
    if (flock(loop->lock_fd, LOCK_EX | LOCK_NB) != 0)
        return FL_FAIL(err, FL_ESTATE, "a coordinator is running in %s already", loop->dir);
    return FL_OK;
}

static fl_status take_memory(coord_loop *loop, fl_err *err) {
    const size_t scratch = 2 * FL_CODEC_ARENA;
    loop->outbox_bytes = malloc(COORD_OUTBOX_BYTES);
    loop->plain = malloc(FL_BODY_MAX);
    loop->frame = malloc(FL_FRAME_MAX);
    loop->chunk = malloc(FL_CHUNK_MAX);
    fl_arena_init(&loop->scratch, malloc(scratch), scratch);
    if (loop->outbox_bytes == NULL || loop->plain == NULL || loop->frame == NULL ||
        loop->chunk == NULL ||
        loop->scratch.base == NULL)
        return FL_FAIL(err, FL_ENOMEM, "no memory to start");
    return FL_OK;
}

// The link is there: it learns who may speak.
static fl_status admit_members(coord_loop *loop, fl_err *err) {
    const coord_world *w = &loop->world;
    bool enrolling = false;
    loop->listening = true;
    for (uint32_t i = 0; i < loop->registry.count; i++) {
        const coord_member *m = &loop->registry.members[i];
        if (m->state == COORD_MEMBER_ACTIVE) FL_TRY(w->admit(w->ctx, m->transport_key, err));
    }
    FL_TRY(coord_store_enrolling(loop->store, &enrolling, err));
    w->enrolment(w->ctx, enrolling);
    fl_link_stats stats;
    w->stats(w->ctx, &stats);
    loop->refusals = loop->refusals_link = stats.zap_refused + stats.dropped; // the canary
    return FL_OK;
}

static fl_status listen_for_nodes(coord_loop *loop, fl_err *err) {
    const fl_link_opts opts = {.endpoint = loop->settings.listen,
                               .curve_secret = fl_secret_view(loop->keys.transport).data,
                               .curve_key = loop->keys.transport_key,
                               .frame_max = FL_UPLOAD_FRAME_MAX,
                               .queue_frames = QUEUE_FRAMES};
    FL_TRY(fl_link_listen(&opts, &loop->link, err));
    loop->world.ctx = loop->link;
    FL_TRY(admit_members(loop, err));
    // What `token` needs to make a URL: the port may have been chosen by the system.
    const char *endpoint = fl_link_endpoint(loop->link);
    return coord_store_put_value(loop->store, "endpoint",
                                 (fl_bytes){(const uint8_t *)endpoint, strlen(endpoint)}, err);
}

static fl_status set_dir(coord_loop *loop, const char *dir, fl_err *err) {
    const int n = snprintf(loop->dir, sizeof(loop->dir), "%s", dir);
    if (n <= 0 || (size_t)n >= sizeof(loop->dir))
        return FL_FAIL(err, FL_EARG, "the folder's name is empty or too long");
    return fl_crypto_init(err);
}

// With store, settings, keys and world in place: everything in memory is made.
static fl_status recover(coord_loop *loop, fl_err *err) {
    FL_TRY(take_memory(loop, err));
    const coord_settings *s = &loop->settings;
    loop->opt = (coord_opt){.kind = (coord_opt_kind)s->optimiser,
                            .rate = s->server_rate,
                            .beta1 = s->beta1,
                            .beta2 = s->beta2,
                            .tau = s->tau};
    loop->gate = (coord_gate){
        .clip_factor = s->clip, .refuse_factor = s->refuse, .norms_min = (uint32_t)s->norms_min};
    return coord_loop_recover(loop, loop->world.now_ms(loop->world.ctx), err);
}

static fl_status open_all(coord_loop *loop, const char *dir, fl_err *err) {
    loop->world = coord_world_real(NULL);
    FL_TRY(set_dir(loop, dir, err));
    FL_TRY(coord_store_open(dir, &loop->store, err)); // first: it says that there is none
    FL_TRY(take_lock(loop, err));
    FL_TRY(coord_settings_load(dir, &loop->settings, err));
    FL_TRY(coord_keys_load(dir, &loop->keys, err));
    FL_TRY(recover(loop, err));
    return listen_for_nodes(loop, err);
}

static fl_status open_in(coord_loop *loop, const coord_loop_opts *opts, fl_err *err) {
    loop->world = *opts->world;
    loop->settings = *opts->settings;
    FL_TRY(coord_keys_copy(opts->keys, &loop->keys, err));
    FL_TRY(set_dir(loop, opts->dir, err));
    FL_TRY(coord_store_open_on(loop->world.disk, opts->dir, &loop->store, err));
    FL_TRY(recover(loop, err));
    return loop->world.receive == NULL ? FL_OK : admit_members(loop, err);
}

fl_status coord_loop_open_in(const coord_loop_opts *opts, coord_loop **ret, fl_err *err) {
    coord_loop *loop = calloc(1, sizeof(*loop));
    if (loop == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory to start");
    loop->lock_fd = -1;
    const fl_status st = open_in(loop, opts, err);
    if (st != FL_OK) {
        coord_loop_close(loop);
        return st;
    }
    *ret = loop;
    return FL_OK;
}

fl_status coord_loop_open(const char *dir, coord_loop **ret, fl_err *err) {
    coord_loop *loop = calloc(1, sizeof(*loop));
    if (loop == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory to start");
    loop->lock_fd = -1;
    const fl_status st = open_all(loop, dir, err);
    if (st != FL_OK) {
        coord_loop_close(loop);
        return st;
    }
    fl_log(FL_LOG_INFO, "coordinator.started", "round %llu, %u nodes, listening at %s",
           (unsigned long long)loop->round.round, coord_registry_active(&loop->registry),
           fl_link_endpoint(loop->link));
    *ret = loop;
    return FL_OK;
}

void coord_loop_close(coord_loop *loop) {
    if (loop == NULL) return;
    fl_link_close(loop->link);
    for (uint32_t i = 0; loop->sessions != NULL && i < loop->registry.count; i++) {
        fl_channel_close(loop->sessions[i].channel);
        free(loop->sessions[i].upload.data);
    }
    for (uint32_t l = 0; l < COORD_LAYERS_MAX; l++) coord_sum_done(&loop->sum[l]);
    free(loop->sessions);
    free(loop->memory.base);
    free(loop->scratch.base);
    free(loop->outbox_bytes);
    free(loop->plain);
    free(loop->frame);
    free(loop->chunk);
    coord_loop_guard_close(loop);
    coord_keys_close(&loop->keys);
    coord_store_close(loop->store);
    if (loop->lock_fd >= 0) close(loop->lock_fd);
    free(loop);
}

const char *coord_loop_endpoint(const coord_loop *loop) {
    return fl_link_endpoint(loop->link);
}

// Who was heard, for the commands that list nodes.
static fl_status save_seen(coord_loop *loop, fl_err *err) {
    for (uint32_t i = 0; i < loop->registry.count; i++) {
        coord_session *s = &loop->sessions[i];
        if (!s->seen) continue;
        FL_TRY(coord_store_begin(loop->store, err));
        FL_TRY(coord_store_touch_node(loop->store, loop->registry.members[i].id,
                                      loop->world.wall_s(loop->world.ctx), s->bytes_up,
                                      s->bytes_down, err));
        s->seen = false;
        s->bytes_up = s->bytes_down = 0;
    }
    return FL_OK;
}

// What approve, revoke and token wrote takes effect. Outside a batch.
static fl_status heed_commands(coord_loop *loop, uint64_t now_ms, fl_err *err) {
    bool changed = false;
    FL_TRY(coord_store_changed(loop->store, &changed, err));
    return changed ? coord_loop_refresh(loop, now_ms, err) : FL_OK;
}

// What time brings: other processes' writes, deadlines, the list of who is here.
static fl_status tick(coord_loop *loop, uint64_t now_ms, fl_err *err) {
    coord_effect fx;
    if (now_ms - loop->polled_ms < COORD_POLL_MS) return FL_OK;
    loop->polled_ms = now_ms;
    FL_TRY(heed_commands(loop, now_ms, err));
    FL_TRY(coord_loop_watch_link(loop, now_ms, err));
    const coord_event ev = {.kind = COORD_EV_TICK, .now_ms = now_ms};
    FL_TRY(coord_round_step(&loop->round, &ev, &fx, err));
    FL_TRY(coord_loop_effect(loop, COORD_NOBODY, &fx, err));
    if (now_ms - loop->saved_ms >= COORD_SAVE_MS) {
        loop->saved_ms = now_ms;
        FL_TRY(save_seen(loop, err));
    }
    return FL_OK;
}

fl_status coord_loop_step(coord_loop *loop, uint32_t wait_ms, fl_err *err) {
    const coord_world *w = &loop->world;
    fl_link_message m;
    FL_TRY(tick(loop, w->now_ms(w->ctx), err));
    FL_TRY(coord_loop_commit(loop, err));
    if (loop->flush_due != COORD_FLUSH_NO) FL_TRY(coord_loop_flush(loop, w->now_ms(w->ctx), err));
    const uint32_t wait = wait_ms < COORD_POLL_MS ? wait_ms : COORD_POLL_MS;
    for (int i = 0; i < BATCH_MAX && loop->flush_due == COORD_FLUSH_NO; i++) {
        const fl_status st = w->receive(w->ctx, i == 0 ? wait : 0, &m, err);
        if (st == FL_ETIME) break;
        FL_TRY(st);
        if (i == 0) // it was revoked as we waited
            FL_TRY(heed_commands(loop, w->now_ms(w->ctx), err));
        FL_TRY(coord_loop_frame(loop, &m, w->now_ms(w->ctx), err));
    }
    FL_TRY(coord_loop_commit(loop, err));
    if (loop->flush_due == COORD_FLUSH_NO) return FL_OK;
    return coord_loop_flush(loop, w->now_ms(w->ctx), err);
}

fl_status coord_loop_run(coord_loop *loop, const volatile sig_atomic_t *stop, fl_err *err) {
    while (*stop == 0) FL_TRY(coord_loop_step(loop, COORD_POLL_MS, err));
    FL_TRY(save_seen(loop, err));
    return coord_loop_commit(loop, err);
}
