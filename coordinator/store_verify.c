// Proves that the state is whole: every named byte is there and has its digest.
#include "common/crypto.h"
#include "coordinator/store_sql.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PIECE = 1 << 18 };

typedef struct check {
    coord_store *s;
    coord_problem_fn fn;
    void *ctx;
    coord_verified seen;
} check;

static void problem(check *c, const char *fmt, ...) FL_PRINTF(2, 3);
static void problem(check *c, const char *fmt, ...) {
    char text[COORD_TEXT_MAX];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    c->seen.problems++;
    if (c->fn != NULL) c->fn(c->ctx, text);
}

static fl_status check_database(check *c, fl_err *err) {
    sqlite3_stmt *stmt = NULL;
    char text[COORD_TEXT_MAX - 16];
    bool more = true;
    FL_TRY(coord_sql(c->s, &stmt, err, "PRAGMA integrity_check(20)", ""));
    fl_status st = coord_sql_step(c->s, stmt, &more, err);
    while (st == FL_OK && more) {
        coord_col_text(stmt, 0, text, sizeof(text));
        if (strcmp(text, "ok") != 0) problem(c, "state.db: %s", text);
        st = coord_sql_step(c->s, stmt, &more, err);
    }
    coord_sql_end(stmt);
    return st;
}

// Hashes a file in pieces: a model does not have to fit in memory.
static fl_status hash_file(coord_store *s, const char *path, uint8_t ret_digest[COORD_DIGEST],
                           uint64_t *ret_size, fl_err *err) {
    coord_disk *d = s->disk;
    coord_file *f = NULL;
    fl_hasher hasher;
    size_t got = 0;
    uint8_t *piece = malloc(PIECE);
    if (piece == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory to check an object");
    fl_hash_init(&hasher, (fl_bytes){0}, COORD_DIGEST);
    *ret_size = 0;
    fl_status st = d->ops->open(d, path, false, &f, err);
    do {
        if (st == FL_OK) st = d->ops->read(d, f, *ret_size, piece, PIECE, &got, err);
        if (st != FL_OK) break;
        fl_hash_add(&hasher, (fl_bytes){piece, got});
        *ret_size += got;
    } while (got == PIECE);
    fl_hash_done(&hasher, ret_digest);
    d->ops->close(d, f);
    free(piece);
    return st;
}

static void check_object(check *c, const uint8_t digest[COORD_DIGEST], int64_t size) {
    char path[COORD_PATH_MAX], hex[2 * COORD_DIGEST + 1];
    uint8_t found[COORD_DIGEST];
    uint64_t found_size = 0;
    fl_err err;
    coord_digest_text(digest, hex);
    coord_store_object_path(c->s, digest, path);
    c->seen.objects++;
    if (hash_file(c->s, path, found, &found_size, &err) != FL_OK) {
        problem(c, "object %.16s: %.160s", hex, err.text);
        return;
    }
    if (size >= 0 && found_size != (uint64_t)size)
        problem(c, "object %.16s has %llu bytes, not %lld", hex, (unsigned long long)found_size,
                (long long)size);
    if (memcmp(found, digest, sizeof(found)) != 0)
        problem(c, "object %.16s is damaged: its bytes do not have its digest", hex);
}

// Every (digest, size) that a query names; size -1 is not known.
static fl_status check_objects(check *c, const char *sql, fl_err *err) {
    sqlite3_stmt *stmt = NULL;
    uint8_t digest[COORD_DIGEST];
    bool more = true;
    FL_TRY(coord_sql(c->s, &stmt, err, sql, ""));
    fl_status st = coord_sql_step(c->s, stmt, &more, err);
    while (st == FL_OK && more) {
        c->seen.rows++;
        if (coord_col_blob(stmt, 0, digest, sizeof(digest)))
            check_object(c, digest, coord_col_i(stmt, 1));
        else
            problem(c, "a row names an object without a digest");
        st = coord_sql_step(c->s, stmt, &more, err);
    }
    coord_sql_end(stmt);
    return st;
}

static fl_status check_update(void *ctx, const coord_update_row *row, fl_err *err) {
    check *c = ctx;
    fl_err why;
    c->seen.updates++;
    if (row->at.size <= 0 || row->at.offset < 0 || row->at.size > (int64_t)FL_MIB(64)) {
        problem(c, "update %lld names an impossible place", (long long)row->id);
        return FL_OK;
    }
    uint8_t *data = malloc((size_t)row->at.size);
    if (data == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory to check an update");
    if (coord_store_unspool(c->s, &row->at, data, &why) != FL_OK)
        problem(c, "update %lld: %.200s", (long long)row->id, why.text);
    free(data);
    return FL_OK;
}

// Counts rows that contradict each other: must be none.
static fl_status check_none(check *c, const char *what, const char *sql, fl_err *err) {
    int64_t bad = 0;
    FL_TRY(coord_sql_integer(c->s, &bad, err, sql, ""));
    c->seen.rows++;
    if (bad != 0) problem(c, "%lld %s", (long long)bad, what);
    return FL_OK;
}

static fl_status check_rows(check *c, fl_err *err) {
    static const struct {
        const char *what, *sql;
    } rules[] = {
        {"rounds are open, there must be at most one",
         "SELECT CASE WHEN count(*) > 1 THEN count(*) ELSE 0 END FROM rounds WHERE closed_s = 0"},
        {"layers have a newest version that the history does not",
         "SELECT count(*) FROM layers AS l WHERE version > 0 AND NOT EXISTS(SELECT 1 FROM"
         " layer_history WHERE layer = l.layer AND version = l.version AND digest = l.digest)"},
        {"versions in the history are newer than the layer",
         "SELECT count(*) FROM layer_history AS h WHERE version >"
         " (SELECT version FROM layers WHERE layer = h.layer)"},
        {"updates are from a node that is not known",
         "SELECT count(*) FROM updates WHERE node NOT IN (SELECT id FROM nodes)"},
        {"updates are of a task that is not known",
         "SELECT count(*) FROM updates WHERE task NOT IN (SELECT task FROM tasks)"},
        {"updates were folded in a round that is not closed",
         "SELECT count(*) FROM updates WHERE round > 0 AND round NOT IN"
         " (SELECT round FROM rounds WHERE closed_s <> 0)"},
    };
    for (size_t i = 0; i < FL_COUNT(rules); i++)
        FL_TRY(check_none(c, rules[i].what, rules[i].sql, err));
    return FL_OK;
}

fl_status coord_store_verify(coord_store *s, coord_problem_fn fn, void *ctx, coord_verified *ret,
                             fl_err *err) {
    check c = {.s = s, .fn = fn, .ctx = ctx};
    FL_TRY(check_database(&c, err));
    FL_TRY(check_rows(&c, err));
    FL_TRY(check_objects(&c, "SELECT digest, size FROM layer_history", err));
    FL_TRY(check_objects(&c, "SELECT moments, -1 FROM layers WHERE moments IS NOT NULL", err));
    FL_TRY(check_objects(&c, "SELECT value, -1 FROM facts WHERE key = 'model_digest'", err));
    FL_TRY(coord_store_each_open_update(s, check_update, &c, err));
    *ret = c.seen;
    return FL_OK;
}
