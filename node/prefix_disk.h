// prefix_disk.h: the prefix cache's store on disk (node/tune/prefix.h): one file, sealed, nameless.
//
// Hidden states tell what the text says, so nothing of them is written as it is: each entry is
// sealed with XChaCha20-Poly1305 under a random key that exists only in locked memory of this
// process, with its place as associated data and a nonce that is never used twice. The file is
// unlinked as soon as it is open: whatever ends the process, its space is free again, and what was
// on the medium is noise without a key. An entry that is altered, moved, old or cut short does not
// unseal, which is a miss.
//
// Places: as many as fit; the file grows only when an entry is kept. A write that fails (a full
// disk, a limit) leaves that entry out. Bytes that reached the file are counted: flash wears.
#ifndef NODE_PREFIX_DISK_H
#define NODE_PREFIX_DISK_H

#include "node/tune/prefix.h"

typedef struct node_prefix_disk node_prefix_disk;

// A file in `folder` for entries at shape->store_places places. FL_EIO when the folder cannot be
// written: the caller asked for it by name.
fl_status node_prefix_disk_open(const char *folder, const node_prefix_shape *shape,
                                node_prefix_disk **ret, fl_err *err) FL_NODISCARD;
void node_prefix_disk_close(node_prefix_disk *disk); // NULL is fine

node_prefix_store node_prefix_disk_store(node_prefix_disk *disk); // of NULL: a store of no places
uint64_t node_prefix_disk_written(const node_prefix_disk *disk);  // bytes; of NULL: 0

// A cache of a plan's shape with all that it holds. Must not move while a tuner uses it.
typedef struct node_prefix_home {
    node_prefix prefix;
    node_prefix_disk *disk; // NULL: only memory
    void *block;
} node_prefix_home;

// folder: only looked at when the shape has places in a store.
fl_status node_prefix_home_open(const node_prefix_shape *shape, const char *folder,
                                node_prefix_home *ret, fl_err *err) FL_NODISCARD;
void node_prefix_home_close(node_prefix_home *home); // a zeroed one is fine

#endif
