// The library that is preloaded: see disk.h. Calls go to the kernel directly; nothing allocates.
#include "tests/durability/disk.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static const char *root;
static size_t root_size;
static int log_fd = -1;
static uint64_t *counts; // shared with the test
static uint64_t own_counts[DISK_OPS + 1];
static disk_action action;
static uint64_t when;               // 0: never
static unsigned of_op = DISK_OPS; // which calls are counted for it; DISK_OPS: all

static int sys_open(const char *path, int flags, mode_t mode) {
    return (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}

static void read_plan(const char *plan) {
    static const char *const names[] = {
#define X(name, text) text,
        DISK_ACTION_LIST(X)
#undef X
    };
    static const char *const ops[] = {
#define X(name, text) text,
        DISK_OP_LIST(X)
#undef X
    };
    char word[16] = "", op[16] = "";
    if (sscanf(plan, "%15[a-z]/%15[a-z]", word, op) < 1) return;
    const char *colon = strchr(plan, ':');
    for (unsigned i = 0; i < DISK_ACTIONS && colon != NULL; i++) {
        if (strcmp(word, names[i]) != 0) continue;
        action = (disk_action)i;
        when = strtoull(colon + 1, NULL, 10);
    }
    for (unsigned i = 0; i < DISK_OPS; i++)
        if (strcmp(op, ops[i]) == 0) of_op = i;
}

__attribute__((constructor)) static void begin(void) {
    const char *text = getenv(DISK_COUNT);
    counts = own_counts;
    if (text != NULL) {
        const int fd = sys_open(text, O_RDWR | O_CLOEXEC, 0);
        void *p = mmap(NULL, sizeof(own_counts), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (p != MAP_FAILED) counts = p;
        close(fd);
    }
    text = getenv(DISK_PLAN);
    if (text != NULL) read_plan(text);
    text = getenv(DISK_LOG);
    if (text != NULL) log_fd = sys_open(text, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    root = getenv(DISK_ROOT);
    root_size = root == NULL ? 0 : strlen(root);
}

static bool ours(const char *path) {
    return root_size > 0 && path != NULL && strncmp(path, root, root_size) == 0;
}

// The path of a descriptor, when it is below the folder.
static bool ours_fd(int fd, char path[PATH_MAX]) {
    char link[64];
    if (root_size == 0) return false;
    snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
    const ssize_t n = readlink(link, path, PATH_MAX - 1);
    if (n <= 0) return false;
    path[n] = '\0';
    return ours(path);
}

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

static bool takes_space(disk_op op) {
    return op != DISK_SYNC && op != DISK_UNLINK;
}

// What is to become of this call: 0 it goes on, 1 half of it and the end, 2 half of it; or the
// program ends here, or errno is set and it is -1.
static int decide(disk_op op) {
    const uint64_t in_kind = __atomic_add_fetch(&counts[op], 1, __ATOMIC_SEQ_CST);
    const uint64_t in_all = __atomic_add_fetch(&counts[DISK_OPS], 1, __ATOMIC_SEQ_CST);
    const uint64_t now = of_op == DISK_OPS ? in_all : of_op == op ? in_kind : 0;
    if (when == 0 || now < when || (now > when && action != DISK_DO_FULL)) return 0;
    switch (action) {
    case DISK_DO_KILL:
        die();
        return 0;
    case DISK_DO_TORN:
        return 1;
    case DISK_DO_FULL:
        if (!takes_space(op)) return 0;
        errno = ENOSPC;
        return -1;
    case DISK_DO_EIO:
        errno = EIO;
        return -1;
    default:
        if (op == DISK_WRITE) return 2;
        if (op != DISK_SYNC) return 0;
        errno = EINTR;
        return -1;
    }
}

static void record(disk_op op, bool failed, int fd, uint64_t offset, const char *path,
                   const char *to, const void *data, size_t size) {
    struct stat s = {0};
    const int saved = errno;
    if (log_fd < 0) return;
    if (fd >= 0)
        fstat(fd, &s);
    else if (op != DISK_UNLINK)
        lstat(to != NULL ? to : path, &s);
    const disk_record r = {.op = op,
                           .failed = failed,
                           .file = s.st_ino,
                           .offset = offset,
                           .path_size = (uint32_t)strlen(path),
                           .to_size = to == NULL ? 0 : (uint32_t)strlen(to),
                           .data_size = (uint32_t)size};
    struct iovec parts[] = {{(void *)(uintptr_t)&r, sizeof(r)},
                            {(void *)(uintptr_t)path, r.path_size},
                            {(void *)(uintptr_t)to, r.to_size},
                            {(void *)(uintptr_t)data, size}};
    (void)!writev(log_fd, parts, 4);
    errno = saved;
}

// ---- calls with a name

static int open_one(int folder, const char *path, int flags, mode_t mode) {
    const bool mine = folder == AT_FDCWD && ours(path) && (flags & (O_CREAT | O_TRUNC)) != 0;
    const bool is_new = mine && (flags & O_CREAT) != 0 && access(path, F_OK) != 0;
    const bool cuts = mine && !is_new && (flags & O_TRUNC) != 0;
    const disk_op op = is_new ? DISK_CREATE : DISK_TRUNCATE;
    int fate = 0;
    if (is_new || cuts) fate = decide(op);
    if (fate < 0) return -1;
    const int fd = (int)syscall(SYS_openat, folder, path, flags, mode);
    if (fd >= 0 && (is_new || cuts)) record(op, false, fd, 0, path, NULL, NULL, 0);
    if (fate == 1) die();
    return fd;
}

#define OPEN(name)                                                                                 \
    int name(const char *path, int flags, ...) {                                                   \
        va_list ap;                                                                                \
        va_start(ap, flags);                                                                       \
        const mode_t mode = (flags & (O_CREAT | O_TMPFILE)) != 0 ? va_arg(ap, mode_t) : 0;         \
        va_end(ap);                                                                                \
        return open_one(AT_FDCWD, path, flags, mode);                                              \
    }
#define OPEN_AT(name)                                                                              \
    int name(int folder, const char *path, int flags, ...) {                                       \
        va_list ap;                                                                                \
        va_start(ap, flags);                                                                       \
        const mode_t mode = (flags & (O_CREAT | O_TMPFILE)) != 0 ? va_arg(ap, mode_t) : 0;         \
        va_end(ap);                                                                                \
        return open_one(folder, path, flags, mode);                                                \
    }
OPEN(open)
OPEN(open64)
OPEN_AT(openat)
OPEN_AT(openat64)

static int temporary(const char *name, char *path, int flags) {
    int (*real)(char *, int);
    *(void **)&real = dlsym(RTLD_NEXT, name);
    if (!ours(path)) return real(path, flags);
    const int fate = decide(DISK_CREATE);
    if (fate < 0) return -1;
    const int fd = real(path, flags);
    if (fd >= 0) record(DISK_CREATE, false, fd, 0, path, NULL, NULL, 0);
    if (fate == 1) die();
    return fd;
}

int mkostemp(char *path, int flags) {
    return temporary("mkostemp", path, flags);
}

int mkostemp64(char *path, int flags) {
    return temporary("mkostemp64", path, flags);
}

int rename(const char *from, const char *to) {
    int fate = 0;
    if (ours(to)) fate = decide(DISK_RENAME);
    if (fate < 0) return -1;
    const int got = (int)syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
    if (got == 0 && ours(to)) record(DISK_RENAME, false, -1, 0, from, to, NULL, 0);
    if (fate == 1) die();
    return got;
}

int link(const char *from, const char *to) {
    int fate = 0;
    if (ours(to)) fate = decide(DISK_LINK);
    if (fate < 0) return -1;
    const int got = (int)syscall(SYS_linkat, AT_FDCWD, from, AT_FDCWD, to, 0);
    if (got == 0 && ours(to)) record(DISK_LINK, false, -1, 0, from, to, NULL, 0);
    if (fate == 1) die();
    return got;
}

int mkdir(const char *path, mode_t mode) {
    int fate = 0;
    if (ours(path)) fate = decide(DISK_FOLDER);
    if (fate < 0) return -1;
    const int got = (int)syscall(SYS_mkdirat, AT_FDCWD, path, mode);
    if (got == 0 && ours(path)) record(DISK_FOLDER, false, -1, 0, path, NULL, NULL, 0);
    if (fate == 1) die();
    return got;
}

int unlinkat(int folder, const char *name, int flags) {
    char path[PATH_MAX];
    bool mine;
    if (folder == AT_FDCWD || name[0] == '/') {
        mine = ours(name);
        snprintf(path, sizeof(path), "%s", name);
    } else {
        mine = ours_fd(folder, path);
        const size_t n = mine ? strlen(path) : 0;
        if (mine) snprintf(path + n, sizeof(path) - n, "/%s", name);
    }
    int fate = 0;
    if (mine && faccessat(folder, name, F_OK, AT_SYMLINK_NOFOLLOW) == 0)
        fate = decide(DISK_UNLINK);
    if (fate < 0) return -1;
    const int got = (int)syscall(SYS_unlinkat, folder, name, flags);
    if (got == 0 && mine) record(DISK_UNLINK, false, -1, 0, path, NULL, NULL, 0);
    if (fate == 1) die();
    return got;
}

int unlink(const char *path) {
    return unlinkat(AT_FDCWD, path, 0);
}

// ---- calls with a descriptor

// position < 0: at the descriptor's own.
static ssize_t write_one(int fd, const void *data, size_t size, off_t position) {
    char path[PATH_MAX];
    const bool mine = ours_fd(fd, path);
    int fate = 0;
    if (mine) fate = decide(DISK_WRITE);
    if (fate < 0) return -1;
    if (fate > 0) size = size > 1 ? size / 2 : size;
    const off_t at = position >= 0 || !mine ? position : lseek(fd, 0, SEEK_CUR);
    const ssize_t n = position >= 0 ? syscall(SYS_pwrite64, fd, data, size, position)
                                    : syscall(SYS_write, fd, data, size);
    if (n > 0 && mine) record(DISK_WRITE, false, fd, (uint64_t)at, path, NULL, data, (size_t)n);
    if (fate == 1) die();
    return n;
}

ssize_t write(int fd, const void *data, size_t size) {
    return write_one(fd, data, size, -1);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    return write_one(fd, data, size, at);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off_t at) {
    return write_one(fd, data, size, at);
}

int ftruncate(int fd, off_t size) {
    char path[PATH_MAX];
    const bool mine = ours_fd(fd, path);
    int fate = 0;
    if (mine) fate = decide(DISK_TRUNCATE);
    if (fate < 0) return -1;
    const int got = (int)syscall(SYS_ftruncate, fd, size);
    if (got == 0 && mine) record(DISK_TRUNCATE, false, fd, (uint64_t)size, path, NULL, NULL, 0);
    if (fate == 1) die();
    return got;
}

int ftruncate64(int fd, off_t size) {
    return ftruncate(fd, size);
}

static int sync_one(int fd, long call) {
    char path[PATH_MAX];
    const bool mine = ours_fd(fd, path);
    int fate = 0;
    if (mine) fate = decide(DISK_SYNC);
    if (fate < 0) {
        record(DISK_SYNC, errno == EIO, fd, 0, path, NULL, NULL, 0);
        return -1;
    }
    const int got = (int)syscall(call, fd);
    if (got == 0 && mine) record(DISK_SYNC, false, fd, 0, path, NULL, NULL, 0);
    if (fate == 1) die();
    return got;
}

int fsync(int fd) {
    return sync_one(fd, SYS_fsync);
}

int fdatasync(int fd) {
    return sync_one(fd, SYS_fdatasync);
}
