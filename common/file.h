// file.h: files that are whole or not there: read at once, map read-only, replace atomically.
#ifndef FL_COMMON_FILE_H
#define FL_COMMON_FILE_H

#include "common/status.h"

// Whole file into memory the caller frees with free(). A terminating zero follows ret->data[size].
// FL_ENOENT, FL_EIO, FL_ELIMIT when larger than size_max.
fl_status fl_file_read(const char *path, size_t size_max, uint8_t **ret_data, size_t *ret_size,
                       fl_err *err) FL_NODISCARD;

// A read-only mapping, shared between processes by the page cache.
typedef struct fl_map {
    fl_bytes bytes;
    int fd; // of the file, while it is mapped: for reads that should not map its pages
} fl_map;
fl_status fl_map_open(const char *path, fl_map *ret, fl_err *err) FL_NODISCARD;
void fl_map_close(fl_map *map); // an empty map is fine

// A file being written beside its final name; it appears under that name only on commit.
typedef struct fl_file fl_file;
fl_status fl_file_create(const char *path, fl_file **ret, fl_err *err) FL_NODISCARD;
fl_status fl_file_write(fl_file *file, fl_bytes bytes, fl_err *err) FL_NODISCARD;
// Overwrites bytes written earlier (a header whose content is known only at the end).
fl_status fl_file_write_at(fl_file *file, uint64_t offset, fl_bytes bytes,
                           fl_err *err) FL_NODISCARD;
// fsync, rename, fsync of the folder. Takes the file: *file is NULL afterwards, whatever happened.
fl_status fl_file_commit(fl_file **file, fl_err *err) FL_NODISCARD;
void fl_file_discard(fl_file *file); // removes what was written; NULL is fine

// Replaces `path` by these bytes, all or nothing.
fl_status fl_file_replace(const char *path, fl_bytes bytes, fl_err *err) FL_NODISCARD;
// Creates a folder (mode 0700) if it is not there, and makes its name durable; parents must exist.
fl_status fl_folder_make(const char *path, fl_err *err) FL_NODISCARD;
// Makes the names in a folder durable.
fl_status fl_folder_sync(const char *path, fl_err *err) FL_NODISCARD;
bool fl_file_exists(const char *path);

#endif
