// client.h: the node's side of the federation as a pure state machine: (state, event, now) goes in,
// effects come out. No sockets, files, clock, threads or randomness; the loop carries the effects
// out and a simulator can drive a thousand of these in one process.
//
//   OFFLINE -> ASKING -> FETCHING -> TRAINING -> SENDING -> REPORTING -> ASKING ...
//                 \-> WAITING -> ASKING
//
// One request is under way at a time (heartbeats aside). What gets no answer is sent again, which
// the protocol makes safe: chunks are idempotent, an update has a key for ever, and what was
// acknowledged twice counts once. After RESENDS in vain the session is given up and begun anew.
// Updates wait in a spool on the node's disk until they are acknowledged, so a node that was killed
// goes on where it was: `node_client_init` is told what the spool holds.
#ifndef NODE_CLIENT_CLIENT_H
#define NODE_CLIENT_CLIENT_H

#include "node/upload/uplink.h"
#include "proto/codec.h"

enum {
    NODE_CLIENT_REPLY_MS = 5000, // a request without an answer is sent again after this
    NODE_CLIENT_RESENDS = 3,
    NODE_CLIENT_HEARTBEAT_MS = 5000,
    NODE_CLIENT_EFFECTS_MAX = 4, // of one event
};

typedef enum node_client_phase {
    NODE_CLIENT_OFFLINE,
    NODE_CLIENT_ASKING,
    NODE_CLIENT_WAITING,
    NODE_CLIENT_FETCHING,
    NODE_CLIENT_TRAINING,
    NODE_CLIENT_SENDING,
    NODE_CLIENT_REPORTING,
    NODE_CLIENT_FINISHED, // the run is over, or the node was revoked: the loop ends
} node_client_phase;
const char *node_client_phase_name(node_client_phase phase);

// One sealed layer update in the spool.
typedef struct node_spooled {
    fl_update_begin begin;
} node_spooled;

typedef enum node_client_event_kind {
    NODE_EV_SESSION_UP,   // the handshake is done
    NODE_EV_SESSION_DOWN, // the link or the session is gone
    NODE_EV_MESSAGE,      // a message of this session: `message`
    NODE_EV_TICK,         // time passes; also when the capability changed
    NODE_EV_STORED,       // bytes of the object being fetched are on disk: `stored` in all
    NODE_EV_OBJECT_BAD,   // the whole object has another digest: it was thrown away
    NODE_EV_TRAINED,      // `updates` are durable in the spool, `report` may be sent after them
    NODE_EV_TRAIN_FAILED, // the task was given up: owner's rules, no memory, no data
    NODE_EV_COUNT
} node_client_event_kind;

typedef struct node_client_event {
    node_client_event_kind kind;
    uint64_t now_ms;
    const fl_msg *message;
    uint64_t stored;
    const node_spooled *updates; // [update_count]
    size_t update_count;
    const fl_report *report;
} node_client_event;

typedef enum node_client_effect_kind {
    NODE_FX_SEND,        // message
    NODE_FX_FETCH_BEGIN, // object: how much of it is on disk? answer with NODE_EV_STORED
    NODE_FX_STORE,       // chunk of the object being fetched: write, then NODE_EV_STORED
    NODE_FX_TRAIN,       // task: all objects are here; train, spool, then NODE_EV_TRAINED
    NODE_FX_ABANDON,     // stop training
    NODE_FX_SEND_CHUNK,  // key, offset, of the spool: read and send UPDATE_CHUNK
    NODE_FX_DROP,        // key, verdict, code: acknowledged; remove it from the spool
    NODE_FX_SHAKE_HANDS, // the session is of no use any more
    NODE_FX_VOTE,        // task.vote: new voting weights
    NODE_FX_END,         // code: the run is finished or we are revoked
} node_client_effect_kind;

typedef struct node_object {
    uint8_t digest[FL_DIGEST_SIZE];
    uint64_t size;
    bool model;       // else the state of a layer
    uint32_t layer;   // of a layer
    uint64_t version; // of a layer
} node_object;

typedef struct node_client_effect {
    node_client_effect_kind kind;
    fl_msg message;     // SEND; may point into the client
    node_object object; // FETCH_BEGIN, STORE
    fl_bytes chunk;     // STORE; borrows from the event's message
    uint64_t offset;    // STORE, SEND_CHUNK
    uint32_t size;      // SEND_CHUNK
    fl_update_key key;  // SEND_CHUNK, DROP
    fl_verdict verdict; // DROP
    fl_code code;       // DROP, END
} node_client_effect;

typedef struct node_client_effects {
    node_client_effect list[NODE_CLIENT_EFFECTS_MAX];
    size_t count;
} node_client_effects;

typedef struct node_client {
    node_client_phase phase;
    bool online; // a session is up; training goes on without one
    fl_capability capability; // the loop keeps it fresh
    uint64_t tokens_local;

    bool has_model; // the run and model below are ours and on disk
    uint8_t run_id[FL_ID_SIZE];
    uint8_t model_digest[FL_DIGEST_SIZE];
    fl_layer_version held[FL_LAYERS_MAX]; // layers we have the state of, ascending
    size_t held_count;
    uint64_t vote_version;

    fl_task task; // bases and objects point into the two arrays below
    fl_layer_version bases[FL_LAYERS_MAX];
    fl_layer_object objects[FL_LAYERS_MAX];
    size_t fetch_next; // index of the object being fetched; 0 is the model
    uint64_t fetched;  // bytes of it on disk
    uint64_t deadline_ms;

    node_spooled spool[FL_LAYERS_MAX]; // oldest first
    size_t spool_count;
    uint64_t sent; // bytes of spool[0] that the coordinator has
    bool begun;    // UPDATE_WANT was received for spool[0]
    fl_report report;
    bool has_report;

    node_uplink uplink; // measured on updates

    uint64_t asked_ms; // when the request under way was sent
    uint32_t resends;
    uint64_t wake_ms;      // WAITING
    uint64_t heartbeat_ms; // when the last one was sent
    uint32_t step, steps;  // the loop's worker tells
    uint64_t tokens;
    float loss;
    uint64_t bytes_up, bytes_down; // the loop counts
} node_client;

// spool: what is on the disk from before, oldest first; count at most FL_LAYERS_MAX.
void node_client_init(node_client *client, const node_spooled *spool, size_t count);

// Applies one event. Events that make no sense now are ignored: a late answer is no failure.
void node_client_step(node_client *client, const node_client_event *event,
                      node_client_effects *ret);

#endif
