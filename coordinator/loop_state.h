// loop_state.h: what the loop's files share. Not for others: include loop.h.
#ifndef COORD_LOOP_STATE_H
#define COORD_LOOP_STATE_H

#include "common/arena.h"
#include "coordinator/aggregate.h"
#include "coordinator/aggregate_vote.h"
#include "coordinator/keys.h"
#include "coordinator/loop.h"
#include "coordinator/loop_world.h"
#include "coordinator/registry.h"
#include "coordinator/robust.h"
#include "coordinator/round.h"
#include "coordinator/settings.h"
#include "coordinator/store.h"
#include "coordinator/validate.h"
#include "proto/codec.h"
#include "proto/update.h"

enum {
    COORD_OUTBOX_MAX = 64,        // answers that wait for the commit
    COORD_OUTBOX_BYTES = 1 << 20, // of their bodies
    COORD_EVENTS_KEPT = 10000,    // in the log of events
    COORD_POLL_MS = 200,          // between looks at what commands wrote
    COORD_CLIP_ITERATIONS = 3,    // of centred clipping
    COORD_SAVE_MS = 5000,         // between writes of who was seen when
};

typedef struct coord_upload { // the one update that a node is sending
    bool active;
    fl_update_begin begin;
    uint8_t *data; // [begin.size], owned
    uint64_t received;
    uint64_t began_ms;
} coord_upload;

typedef struct coord_session { // beside each member, same index
    fl_channel *channel;       // opened at its first HELLO
    fl_link_peer peer;         // where it was heard last
    coord_upload upload;
    coord_quota hellos;
    uint64_t link_bytes_s;        // of its newest upload; 0: not measured
    int64_t bytes_up, bytes_down; // not written to the store yet
    bool seen;
    fl_heartbeat heartbeat;
    int64_t reported;       // newest round it reported of
    uint32_t final_tasks;   // how often it was asked to score the last layers
    coord_quota faults;     // frames that no honest node sends
    uint64_t complained_ms; // when an event about it was last written for a bad frame
} coord_session;

typedef struct coord_answer { // encoded, sent when what it says is durable
    uint32_t node;            // COORD_NOBODY: in the clear to `peer`
    fl_link_peer peer;
    fl_msg_type type;
    size_t at, size; // in outbox_bytes
} coord_answer;

struct coord_loop {
    coord_settings settings;
    coord_keys keys;
    coord_store *store;
    coord_world world;
    bool listening; // the world's link may be told of members
    fl_link *link;  // the real one; NULL in a simulation
    int lock_fd;    // -1: none
    char dir[COORD_PATH_MAX - 128];

    uint8_t run_id[FL_ID_SIZE];
    uint8_t model_digest[FL_DIGEST_SIZE];
    uint64_t model_size, a_seed;

    coord_registry registry;
    coord_round round;
    coord_session *sessions; // [nodes_max]
    uint32_t layers;
    coord_layer_row layer[COORD_LAYERS_MAX];
    coord_sum sum[COORD_LAYERS_MAX];     // count 0: nothing folded yet
    coord_norms norms[COORD_LAYERS_MAX]; // of admitted updates
    coord_vote vote;
    coord_opt opt;
    coord_gate gate;
    coord_good good;                  // the newest layers that the fleet's reports approve of
    coord_conducts conducts;          // of the nodes
    char rule_told[COORD_RULE_REASON]; // why the rule in use is not the one asked for

    coord_flush flush_due;
    uint64_t uploads; // bytes held by all uploads
    uint64_t polled_ms, saved_ms;
    uint64_t refusals, refusals_link;  // in all and of the link, as last written down
    uint64_t refusals_ms;              // since when there are more; 0: there are none
    uint64_t strangers;                // frames of keys that may only ask to join, and did not
    uint8_t stranger_key[FL_LINK_KEY]; // of the newest
    coord_quota join_faults;           // join requests that prove nothing
    coord_quota refusal_events;        // who knocks for ever must not fill the log

    coord_answer outbox[COORD_OUTBOX_MAX];
    size_t outbox_count, outbox_used;
    uint8_t *outbox_bytes; // [COORD_OUTBOX_BYTES]
    fl_arena scratch;      // one message decoded and one encoded
    fl_arena memory;       // registry and round
    uint8_t *plain;        // [FL_BODY_MAX] opened body
    uint8_t *frame;        // [FL_FRAME_MAX] to be sent
    uint8_t *chunk;        // [FL_CHUNK_MAX] of an object
};

// ---- loop_recover.c
fl_status coord_loop_recover(coord_loop *loop, uint64_t now_ms, fl_err *err) FL_NODISCARD;
// Reads the registry again: what approve and revoke wrote takes effect.
fl_status coord_loop_refresh(coord_loop *loop, uint64_t now_ms, fl_err *err) FL_NODISCARD;

// ---- loop_session.c
// One frame. Only failures of the store are errors; what is wrong with the frame is answered.
fl_status coord_loop_frame(coord_loop *loop, const fl_link_message *m, uint64_t now_ms,
                           fl_err *err) FL_NODISCARD;
// Writes down that the link refused keys since the last call, once in a while.
fl_status coord_loop_watch_link(coord_loop *loop, uint64_t now_ms, fl_err *err) FL_NODISCARD;
// Queues an answer until the batch is durable; pieces of objects are sent at once.
fl_status coord_loop_answer(coord_loop *loop, uint32_t node, const fl_msg *msg,
                            fl_err *err) FL_NODISCARD;
// The same in the clear, to whoever is there.
fl_status coord_loop_answer_clear(coord_loop *loop, fl_link_peer peer, const fl_msg *msg,
                                  fl_err *err) FL_NODISCARD;
fl_status coord_loop_commit(coord_loop *loop, fl_err *err) FL_NODISCARD; // then sends the outbox
fl_status coord_loop_event(coord_loop *loop, const char *kind, uint32_t node, fl_err *err,
                           const char *fmt, ...) FL_PRINTF(5, 6) FL_NODISCARD;
// A node was revoked: it has no session, no upload and no task.
fl_status coord_loop_expel(coord_loop *loop, uint32_t node, uint64_t now_ms,
                           fl_err *err) FL_NODISCARD;

// ---- loop_join.c
fl_status coord_loop_join(coord_loop *loop, const fl_link_message *m, const fl_join_request *q,
                          uint64_t now_ms, fl_err *err) FL_NODISCARD;

// ---- loop_task.c
fl_status coord_loop_on_request(coord_loop *loop, uint32_t node, const fl_msg *msg, uint64_t now_ms,
                                fl_err *err) FL_NODISCARD;
fl_status coord_loop_on_chunk_request(coord_loop *loop, uint32_t node, const fl_msg *msg,
                                      uint64_t now_ms, fl_err *err) FL_NODISCARD;
fl_status coord_loop_on_heartbeat(coord_loop *loop, uint32_t node, const fl_msg *msg,
                                  uint64_t now_ms, fl_err *err) FL_NODISCARD;
fl_status coord_loop_on_report(coord_loop *loop, uint32_t node, const fl_msg *msg, uint64_t now_ms,
                               fl_err *err) FL_NODISCARD;

// ---- loop_update.c
fl_status coord_loop_on_begin(coord_loop *loop, uint32_t node, const fl_msg *msg, uint64_t now_ms,
                              fl_err *err) FL_NODISCARD;
fl_status coord_loop_on_update_chunk(coord_loop *loop, uint32_t node, const fl_msg *msg,
                                     uint64_t now_ms, fl_err *err) FL_NODISCARD;
fl_status coord_loop_on_commit(coord_loop *loop, uint32_t node, const fl_msg *msg, uint64_t now_ms,
                               fl_err *err) FL_NODISCARD;
void coord_loop_drop_upload(coord_loop *loop, uint32_t node);
// Carries out what round says about tasks and flushes.
fl_status coord_loop_effect(coord_loop *loop, uint32_t node, const coord_effect *fx,
                            fl_err *err) FL_NODISCARD;
// Adds an opened update to its layer's sum, with the weight and clip of the ledger.
fl_status coord_loop_fold(coord_loop *loop, const fl_update *update, uint64_t weight, uint32_t clip,
                          fl_err *err) FL_NODISCARD;

// ---- loop_share.c
// Weighs updates of the open buffer again where their node has too large a share of a layer.
fl_status coord_loop_cap_shares(coord_loop *loop, fl_err *err) FL_NODISCARD;

// ---- loop_flush.c
// The open buffer becomes new layer versions, durably and once; or, when the fleet's reports say
// that the last ones did harm, the good ones are put back.
fl_status coord_loop_flush(coord_loop *loop, uint64_t now_ms, fl_err *err) FL_NODISCARD;

// ---- loop_robust.c
// mean[layer->count]: the layer's step by the rule of the settings. *ret_heard: some voice counted.
fl_status coord_loop_robust(coord_loop *loop, const coord_layer_row *layer, double *mean,
                            bool *ret_heard, fl_err *err) FL_NODISCARD;

// ---- loop_guard.c
typedef char coord_verdict_text[96];
typedef struct coord_guard_mark { // conduct and good layers as they were before a flush
    coord_good good;
    coord_conduct *rows; // owned
    uint32_t count;
} coord_guard_mark;
fl_status coord_loop_guard_open(coord_loop *loop, fl_err *err) FL_NODISCARD;
void coord_loop_guard_close(coord_loop *loop);
fl_status coord_loop_guard_mark(const coord_loop *loop, coord_guard_mark *ret,
                                fl_err *err) FL_NODISCARD;
void coord_loop_guard_rewind(coord_loop *loop, coord_guard_mark *mark, bool failed);
// Judges the newest layers by this round's reports. *ret_undo: they are worse than the good ones.
fl_status coord_loop_judge(coord_loop *loop, bool *ret_undo, fl_err *err) FL_NODISCARD;
// row: the layer as stored; becomes its next version, with the good version's content.
fl_status coord_loop_put_back(coord_loop *loop, coord_layer_row *row, fl_err *err) FL_NODISCARD;
fl_status coord_loop_put_vote_back(coord_loop *loop, coord_vote *vote, fl_err *err) FL_NODISCARD;
// Versions of each layer to keep, so that the good ones stay on the disk.
int64_t coord_loop_versions_kept(const coord_loop *loop, const coord_layer_row *next);
// In the batch of a flush: quarantine, release, and what must not be forgotten.
fl_status coord_loop_guard_save(coord_loop *loop, fl_err *err) FL_NODISCARD;

#endif
