#include "common/file.h"

#include "common/fault.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { HUGE_PAGE = 2 << 20 };

static fl_status fail_errno(fl_err *err, const char *verb, const char *path) {
    const int e = errno;
    const fl_status st = e == ENOENT ? FL_ENOENT : FL_EIO;
    return FL_FAIL(err, st, "cannot %s %s: %s", verb, path, strerror(e));
}

static fl_status open_regular(const char *path, int *ret_fd, uint64_t *ret_size, fl_err *err) {
    const int fd = fl_fault() ? (errno = EIO, -1) : open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return fail_errno(err, "open", path);
    struct stat s;
    if (fl_fault() || fstat(fd, &s) != 0) {
        close(fd);
        return fail_errno(err, "look at", path);
    }
    if (!S_ISREG(s.st_mode)) {
        close(fd);
        return FL_FAIL(err, FL_EIO, "%s is not a regular file", path);
    }
    *ret_fd = fd;
    *ret_size = (uint64_t)s.st_size;
    return FL_OK;
}

fl_status fl_file_read(const char *path, size_t size_max, uint8_t **ret_data, size_t *ret_size,
                       fl_err *err) {
    int fd;
    uint64_t size;
    FL_TRY(open_regular(path, &fd, &size, err));
    fl_status st = FL_OK;
    uint8_t *data = NULL;
    if (size > size_max) {
        st = FL_FAIL(err, FL_ELIMIT, "%s has %llu bytes, more than %zu", path,
                     (unsigned long long)size, size_max);
        goto out;
    }
    data = fl_fault() ? NULL : malloc((size_t)size + 1);
    if (data == NULL) {
        st = FL_FAIL(err, FL_ENOMEM, "no memory to read %s", path);
        goto out;
    }
    size_t got = 0;
    while (got < size) {
        const ssize_t n = fl_fault() ? (errno = EIO, -1) : read(fd, data + got, (size_t)size - got);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) {
            st = fail_errno(err, "read", path);
            goto out;
        }
        if (n == 0) break; // it shrank while we read
        got += (size_t)n;
    }
    data[got] = 0;
    *ret_data = data;
    *ret_size = got;
    data = NULL;
out:
    free(data);
    close(fd);
    return st;
}

// At an address where a huge page of the file can be one of the memory: reading through small ones
// costs a fifth of the bandwidth. Where the system has none for files, nothing is lost.
static void *map_aligned(int fd, size_t size) {
    if (size < HUGE_PAGE) return mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0);
    const size_t room = size + HUGE_PAGE;
    uint8_t *all = mmap(NULL, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED) return mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0);
    const size_t before = (HUGE_PAGE - (uintptr_t)all % HUGE_PAGE) % HUGE_PAGE;
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), used = (size + page - 1) / page * page;
    void *p = mmap(all + before, size, PROT_READ, MAP_SHARED | MAP_FIXED, fd, 0);
    if (p == MAP_FAILED) {
        const int saved = errno;
        munmap(all, room);
        errno = saved;
        return p;
    }
    if (before > 0) munmap(all, before);
    munmap(all + before + used, room - before - used);
    (void)madvise(p, size, MADV_HUGEPAGE);
    return p;
}

fl_status fl_map_open(const char *path, fl_map *ret, fl_err *err) {
    int fd;
    uint64_t size;
    FL_TRY(open_regular(path, &fd, &size, err));
    fl_status st = FL_OK;
    if (size == 0) {
        st = FL_FAIL(err, FL_EFORMAT, "%s is empty", path);
        goto out;
    }
    if (size > SIZE_MAX / 2) {
        st = FL_FAIL(err, FL_ELIMIT, "%s is too large to map", path);
        goto out;
    }
    void *p = fl_fault() ? (errno = ENOMEM, MAP_FAILED) : map_aligned(fd, (size_t)size);
    if (p == MAP_FAILED) {
        st = fail_errno(err, "map", path);
        goto out;
    }
    *ret = (fl_map){{p, (size_t)size}, fd};
    fd = -1;
out:
    if (fd >= 0) close(fd);
    return st;
}

void fl_map_close(fl_map *map) {
    if (map->bytes.data != NULL) {
        munmap((void *)(uintptr_t)map->bytes.data, map->bytes.size);
        close(map->fd);
    }
    *map = (fl_map){0};
}

// Appended bytes go out by the huge page: that is how the page cache then holds them.
struct fl_file {
    int fd;
    uint64_t size; // with what is held back
    size_t held_size;
    char path[PATH_MAX];
    char temporary[PATH_MAX];
    uint8_t held[HUGE_PAGE]; // the file's last bytes, from a multiple of HUGE_PAGE on
};

fl_status fl_file_create(const char *path, fl_file **ret, fl_err *err) {
    fl_file *f = fl_fault() ? NULL : calloc(1, sizeof(*f));
    if (f == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory to write %s", path);
    const int a = snprintf(f->path, sizeof(f->path), "%s", path);
    const int b = snprintf(f->temporary, sizeof(f->temporary), "%s.XXXXXX", path);
    if (a < 0 || b < 0 || (size_t)b >= sizeof(f->temporary)) {
        free(f);
        return FL_FAIL(err, FL_EARG, "the path is too long");
    }
    f->fd = fl_fault() ? (errno = EIO, -1) : mkostemp(f->temporary, O_CLOEXEC);
    if (f->fd < 0) {
        const fl_status st = fail_errno(err, "create", path);
        free(f);
        return st;
    }
    *ret = f;
    return FL_OK;
}

static fl_status write_out(fl_file *f, uint64_t offset, fl_bytes bytes, fl_err *err) {
    size_t done = 0;
    while (done < bytes.size) {
        const ssize_t n = fl_fault() ? (errno = ENOSPC, -1)
                                     : pwrite(f->fd, bytes.data + done, bytes.size - done,
                                              (off_t)(offset + done));
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return fail_errno(err, "write", f->path);
        done += (size_t)n;
    }
    return FL_OK;
}

static fl_status write_held(fl_file *f, fl_err *err) {
    const fl_bytes held = {f->held, f->held_size};
    FL_TRY(write_out(f, f->size - f->held_size, held, err));
    f->held_size = 0;
    return FL_OK;
}

fl_status fl_file_write_at(fl_file *f, uint64_t offset, fl_bytes bytes, fl_err *err) {
    FL_TRY(write_held(f, err));
    FL_TRY(write_out(f, offset, bytes, err));
    if (offset + bytes.size > f->size) f->size = offset + bytes.size;
    return FL_OK;
}

fl_status fl_file_write(fl_file *f, fl_bytes bytes, fl_err *err) {
    while (bytes.size > 0) {
        if (f->held_size > 0 && f->size % HUGE_PAGE == 0) FL_TRY(write_held(f, err));
        const size_t room = HUGE_PAGE - (size_t)(f->size % HUGE_PAGE);
        const size_t n = bytes.size < room ? bytes.size : room;
        memcpy(f->held + f->held_size, bytes.data, n);
        f->held_size += n;
        f->size += n;
        bytes = (fl_bytes){bytes.data + n, bytes.size - n};
    }
    return FL_OK;
}

fl_status fl_folder_sync(const char *path, fl_err *err) {
    const int fd = fl_fault() ? (errno = EIO, -1) : open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return fail_errno(err, "open", path);
    const bool ok = !fl_fault() && fsync(fd) == 0;
    const fl_status st = ok ? FL_OK : fail_errno(err, "sync", path);
    close(fd);
    return st;
}

// A rename is durable only when the folder that holds the name is.
static fl_status sync_folder_of(const char *path, fl_err *err) {
    char folder[PATH_MAX];
    snprintf(folder, sizeof(folder), "%s", path);
    for (size_t n = strlen(folder); n > 1 && folder[n - 1] == '/';) folder[--n] = '\0';
    char *slash = strrchr(folder, '/');
    if (slash == NULL)
        snprintf(folder, sizeof(folder), ".");
    else
        slash[slash == folder ? 1 : 0] = '\0';
    return fl_folder_sync(folder, err);
}

fl_status fl_file_commit(fl_file **file, fl_err *err) {
    fl_file *f = *file;
    *file = NULL;
    fl_status st = write_held(f, err);
    if (st != FL_OK) goto out;
    if (fl_fault() || fsync(f->fd) != 0) {
        st = fail_errno(err, "sync", f->path);
        goto out;
    }
    if (fl_fault() || rename(f->temporary, f->path) != 0) {
        st = fail_errno(err, "rename", f->path);
        goto out;
    }
    f->temporary[0] = '\0'; // it has its name: nothing to remove
    st = sync_folder_of(f->path, err);
out:
    fl_file_discard(f);
    return st;
}

void fl_file_discard(fl_file *f) {
    if (f == NULL) return;
    close(f->fd);
    if (f->temporary[0] != '\0') unlink(f->temporary);
    free(f);
}

fl_status fl_file_replace(const char *path, fl_bytes bytes, fl_err *err) {
    fl_file *f = NULL;
    fl_status st = fl_file_create(path, &f, err);
    if (st != FL_OK) goto out;
    st = fl_file_write(f, bytes, err);
    if (st != FL_OK) goto out;
    st = fl_file_commit(&f, err);
out:
    fl_file_discard(f);
    return st;
}

fl_status fl_folder_make(const char *path, fl_err *err) {
    struct stat s;
    if (fl_fault()) return fail_errno(err, "create folder", path);
    if (mkdir(path, 0700) != 0 && (errno != EEXIST || stat(path, &s) != 0 || !S_ISDIR(s.st_mode)))
        return fail_errno(err, "create folder", path);
    return sync_folder_of(path, err); // also when it is there: its maker may not have come so far
}

bool fl_file_exists(const char *path) {
    return access(path, F_OK) == 0;
}
