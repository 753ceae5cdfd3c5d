// disk.h: what the library between a program and its disk (disk.c) and the tests agree on.
//
// Preloaded into a program, the library looks at every call that changes a file below one folder.
// It can count them, end the program at any of them, make any of them fail, and write down all that
// happened, so that a disk can be made that lost power at any moment.
#ifndef TESTS_DURABILITY_DISK_H
#define TESTS_DURABILITY_DISK_H

#include <stdint.h>

#define DISK_ROOT  "FLEETUNE_DISK_ROOT"  // the folder; without it the library does nothing
#define DISK_PLAN  "FLEETUNE_DISK_PLAN"  // "ACTION:K" or "ACTION/KIND:K": the K-th call, from 1
#define DISK_COUNT "FLEETUNE_DISK_COUNT" // a file of uint64_t[DISK_OPS + 1]: calls by kind, all
#define DISK_LOG   "FLEETUNE_DISK_LOG"   // a file that records are appended to

#define DISK_OP_LIST(X)                                                                            \
    X(CREATE, "create")     /* a new name, also by mkostemp */                                     \
    X(WRITE, "write")       /* write, pwrite */                                                    \
    X(TRUNCATE, "truncate") /* ftruncate, O_TRUNC */                                               \
    X(SYNC, "sync")         /* fsync, fdatasync, of a file or a folder */                          \
    X(RENAME, "rename")                                                                            \
    X(UNLINK, "unlink")                                                                            \
    X(FOLDER, "mkdir")                                                                             \
    X(LINK, "link")                                                                                \
    X(ACK, "acknowledged")  /* only in the log: the client was told */
typedef enum disk_op {
#define X(name, text) DISK_##name,
    DISK_OP_LIST(X) DISK_OPS
#undef X
} disk_op;

// What happens at the K-th call.
#define DISK_ACTION_LIST(X)                                                                        \
    X(KILL, "kill")   /* SIGKILL before it */                                                      \
    X(TORN, "torn")   /* a write does its first half, everything else its work; then SIGKILL */    \
    X(FULL, "full")   /* it and all later calls that take space fail with ENOSPC */                \
    X(EIO, "eio")     /* it fails with EIO, once; the bytes of a failed sync are lost */           \
    X(SHORT, "short") /* a write does its first half and says so; a sync fails with EINTR */
typedef enum disk_action {
#define X(name, text) DISK_DO_##name,
    DISK_ACTION_LIST(X) DISK_ACTIONS
#undef X
} disk_action;

// A record of the log; path, to (of a rename or link) and data follow it.
typedef struct disk_record {
    uint32_t op, failed;
    uint64_t file;   // inode
    uint64_t offset; // of a write; size of a truncation; number of an acknowledgement
    uint32_t path_size, to_size, data_size;
    uint32_t unused;
} disk_record;

#endif
