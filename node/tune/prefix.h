// prefix.h: hidden states that come again. While nothing below a window changes, the state that
// enters it is the same whenever the same micro-batch comes, so it is kept instead of being
// computed again: at SmolLM2's depth that saves 23 of 30 layers of the forward pass.
//
//   Entry    one micro-batch: fp16[tokens][hidden], and of each token an int16 power of two. A row
//            whose largest magnitude is below 2^15 has power 0 and is plain fp16; a larger one is
//            divided by 2^power first, so that no finite row ever becomes infinite.
//   Bits     the tuner passes every state through this form, whether it is kept or not, found or
//            not: a run has the same bits with a cache of any size, in memory, on disk, or without.
//   Key      128 bits over everything that the state depends on: model, compression policy, first
//            layer of the window, rank, scale and A's seed, every B below the window, and the
//            tokens with their positions and what each may see. When any of the first changes, all
//            entries are dropped. The digest finds changes, not forgers: both sides of it are ours.
//   Places   in memory, then in the store; who comes first stays. When all are taken nothing gives
//   way:
//            in an epoch every micro-batch comes once, so a state that is found again was kept over
//            an epoch's end, and no rule finds more than there are places then. The usual rule,
//            out with what was used longest ago, throws out what comes next and finds next to
//            nothing. Nor is anything written twice: a flash card wears.
//   Store    given by the program, which owns files and keys. An entry that the store does not
//            give back whole is a miss, and is offered to it again; one that it could not keep is
//            forgotten, and nothing more is offered to it until entries are dropped.
//   Errors   none: the worst that happens is that a state is computed again.   Threads  one.
#ifndef NODE_TUNE_PREFIX_H
#define NODE_TUNE_PREFIX_H

#include "node/tune/adapter.h"
#include "node/tune/data.h"

enum { NODE_PREFIX_ROOM = 16 }; // bytes behind an entry that a store may use, for its tag

typedef struct node_prefix_store {
    void *self;
    uint32_t places; // it takes entries at 0 .. places - 1; 0: there is no store
    // Both may change entry[0 .. size + NODE_PREFIX_ROOM). false: not kept; lost or altered.
    bool (*put)(void *self, uint32_t place, uint8_t *entry, size_t size);
    bool (*get)(void *self, uint32_t place, uint8_t *entry, size_t size);
} node_prefix_store;

typedef struct node_prefix_key {
    uint64_t half[2];
} node_prefix_key;

typedef struct node_prefix_shape {
    uint32_t batches;      // different micro-batches
    uint32_t places;       // of them kept in memory
    uint32_t store_places; // and in a store
    size_t entry_size;
} node_prefix_shape;

typedef struct node_prefix {
    node_prefix_shape shape;
    node_prefix_store store;
    node_prefix_key base;
    uint32_t *place_of;   // [batches] 1 + the place of each micro-batch; 0: it has none
    node_prefix_key *key; // [places + store_places] zero: nothing is there
    uint8_t *memory;      // [places][entry_size]
    uint32_t taken;       // places given to a micro-batch
    uint64_t hits, misses;
    bool store_full;
} node_prefix;

size_t node_prefix_entry_size(uint32_t tokens, uint32_t hidden);
// Bytes that bind takes from an arena.
size_t node_prefix_size(const node_prefix_shape *shape);
// Sets shape->places: as many as `bytes` hold, at most one a micro-batch.
void node_prefix_fit(node_prefix_shape *shape, uint64_t bytes);

bool node_prefix_same_shape(const node_prefix_shape *x, const node_prefix_shape *y);

// `store` has at least shape->store_places; it may be NULL when those are 0.
void node_prefix_bind(node_prefix *prefix, const node_prefix_shape *shape,
                      const node_prefix_store *store, fl_arena *arena);

// What all entries rest on.
node_prefix_key node_prefix_base(const node_model *model, const node_adapter *adapter,
                                 uint32_t first);
// Drops all entries unless they rest on this.
void node_prefix_begin(node_prefix *prefix, node_prefix_key base);
node_prefix_key node_prefix_key_of(node_prefix_key base, const node_micro *micro);

// entry[entry_size + NODE_PREFIX_ROOM]. get: false when it is not there, and then entry holds
// nothing of use. put: after a get that was false; it may leave anything in entry.
bool node_prefix_get(node_prefix *prefix, uint32_t index, node_prefix_key key, uint8_t *entry);
void node_prefix_put(node_prefix *prefix, uint32_t index, node_prefix_key key, uint8_t *entry);

// x[tokens][hidden] to an entry and back. Decoding gives the rounded x; encoding that again may
// round once more, so it is not done.
void node_prefix_encode(uint32_t tokens, uint32_t hidden, const float *x, uint8_t *entry);
void node_prefix_decode(uint32_t tokens, uint32_t hidden, const uint8_t *entry, float *x);

#endif
