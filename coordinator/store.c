#include "coordinator/store.h"

#include "common/fault.h"
#include "coordinator/store_sql.h"

#include <math.h>
#include <sqlite3.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SCHEMA_VERSION = 1, BUSY_MS = 5000 };

static const char schema[] =
    "CREATE TABLE facts(key TEXT PRIMARY KEY, value BLOB NOT NULL) STRICT;"
    "CREATE TABLE nodes(id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL,"
    " sign_key BLOB NOT NULL UNIQUE, transport_key BLOB NOT NULL UNIQUE, state INTEGER NOT NULL,"
    " joined_s INTEGER NOT NULL, seen_s INTEGER NOT NULL, bytes_up INTEGER NOT NULL,"
    " bytes_down INTEGER NOT NULL) STRICT;"
    "CREATE TABLE tokens(id BLOB PRIMARY KEY, key BLOB NOT NULL, uses INTEGER NOT NULL,"
    " auto INTEGER NOT NULL) STRICT;"
    "CREATE TABLE layers(layer INTEGER PRIMARY KEY, version INTEGER NOT NULL,"
    " count INTEGER NOT NULL, digest BLOB, size INTEGER NOT NULL, moments BLOB,"
    " round INTEGER NOT NULL) STRICT;"
    "CREATE TABLE layer_history(layer INTEGER NOT NULL, version INTEGER NOT NULL,"
    " digest BLOB NOT NULL, size INTEGER NOT NULL, round INTEGER NOT NULL,"
    " updates INTEGER NOT NULL, PRIMARY KEY(layer, version)) STRICT;"
    "CREATE INDEX history_digest ON layer_history(digest);"
    "CREATE TABLE rounds(round INTEGER PRIMARY KEY, opened_s INTEGER NOT NULL,"
    " closed_s INTEGER NOT NULL, contributions INTEGER NOT NULL, updates INTEGER NOT NULL,"
    " layers INTEGER NOT NULL, bytes_up INTEGER NOT NULL, loss REAL, reason TEXT NOT NULL) STRICT;"
    "CREATE TABLE tasks(task INTEGER PRIMARY KEY, node INTEGER NOT NULL,"
    " round INTEGER NOT NULL, exit INTEGER NOT NULL, first INTEGER NOT NULL,"
    " last INTEGER NOT NULL, counted INTEGER NOT NULL, open INTEGER NOT NULL) STRICT;"
    "CREATE INDEX tasks_open ON tasks(open) WHERE open = 1;"
    "CREATE INDEX tasks_counted ON tasks(counted) WHERE counted > 0;"
    "CREATE TABLE updates(id INTEGER PRIMARY KEY AUTOINCREMENT, task INTEGER NOT NULL,"
    " node INTEGER NOT NULL, layer INTEGER NOT NULL, base INTEGER NOT NULL,"
    " sequence INTEGER NOT NULL, tokens INTEGER NOT NULL, weight INTEGER NOT NULL,"
    " clip INTEGER NOT NULL, norm REAL NOT NULL, round INTEGER NOT NULL, spool INTEGER NOT NULL,"
    " place INTEGER NOT NULL, size INTEGER NOT NULL, digest BLOB NOT NULL,"
    " UNIQUE(node, layer, base)) STRICT;"
    "CREATE INDEX updates_open ON updates(round) WHERE round = 0;"
    "CREATE INDEX updates_task ON updates(task);"
    "CREATE INDEX updates_layer ON updates(layer, id);"
    "CREATE TABLE votes(version INTEGER PRIMARY KEY, round INTEGER NOT NULL,"
    " tokens INTEGER NOT NULL, weights BLOB NOT NULL, loss REAL NOT NULL, gain REAL NOT NULL)"
    " STRICT;"
    "CREATE TABLE reports(node INTEGER NOT NULL, sequence INTEGER NOT NULL,"
    " round INTEGER NOT NULL, vote INTEGER NOT NULL, tokens INTEGER NOT NULL,"
    " nll_base INTEGER NOT NULL, nll_local INTEGER NOT NULL, nll_voted INTEGER NOT NULL,"
    " peak_rss INTEGER NOT NULL, sums BLOB NOT NULL, PRIMARY KEY(node, sequence)) STRICT;"
    "CREATE INDEX reports_round ON reports(round);"
    "CREATE TABLE events(id INTEGER PRIMARY KEY AUTOINCREMENT, time_s INTEGER NOT NULL,"
    " kind TEXT NOT NULL, node INTEGER NOT NULL, text TEXT NOT NULL) STRICT;";

fl_status coord_sql_fail(coord_store *s, fl_err *err) {
    const int code = s->db == NULL ? SQLITE_CANTOPEN : sqlite3_extended_errcode(s->db);
    const char *text = s->db == NULL ? "out of memory" : sqlite3_errmsg(s->db);
    switch (code == SQLITE_IOERR_DATA ? SQLITE_CORRUPT : code & 0xff) { // the sum of a page
    case SQLITE_BUSY:
    case SQLITE_LOCKED:
        return FL_FAIL(err, FL_ETIME, "%s/state.db is locked by another process", s->dir);
    case SQLITE_CORRUPT:
    case SQLITE_NOTADB:
        return FL_FAIL(err, FL_EFORMAT, "%s/state.db is damaged (%s); restore it from a backup",
                       s->dir, text);
    case SQLITE_NOMEM:
        return FL_FAIL(err, FL_ENOMEM, "no memory for the state");
    case SQLITE_FULL:
        return FL_FAIL(err, FL_EIO, "the disk of %s is full", s->dir);
    case SQLITE_CONSTRAINT:
        return FL_FAIL(err, FL_ESTATE, "state: %s", text);
    default:
        return FL_FAIL(err, FL_EIO, "%s/state.db: %s", s->dir, text);
    }
}

struct coord_cached {
    const char *sql;
    sqlite3_stmt *stmt;
    coord_cached *next;
};

// One that is in the middle of its rows is left alone: a callback may run the same query again.
static fl_status prepared(coord_store *s, const char *sql, sqlite3_stmt **ret, fl_err *err) {
    coord_cached **bucket = &s->cached[((uintptr_t)sql >> 3) % COORD_CACHED];
    for (const coord_cached *c = *bucket; c != NULL; c = c->next) {
        if (c->sql == sql && sqlite3_stmt_busy(c->stmt) == 0) {
            *ret = c->stmt;
            return FL_OK;
        }
    }
    coord_cached *c = fl_fault() ? NULL : malloc(sizeof(*c));
    if (c == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory for the state");
    sqlite3_stmt *stmt = NULL;
    if (sqlite3_prepare_v3(s->db, sql, -1, SQLITE_PREPARE_PERSISTENT, &stmt, NULL) != SQLITE_OK) {
        free(c);
        return coord_sql_fail(s, err);
    }
    *c = (coord_cached){.sql = sql, .stmt = stmt, .next = *bucket};
    *bucket = c;
    *ret = stmt;
    return FL_OK;
}

static void forget_prepared(coord_store *s) {
    for (size_t i = 0; i < COORD_CACHED; i++) {
        for (coord_cached *c = s->cached[i], *next; c != NULL; c = next) {
            next = c->next;
            sqlite3_finalize(c->stmt);
            free(c);
        }
    }
}

static fl_status sql_v(coord_store *s, sqlite3_stmt **ret, fl_err *err, const char *sql,
                       const char *types, va_list ap) {
    sqlite3_stmt *st = NULL;
    if (fl_fault()) return FL_FAIL(err, FL_EIO, "state: the disk failed");
    FL_TRY(prepared(s, sql, &st, err));
    int at = 0, rc = SQLITE_OK;
    for (const char *t = types; *t != '\0' && rc == SQLITE_OK; t++) {
        at++;
        switch (*t) {
        case 'i':
            rc = sqlite3_bind_int64(st, at, va_arg(ap, int64_t));
            break;
        case 'd':
            rc = sqlite3_bind_double(st, at, va_arg(ap, double));
            break;
        case 't':
            rc = sqlite3_bind_text(st, at, va_arg(ap, const char *), -1, SQLITE_STATIC);
            break;
        case 'b': {
            const uint8_t *data = va_arg(ap, const uint8_t *);
            const size_t size = va_arg(ap, size_t);
            rc = sqlite3_bind_blob64(st, at, data, size, SQLITE_STATIC);
            break;
        }
        default:
            FL_ASSERT(false);
        }
    }
    if (rc != SQLITE_OK) {
        coord_sql_end(st);
        return coord_sql_fail(s, err);
    }
    *ret = st;
    return FL_OK;
}

fl_status coord_sql(coord_store *s, sqlite3_stmt **ret, fl_err *err, const char *sql,
                    const char *types, ...) {
    va_list ap;
    va_start(ap, types);
    const fl_status st = sql_v(s, ret, err, sql, types, ap);
    va_end(ap);
    return st;
}

fl_status coord_sql_step(coord_store *s, sqlite3_stmt *st, bool *ret_row, fl_err *err) {
    if (fl_fault()) return FL_FAIL(err, FL_EIO, "state: the disk failed");
    const int rc = sqlite3_step(st);
    if (rc != SQLITE_ROW && rc != SQLITE_DONE) return coord_sql_fail(s, err);
    *ret_row = rc == SQLITE_ROW;
    return FL_OK;
}

void coord_sql_end(sqlite3_stmt *st) {
    if (st == NULL) return;
    sqlite3_reset(st); // what failed has been told by step
    sqlite3_clear_bindings(st);
}

fl_status coord_sql_run(coord_store *s, int64_t *ret_changed, fl_err *err, const char *sql,
                        const char *types, ...) {
    sqlite3_stmt *stmt = NULL;
    bool row = true;
    va_list ap;
    va_start(ap, types);
    fl_status st = sql_v(s, &stmt, err, sql, types, ap);
    va_end(ap);
    while (st == FL_OK && row) st = coord_sql_step(s, stmt, &row, err);
    coord_sql_end(stmt);
    if (st == FL_OK && ret_changed != NULL) *ret_changed = sqlite3_changes64(s->db);
    return st;
}

fl_status coord_sql_integer(coord_store *s, int64_t *ret, fl_err *err, const char *sql,
                            const char *types, ...) {
    sqlite3_stmt *stmt = NULL;
    bool row = false;
    va_list ap;
    va_start(ap, types);
    fl_status st = sql_v(s, &stmt, err, sql, types, ap);
    va_end(ap);
    if (st == FL_OK) st = coord_sql_step(s, stmt, &row, err);
    if (st == FL_OK && !row) st = FL_FAIL(err, FL_ENOENT, "state: no such row");
    if (st == FL_OK) *ret = sqlite3_column_int64(stmt, 0);
    coord_sql_end(stmt);
    return st;
}

int64_t coord_col_i(sqlite3_stmt *st, int col) {
    return sqlite3_column_int64(st, col);
}

double coord_col_d(sqlite3_stmt *st, int col) {
    return sqlite3_column_type(st, col) == SQLITE_NULL ? (double)NAN
                                                       : sqlite3_column_double(st, col);
}

void coord_col_text(sqlite3_stmt *st, int col, char *out, size_t size) {
    const unsigned char *text = sqlite3_column_text(st, col);
    snprintf(out, size, "%s", text == NULL ? "" : (const char *)text);
}

bool coord_col_blob(sqlite3_stmt *st, int col, void *out, size_t size) {
    const void *data = sqlite3_column_blob(st, col);
    const bool fits = data != NULL && (size_t)sqlite3_column_bytes(st, col) == size;
    if (fits)
        memcpy(out, data, size);
    else
        memset(out, 0, size);
    return fits;
}

static fl_status exec(coord_store *s, const char *sql, fl_err *err) {
    if (fl_fault()) return FL_FAIL(err, FL_EIO, "state: the disk failed");
    return sqlite3_exec(s->db, sql, NULL, NULL, NULL) == SQLITE_OK ? FL_OK : coord_sql_fail(s, err);
}

// Opens state.db and sets what must hold for every connection.
static fl_status connect_db(coord_store *s, bool create, fl_err *err) {
    char path[COORD_PATH_MAX];
    const int flags = SQLITE_OPEN_READWRITE | (create ? SQLITE_OPEN_CREATE : 0);
    snprintf(path, sizeof(path), "%s/state.db", s->dir);
    if (fl_fault()) return FL_FAIL(err, FL_EIO, "cannot open %s", path);
    if (create) { // ours alone from its first byte; -wal and -shm follow
        coord_file *f = NULL;
        FL_TRY(s->disk->ops->open(s->disk, path, true, &f, err));
        s->disk->ops->close(s->disk, f);
        FL_TRY(coord_disk_sync_parent(s->disk, path, err));
    }
    const char *vfs = coord_vfs_name(s->vfs);
    if (s->vfs == NULL) FL_TRY(coord_pages_vfs(&vfs, err));
    if (sqlite3_open_v2(path, &s->db, flags | SQLITE_OPEN_NOMUTEX, vfs) != SQLITE_OK)
        return coord_sql_fail(s, err);
    sqlite3_busy_timeout(s->db, BUSY_MS);
    if (s->vfs != NULL)
        FL_TRY(exec(s, "PRAGMA locking_mode=EXCLUSIVE; PRAGMA temp_store=MEMORY", err));
    if (create) { // of a state that is there both are as they were made
        int reserve = s->vfs == NULL ? COORD_PAGE_SUM : 0;
        sqlite3_file_control(s->db, "main", SQLITE_FCNTL_RESERVE_BYTES, &reserve);
        FL_TRY(exec(s, "PRAGMA page_size=4096", err));
    }
    FL_TRY(exec(s, "PRAGMA journal_mode=WAL", err));
    return exec(s, "PRAGMA synchronous=FULL; PRAGMA cache_size=-4096; PRAGMA trusted_schema=OFF",
                err);
}

static fl_status new_store(coord_disk *disk, const char *dir, coord_store **ret, fl_err *err) {
    coord_store *s = fl_fault() ? NULL : calloc(1, sizeof(*s));
    if (s == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory for the state");
    s->disk = disk;
    const int n = snprintf(s->dir, sizeof(s->dir), "%s", dir);
    if (n <= 0 || (size_t)n >= sizeof(s->dir)) {
        free(s);
        return FL_FAIL(err, FL_EARG, "the folder's name is empty or too long");
    }
    if (!disk->system) {
        const fl_status st = coord_vfs_open(disk, &s->vfs, err);
        if (st != FL_OK) {
            free(s);
            return st;
        }
    }
    *ret = s;
    return FL_OK;
}

static fl_status make_folders(coord_disk *disk, const char *dir, fl_err *err) {
    static const char *const inside[] = {"objects", "spool"};
    char path[COORD_PATH_MAX];
    FL_TRY(disk->ops->make_folder(disk, dir, err));
    for (size_t i = 0; i < FL_COUNT(inside); i++) {
        snprintf(path, sizeof(path), "%s/%s", dir, inside[i]);
        FL_TRY(disk->ops->make_folder(disk, path, err));
    }
    return FL_OK;
}

fl_status coord_store_create_on(coord_disk *disk, const char *dir, fl_err *err) {
    coord_store *s = NULL;
    char sql[sizeof(schema) + 128];
    fl_status st = new_store(disk, dir, &s, err);
    if (st != FL_OK) goto out;
    st = make_folders(disk, dir, err);
    if (st != FL_OK) goto out;
    st = connect_db(s, true, err);
    if (st != FL_OK) goto out;
    int64_t version = 0;
    st = coord_sql_integer(s, &version, err, "PRAGMA user_version", "");
    if (st != FL_OK) goto out;
    if (version != 0) {
        st = FL_FAIL(err, FL_ESTATE, "%s holds a coordinator already; choose another folder", dir);
        goto out;
    }
    // One transaction: a half-made schema never has a version, and is made again from nothing.
    snprintf(sql, sizeof(sql), "BEGIN IMMEDIATE;%sPRAGMA user_version=%d;COMMIT;", schema,
             SCHEMA_VERSION);
    st = exec(s, sql, err);
out:
    coord_store_close(s);
    return st;
}

fl_status coord_store_open_on(coord_disk *disk, const char *dir, coord_store **ret, fl_err *err) {
    coord_store *s = NULL;
    char path[COORD_PATH_MAX];
    fl_status st = new_store(disk, dir, &s, err);
    if (st != FL_OK) goto out;
    snprintf(path, sizeof(path), "%s/state.db", s->dir);
    if (!disk->ops->exists(disk, path)) {
        st = FL_FAIL(err, FL_ENOENT, "there is no coordinator in %s; make one with init", dir);
        goto out;
    }
    st = connect_db(s, false, err);
    if (st != FL_OK) goto out;
    int64_t version = 0;
    st = coord_sql_integer(s, &version, err, "PRAGMA user_version", "");
    if (st != FL_OK) goto out;
    if (version != SCHEMA_VERSION) {
        st = FL_FAIL(err, FL_EUNSUPPORTED, "%s has state version %lld, this program knows %d", dir,
                     (long long)version, SCHEMA_VERSION);
        goto out;
    }
    st = coord_sql_integer(s, &s->data_version, err, "PRAGMA data_version", "");
    if (st != FL_OK) goto out;
    *ret = s;
    s = NULL;
out:
    coord_store_close(s);
    return st;
}

fl_status coord_store_create(const char *dir, fl_err *err) {
    return coord_store_create_on(coord_disk_posix(), dir, err);
}

fl_status coord_store_open(const char *dir, coord_store **ret, fl_err *err) {
    return coord_store_open_on(coord_disk_posix(), dir, ret, err);
}

void coord_store_close(coord_store *s) {
    if (s == NULL) return;
    coord_store_rollback(s);
    coord_spool_close(s);
    forget_prepared(s);
    sqlite3_close(s->db);
    coord_vfs_close(s->vfs);
    free(s);
}

fl_status coord_store_begin(coord_store *s, fl_err *err) {
    if (s->batch) return FL_OK;
    FL_TRY(coord_sql_run(s, NULL, err, "BEGIN IMMEDIATE", ""));
    s->batch = true;
    return FL_OK;
}

fl_status coord_store_commit(coord_store *s, fl_err *err) {
    if (!s->batch) return FL_OK;
    fl_status st = coord_spool_sync(s, err); // bytes first, then the rows that name them
    if (st == FL_OK) st = coord_sql_run(s, NULL, err, "COMMIT", "");
    if (st != FL_OK) {
        coord_store_rollback(s);
        return st;
    }
    s->batch = false;
    return FL_OK;
}

void coord_store_rollback(coord_store *s) {
    if (!s->batch) return;
    sqlite3_exec(s->db, "ROLLBACK", NULL, NULL, NULL); // nothing to say when it fails: gone anyway
    s->batch = false;
    coord_spool_close(s); // its tail is not named by any row; opening cuts it off
}

fl_status coord_store_changed(coord_store *s, bool *ret, fl_err *err) {
    int64_t version = 0;
    FL_TRY(coord_sql_integer(s, &version, err, "PRAGMA data_version", ""));
    *ret = version != s->data_version;
    s->data_version = version;
    return FL_OK;
}
