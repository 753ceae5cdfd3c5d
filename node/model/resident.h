// resident.h: which weights of a mapped model are in memory, and when.
//
// A model that fits is left to the system: its pages come as they are touched, and stay. For one
// that does not, some parts (layers, slices of the head) stay resident and the others pass through
// a ring: a thread reads the parts that come next while the present one computes, and a part leaves
// when it has been used. A fixed set and a ring, not the least recently used: every pass goes
// through all layers in order, and there LRU would throw out each part just before it is needed.
//
// Rows that are read here and there (embedding, target rows of the head) are read through the file,
// not the mapping: touching one would map what lies around it, up to megabytes where the system's
// cache holds large pages.
//
//   Memory   plain arithmetic over the file's layout says beforehand how much is resident at most:
//            the fixed parts and the ring (and, at the edges of parts, what is left of a large page
//            of the cache, where it holds such: the system maps those whole). Counted are pages in
//            this process's tables: RSS. What the system keeps in its cache besides is its own to
//            give up; with `forget` pages leave that too, for a machine or control group that could
//            not hold the model.
//   Bits     none change: the same bytes at the same addresses.
//   Threads  one caller besides the reader. Allocates nothing after open.
//   Errors   a page that cannot be read ends the process (SIGBUS), as with any mapped file.
//   Source   cyclic access and LRU: Denning 1968, "The working set model"; madvise(2).
#ifndef NODE_MODEL_RESIDENT_H
#define NODE_MODEL_RESIDENT_H

#include "node/model/model.h"

// What a pass uses.
typedef struct node_resident_use {
    uint32_t layers;    // layers 0 .. layers - 1
    uint32_t window;    // the topmost of them that are used again on the way back; 0: none
    uint32_t head_rows; // rows of the head at a time: a chunk of the vocabulary
} node_resident_use;

typedef struct node_resident_plan {
    node_resident_use use;
    uint64_t limit;
    uint64_t bytes;           // most that is resident
    uint64_t least;           // the least limit that a plan can meet
    uint64_t fixed, ring;     // of parts that stay; for parts that pass. ring 0: nothing passes
    uint64_t streamed;        // read again in every pass
    uint32_t layers_streamed; // layers that pass through the ring
    bool head_streamed;       // some of the head does
} node_resident_plan;

// The plan under `limit` bytes (0: none). False when there is none: ret->least says what would do.
bool node_resident_make_plan(const node_model *model, const node_resident_use *use, uint64_t limit,
                             node_resident_plan *ret) FL_NODISCARD;

typedef struct node_resident_stats {
    uint64_t streamed_bytes; // read by the reader
    double read_seconds;     // that it took
    double wait_seconds;     // that the caller stood still for it
} node_resident_stats;

// Carries a plan out: model->resident is set until close, and everything that computes with the
// model goes by it. A plan under which nothing passes starts no thread. The model is a mapped file.
// FL_ENOMEM, FL_EIO when the system refuses memory or a thread.
fl_status node_resident_open(node_model *model, const node_resident_plan *plan, bool forget,
                             fl_err *err) FL_NODISCARD;
void node_resident_close(node_model *model); // a model without is fine
void node_resident_read_stats(const node_model *model, node_resident_stats *ret);

// Lets go of every page of the file; it comes back when touched. Nothing for a model in memory.
void node_resident_drop(const node_model *model);

// ---- called where weights are used; each does nothing when model->resident is NULL

// A pass begins: layers first .. last in order, the head `heads` times, then, when `back` is true,
// layers last .. low on the way back. Only says what to read ahead.
typedef struct node_resident_pass {
    uint32_t first, last, heads, low;
    bool back;
} node_resident_pass;
void node_resident_begin(const node_model *model, const node_resident_pass *pass);
// Returns when the layer, or these rows of the head, may be read. Valid until the next call.
void node_resident_layer(const node_model *model, uint32_t layer);
void node_resident_head(const node_model *model, uint32_t row_begin, uint32_t row_end);
// Row r of the embedding or the head as floats, out[cols]: node_matrix_row for rows that lie
// scattered. Any thread may call it.
void node_resident_row(const node_model *model, const node_matrix *w, uint32_t row, float *out);
// Must the head be taken in chunks of at most use.head_rows?
bool node_resident_head_passes(const node_model *model);

#endif
