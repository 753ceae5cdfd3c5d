// SQLite on any coord_disk, so that a simulated disk is under the database as well. The daemon does
// not come here: on the system's disk SQLite uses its own file layer. One connection a database:
// the store asks for locking_mode=EXCLUSIVE, so the index of the log is in memory and the locks
// below have nobody to keep out.
// Source: sqlite.org/vfs.html, and os_unix.c for what a file layer must sync when.
#include "coordinator/store_sql.h"

#include <sqlite3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SECTOR = 4096, PATH_BYTES = 4096 };

typedef struct vfs_file {
    sqlite3_file base;
    coord_disk *disk;
    coord_file *file;
    bool name_dirty; // its name may not be durable yet
    char path[PATH_BYTES];
} vfs_file;

static int on_close(sqlite3_file *f) {
    vfs_file *v = (vfs_file *)f;
    v->disk->ops->close(v->disk, v->file);
    return SQLITE_OK;
}

static int on_read(sqlite3_file *f, void *out, int size, sqlite3_int64 offset) {
    vfs_file *v = (vfs_file *)f;
    size_t got = 0;
    if (v->disk->ops->read(v->disk, v->file, (uint64_t)offset, out, (size_t)size, &got, NULL) !=
        FL_OK)
        return SQLITE_IOERR_READ;
    if (got == (size_t)size) return SQLITE_OK;
    memset((uint8_t *)out + got, 0, (size_t)size - got);
    return SQLITE_IOERR_SHORT_READ;
}

static int on_write(sqlite3_file *f, const void *data, int size, sqlite3_int64 offset) {
    vfs_file *v = (vfs_file *)f;
    const fl_status st = v->disk->ops->write(v->disk, v->file, (uint64_t)offset,
                                             (fl_bytes){data, (size_t)size}, NULL);
    return st == FL_OK ? SQLITE_OK : SQLITE_IOERR_WRITE;
}

static int on_truncate(sqlite3_file *f, sqlite3_int64 size) {
    vfs_file *v = (vfs_file *)f;
    const fl_status st = v->disk->ops->truncate(v->disk, v->file, (uint64_t)size, NULL);
    return st == FL_OK ? SQLITE_OK : SQLITE_IOERR_TRUNCATE;
}

static int on_sync(sqlite3_file *f, int flags) {
    vfs_file *v = (vfs_file *)f;
    (void)flags;
    if (v->disk->ops->sync(v->disk, v->file, NULL) != FL_OK) return SQLITE_IOERR_FSYNC;
    if (v->name_dirty && coord_disk_sync_parent(v->disk, v->path, NULL) != FL_OK)
        return SQLITE_IOERR_DIR_FSYNC;
    v->name_dirty = false;
    return SQLITE_OK;
}

static int on_size(sqlite3_file *f, sqlite3_int64 *ret) {
    vfs_file *v = (vfs_file *)f;
    uint64_t size = 0;
    if (v->disk->ops->size(v->disk, v->file, &size, NULL) != FL_OK) return SQLITE_IOERR_FSTAT;
    *ret = (sqlite3_int64)size;
    return SQLITE_OK;
}

static int on_lock(sqlite3_file *f, int level) {
    (void)f, (void)level;
    return SQLITE_OK;
}

static int on_check_lock(sqlite3_file *f, int *ret) {
    (void)f;
    *ret = 0;
    return SQLITE_OK;
}

static int on_control(sqlite3_file *f, int op, void *arg) {
    (void)f, (void)op, (void)arg;
    return SQLITE_NOTFOUND;
}

static int on_sector(sqlite3_file *f) {
    (void)f;
    return SECTOR;
}

static int on_traits(sqlite3_file *f) {
    (void)f;
    return SQLITE_IOCAP_POWERSAFE_OVERWRITE; // as os_unix.c says of every disk
}

static int vfs_open(sqlite3_vfs *vfs, sqlite3_filename name, sqlite3_file *f, int flags,
                    int *ret_flags) {
    static const sqlite3_io_methods methods = {
        .iVersion = 1,
        .xClose = on_close,
        .xRead = on_read,
        .xWrite = on_write,
        .xTruncate = on_truncate,
        .xSync = on_sync,
        .xFileSize = on_size,
        .xLock = on_lock,
        .xUnlock = on_lock,
        .xCheckReservedLock = on_check_lock,
        .xFileControl = on_control,
        .xSectorSize = on_sector,
        .xDeviceCharacteristics = on_traits,
    };
    vfs_file *v = (vfs_file *)f;
    v->base.pMethods = NULL;
    if (name == NULL) return SQLITE_CANTOPEN; // temporary files are in memory
    v->disk = vfs->pAppData;
    const bool create = (flags & SQLITE_OPEN_CREATE) != 0;
    v->name_dirty = create; // also when it is there: whoever made it may not have come so far
    snprintf(v->path, sizeof(v->path), "%s", name);
    if (v->disk->ops->open(v->disk, name, create, &v->file, NULL) != FL_OK) return SQLITE_CANTOPEN;
    v->base.pMethods = &methods;
    if (ret_flags != NULL) *ret_flags = flags;
    return SQLITE_OK;
}

static int vfs_delete(sqlite3_vfs *vfs, const char *path, int sync) {
    coord_disk *d = vfs->pAppData;
    const fl_status st = d->ops->unlink(d, path, NULL);
    if (st == FL_ENOENT) return SQLITE_IOERR_DELETE_NOENT;
    if (st != FL_OK) return SQLITE_IOERR_DELETE;
    return sync == 0 || coord_disk_sync_parent(d, path, NULL) == FL_OK ? SQLITE_OK
                                                                       : SQLITE_IOERR_DIR_FSYNC;
}

static int vfs_access(sqlite3_vfs *vfs, const char *path, int flags, int *ret) {
    coord_disk *d = vfs->pAppData;
    (void)flags;
    *ret = d->ops->exists(d, path);
    return SQLITE_OK;
}

static int vfs_full_path(sqlite3_vfs *vfs, const char *path, int size, char *out) {
    (void)vfs;
    snprintf(out, (size_t)size, "%s", path);
    return SQLITE_OK;
}

static int vfs_random(sqlite3_vfs *vfs, int size, char *out) {
    coord_disk *d = vfs->pAppData;
    d->random(d, out, (size_t)size);
    return size;
}

static int vfs_sleep(sqlite3_vfs *vfs, int microseconds) {
    (void)vfs;
    return microseconds;
}

static int vfs_now(sqlite3_vfs *vfs, sqlite3_int64 *ret) {
    static const sqlite3_int64 epoch = 210866760000000; // 1970 in milliseconds of Julian days
    coord_disk *d = vfs->pAppData;
    *ret = epoch + d->wall_ms(d);
    return SQLITE_OK;
}

static int vfs_now_days(sqlite3_vfs *vfs, double *ret) {
    sqlite3_int64 ms;
    vfs_now(vfs, &ms);
    *ret = (double)ms / 86400000.0;
    return SQLITE_OK;
}

static int vfs_error(sqlite3_vfs *vfs, int size, char *out) {
    (void)vfs, (void)size, (void)out;
    return 0;
}

struct coord_vfs {
    sqlite3_vfs vfs;
    char name[32];
};

fl_status coord_vfs_open(coord_disk *disk, coord_vfs **ret, fl_err *err) {
    coord_vfs *v = calloc(1, sizeof(*v));
    if (v == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory for the state");
    snprintf(v->name, sizeof(v->name), "fl-%p", (void *)v);
    v->vfs = (sqlite3_vfs){
        .iVersion = 2,
        .szOsFile = sizeof(vfs_file),
        .mxPathname = PATH_BYTES - 1,
        .zName = v->name,
        .pAppData = disk,
        .xOpen = vfs_open,
        .xDelete = vfs_delete,
        .xAccess = vfs_access,
        .xFullPathname = vfs_full_path,
        .xRandomness = vfs_random,
        .xSleep = vfs_sleep,
        .xCurrentTime = vfs_now_days,
        .xGetLastError = vfs_error,
        .xCurrentTimeInt64 = vfs_now,
    };
    if (sqlite3_vfs_register(&v->vfs, 0) != SQLITE_OK) {
        free(v);
        return FL_FAIL(err, FL_ENOMEM, "no memory for the state");
    }
    *ret = v;
    return FL_OK;
}

const char *coord_vfs_name(const coord_vfs *v) {
    return v == NULL ? NULL : v->name;
}

void coord_vfs_close(coord_vfs *v) {
    if (v == NULL) return;
    sqlite3_vfs_unregister(&v->vfs);
    free(v);
}
