// Content-addressed files, and the spool of accepted updates.
#include "common/crypto.h"
#include "common/file.h"
#include "common/plant.h"
#include "coordinator/store_sql.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PIECE = 1 << 18 };

void coord_digest_text(const uint8_t digest[COORD_DIGEST], char ret_hex[2 * COORD_DIGEST + 1]) {
    const bool fits =
        fl_hex_encode((fl_bytes){digest, COORD_DIGEST}, ret_hex, 2 * COORD_DIGEST + 1);
    FL_ASSERT(fits);
}

void coord_store_object_path(const coord_store *s, const uint8_t digest[COORD_DIGEST],
                             char ret_path[COORD_PATH_MAX]) {
    char hex[2 * COORD_DIGEST + 1];
    coord_digest_text(digest, hex);
    snprintf(ret_path, COORD_PATH_MAX, "%s/objects/%s", s->dir, hex);
}

fl_status coord_store_put_object(coord_store *s, fl_bytes bytes, uint8_t ret_digest[COORD_DIGEST],
                                 fl_err *err) {
    char path[COORD_PATH_MAX];
    uint8_t digest[COORD_DIGEST];
    fl_hash(bytes, digest);
    coord_store_object_path(s, digest, path);
    if (!s->disk->ops->exists(s->disk, path))
        FL_TRY(coord_disk_replace(s->disk, path, bytes, err));
    else // whoever put it there may have been killed before its name was durable
        FL_TRY(coord_disk_sync_parent(s->disk, path, err));
    memcpy(ret_digest, digest, sizeof(digest));
    return FL_OK;
}

// Import is a command's, from a file of the owner's: it is of the system's disk only.
// The file's bytes go to `out` (when not NULL) and into the digest, piece by piece.
static fl_status copy_hashed(const char *path, fl_file *out, uint8_t digest[COORD_DIGEST],
                             uint64_t *ret_size, fl_err *err) {
    fl_map map = {0};
    fl_hasher hasher;
    FL_TRY(fl_map_open(path, &map, err));
    fl_hash_init(&hasher, (fl_bytes){0}, COORD_DIGEST);
    fl_status st = FL_OK;
    for (size_t at = 0; at < map.bytes.size && st == FL_OK; at += PIECE) {
        const size_t left = map.bytes.size - at;
        const fl_bytes piece = {map.bytes.data + at, left < PIECE ? left : PIECE};
        fl_hash_add(&hasher, piece);
        if (out != NULL) st = fl_file_write(out, piece, err);
    }
    fl_hash_done(&hasher, digest);
    *ret_size = map.bytes.size;
    fl_map_close(&map);
    return st;
}

fl_status coord_store_import_object(coord_store *s, const char *path,
                                    uint8_t ret_digest[COORD_DIGEST], uint64_t *ret_size,
                                    fl_err *err) {
    char to[COORD_PATH_MAX];
    uint8_t digest[COORD_DIGEST], copied[COORD_DIGEST];
    uint64_t size = 0;
    fl_file *file = NULL;
    fl_status st = copy_hashed(path, NULL, digest, &size, err);
    if (st != FL_OK) goto out;
    coord_store_object_path(s, digest, to);
    if (!fl_file_exists(to)) {
        st = fl_file_create(to, &file, err);
        if (st != FL_OK) goto out;
        st = copy_hashed(path, file, copied, &size, err);
        if (st != FL_OK) goto out;
        if (memcmp(copied, digest, sizeof(digest)) != 0) {
            st = FL_FAIL(err, FL_EIO, "%s changed while it was copied; try again", path);
            goto out;
        }
        st = fl_file_commit(&file, err);
        if (st != FL_OK) goto out;
    }
    memcpy(ret_digest, digest, sizeof(digest));
    *ret_size = size;
out:
    fl_file_discard(file);
    return st;
}

fl_status coord_store_get_object(coord_store *s, const uint8_t digest[COORD_DIGEST],
                                 size_t size_max, uint8_t **ret_data, size_t *ret_size,
                                 fl_err *err) {
    char path[COORD_PATH_MAX];
    uint8_t found[COORD_DIGEST], *data = NULL;
    size_t size = 0;
    coord_store_object_path(s, digest, path);
    FL_TRY(coord_disk_read_all(s->disk, path, size_max, &data, &size, err));
    fl_hash((fl_bytes){data, size}, found);
    if (memcmp(found, digest, sizeof(found)) != 0) {
        free(data);
        return FL_FAIL(err, FL_EFORMAT, "%s is damaged: its bytes do not have its digest", path);
    }
    *ret_data = data;
    *ret_size = size;
    return FL_OK;
}

fl_status coord_store_read_object(coord_store *s, const uint8_t digest[COORD_DIGEST],
                                  uint64_t offset, uint8_t *out, size_t size, size_t *ret_got,
                                  uint64_t *ret_total, fl_err *err) {
    char path[COORD_PATH_MAX];
    coord_file *f = NULL;
    coord_store_object_path(s, digest, path);
    FL_TRY(s->disk->ops->open(s->disk, path, false, &f, err));
    fl_status st = s->disk->ops->size(s->disk, f, ret_total, err);
    if (st == FL_OK) st = s->disk->ops->read(s->disk, f, offset, out, size, ret_got, err);
    s->disk->ops->close(s->disk, f);
    return st;
}

void coord_spool_path(const coord_store *s, int64_t spool, char ret_path[COORD_PATH_MAX]) {
    snprintf(ret_path, COORD_PATH_MAX, "%s/spool/%lld", s->dir, (long long)spool);
}

void coord_spool_close(coord_store *s) {
    s->disk->ops->close(s->disk, s->spool_file);
    s->spool_file = NULL;
    s->spool_dirty = false;
}

// Opens spool file `spool` behind the last bytes that a row names: what lies after them was never
// acknowledged.
static fl_status spool_open(coord_store *s, int64_t spool, fl_err *err) {
    char path[COORD_PATH_MAX];
    coord_file *f = NULL;
    if (s->spool_file != NULL && s->spool == spool) return FL_OK;
    coord_spool_close(s);
    int64_t size = 0;
    FL_TRY(coord_sql_integer(s, &size, err,
                             "SELECT coalesce(max(place + size), 0) FROM updates"
                             " WHERE round = 0 AND spool = ?",
                             "i", spool));
    coord_spool_path(s, spool, path);
    const bool is_new = !s->disk->ops->exists(s->disk, path);
    if (fl_plant(SPOOL_CUT)) size = 0;
    FL_TRY(s->disk->ops->open(s->disk, path, true, &f, err));
    fl_status st = s->disk->ops->truncate(s->disk, f, (uint64_t)size, err);
    if (st == FL_OK && is_new) st = coord_disk_sync_parent(s->disk, path, err);
    if (st != FL_OK) {
        s->disk->ops->close(s->disk, f);
        return st;
    }
    s->spool_file = f;
    s->spool = spool;
    s->spool_size = size;
    return FL_OK;
}

fl_status coord_store_spool(coord_store *s, int64_t spool, fl_bytes bytes, coord_spooled *ret,
                            fl_err *err) {
    FL_TRY(spool_open(s, spool, err));
    FL_TRY(s->disk->ops->write(s->disk, s->spool_file, (uint64_t)s->spool_size, bytes, err));
    *ret = (coord_spooled){.spool = spool, .offset = s->spool_size, .size = (int64_t)bytes.size};
    fl_hash(bytes, ret->digest);
    s->spool_size += (int64_t)bytes.size;
    s->spool_dirty = true;
    return FL_OK;
}

fl_status coord_spool_sync(coord_store *s, fl_err *err) {
    if (!s->spool_dirty) return FL_OK;
    FL_TRY(s->disk->ops->sync(s->disk, s->spool_file, err));
    s->spool_dirty = false;
    return FL_OK;
}

fl_status coord_store_unspool(coord_store *s, const coord_spooled *at, uint8_t *data, fl_err *err) {
    char path[COORD_PATH_MAX];
    uint8_t digest[COORD_DIGEST];
    coord_file *f = NULL;
    size_t got = 0;
    const size_t size = (size_t)at->size;
    coord_spool_path(s, at->spool, path);
    FL_TRY(s->disk->ops->open(s->disk, path, false, &f, err));
    const fl_status st =
        s->disk->ops->read(s->disk, f, (uint64_t)at->offset, data, size, &got, err);
    s->disk->ops->close(s->disk, f);
    FL_TRY(st);
    if (got == size) fl_hash((fl_bytes){data, size}, digest);
    if (got != size || memcmp(digest, at->digest, sizeof(digest)) != 0)
        return FL_FAIL(err, FL_EFORMAT, "%s is damaged at %lld", path, (long long)at->offset);
    return FL_OK;
}

static fl_status object_is_named(coord_store *s, const char *name, bool *ret, fl_err *err) {
    uint8_t digest[COORD_DIGEST];
    int64_t found = 0;
    *ret = false;
    if (!fl_hex_decode(name, digest, sizeof(digest))) return FL_OK;
    FL_TRY(
        coord_sql_integer(s, &found, err,
                          "SELECT EXISTS(SELECT 1 FROM layers WHERE digest = ?1 OR moments = ?1) OR"
                          " EXISTS(SELECT 1 FROM layer_history WHERE digest = ?1) OR"
                          " EXISTS(SELECT 1 FROM facts WHERE value = ?1)",
                          "b", digest, sizeof(digest)));
    *ret = found != 0;
    if (fl_plant(SWEEP_MOMENTS)) {
        FL_TRY(coord_sql_integer(s, &found, err,
                                 "SELECT EXISTS(SELECT 1 FROM layers WHERE moments = ?)", "b",
                                 digest, sizeof(digest)));
        *ret = *ret && found == 0;
    }
    return FL_OK;
}

static fl_status spool_is_named(coord_store *s, const char *name, bool *ret, fl_err *err) {
    char *end;
    int64_t found = 0;
    const long long spool = strtoll(name, &end, 10);
    *ret = false;
    if (*end != '\0') return FL_OK;
    FL_TRY(coord_sql_integer(s, &found, err,
                             "SELECT EXISTS(SELECT 1 FROM updates WHERE round = 0 AND spool = ?)",
                             "i", (int64_t)spool));
    *ret = (found != 0 && !fl_plant(SWEEP_SPOOL)) || (s->spool_file != NULL && s->spool == spool);
    return FL_OK;
}

typedef struct sweeper {
    coord_store *s;
    const char *folder;
    fl_status (*is_named)(coord_store *, const char *, bool *, fl_err *);
} sweeper;

static fl_status sweep_name(void *ctx, const char *name, fl_err *err) {
    const sweeper *w = ctx;
    char path[COORD_PATH_MAX];
    bool named = true;
    FL_TRY(w->is_named(w->s, name, &named, err));
    if (named) return FL_OK;
    const int n = snprintf(path, sizeof(path), "%s/%s/%s", w->s->dir, w->folder, name);
    if (n > 0 && (size_t)n < sizeof(path)) // what cannot be removed stays for the next sweep
        (void)w->s->disk->ops->unlink(w->s->disk, path, NULL);
    return FL_OK;
}

static fl_status sweep(coord_store *s, const char *folder,
                       fl_status (*is_named)(coord_store *, const char *, bool *, fl_err *),
                       fl_err *err) {
    sweeper w = {s, folder, is_named};
    char path[COORD_PATH_MAX];
    snprintf(path, sizeof(path), "%s/%s", s->dir, folder);
    return s->disk->ops->list(s->disk, path, sweep_name, &w, err);
}

fl_status coord_store_sweep(coord_store *s, fl_err *err) {
    FL_ASSERT(!s->batch);
    FL_TRY(sweep(s, "objects", object_is_named, err));
    return sweep(s, "spool", spool_is_named, err);
}
