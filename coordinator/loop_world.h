// loop_world.h: all that the loop takes from outside, as one table: time, randomness, the link, the
// disk and public-key arithmetic. The daemon runs in coord_world_real(); the simulator brings its
// own, and runs the very same loop.
#ifndef COORD_LOOP_WORLD_H
#define COORD_LOOP_WORLD_H

#include "coordinator/store_disk.h"
#include "proto/channel.h"
#include "proto/link.h"
#include "proto/seal.h"

typedef struct coord_world {
    void *ctx;
    uint64_t (*now_ms)(void *ctx); // monotonic
    int64_t (*wall_s)(void *ctx);  // since 1970, for people; may jump
    void (*random)(void *ctx, void *out, size_t size);
    coord_disk *disk;
    const fl_pk *pk;                   // of the handshakes
    typeof(fl_unseal_update) *unseal; // of updates

    // The link, as in proto/link.h. NULL functions of a loop that does not listen are never called.
    fl_status (*receive)(void *ctx, uint32_t timeout_ms, fl_link_message *ret, fl_err *err);
    fl_status (*send)(void *ctx, fl_link_peer peer, fl_bytes frame, fl_err *err);
    fl_status (*admit)(void *ctx, const uint8_t key[FL_LINK_KEY], fl_err *err);
    void (*revoke)(void *ctx, const uint8_t key[FL_LINK_KEY]);
    void (*enrolment)(void *ctx, bool open);
    void (*stats)(void *ctx, fl_link_stats *ret);
} coord_world;

// The system's clock, randomness and disk, libsodium, and the link, which may still be NULL.
coord_world coord_world_real(fl_link *link);

#endif
