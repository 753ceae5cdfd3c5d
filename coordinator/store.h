// store.h: everything the coordinator must not forget. The only door to SQLite.
//
//   DIR/state.db            SQLite, write-ahead log, synchronous=FULL
//   DIR/objects/<digest>    content-addressed files: the model, layers, optimiser moments
//   DIR/spool/<n>           accepted updates of open buffer n, appended
//
// The order is always: bytes in a file, fsync, then the row that names them, commit. So a row never
// names bytes that are not there, and bytes that no row names are swept at the next start.
// Writes happen in a batch: coord_store_commit() returns FL_OK only when all of it is durable, and
// nothing may be acknowledged before. Commands in other processes write to the same database while
// the daemon runs; coord_store_changed() tells it.
// Errors of every function: FL_EIO (disk), FL_ENOMEM, FL_ETIME (another process holds the lock),
// FL_EFORMAT (damaged: run verify), and what is named at the function.
#ifndef COORD_STORE_H
#define COORD_STORE_H

#include "common/status.h"
#include "coordinator/store_disk.h"

enum {
    COORD_DIGEST = 32, // BLAKE2b-256
    COORD_KEY = 32,
    COORD_TOKEN_ID = 8,
    COORD_NAME_MAX = 64,
    COORD_LAYERS_MAX = 256,
    COORD_SUMS_MAX = 16, // exits of a model
    COORD_TEXT_MAX = 256,
    COORD_PATH_MAX = 4096,
};

typedef struct coord_store coord_store;

// Makes DIR and an empty state in it. FL_ESTATE when one is there.
fl_status coord_store_create(const char *dir, fl_err *err) FL_NODISCARD;
// FL_ENOENT: no state there. FL_EUNSUPPORTED: written by a newer version.
fl_status coord_store_open(const char *dir, coord_store **ret, fl_err *err) FL_NODISCARD;
// The same on another disk than the system's: there the database has this one connection only.
fl_status coord_store_create_on(coord_disk *disk, const char *dir, fl_err *err) FL_NODISCARD;
fl_status coord_store_open_on(coord_disk *disk, const char *dir, coord_store **ret,
                              fl_err *err) FL_NODISCARD;
void coord_store_close(coord_store *s); // rolls an open batch back; NULL is fine

// A batch. begin is idempotent; commit without a batch does nothing.
fl_status coord_store_begin(coord_store *s, fl_err *err) FL_NODISCARD;
fl_status coord_store_commit(coord_store *s, fl_err *err) FL_NODISCARD; // rolled back on failure
void coord_store_rollback(coord_store *s);
// Did another process commit since the last call? Not inside a batch.
fl_status coord_store_changed(coord_store *s, bool *ret, fl_err *err) FL_NODISCARD;

// ---- objects and spool (store_objects.c)

// Writes the bytes (durable at once) unless an object with their digest is there.
fl_status coord_store_put_object(coord_store *s, fl_bytes bytes, uint8_t ret_digest[COORD_DIGEST],
                                 fl_err *err) FL_NODISCARD;
// The same for a file of any size; copied in pieces.
fl_status coord_store_import_object(coord_store *s, const char *path,
                                    uint8_t ret_digest[COORD_DIGEST], uint64_t *ret_size,
                                    fl_err *err) FL_NODISCARD;
// Whole object, digest checked; free() it. FL_ENOENT, FL_ELIMIT, FL_EFORMAT: altered bytes.
fl_status coord_store_get_object(coord_store *s, const uint8_t digest[COORD_DIGEST],
                                 size_t size_max, uint8_t **ret_data, size_t *ret_size,
                                 fl_err *err) FL_NODISCARD;
// Up to `size` bytes of an object from `offset` on, unchecked: who fetches it has the digest.
// FL_ENOENT; *ret_total is its whole size.
fl_status coord_store_read_object(coord_store *s, const uint8_t digest[COORD_DIGEST],
                                  uint64_t offset, uint8_t *out, size_t size, size_t *ret_got,
                                  uint64_t *ret_total, fl_err *err) FL_NODISCARD;
void coord_store_object_path(const coord_store *s, const uint8_t digest[COORD_DIGEST],
                             char ret_path[COORD_PATH_MAX]);
void coord_digest_text(const uint8_t digest[COORD_DIGEST], char ret_hex[2 * COORD_DIGEST + 1]);

typedef struct coord_spooled { // where an update's bytes are
    int64_t spool;             // file number
    int64_t offset, size;
    uint8_t digest[COORD_DIGEST];
} coord_spooled;
// Appends to spool file `spool`; durable at coord_store_commit().
fl_status coord_store_spool(coord_store *s, int64_t spool, fl_bytes bytes, coord_spooled *ret,
                            fl_err *err) FL_NODISCARD;
// Reads it back into data[at->size], digest checked.
fl_status coord_store_unspool(coord_store *s, const coord_spooled *at, uint8_t *data,
                              fl_err *err) FL_NODISCARD;
// Removes objects and spool files that no row names. Outside a batch.
fl_status coord_store_sweep(coord_store *s, fl_err *err) FL_NODISCARD;

// ---- registry, tokens, events, small values (store_registry.c)

#define COORD_NODE_STATE_LIST(X)                                                                   \
    X(PENDING, "pending")                                                                          \
    X(ACTIVE, "active")                                                                            \
    X(REVOKED, "revoked")
typedef enum coord_node_state {
#define X(name, text) COORD_NODE_##name,
    COORD_NODE_STATE_LIST(X) COORD_NODE_STATE_COUNT
#undef X
} coord_node_state;
const char *coord_node_state_text(coord_node_state state);

typedef struct coord_node_row {
    int64_t id;
    char name[COORD_NAME_MAX + 1];
    uint8_t sign_key[COORD_KEY];      // Ed25519, the node's identity
    uint8_t transport_key[COORD_KEY]; // CURVE
    coord_node_state state;
    int64_t joined_s, seen_s; // wall clock, for people
    int64_t bytes_up, bytes_down;
} coord_node_row;

// FL_ESTATE: the key is known already. *ret_id is never used twice.
fl_status coord_store_add_node(coord_store *s, const coord_node_row *row, int64_t *ret_id,
                               fl_err *err) FL_NODISCARD;
// FL_ENOENT; FL_ESTATE: revoked nodes stay revoked.
fl_status coord_store_set_node_state(coord_store *s, int64_t id, coord_node_state state,
                                     fl_err *err) FL_NODISCARD;
fl_status coord_store_touch_node(coord_store *s, int64_t id, int64_t seen_s, int64_t bytes_up,
                                 int64_t bytes_down, fl_err *err) FL_NODISCARD; // bytes are added
typedef fl_status (*coord_node_fn)(void *ctx, const coord_node_row *row, fl_err *err);
fl_status coord_store_each_node(coord_store *s, coord_node_fn fn, void *ctx,
                                fl_err *err) FL_NODISCARD; // by id
// By id in decimal, or by name, or by the first 8 or more hex digits of the key. FL_ENOENT,
// FL_EARG: more than one fits.
fl_status coord_store_find_node(coord_store *s, const char *text, coord_node_row *ret,
                                fl_err *err) FL_NODISCARD;

// Join tokens: only what both sides derive from the secret is kept (proto/invite.h).
fl_status coord_store_add_token(coord_store *s, const uint8_t id[COORD_TOKEN_ID],
                                const uint8_t key[COORD_KEY], int64_t uses, bool auto_approve,
                                fl_err *err) FL_NODISCARD;
typedef struct coord_token_row {
    uint8_t key[COORD_KEY];
    int64_t uses; // left
    bool auto_approve;
} coord_token_row;
// FL_ENOENT: unknown. A spent token is still found, with no uses left: a lost reply can be
// repeated.
fl_status coord_store_find_token(coord_store *s, const uint8_t id[COORD_TOKEN_ID],
                                 coord_token_row *ret, fl_err *err) FL_NODISCARD;
// Takes one use. FL_EAUTH: unknown or spent.
fl_status coord_store_use_token(coord_store *s, const uint8_t id[COORD_TOKEN_ID],
                                fl_err *err) FL_NODISCARD;
// Is there a token with uses left, or a node that waits for approval?
fl_status coord_store_enrolling(coord_store *s, bool *ret, fl_err *err) FL_NODISCARD;

typedef struct coord_event_row {
    int64_t id, time_s;
    int64_t node; // 0: none
    char kind[32];
    char text[COORD_TEXT_MAX];
} coord_event_row;
fl_status coord_store_add_event(coord_store *s, int64_t time_s, const char *kind, int64_t node,
                                const char *text, fl_err *err) FL_NODISCARD;
// The newest `max`, oldest first.
fl_status coord_store_events(coord_store *s, coord_event_row *rows, size_t max, size_t *ret_count,
                             fl_err *err) FL_NODISCARD;
// Keeps the newest `keep` events: a hostile peer cannot fill the disk with refusals.
fl_status coord_store_trim_events(coord_store *s, int64_t keep, fl_err *err) FL_NODISCARD;

fl_status coord_store_put_value(coord_store *s, const char *key, fl_bytes value,
                                fl_err *err) FL_NODISCARD;
// FL_ENOENT; FL_ELIMIT when larger than size_max.
fl_status coord_store_get_value(coord_store *s, const char *key, void *data, size_t size_max,
                                size_t *ret_size, fl_err *err) FL_NODISCARD;

// ---- layers, rounds, tasks, updates (store_ledger.c)

typedef struct coord_layer_row {
    uint32_t layer;
    int64_t version;              // 0: all zeros, there is no object
    int64_t count;                // values; 0: not known before the first update
    uint8_t digest[COORD_DIGEST]; // object: proto/update.h's layer state
    int64_t size;                 // of that object
    bool has_moments;
    uint8_t moments[COORD_DIGEST]; // object of the optimiser's doubles
    int64_t round;                 // in which it last changed; 0: never
} coord_layer_row;

// Version 0 of `layers` layers. FL_ESTATE when layers are there.
fl_status coord_store_add_layers(coord_store *s, uint32_t layers, fl_err *err) FL_NODISCARD;
// Pins the number of values of a layer. FL_ESTATE when another number is pinned.
fl_status coord_store_pin_layer(coord_store *s, uint32_t layer, int64_t count,
                                fl_err *err) FL_NODISCARD;
fl_status coord_store_layers(coord_store *s, coord_layer_row *rows, size_t max, size_t *ret_count,
                             fl_err *err) FL_NODISCARD;
// The next version: row->version must be the stored one plus 1 (FL_ESTATE). Keeps the history.
fl_status coord_store_set_layer(coord_store *s, const coord_layer_row *row, int64_t updates,
                                fl_err *err) FL_NODISCARD;
// The object of one version. FL_ENOENT: it is not kept, or not made yet.
fl_status coord_store_find_layer(coord_store *s, uint32_t layer, int64_t version,
                                 uint8_t ret_digest[COORD_DIGEST], fl_err *err) FL_NODISCARD;
// Is this the digest of a version that is kept?
fl_status coord_store_is_layer(coord_store *s, const uint8_t digest[COORD_DIGEST], bool *ret,
                               fl_err *err) FL_NODISCARD;
// Forgets versions older than the newest `keep` of each layer; their objects go at the next sweep.
fl_status coord_store_trim_layers(coord_store *s, int64_t keep, fl_err *err) FL_NODISCARD;

typedef struct coord_round_row {
    int64_t round;              // from 1
    int64_t opened_s, closed_s; // closed_s 0: open
    int64_t contributions, updates, layers, bytes_up;
    double loss; // held-out loss of the vote over the nodes' reports of the round; NaN: none
    char reason[32];
} coord_round_row;

fl_status coord_store_open_round(coord_store *s, int64_t round, int64_t opened_s,
                                 fl_err *err) FL_NODISCARD;
// FL_ESTATE when it is closed already: a flush happens once.
fl_status coord_store_close_round(coord_store *s, const coord_round_row *row,
                                  fl_err *err) FL_NODISCARD;
// The newest `max`, oldest first.
fl_status coord_store_rounds(coord_store *s, coord_round_row *rows, size_t max, size_t *ret_count,
                             fl_err *err) FL_NODISCARD;

typedef struct coord_task_row {
    int64_t task, node, round;
    uint32_t exit, first, last; // trains layers first..last with the loss at exit
    int64_t counted;            // round in which it counted as a contribution; 0: none
    bool open;                  // layers are still awaited
} coord_task_row;
// Task numbers are given out by the caller, upwards. FL_ESTATE: this one was used.
fl_status coord_store_add_task(coord_store *s, const coord_task_row *row, fl_err *err) FL_NODISCARD;
fl_status coord_store_last_task(coord_store *s, int64_t *ret, fl_err *err) FL_NODISCARD; // 0: none
// No more layers are awaited. counted: as in the row.
fl_status coord_store_close_task(coord_store *s, int64_t task, int64_t counted,
                                 fl_err *err) FL_NODISCARD;
typedef fl_status (*coord_task_fn)(void *ctx, const coord_task_row *row, fl_err *err);
// The open tasks, and those that counted in `round`, in order.
fl_status coord_store_each_task(coord_store *s, int64_t round, coord_task_fn fn, void *ctx,
                                fl_err *err) FL_NODISCARD;
// How many tasks each exit was given so far: counts[exits].
fl_status coord_store_task_counts(coord_store *s, uint64_t *counts, size_t exits,
                                  fl_err *err) FL_NODISCARD;

typedef struct coord_update_row {
    int64_t id, task, node;
    uint32_t layer;
    int64_t base, sequence; // with node and layer the idempotency key
    int64_t tokens, weight;
    uint32_t clip;
    double norm;
    int64_t round; // that folded it; 0: in the open buffer
    coord_spooled at;
} coord_update_row;

typedef enum coord_seen { COORD_SEEN_NEW, COORD_SEEN_SAME, COORD_SEEN_OTHER } coord_seen;
// SAME: this very key is in the ledger. OTHER: another update of this node, layer and base is.
fl_status coord_store_seen_update(coord_store *s, int64_t node, uint32_t layer, int64_t base,
                                  int64_t sequence, coord_seen *ret, fl_err *err) FL_NODISCARD;
// FL_ESTATE: there is one for this node, layer and base.
fl_status coord_store_add_update(coord_store *s, const coord_update_row *row,
                                 fl_err *err) FL_NODISCARD;
typedef fl_status (*coord_update_fn)(void *ctx, const coord_update_row *row, fl_err *err);
// Updates of the open buffer, in the order of their admission.
fl_status coord_store_each_open_update(coord_store *s, coord_update_fn fn, void *ctx,
                                       fl_err *err) FL_NODISCARD;
// All updates with a greater id, in order.
fl_status coord_store_each_update_after(coord_store *s, int64_t id, coord_update_fn fn, void *ctx,
                                        fl_err *err) FL_NODISCARD;
// All admitted updates of one task.
fl_status coord_store_each_task_update(coord_store *s, int64_t task, coord_update_fn fn, void *ctx,
                                       fl_err *err) FL_NODISCARD;
// The newest `max` updates of a layer, oldest first (their norms feed the running median).
fl_status coord_store_each_recent_update(coord_store *s, uint32_t layer, int64_t max,
                                         coord_update_fn fn, void *ctx, fl_err *err) FL_NODISCARD;
// For each node and layer the update with the newest base.
fl_status coord_store_each_last_update(coord_store *s, coord_update_fn fn, void *ctx,
                                       fl_err *err) FL_NODISCARD;
// Weight that each layer received in the newest `rounds` rounds up to the open one, in any order.
typedef fl_status (*coord_cover_fn)(void *ctx, int64_t round, uint32_t layer, int64_t weight,
                                    fl_err *err);
fl_status coord_store_each_cover(coord_store *s, int64_t open_round, int64_t rounds,
                                 coord_cover_fn fn, void *ctx, fl_err *err) FL_NODISCARD;
fl_status coord_store_spooled_bytes(coord_store *s, int64_t *ret, fl_err *err) FL_NODISCARD;
// Marks the whole open buffer as folded in `round`; its spooled bytes are given up.
fl_status coord_store_fold_updates(coord_store *s, int64_t round, fl_err *err) FL_NODISCARD;

// ---- votes and reports (store_votes.c)

typedef struct coord_vote_row {
    int64_t version, round, tokens;
    uint32_t exits;
    double weights[COORD_SUMS_MAX];
    double loss, gain; // of the vote before it, and what this one promises; nats a token
} coord_vote_row;
fl_status coord_store_add_vote(coord_store *s, const coord_vote_row *row, fl_err *err) FL_NODISCARD;
fl_status coord_store_last_vote(coord_store *s, coord_vote_row *ret, fl_err *err) FL_NODISCARD;

typedef struct coord_report_row { // one node's held-out sums; q20: units of 2^-20
    int64_t node, sequence, round, vote, tokens;
    int64_t nll_base, nll_local, nll_voted; // q20
    int64_t peak_rss_bytes;
    uint32_t exits;
    int64_t share[COORD_SUMS_MAX], nll[COORD_SUMS_MAX]; // q20
} coord_report_row;
// FL_ESTATE: a report of this node with this sequence or a later one is there.
fl_status coord_store_add_report(coord_store *s, const coord_report_row *row,
                                 fl_err *err) FL_NODISCARD;
typedef fl_status (*coord_report_fn)(void *ctx, const coord_report_row *row, fl_err *err);
// The newest report of each node, by node.
fl_status coord_store_each_last_report(coord_store *s, coord_report_fn fn, void *ctx,
                                       fl_err *err) FL_NODISCARD;
// All reports of one round, by node and sequence.
fl_status coord_store_each_report(coord_store *s, int64_t round, coord_report_fn fn, void *ctx,
                                  fl_err *err) FL_NODISCARD;

// ---- verify (store_verify.c)

typedef struct coord_verified {
    int64_t objects, updates, rows; // looked at
    int64_t problems;
} coord_verified;
typedef void (*coord_problem_fn)(void *ctx, const char *text);
// Reads every object and spooled update, checks digests and sizes, and the rows against each other.
// FL_OK even when there are problems: they are counted, and told one by one.
fl_status coord_store_verify(coord_store *s, coord_problem_fn fn, void *ctx, coord_verified *ret,
                             fl_err *err) FL_NODISCARD;

// ---- backup (store_backup.c)

// Copies the whole folder to a new one, consistent whatever others do meanwhile; durable file by
// file. Outside a batch.
fl_status coord_store_backup(coord_store *s, const char *to, fl_err *err) FL_NODISCARD;

#endif
