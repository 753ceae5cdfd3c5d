// state.h: what a node must not lose, as files of one folder. Everything is written whole or not at
// all; a node that is killed at any moment opens the same folder and goes on.
//
//   identity.key, curve.key   who it is: Ed25519 and CURVE secrets, mode 0600
//   enrolment.ini             whom it belongs to: address and pinned keys of the coordinator
//   run.ini                   the run it takes part in, and how many updates and reports it has
//                             made, and what updates took of the day's budget
//   model.gguf                the run's compressed model; model.part while it is being fetched
//   layers/NNN                the fleet's state of layer NNN (proto/update.h: fl_layer)
//   layers/NNN.sum            its digest as it came, checked at every start
//   layers/NNN.part           one that is being fetched
//   spool/SEQUENCE            a sealed update that the coordinator has not acknowledged yet, and
//                             behind it what it leaves for the next one (node/upload/residual.h)
//   kept/NNN                  the newest such file of layer NNN that was counted: its rest counts
//   kept/NNN-whole            ... that was not counted, but is good: its content counts too
//   adapter                   the fleet's adapter, for `eval`, `generate` and `chat`
#ifndef NODE_STATE_H
#define NODE_STATE_H

#include "common/crypto.h"
#include "common/file.h"
#include "node/client/client.h"
#include "node/upload/choose.h"
#include "node/upload/residual.h"

enum { NODE_PATH_MAX = 1024 };

typedef struct node_state {
    char folder[NODE_PATH_MAX - 64];
    int lock; // descriptor + 1 of the file that one process at a time holds
    fl_secret *identity, *curve;
    uint8_t identity_key[FL_KEY_SIZE], curve_key[FL_KEY_SIZE];

    bool enrolled;
    char host[512], name[512];
    int64_t port;
    uint8_t coordinator_curve[FL_KEY_SIZE], coordinator_identity[FL_KEY_SIZE];

    bool has_run;
    uint8_t run_id[FL_ID_SIZE], model_digest[FL_DIGEST_SIZE];
    int64_t updates_made, reports_made; // sequence numbers that were used
    node_upload_spent upload;           // of the day's budget; the worker's while a task runs
} node_state;

// Opens the folder, for this process alone; makes keys when there are none. FL_ESTATE: another
// process has it. FL_EFORMAT names the damaged file.
fl_status node_state_open(const char *folder, node_state *ret, fl_err *err) FL_NODISCARD;
void node_state_close(node_state *state); // a zeroed one is fine

fl_status node_state_save_enrolment(const node_state *state, fl_err *err) FL_NODISCARD;
fl_status node_state_save_run(const node_state *state, fl_err *err) FL_NODISCARD;
// Another run: its layers and spool are of no use any more and are removed.
fl_status node_state_begin_run(node_state *state, const uint8_t run_id[FL_ID_SIZE],
                               const uint8_t model_digest[FL_DIGEST_SIZE],
                               fl_err *err) FL_NODISCARD;

// path[NODE_PATH_MAX] of "name" in the folder.
void node_state_path(const node_state *state, const char *name, char *path);
void node_state_layer_path(const node_state *state, uint32_t layer, char *path);

// Is the run's model there, every bit of it? A damaged one is removed: it is fetched again.
bool node_state_has_model(const node_state *state);
// The layers on disk, ascending; damaged ones are removed and fetched again. held[FL_LAYERS_MAX].
fl_status node_state_held(const node_state *state, fl_layer_version *held, size_t *ret_count,
                          fl_err *err) FL_NODISCARD;

// Fetching: bytes that are there of an object, a further piece, and the end of it: the digest is
// checked, then the object gets its name. FL_EAUTH: another digest; the piece was thrown away.
fl_status node_state_fetched(const node_state *state, const node_object *object, uint64_t *ret,
                             fl_err *err) FL_NODISCARD;
fl_status node_state_store(const node_state *state, const node_object *object, uint64_t offset,
                           fl_bytes piece, fl_err *err) FL_NODISCARD;
fl_status node_state_fetch_done(node_state *state, const node_object *object,
                                fl_err *err) FL_NODISCARD;

// The spool. Adding is durable when it returns; `begin->key.sequence` names the file. rest: what is
// kept with it, or nothing.
fl_status node_state_spool_add(const node_state *state, const fl_update_begin *begin,
                               fl_bytes sealed, fl_bytes rest, fl_err *err) FL_NODISCARD;
fl_status node_state_spool_list(const node_state *state, node_spooled *list, size_t *ret_count,
                                fl_err *err) FL_NODISCARD; // oldest first; list[FL_LAYERS_MAX]
fl_status node_state_spool_read(const node_state *state, uint64_t sequence, uint64_t offset,
                                uint32_t size, uint8_t *out, fl_err *err) FL_NODISCARD;
// The end of an update, by one rename or removal; after a kill before it, the coordinator's answer
// comes again and so does this.
void node_state_spool_end(const node_state *state, const fl_update_key *key,
                          node_residual_fate fate);

// What the newest update of a layer leaves, as bytes of node/upload/residual.h that the caller
// frees; *ret_whole: with what it carried. FL_ENOENT: nothing.
fl_status node_state_rest(const node_state *state, uint32_t layer, uint8_t **ret, size_t *ret_size,
                          bool *ret_whole, fl_err *err) FL_NODISCARD;

#endif
