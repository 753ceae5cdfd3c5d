// round.h: rounds as a pure state machine. No sockets, files, clock or threads: events go in (time
// included), effects come out, and the loop carries them out. The simulator drives the same code.
//
// A round is a buffer of updates. Nodes ask for tasks (a window of layers below an exit), send one
// update for each layer of it, and the buffer is flushed when enough nodes contributed or when its
// deadline has passed with at least the minimum. A task outlives its round: late updates count in
// the buffer that is open when they come, discounted by their staleness, which is counted in
// versions of their own layer. A node counts once a round, and sends one update for each layer and
// version: that is what last[][] keeps.
#ifndef COORD_ROUND_H
#define COORD_ROUND_H

#include "common/arena.h"
#include "common/status.h"
#include "coordinator/round_weight.h"
#include "proto/codec.h"

enum { COORD_COVER_ROUNDS = 16 }; // what a layer received is remembered for so many rounds

typedef struct coord_round_opts {
    uint32_t nodes_max;
    uint32_t layers, exits;
    uint32_t exit_layers[FL_EXITS_MAX]; // strictly ascending; an exit sits after this layer
    uint32_t shares[FL_EXITS_MAX];      // how often each exit is given out; 0: never
    uint32_t window;                    // most layers in a window; 0: up to the exit before
    uint32_t steps;                     // most in a task; 0: 1
    uint64_t step_tokens;               // tokens of one step; 0: 1
    uint64_t task_deadline_ms;          // after which a task that is out is given up
    uint64_t layer_bytes;               // an update of a layer on the wire; 0: not known yet
    uint32_t updates;                   // contributions that flush a round; 0: all active nodes
    uint32_t updates_min;               // contributions without which a round never flushes, >= 1
    uint64_t deadline_ms;               // after opening
    uint64_t staleness_max;             // versions behind; older updates are refused
    uint64_t rounds;                    // after so many the run is finished; 0: never
    uint64_t retry_ms;                  // what a node that must wait is told
} coord_round_opts;

typedef enum coord_phase { COORD_COLLECT, COORD_FLUSHING, COORD_FINISHED } coord_phase;

typedef struct coord_slot { // what one node is doing
    bool member;            // active in the registry
    uint64_t task;          // 0: none
    uint32_t exit, first, last;          // last is the exit's layer, or below it
    uint32_t steps;                      // of its task; 0: restored, asked for again
    uint64_t given_ms;
    uint32_t awaited, admitted;          // layers not answered yet; layers that count
    uint8_t answered[FL_LAYERS_MAX / 8]; // by layer
    uint64_t counted;                    // newest round in which it counted
} coord_slot;

typedef struct coord_round {
    coord_round_opts opts;
    coord_phase phase;
    uint64_t round; // open buffer, from 1
    uint64_t opened_ms;
    uint32_t contributions; // nodes that counted in it
    uint32_t updates;       // admitted into it
    uint32_t members;       // active nodes
    uint64_t next_task;
    uint64_t given[FL_EXITS_MAX]; // tasks of each exit so far
    uint64_t version[FL_LAYERS_MAX];
    uint64_t changed[FL_LAYERS_MAX]; // round in which the layer last changed
    bool touched[FL_LAYERS_MAX];     // has updates in the open buffer
    coord_slot *slots;               // [nodes_max]
    uint64_t *last;  // [nodes_max][layers]: 1 + newest base admitted from the node; 0: none
    uint64_t *cover; // [COORD_COVER_ROUNDS][layers]: weight admitted in the round; row round mod
} coord_round;

typedef enum coord_event_kind {
    COORD_EV_TICK,    // time passes
    COORD_EV_JOIN,    // node became active
    COORD_EV_LEAVE,   // node was revoked: its task is over, what it sent before stays
    COORD_EV_REQUEST, // node asks for a task: window_max, speed, link_bytes_s
    COORD_EV_OFFER,   // node wants to send an update: task, layer, base. Nothing changes.
    COORD_EV_UPDATE,  // its update passed every other check: task, layer, base, tokens
    COORD_EV_REFUSED, // its update did not: task, layer
    COORD_EV_FLUSHED, // the flush that was asked for is durable
    COORD_EV_COUNT
} coord_event_kind;

typedef struct coord_event {
    coord_event_kind kind;
    uint64_t now_ms;
    uint32_t node; // index in the registry
    uint32_t window_max;   // layers down from an exit that it can train
    uint64_t speed;        // tokens it tunes in 1000 s; 0: not measured
    uint64_t link_bytes_s; // 0: not measured
    uint64_t task;
    uint32_t layer;
    uint64_t base, tokens;
} coord_event;

typedef enum coord_flush { COORD_FLUSH_NO, COORD_FLUSH_FULL, COORD_FLUSH_DEADLINE } coord_flush;

typedef struct coord_effect {
    fl_code code;  // REQUEST: why it must wait. OFFER, UPDATE: why it is refused. NONE: fine
    bool new_task; // REQUEST: the task was made now and must be durable before it is sent
    uint64_t task; // REQUEST: the slot has the window. UPDATE, REFUSED, LEAVE: the task that ended
    bool task_ended;    // make it durable, with `counted`
    uint64_t counted;   // round in which that task counted; 0: none
    uint64_t staleness;    // UPDATE, OFFER
    uint64_t weight;       // UPDATE: coord_weight of its tokens
    coord_flush flush;  // aggregate the open buffer now, then send COORD_EV_FLUSHED
} coord_effect;

// Takes memory for opts->nodes_max nodes. FL_EARG says which option contradicts another.
// `round` is the open one. The caller then sets versions, given, next_task and restores tasks.
fl_status coord_round_init(coord_round *r, const coord_round_opts *opts, uint64_t round,
                           uint64_t now_ms, fl_arena *arena, fl_err *err) FL_NODISCARD;
// Bytes of the arena that init needs.
size_t coord_round_size(const coord_round_opts *opts);

// Recovery, in this order: newest base of each (node, layer); updates of the open buffer; what
// layers received; tasks with their answered layers. Indexes out of range are FL_EFORMAT: the state
// is damaged.
fl_status coord_round_restore_last(coord_round *r, uint32_t node, uint32_t layer, uint64_t base,
                                   fl_err *err) FL_NODISCARD;
fl_status coord_round_restore_update(coord_round *r, uint32_t layer, fl_err *err) FL_NODISCARD;
fl_status coord_round_restore_task(coord_round *r, uint32_t node, uint64_t task, uint32_t exit,
                                   uint32_t first, uint32_t last, bool open, uint64_t counted,
                                   fl_err *err) FL_NODISCARD;
// Weight that a layer received in a round; rounds too old to matter are ignored.
fl_status coord_round_restore_cover(coord_round *r, uint64_t round, uint32_t layer, uint64_t weight,
                                    fl_err *err) FL_NODISCARD;
fl_status coord_round_restore_answer(coord_round *r, uint32_t node, uint64_t task, uint32_t layer,
                                     fl_err *err) FL_NODISCARD;

// Applies one event. FL_ESTATE: not legal in this phase; *r unchanged. ev->node and ev->layer in
// range is the caller's contract for node, and checked here for layer and task.
fl_status coord_round_step(coord_round *r, const coord_event *ev, coord_effect *ret_effect,
                           fl_err *err) FL_NODISCARD;

#endif
