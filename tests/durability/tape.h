// tape.h: what a program did to its disk, and the disks that a loss of power can leave of it.
//
// The model is the weakest disk that POSIX allows. Bytes are safe once their file was synced, and a
// name is safe once its folder was. Everything else may be there or not: all of it, none, a
// beginning, any part, in sectors of 512 bytes or pages of 4096. What a failed sync was to write is
// lost, though a reader saw it until the power went. Shared memory (-shm) is no file of a disk.
// Source: Pillai et al., All File Systems Are Not Created Equal, OSDI 2014; Rebello et al., Can
// Applications Recover from fsync Failures?, USENIX ATC 2020.
#ifndef TESTS_DURABILITY_TAPE_H
#define TESTS_DURABILITY_TAPE_H

#include "tests/durability/rig.h"

enum { TAPE_FILES = 4096, TAPE_NAMES_MAX = 4096, TAPE_PENDING = 8192, TAPE_PATH = 256 };

#define TAPE_MODE_LIST(X)                                                                          \
    X(NONE)    /* nothing that was not synced */                                                   \
    X(NAMES)   /* all names, no bytes: what delayed allocation leaves */                           \
    X(ALL)     /* everything: as a kill */                                                         \
    X(TORN)    /* of each file a beginning, its last write cut at a sector; of the names too */    \
    X(REORDER) /* of each file any of its writes; of the names a beginning */                      \
    X(SECTORS) /* of each write any sectors of 512 bytes, any of the names */                      \
    X(PAGES)   /* of each write any pages of 4096 bytes, any of the names */
typedef enum tape_mode {
#define X(name) TAPE_##name,
    TAPE_MODE_LIST(X) TAPE_MODES
#undef X
} tape_mode;

typedef struct tape_entry {
    disk_record r;
    const char *path, *to;
    const uint8_t *data;
} tape_entry;

typedef struct tape_file {
    uint64_t file; // inode
    bool gone;     // another one has its inode now
    uint8_t *data;
    size_t size;
    const tape_entry *pending[TAPE_PENDING];
    size_t pending_count;
} tape_file;

typedef struct tape_name {
    char path[TAPE_PATH];
    tape_file *file; // NULL: a folder
} tape_name;

typedef struct tape {
    char dir[256]; // where it happened
    uint8_t *bytes;
    tape_entry *entries;
    size_t count;
    tape_file *files[TAPE_FILES];
    size_t file_count;
    tape_name names[TAPE_NAMES_MAX]; // that are safe
    size_t name_count;
    const tape_entry *pending[TAPE_PENDING]; // changes of names that are not
    tape_file *pending_file[TAPE_PENDING];
    size_t pending_count;
} tape;

// ---- files and names

static tape_file *tape_file_new(tape *t, uint64_t file, const uint8_t *data, size_t size) {
    for (size_t i = 0; i < t->file_count; i++)
        if (t->files[i]->file == file) t->files[i]->gone = true;
    tape_file *f = calloc(1, sizeof(*f));
    T_NEED(f != NULL && t->file_count < TAPE_FILES, "room for files");
    f->file = file;
    f->data = malloc(size + 1);
    f->size = size;
    if (size > 0) memcpy(f->data, data, size);
    t->files[t->file_count++] = f;
    return f;
}

static tape_file *tape_find(tape *t, uint64_t file) {
    for (size_t i = t->file_count; i-- > 0;)
        if (t->files[i]->file == file && !t->files[i]->gone) return t->files[i];
    return NULL;
}

static void tape_put_name(tape *t, const char *path, tape_file *f) {
    size_t i = 0;
    while (i < t->name_count && strcmp(t->names[i].path, path) != 0) i++;
    T_NEED(i < TAPE_NAMES_MAX, "room for names");
    if (i == t->name_count) t->name_count++;
    snprintf(t->names[i].path, TAPE_PATH, "%.*s", TAPE_PATH - 1, path);
    t->names[i].file = f;
}

static void tape_drop_name(tape *t, const char *path) {
    for (size_t i = 0; i < t->name_count; i++)
        if (strcmp(t->names[i].path, path) == 0) t->names[i] = t->names[--t->name_count];
}

static bool tape_is_in(const char *path, const char *folder) {
    const size_t n = strlen(folder);
    return strncmp(path, folder, n) == 0 && path[n] == '/' && strchr(path + n + 1, '/') == NULL;
}

static const char *tape_target(const tape_entry *e) {
    return e->to[0] != '\0' ? e->to : e->path;
}

static void tape_apply_name(tape *t, const tape_entry *e, tape_file *f) {
    if (e->r.op == DISK_RENAME || e->r.op == DISK_UNLINK) tape_drop_name(t, e->path);
    if (e->r.op != DISK_UNLINK) tape_put_name(t, tape_target(e), f);
}

// Bytes [from, from + size) of the entry's write, or its truncation.
static void tape_apply(tape_file *f, const tape_entry *e, size_t from, size_t size) {
    const size_t end = e->r.op == DISK_WRITE ? (size_t)e->r.offset + from + size
                                             : (size_t)e->r.offset;
    if (e->r.op == DISK_TRUNCATE && end < f->size) f->size = end;
    if (end > f->size) {
        f->data = realloc(f->data, end + 1);
        memset(f->data + f->size, 0, end - f->size);
        f->size = end;
    }
    if (e->r.op == DISK_WRITE) memcpy(f->data + e->r.offset + from, e->data + from, size);
}

// ---- playing

static void tape_sync(tape *t, const tape_entry *e) {
    tape_file *f = tape_find(t, e->r.file);
    if (f != NULL) {
        for (size_t i = 0; i < f->pending_count && !e->r.failed; i++)
            tape_apply(f, f->pending[i], 0, f->pending[i]->r.data_size);
        f->pending_count = 0;
        return;
    }
    size_t kept = 0;
    for (size_t i = 0; i < t->pending_count; i++) {
        if (!tape_is_in(tape_target(t->pending[i]), e->path) || e->r.failed) {
            t->pending[kept] = t->pending[i];
            t->pending_file[kept++] = t->pending_file[i];
        } else {
            tape_apply_name(t, t->pending[i], t->pending_file[i]);
        }
    }
    t->pending_count = kept;
}

static void tape_step(tape *t, const tape_entry *e) {
    tape_file *f = tape_find(t, e->r.file);
    switch (e->r.op) {
    case DISK_SYNC:
        tape_sync(t, e);
        return;
    case DISK_WRITE:
    case DISK_TRUNCATE:
        T_NEED(f != NULL && f->pending_count < TAPE_PENDING, "a file of %s", e->path);
        f->pending[f->pending_count++] = e;
        return;
    case DISK_ACK:
        return;
    case DISK_CREATE:
        f = tape_file_new(t, e->r.file, NULL, 0);
        break;
    default:
        break;
    }
    T_NEED(t->pending_count < TAPE_PENDING, "room for changes of names");
    t->pending[t->pending_count] = e;
    t->pending_file[t->pending_count++] = e->r.op == DISK_FOLDER ? NULL : f;
}

// ---- losing power

static void tape_lose_bytes(tape_file *f, tape_mode mode) {
    const size_t cut = mode == TAPE_TORN && f->pending_count > 0 ? t_rand() % f->pending_count : 0;
    for (size_t i = 0; i < f->pending_count; i++) {
        const tape_entry *e = f->pending[i];
        const size_t size = e->r.data_size, grain = mode == TAPE_PAGES ? 4096 : 512;
        if (mode == TAPE_ALL || (mode == TAPE_TORN && i < cut) ||
            ((mode == TAPE_REORDER || e->r.op == DISK_TRUNCATE) && mode >= TAPE_REORDER &&
             t_rand() % 2 == 0)) {
            tape_apply(f, e, 0, size);
        } else if (mode == TAPE_TORN && i == cut && size > 0) {
            tape_apply(f, e, 0, t_rand() % (size / grain + 1) * grain);
        } else if ((mode == TAPE_SECTORS || mode == TAPE_PAGES) && e->r.op == DISK_WRITE) {
            for (size_t at = 0; at < size;) { // sectors of the disk, not of the write
                const size_t left = grain - (size_t)(e->r.offset + at) % grain;
                const size_t n = left < size - at ? left : size - at;
                if (t_rand() % 2 == 0) tape_apply(f, e, at, n);
                at += n;
            }
        }
    }
    f->pending_count = 0;
}

static void tape_lose_power(tape *t, tape_mode mode) {
    const size_t cut = t->pending_count > 0 ? t_rand() % (t->pending_count + 1) : 0;
    for (size_t i = 0; i < t->pending_count; i++) {
        const bool any = mode == TAPE_SECTORS || mode == TAPE_PAGES;
        const bool keep = mode == TAPE_ALL || mode == TAPE_NAMES ||
                          ((mode == TAPE_TORN || mode == TAPE_REORDER) && i < cut) ||
                          (any && t_rand() % 2 == 0);
        if (keep) tape_apply_name(t, t->pending[i], t->pending_file[i]);
    }
    for (size_t i = 0; i < t->file_count; i++) tape_lose_bytes(t->files[i], mode);
}

// ---- from and to a real folder

static void tape_scan(tape *t, const char *folder) {
    char path[COORD_PATH_MAX];
    struct stat s;
    DIR *d = opendir(folder);
    if (d == NULL) return; // it is made later
    tape_put_name(t, folder, NULL);
    for (const struct dirent *e; (e = readdir(d)) != NULL;) {
        if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0) continue;
        snprintf(path, sizeof(path), "%s/%s", folder, e->d_name);
        if (e->d_type == DT_DIR) {
            tape_scan(t, path);
            continue;
        }
        uint8_t *data = NULL;
        size_t size = 0;
        T_NEED(stat(path, &s) == 0 && fl_file_read(path, FL_MIB(64), &data, &size, NULL) == FL_OK,
               "%s", path);
        tape_put_name(t, path, tape_file_new(t, s.st_ino, data, size));
        free(data);
    }
    closedir(d);
}

static void tape_load(tape *t, const char *path) {
    size_t size = 0, at = 0;
    fl_err err;
    T_OK(fl_file_read(path, (size_t)1 << 30, &t->bytes, &size, &err), err);
    t->entries = calloc(size / sizeof(disk_record) + 1, sizeof(*t->entries));
    T_NEED(t->entries != NULL, "memory");
    while (at + sizeof(disk_record) <= size) {
        tape_entry *e = &t->entries[t->count++];
        memcpy(&e->r, t->bytes + at, sizeof(e->r));
        at += sizeof(e->r);
        T_NEED(at + e->r.path_size + e->r.to_size + e->r.data_size <= size, "the log is cut");
        e->path = strndup((const char *)t->bytes + at, e->r.path_size);
        e->to = strndup((const char *)t->bytes + at + e->r.path_size, e->r.to_size);
        e->data = t->bytes + at + e->r.path_size + e->r.to_size;
        at += e->r.path_size + e->r.to_size + e->r.data_size;
    }
}

static int by_length(const void *a, const void *b) {
    const size_t x = strlen(((const tape_name *)a)->path), y = strlen(((const tape_name *)b)->path);
    return (x > y) - (x < y);
}

// Makes `to` what is safe on the tape's disk. A name whose folder is not there is lost with it.
static void tape_write(tape *t, const char *to) {
    char path[COORD_PATH_MAX];
    qsort(t->names, t->name_count, sizeof(t->names[0]), by_length); // folders come first
    for (size_t i = 0; i < t->name_count; i++) {
        const tape_name *n = &t->names[i];
        const size_t tail = strlen(n->path);
        if (tail > 4 && strcmp(n->path + tail - 4, "-shm") == 0) continue;
        snprintf(path, sizeof(path), "%s%s", to, n->path + strlen(t->dir));
        if (n->file == NULL) {
            (void)mkdir(path, 0700);
            continue;
        }
        const int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
        if (fd < 0) continue;
        T_NEED(write(fd, n->file->data, n->file->size) == (ssize_t)n->file->size, "%s", path);
        close(fd);
    }
}

#endif
