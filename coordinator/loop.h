// loop.h: the daemon: one thread that owns the sockets, the clock and the state, and carries out
// what round asks for. Crash-only: any failure of the store ends it, and a start is a recovery.
#ifndef COORD_LOOP_H
#define COORD_LOOP_H

#include "coordinator/keys.h"
#include "coordinator/loop_world.h"
#include "coordinator/settings.h"

#include <signal.h>

typedef struct coord_loop coord_loop;

// Opens DIR, rebuilds everything from it and listens. FL_ESTATE: another process runs it.
fl_status coord_loop_open(const char *dir, coord_loop **ret, fl_err *err) FL_NODISCARD;
// The same in another world, with settings and keys at hand and a state that lies in opts->dir on
// that world's disk. Everything is copied. A world without `receive` is only recovered, to look at.
typedef struct coord_loop_opts {
    const char *dir;
    const coord_world *world;
    const coord_settings *settings;
    const coord_keys *keys;
} coord_loop_opts;
fl_status coord_loop_open_in(const coord_loop_opts *opts, coord_loop **ret,
                             fl_err *err) FL_NODISCARD;
void coord_loop_close(coord_loop *loop); // NULL is fine

const char *coord_loop_endpoint(const coord_loop *loop); // with the real port

// Serves for at most about wait_ms and returns; call it again. Everything acknowledged in it is
// durable. Any failure: the state on the disk is whole, close and start again.
fl_status coord_loop_step(coord_loop *loop, uint32_t wait_ms, fl_err *err) FL_NODISCARD;
// coord_loop_step until *stop is not 0.
fl_status coord_loop_run(coord_loop *loop, const volatile sig_atomic_t *stop,
                         fl_err *err) FL_NODISCARD;

#endif
