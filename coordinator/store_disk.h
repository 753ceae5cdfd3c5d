// store_disk.h: what the store needs of a disk, as a table, so that a simulator can lose, tear and
// reorder what was not synced. The daemon runs on coord_disk_posix(); SQLite then uses its own
// file layer. Any other disk is put under SQLite by store_vfs.c.
//
// What a disk promises: a file's bytes are durable after sync, its name after sync_folder of the
// folder that it lies in. A crash before that may leave the old bytes, the new ones, or some of
// each; the old name, the new one, or both.
// Errors of every function: FL_EIO, FL_ENOMEM, FL_ENOENT (no such file or folder).
#ifndef COORD_STORE_DISK_H
#define COORD_STORE_DISK_H

#include "common/status.h"

typedef struct coord_disk coord_disk;
typedef struct coord_file coord_file; // one open file; its body is the disk's own affair

typedef fl_status (*coord_disk_name_fn)(void *ctx, const char *name, fl_err *err);

typedef struct coord_disk_ops {
    // create: an empty file, mode 0600, if there is none.
    fl_status (*open)(coord_disk *d, const char *path, bool create, coord_file **ret, fl_err *err);
    void (*close)(coord_disk *d, coord_file *f); // NULL is fine
    // *ret_got < size only at the end of the file.
    fl_status (*read)(coord_disk *d, coord_file *f, uint64_t offset, void *out, size_t size,
                      size_t *ret_got, fl_err *err);
    fl_status (*write)(coord_disk *d, coord_file *f, uint64_t offset, fl_bytes bytes, fl_err *err);
    fl_status (*truncate)(coord_disk *d, coord_file *f, uint64_t size, fl_err *err);
    fl_status (*sync)(coord_disk *d, coord_file *f, fl_err *err);
    fl_status (*size)(coord_disk *d, coord_file *f, uint64_t *ret, fl_err *err);
    fl_status (*rename)(coord_disk *d, const char *from, const char *to, fl_err *err);
    fl_status (*unlink)(coord_disk *d, const char *path, fl_err *err);
    bool (*exists)(coord_disk *d, const char *path);
    fl_status (*make_folder)(coord_disk *d, const char *path, fl_err *err); // there already: fine
    fl_status (*sync_folder)(coord_disk *d, const char *path, fl_err *err);
    // Names in a folder, none that begins with a dot; fn may unlink the file it is told.
    fl_status (*list)(coord_disk *d, const char *path, coord_disk_name_fn fn, void *ctx,
                      fl_err *err);
} coord_disk_ops;

struct coord_disk {
    const coord_disk_ops *ops;
    bool system; // the operating system's: SQLite may go to the files itself
    // Any other: random bytes and milliseconds since 1970 for SQLite, from the simulation's seed.
    void (*random)(coord_disk *d, void *out, size_t size);
    int64_t (*wall_ms)(coord_disk *d);
};

coord_disk *coord_disk_posix(void); // shared, has no state

// The file `path` gets these bytes, all or nothing: written beside, synced, renamed, folder synced.
fl_status coord_disk_replace(coord_disk *d, const char *path, fl_bytes bytes,
                             fl_err *err) FL_NODISCARD;
// Whole file, free() it. FL_ELIMIT when larger than size_max.
fl_status coord_disk_read_all(coord_disk *d, const char *path, size_t size_max, uint8_t **ret_data,
                              size_t *ret_size, fl_err *err) FL_NODISCARD;
// Syncs the folder in which `path` lies.
fl_status coord_disk_sync_parent(coord_disk *d, const char *path, fl_err *err) FL_NODISCARD;

#endif
