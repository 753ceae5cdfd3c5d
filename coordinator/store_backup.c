// A copy of a state that others are using: consistent, because nobody can commit while its files
// get their second names, and the database is then read as it was at that moment.
//
// Objects never change, so their copies are links where the file system allows it. The spool grows,
// so it is copied. The lock is held for the links and the spool alone, never for the database.
#include "common/crypto.h"
#include "common/file.h"
#include "coordinator/store_sql.h"

#include <dirent.h>
#include <errno.h>
#include <sqlite3.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static fl_status copy_file(const char *from, const char *to, fl_err *err) {
    enum { PIECE = 1 << 20 };
    fl_map map = {0};
    fl_file *file = NULL;
    struct stat s;
    if (stat(from, &s) == 0 && s.st_size == 0) return fl_file_replace(to, (fl_bytes){0}, err);
    fl_status st = fl_map_open(from, &map, err);
    if (st == FL_OK) st = fl_file_create(to, &file, err);
    for (size_t at = 0; at < map.bytes.size && st == FL_OK; at += PIECE) {
        const size_t left = map.bytes.size - at;
        st = fl_file_write(file, (fl_bytes){map.bytes.data + at, left < PIECE ? left : PIECE}, err);
    }
    if (st == FL_OK) st = fl_file_commit(&file, err);
    fl_file_discard(file);
    fl_map_close(&map);
    return st;
}

// A second name is durable with its folder, which the last call for the folder makes so.
static fl_status link_file(const char *from, const char *to, fl_err *err) {
    if (link(from, to) == 0) return FL_OK;
    if (errno == EXDEV || errno == EPERM || errno == EMLINK || errno == EOPNOTSUPP)
        return copy_file(from, to, err);
    return FL_FAIL(err, FL_EIO, "cannot link %s: %s", to, strerror(errno));
}

static fl_status copy_folder(const coord_store *s, const char *to, const char *name,
                             fl_status (*copy)(const char *, const char *, fl_err *), fl_err *err) {
    char from_path[2 * COORD_PATH_MAX], to_path[2 * COORD_PATH_MAX];
    snprintf(from_path, COORD_PATH_MAX, "%s/%s", s->dir, name);
    snprintf(to_path, COORD_PATH_MAX, "%s/%s", to, name);
    FL_TRY(fl_folder_make(to_path, err));
    DIR *dir = opendir(from_path);
    if (dir == NULL) return FL_FAIL(err, FL_EIO, "cannot read %s: %s", from_path, strerror(errno));
    fl_status st = FL_OK;
    for (const struct dirent *e; st == FL_OK && (e = readdir(dir)) != NULL;) {
        if (e->d_name[0] == '.') continue;
        snprintf(from_path, sizeof(from_path), "%s/%s/%s", s->dir, name, e->d_name);
        snprintf(to_path, sizeof(to_path), "%s/%s/%s", to, name, e->d_name);
        st = copy(from_path, to_path, err);
        if (st != FL_OK && access(from_path, F_OK) != 0) st = FL_OK; // a piece that was given up
    }
    closedir(dir);
    snprintf(to_path, sizeof(to_path), "%s/%s", to, name);
    return st == FL_OK ? fl_folder_sync(to_path, err) : st;
}

// Reads the database as `pinned` sees it: its read transaction is open.
static fl_status copy_database(coord_store *pinned, const char *to, fl_err *err) {
    coord_store into = {.disk = pinned->disk};
    const char *vfs = NULL;
    char path[COORD_PATH_MAX];
    FL_TRY(coord_pages_vfs(&vfs, err));
    snprintf(into.dir, sizeof(into.dir), "%s", to);
    snprintf(path, sizeof(path), "%s/state.db", to);
    FL_TRY(fl_file_replace(path, (fl_bytes){0}, err)); // mode 0600 from its first byte
    fl_status st = FL_OK;
    if (sqlite3_open_v2(path, &into.db, SQLITE_OPEN_READWRITE | SQLITE_OPEN_NOMUTEX, vfs) !=
        SQLITE_OK) {
        st = coord_sql_fail(&into, err);
        goto out;
    }
    sqlite3_backup *b = sqlite3_backup_init(into.db, "main", pinned->db, "main");
    if (b == NULL) {
        st = coord_sql_fail(&into, err);
        goto out;
    }
    (void)sqlite3_backup_step(b, -1);
    if (sqlite3_backup_finish(b) != SQLITE_OK) st = coord_sql_fail(&into, err);
out:
    sqlite3_close(into.db);
    return st;
}

static fl_status copy_all(coord_store *s, coord_store *pinned, const char *to, fl_err *err) {
    int64_t rows = 0;
    char from_path[COORD_PATH_MAX], to_path[COORD_PATH_MAX];
    FL_TRY(fl_folder_make(to, err));
    FL_TRY(coord_store_begin(s, err)); // from here nobody commits
    FL_TRY(coord_sql_run(pinned, NULL, err, "BEGIN", ""));
    FL_TRY(coord_sql_integer(pinned, &rows, err, "SELECT count(*) FROM facts", ""));
    FL_TRY(copy_folder(s, to, "objects", link_file, err));
    FL_TRY(copy_folder(s, to, "spool", copy_file, err));
    coord_store_rollback(s); // to here
    FL_TRY(copy_database(pinned, to, err));
    FL_TRY(copy_folder(s, to, "keys", copy_file, err));
    snprintf(from_path, sizeof(from_path), "%s/coordinator.ini", s->dir);
    snprintf(to_path, sizeof(to_path), "%s/coordinator.ini", to);
    return copy_file(from_path, to_path, err);
}

fl_status coord_store_backup(coord_store *s, const char *to, fl_err *err) {
    coord_store *pinned = NULL;
    fl_status st = coord_store_open(s->dir, &pinned, err);
    if (st == FL_OK) st = copy_all(s, pinned, to, err);
    coord_store_rollback(s);
    coord_store_close(pinned); // ends its transaction
    return st;
}
