#include "sim/disk.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SECTOR = 512, PATH_BYTES = 128 };

typedef struct change { // not synced yet
    bool cut;           // to `offset` bytes; else a write of `size` bytes there
    uint64_t offset, size;
} change;

typedef struct content {
    uint8_t *data;
    size_t size, room;
} content;

typedef struct inode {
    content seen, durable;
    change *changes;
    size_t count, room;
    unsigned names, handles; // who needs it
} inode;

typedef struct entry {
    char path[PATH_BYTES];
    inode *seen, *durable; // NULL: no such name
} entry;

struct sim_disk {
    coord_disk table; // first: the table's functions are given this
    sim_rng rng;
    const uint64_t *wall_ms;
    entry *entries;
    size_t count, room;
    sim_disk_lies lies;
    uint64_t changes, dies_at, fails_at;
    bool dead;
};

struct coord_file {
    inode *node;
    bool spool, log, object;
};

static sim_disk *of(coord_disk *d) {
    return (sim_disk *)d;
}

static fl_status gone(fl_err *err) {
    return FL_FAIL(err, FL_EIO, "the simulated disk failed");
}

static void *must(void *p) {
    FL_ASSERT(p != NULL); // a simulation without memory has nothing to say
    return p;
}

static void resize(content *c, size_t size) {
    if (size > c->room) {
        const size_t room = size + size / 2 + 256;
        c->data = must(realloc(c->data, room));
        c->room = room;
    }
    if (size > c->size) memset(c->data + c->size, 0, size - c->size);
    c->size = size;
}

static void put(content *c, uint64_t offset, const uint8_t *data, size_t size) {
    if (offset + size > c->size) resize(c, (size_t)offset + size);
    memcpy(c->data + offset, data, size);
}

static void release(inode *n) {
    if (n == NULL || n->names != 0 || n->handles != 0) return;
    free(n->seen.data);
    free(n->durable.data);
    free(n->changes);
    free(n);
}

static void note(inode *n, change c) {
    if (n->count == n->room) {
        n->room = n->room == 0 ? 8 : 2 * n->room;
        n->changes = must(realloc(n->changes, n->room * sizeof(*n->changes)));
    }
    n->changes[n->count++] = c;
}

static entry *find(sim_disk *d, const char *path) {
    for (size_t i = 0; i < d->count; i++) {
        if (strcmp(d->entries[i].path, path) == 0) return &d->entries[i];
    }
    return NULL;
}

static entry *find_or_add(sim_disk *d, const char *path) {
    entry *e = find(d, path);
    if (e != NULL) return e;
    if (d->count == d->room) {
        d->room = d->room == 0 ? 32 : 2 * d->room;
        d->entries = must(realloc(d->entries, d->room * sizeof(*d->entries)));
    }
    e = &d->entries[d->count++];
    *e = (entry){0};
    const int n = snprintf(e->path, sizeof(e->path), "%s", path);
    FL_ASSERT(n > 0 && n < PATH_BYTES);
    return e;
}

static void point(inode **at, inode *to) {
    inode *old = *at;
    if (to != NULL) to->names++;
    *at = to;
    if (old != NULL) {
        old->names--;
        release(old);
    }
}

// May this change happen? What comes after the one that kills does not.
static bool may(sim_disk *d) {
    if (d->dead) return false;
    d->changes++;
    if (d->changes == d->dies_at) d->dead = true;
    return !d->dead && d->changes != d->fails_at;
}

static fl_status disk_open(coord_disk *t, const char *path, bool create, coord_file **ret,
                           fl_err *err) {
    sim_disk *d = of(t);
    if (d->dead) return gone(err);
    entry *e = create ? find_or_add(d, path) : find(d, path);
    if (e == NULL || (e->seen == NULL && !create))
        return FL_FAIL(err, FL_ENOENT, "cannot open %s: there is no such file", path);
    if (e->seen == NULL) {
        if (!may(d)) return gone(err);
        point(&e->seen, must(calloc(1, sizeof(inode))));
    }
    coord_file *f = must(malloc(sizeof(*f)));
    *f = (coord_file){.node = e->seen,
                      .spool = strstr(path, "/spool/") != NULL,
                      .log = strstr(path, "-wal") != NULL,
                      .object = strstr(path, "/objects/") != NULL};
    f->node->handles++;
    *ret = f;
    return FL_OK;
}

static void disk_close(coord_disk *t, coord_file *f) {
    (void)t;
    if (f == NULL) return;
    f->node->handles--;
    release(f->node);
    free(f);
}

static fl_status disk_read(coord_disk *t, coord_file *f, uint64_t offset, void *out, size_t size,
                           size_t *ret_got, fl_err *err) {
    const content *c = &f->node->seen;
    if (of(t)->dead) return gone(err);
    const size_t left = offset < c->size ? c->size - (size_t)offset : 0;
    *ret_got = size < left ? size : left;
    if (*ret_got > 0) memcpy(out, c->data + offset, *ret_got);
    return FL_OK;
}

static void write_out(inode *n, uint64_t offset, fl_bytes bytes) {
    if (bytes.size == 0) return;
    put(&n->seen, offset, bytes.data, bytes.size);
    note(n, (change){.offset = offset, .size = bytes.size});
}

static fl_status disk_write(coord_disk *t, coord_file *f, uint64_t offset, fl_bytes bytes,
                            fl_err *err) {
    sim_disk *d = of(t);
    if (d->dead) return gone(err);
    if (!may(d)) { // some of it may have gone out
        bytes.size = (size_t)sim_between(&d->rng, 0, bytes.size);
        write_out(f->node, offset, bytes);
        return gone(err);
    }
    write_out(f->node, offset, bytes);
    return FL_OK;
}

static fl_status disk_truncate(coord_disk *t, coord_file *f, uint64_t size, fl_err *err) {
    if (f->node->seen.size == size && !of(t)->dead) return FL_OK;
    if (!may(of(t))) return gone(err);
    resize(&f->node->seen, (size_t)size);
    note(f->node, (change){.cut = true, .offset = size});
    return FL_OK;
}

// One change reaches the platter, from what readers see now.
static void apply(inode *n, const change *c, size_t size) {
    if (c->cut) {
        resize(&n->durable, (size_t)c->offset);
        return;
    }
    if (c->offset >= n->seen.size) return; // cut away since
    const size_t left = n->seen.size - (size_t)c->offset;
    if (size > left) size = left;
    put(&n->durable, c->offset, n->seen.data + c->offset, size);
}

static fl_status disk_sync(coord_disk *t, coord_file *f, fl_err *err) {
    sim_disk *d = of(t);
    inode *n = f->node;
    if (!may(d)) return gone(err);
    if ((f->spool && d->lies.spool_sync) || (f->log && d->lies.log_sync) ||
        (f->object && d->lies.object_sync))
        return FL_OK;
    for (size_t i = 0; i < n->count; i++) apply(n, &n->changes[i], (size_t)n->changes[i].size);
    if (n->durable.size != n->seen.size) resize(&n->durable, n->seen.size);
    n->count = 0;
    return FL_OK;
}

static fl_status disk_size(coord_disk *t, coord_file *f, uint64_t *ret, fl_err *err) {
    if (of(t)->dead) return gone(err);
    *ret = f->node->seen.size;
    return FL_OK;
}

static fl_status disk_rename(coord_disk *t, const char *from, const char *to, fl_err *err) {
    sim_disk *d = of(t);
    if (!may(d)) return gone(err);
    find_or_add(d, to); // may move the entries
    entry *a = find(d, from), *b = find(d, to);
    if (a == NULL || a->seen == NULL) return FL_FAIL(err, FL_ENOENT, "there is no %s", from);
    point(&b->seen, a->seen);
    point(&a->seen, NULL);
    return FL_OK;
}

static fl_status disk_unlink(coord_disk *t, const char *path, fl_err *err) {
    sim_disk *d = of(t);
    entry *e = find(d, path);
    if (e == NULL || e->seen == NULL) return FL_FAIL(err, FL_ENOENT, "there is no %s", path);
    if (!may(d)) return gone(err);
    point(&e->seen, NULL);
    return FL_OK;
}

static bool disk_exists(coord_disk *t, const char *path) {
    const entry *e = find(of(t), path);
    return e != NULL && e->seen != NULL;
}

// Folders are there from the start: only names of files are lost.
static fl_status disk_make_folder(coord_disk *t, const char *path, fl_err *err) {
    (void)path;
    return of(t)->dead ? gone(err) : FL_OK;
}

static bool lies_in(const char *path, const char *folder) {
    const size_t n = strlen(folder);
    return strncmp(path, folder, n) == 0 && path[n] == '/' && strchr(path + n + 1, '/') == NULL;
}

static fl_status disk_sync_folder(coord_disk *t, const char *path, fl_err *err) {
    sim_disk *d = of(t);
    if (!may(d)) return gone(err);
    if (d->lies.folder_sync) return FL_OK;
    size_t kept = 0;
    for (size_t i = 0; i < d->count; i++) {
        entry *e = &d->entries[i];
        if (lies_in(e->path, path) && e->durable != e->seen) point(&e->durable, e->seen);
        if (e->seen != NULL || e->durable != NULL) d->entries[kept++] = *e;
    }
    d->count = kept;
    return FL_OK;
}

static fl_status disk_list(coord_disk *t, const char *path, coord_disk_name_fn fn, void *ctx,
                           fl_err *err) {
    sim_disk *d = of(t);
    if (d->dead) return gone(err);
    for (size_t i = 0; i < d->count; i++) { // fn may unlink, which moves no entry
        if (!lies_in(d->entries[i].path, path) || d->entries[i].seen == NULL) continue;
        char name[PATH_BYTES];
        snprintf(name, sizeof(name), "%s", strrchr(d->entries[i].path, '/') + 1);
        FL_TRY(fn(ctx, name, err));
    }
    return FL_OK;
}

static void disk_random(coord_disk *t, void *out, size_t size) {
    sim_fill(&of(t)->rng, out, size);
}

static int64_t disk_wall_ms(coord_disk *t) {
    const uint64_t *ms = of(t)->wall_ms;
    return ms == NULL ? 0 : (int64_t)*ms;
}

sim_disk *sim_disk_new(uint64_t seed, const uint64_t *wall_ms) {
    static const coord_disk_ops ops = {
        .open = disk_open,
        .close = disk_close,
        .read = disk_read,
        .write = disk_write,
        .truncate = disk_truncate,
        .sync = disk_sync,
        .size = disk_size,
        .rename = disk_rename,
        .unlink = disk_unlink,
        .exists = disk_exists,
        .make_folder = disk_make_folder,
        .sync_folder = disk_sync_folder,
        .list = disk_list,
    };
    sim_disk *d = must(calloc(1, sizeof(*d)));
    d->table = (coord_disk){.ops = &ops, .random = disk_random, .wall_ms = disk_wall_ms};
    d->rng.key = fl_rng_key(seed, 0xd15c, 0);
    d->wall_ms = wall_ms;
    return d;
}

void sim_disk_free(sim_disk *d) {
    if (d == NULL) return;
    for (size_t i = 0; i < d->count; i++) {
        point(&d->entries[i].seen, NULL);
        point(&d->entries[i].durable, NULL);
    }
    free(d->entries);
    free(d);
}

sim_disk *sim_disk_clone(const sim_disk *d) {
    sim_disk *c = sim_disk_new(d->rng.key, d->wall_ms);
    for (size_t i = 0; i < d->count; i++) {
        const inode *from = d->entries[i].seen;
        if (from == NULL) continue;
        inode *n = must(calloc(1, sizeof(*n)));
        if (from->seen.size > 0) {
            put(&n->seen, 0, from->seen.data, from->seen.size);
            put(&n->durable, 0, from->seen.data, from->seen.size);
        }
        entry *e = find_or_add(c, d->entries[i].path);
        point(&e->seen, n);
        point(&e->durable, n);
    }
    return c;
}

coord_disk *sim_disk_table(sim_disk *d) {
    return &d->table;
}

void sim_disk_lie(sim_disk *d, sim_disk_lies lies) {
    d->lies = lies;
}

void sim_disk_arm(sim_disk *d, uint64_t k) {
    d->dies_at = k == 0 ? 0 : d->changes + k;
}

void sim_disk_fail(sim_disk *d, uint64_t k) {
    d->fails_at = k == 0 ? 0 : d->changes + k;
}

bool sim_disk_failed(const sim_disk *d) {
    return d->fails_at != 0 && d->changes >= d->fails_at;
}

bool sim_disk_dead(const sim_disk *d) {
    return d->dead;
}

uint64_t sim_disk_changes(const sim_disk *d) {
    return d->changes;
}

// Some of the first bytes, to a sector: as much as was written when the power went.
static void tear(sim_disk *d, inode *n, const change *c) {
    const uint64_t sectors = (c->offset + c->size) / SECTOR - c->offset / SECTOR;
    const uint64_t to = (c->offset / SECTOR + sim_between(&d->rng, 0, sectors)) * SECTOR;
    if (to > c->offset) apply(n, c, (size_t)(to - c->offset));
}

static void cut_power(sim_disk *d, inode *n, double kept) {
    for (size_t i = 0; i < n->count; i++) {
        const change *c = &n->changes[i];
        if (sim_chance(&d->rng, kept))
            apply(n, c, (size_t)c->size);
        else if (!c->cut && sim_chance(&d->rng, 0.3))
            tear(d, n, c);
    }
    n->count = 0;
    resize(&n->seen, n->durable.size);
    if (n->durable.size > 0) memcpy(n->seen.data, n->durable.data, n->durable.size);
}

void sim_disk_restart(sim_disk *d, bool power_cut) {
    static const double kept_of[] = {0.0, 0.1, 0.5, 0.9, 1.0};
    const double kept = kept_of[sim_between(&d->rng, 0, FL_COUNT(kept_of) - 1)];
    d->dead = false;
    d->dies_at = d->fails_at = 0;
    if (!power_cut) return;
    for (size_t i = 0; i < d->count; i++) {
        entry *e = &d->entries[i];
        if (e->seen == e->durable) continue;
        if (sim_chance(&d->rng, kept))
            point(&e->durable, e->seen);
        else
            point(&e->seen, e->durable);
    }
    for (size_t i = 0; i < d->count; i++) {
        if (d->entries[i].seen != NULL && d->entries[i].seen->count > 0)
            cut_power(d, d->entries[i].seen, kept);
    }
}
