// setup.h: what nearly every command opens first: the model, its tokenizer, the kernels and
// threads chosen for this machine, and the adapter if one is named.
#ifndef NODE_COMMANDS_SETUP_H
#define NODE_COMMANDS_SETUP_H

#include "common/cli.h"
#include "common/json.h"
#include "node/model/forward.h"
#include "node/model/resident.h"
#include "node/model/tokenizer.h"
#include "node/schedule/probe.h"
#include "node/tune/adapter.h"

typedef struct node_setup {
    node_model *model;
    node_tokenizer *tokenizer;
    node_adapter *adapter; // NULL: none was named
    fl_kern kern;
    fl_pool *pool;
    node_engine engine;
    node_facts facts;
    node_resident_stats streamed; // by plans for the weights that are closed
} node_setup;

typedef struct node_setup_opts {
    const char *model;
    const char *adapter; // "" for none
    int64_t threads;     // 0: as many as the machine has fast cores
    bool any_base;       // accept an adapter made for the same shapes with other weights
    bool without_tokenizer;
} node_setup_opts;

fl_status node_setup_open(const node_setup_opts *opts, node_setup *ret, fl_err *err) FL_NODISCARD;
// Another number of threads from now on. A tuner that is bound to the engine goes on with it.
fl_status node_setup_threads(node_setup *setup, uint32_t threads, fl_err *err) FL_NODISCARD;
void node_setup_close(node_setup *session); // a zeroed session is fine

// A whole text file: not empty, UTF-8; the error says at which byte it is not. free() the result.
fl_status node_read_text(const char *path, uint8_t **ret_text, size_t *ret_size,
                         fl_err *err) FL_NODISCARD;

// The process's resident set now and at its highest, bytes.
uint64_t node_rss_now(void);
uint64_t node_rss_peak(void);

// Bytes that the process holds besides the weights and what it will take from now on. Lets go of
// the model's pages (and of a plan for them) and of freed memory, so that it can be measured rather
// than guessed.
uint64_t node_setup_bytes(node_setup *setup);
void node_setup_let_go(node_setup *setup); // only that
void node_setup_trim(void);                // freed memory alone
// Opens a plan for the weights of setup->model. They leave the system's cache too when the machine
// or the control group could not hold them there.
fl_status node_setup_place_weights(node_setup *setup, const node_resident_plan *plan,
                                   fl_err *err) FL_NODISCARD;

// Both for a command that goes forward only: places the weights under what the owner (memory, 0: no
// opinion), the machine and the control group allow, with `block` bytes left to be taken. FL_ENOMEM
// says what would do.
fl_status node_setup_fit(node_setup *setup, const node_resident_use *use, uint64_t memory,
                         size_t block, uint64_t *ret_peak, fl_err *err) FL_NODISCARD;
// How much was read, how fast, and how long it was waited for; nothing when nothing was.
void node_setup_add_streamed(const node_setup *setup, fl_json *root);
void node_setup_print_streamed(const node_setup *setup, double seconds, FILE *out);

// One 64-byte aligned block for an arena; free() it. FL_ENOMEM names the size.
fl_status node_block_take(size_t size, void **ret, fl_err *err) FL_NODISCARD;

#endif
