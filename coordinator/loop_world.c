#include "coordinator/loop_world.h"

#include "common/clock.h"

static uint64_t now_ms(void *ctx) {
    (void)ctx;
    return fl_clock_ms();
}

static int64_t wall_s(void *ctx) {
    (void)ctx;
    return fl_clock_wall_s();
}

static void random_bytes(void *ctx, void *out, size_t size) {
    (void)ctx;
    fl_random(out, size);
}

static fl_status receive(void *ctx, uint32_t timeout_ms, fl_link_message *ret, fl_err *err) {
    return fl_link_receive(ctx, timeout_ms, ret, err);
}

static fl_status send(void *ctx, fl_link_peer peer, fl_bytes frame, fl_err *err) {
    return fl_link_send(ctx, peer, frame, err);
}

static fl_status admit(void *ctx, const uint8_t key[FL_LINK_KEY], fl_err *err) {
    return fl_link_admit(ctx, key, err);
}

static void revoke(void *ctx, const uint8_t key[FL_LINK_KEY]) {
    fl_link_revoke(ctx, key);
}

static void enrolment(void *ctx, bool open) {
    fl_link_enrolment(ctx, open);
}

static void stats(void *ctx, fl_link_stats *ret) {
    fl_link_stats_get(ctx, ret);
}

coord_world coord_world_real(fl_link *link) {
    return (coord_world){
        .ctx = link,
        .now_ms = now_ms,
        .wall_s = wall_s,
        .random = random_bytes,
        .disk = coord_disk_posix(),
        .pk = &fl_pk_real,
        .unseal = fl_unseal_update,
        .receive = receive,
        .send = send,
        .admit = admit,
        .revoke = revoke,
        .enrolment = enrolment,
        .stats = stats,
    };
}
