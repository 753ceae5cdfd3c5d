#include "coordinator/store_disk.h"

#include "common/fault.h"
#include "common/file.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

struct coord_file {
    int fd;
};

static fl_status fail(fl_err *err, const char *verb, const char *path) {
    const int e = errno;
    const fl_status st = e == ENOENT ? FL_ENOENT : FL_EIO;
    return FL_FAIL(err, st, "cannot %s %s: %s", verb, path, strerror(e));
}

static bool faulty(int error) {
    if (!fl_fault()) return false;
    errno = error;
    return true;
}

static fl_status posix_open(coord_disk *d, const char *path, bool create, coord_file **ret,
                            fl_err *err) {
    (void)d;
    coord_file *f = fl_fault() ? NULL : malloc(sizeof(*f));
    if (f == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory to open %s", path);
    const int flags = create ? O_RDWR | O_CREAT : O_RDWR;
    f->fd = faulty(EIO) ? -1 : open(path, flags | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (f->fd < 0) {
        const fl_status st = fail(err, "open", path);
        free(f);
        return st;
    }
    *ret = f;
    return FL_OK;
}

static void posix_close(coord_disk *d, coord_file *f) {
    (void)d;
    if (f != NULL) close(f->fd);
    free(f);
}

static fl_status posix_read(coord_disk *d, coord_file *f, uint64_t offset, void *out, size_t size,
                            size_t *ret_got, fl_err *err) {
    (void)d;
    size_t done = 0;
    while (done < size) {
        const ssize_t n = faulty(EIO) ? -1
                                      : pread(f->fd, (uint8_t *)out + done, size - done,
                                              (off_t)(offset + done));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return fail(err, "read", "a file of the state");
        if (n == 0) break;
        done += (size_t)n;
    }
    *ret_got = done;
    return FL_OK;
}

static fl_status posix_write(coord_disk *d, coord_file *f, uint64_t offset, fl_bytes bytes,
                             fl_err *err) {
    (void)d;
    for (size_t done = 0; done < bytes.size;) {
        const ssize_t n = faulty(ENOSPC) ? -1
                                         : pwrite(f->fd, bytes.data + done, bytes.size - done,
                                                  (off_t)(offset + done));
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return fail(err, "write", "a file of the state");
        done += (size_t)n;
    }
    return FL_OK;
}

static fl_status posix_truncate(coord_disk *d, coord_file *f, uint64_t size, fl_err *err) {
    (void)d;
    if (!faulty(EIO) && ftruncate(f->fd, (off_t)size) == 0) return FL_OK;
    return fail(err, "cut", "a file of the state");
}

static fl_status posix_sync(coord_disk *d, coord_file *f, fl_err *err) {
    (void)d;
    if (!faulty(EIO) && fdatasync(f->fd) == 0) return FL_OK;
    return fail(err, "sync", "a file of the state");
}

static fl_status posix_size(coord_disk *d, coord_file *f, uint64_t *ret, fl_err *err) {
    (void)d;
    struct stat s;
    if (faulty(EIO) || fstat(f->fd, &s) != 0) return fail(err, "look at", "a file of the state");
    *ret = (uint64_t)s.st_size;
    return FL_OK;
}

static fl_status posix_rename(coord_disk *d, const char *from, const char *to, fl_err *err) {
    (void)d;
    return !faulty(EIO) && rename(from, to) == 0 ? FL_OK : fail(err, "rename", from);
}

static fl_status posix_unlink(coord_disk *d, const char *path, fl_err *err) {
    (void)d; // no fault: whoever removes something here goes on without
    return unlink(path) == 0 ? FL_OK : fail(err, "remove", path);
}

static bool posix_exists(coord_disk *d, const char *path) {
    (void)d;
    return fl_file_exists(path);
}

static fl_status posix_make_folder(coord_disk *d, const char *path, fl_err *err) {
    (void)d;
    return fl_folder_make(path, err);
}

static fl_status posix_sync_folder(coord_disk *d, const char *path, fl_err *err) {
    (void)d;
    const int fd = faulty(EIO) ? -1 : open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return fail(err, "open", path);
    const bool ok = !faulty(EIO) && fsync(fd) == 0;
    const fl_status st = ok ? FL_OK : fail(err, "sync", path);
    close(fd);
    return st;
}

static fl_status posix_list(coord_disk *d, const char *path, coord_disk_name_fn fn, void *ctx,
                            fl_err *err) {
    (void)d;
    DIR *dir = faulty(EIO) ? NULL : opendir(path);
    if (dir == NULL) return fail(err, "read", path);
    fl_status st = FL_OK;
    for (const struct dirent *e; st == FL_OK && (e = readdir(dir)) != NULL;) {
        if (e->d_name[0] != '.') st = fn(ctx, e->d_name, err);
    }
    closedir(dir);
    return st;
}

coord_disk *coord_disk_posix(void) {
    static const coord_disk_ops ops = {
        .open = posix_open,
        .close = posix_close,
        .read = posix_read,
        .write = posix_write,
        .truncate = posix_truncate,
        .sync = posix_sync,
        .size = posix_size,
        .rename = posix_rename,
        .unlink = posix_unlink,
        .exists = posix_exists,
        .make_folder = posix_make_folder,
        .sync_folder = posix_sync_folder,
        .list = posix_list,
    };
    static coord_disk disk = {.ops = &ops, .system = true};
    return &disk;
}

// ---- of any disk

fl_status coord_disk_sync_parent(coord_disk *d, const char *path, fl_err *err) {
    char folder[PATH_MAX];
    const char *slash = strrchr(path, '/');
    const int length = slash == NULL ? 0 : (int)(slash - path);
    const int n = snprintf(folder, sizeof(folder), "%.*s", length, path);
    if (n < 0 || (size_t)n >= sizeof(folder)) return FL_FAIL(err, FL_EARG, "the path is too long");
    return d->ops->sync_folder(d, slash == NULL ? "." : n == 0 ? "/" : folder, err);
}

fl_status coord_disk_replace(coord_disk *d, const char *path, fl_bytes bytes, fl_err *err) {
    char beside[PATH_MAX];
    coord_file *f = NULL;
    const int n = snprintf(beside, sizeof(beside), "%s.new", path);
    if (n < 0 || (size_t)n >= sizeof(beside)) return FL_FAIL(err, FL_EARG, "the path is too long");
    FL_TRY(d->ops->open(d, beside, true, &f, err));
    fl_status st = d->ops->truncate(d, f, 0, err); // one of a start that was cut short
    if (st == FL_OK) st = d->ops->write(d, f, 0, bytes, err);
    if (st == FL_OK) st = d->ops->sync(d, f, err);
    d->ops->close(d, f);
    if (st == FL_OK) st = d->ops->rename(d, beside, path, err);
    if (st != FL_OK) {
        (void)d->ops->unlink(d, beside, NULL); // swept at the next start if this fails as well
        return st;
    }
    return coord_disk_sync_parent(d, path, err);
}

fl_status coord_disk_read_all(coord_disk *d, const char *path, size_t size_max, uint8_t **ret_data,
                              size_t *ret_size, fl_err *err) {
    coord_file *f = NULL;
    uint8_t *data = NULL;
    uint64_t size = 0;
    FL_TRY(d->ops->open(d, path, false, &f, err));
    fl_status st = d->ops->size(d, f, &size, err);
    if (st == FL_OK && size > size_max)
        st = FL_FAIL(err, FL_ELIMIT, "%s has %llu bytes, more than %zu", path,
                     (unsigned long long)size, size_max);
    if (st == FL_OK) {
        data = fl_fault() ? NULL : malloc((size_t)size + 1);
        st = data == NULL ? FL_FAIL(err, FL_ENOMEM, "no memory to read %s", path)
                          : d->ops->read(d, f, 0, data, (size_t)size, ret_size, err);
    }
    d->ops->close(d, f);
    if (st == FL_OK)
        *ret_data = data;
    else
        free(data);
    return st;
}
