// store_sql.h: what the store's files share. Not for others: include store.h.
#ifndef COORD_STORE_SQL_H
#define COORD_STORE_SQL_H

#include "coordinator/store.h"
#include "coordinator/store_disk.h"

typedef struct sqlite3 sqlite3;
typedef struct sqlite3_stmt sqlite3_stmt;

// A statement stays prepared as long as the store is open: to parse one costs more than to run it.
typedef struct coord_cached coord_cached;
enum { COORD_CACHED = 128 }; // buckets

typedef struct coord_vfs coord_vfs; // SQLite on another disk than the system's (store_vfs.c)

struct coord_store {
    coord_disk *disk;
    coord_vfs *vfs; // NULL on the system's disk
    sqlite3 *db;
    coord_cached *cached[COORD_CACHED]; // by the address of their text
    bool batch;
    int64_t data_version;
    coord_file *spool_file; // NULL: none open
    int64_t spool, spool_size;
    bool spool_dirty;
    char dir[COORD_PATH_MAX - 128];
};

fl_status coord_sql_fail(coord_store *s, fl_err *err);

// Prepares, or takes one prepared before, and binds. sql must be a literal. types, one letter an
// argument: i int64_t, d double, t const char *, b const uint8_t *, size_t (a blob).
fl_status coord_sql(coord_store *s, sqlite3_stmt **ret, fl_err *err, const char *sql,
                    const char *types, ...) FL_NODISCARD;
// One row, or *ret_row false at the end.
fl_status coord_sql_step(coord_store *s, sqlite3_stmt *st, bool *ret_row, fl_err *err) FL_NODISCARD;
void coord_sql_end(sqlite3_stmt *st); // it may be taken again; NULL is fine
// Prepare, bind, step to the end. *ret_changed may be NULL.
fl_status coord_sql_run(coord_store *s, int64_t *ret_changed, fl_err *err, const char *sql,
                        const char *types, ...) FL_NODISCARD;
// The first column of the first row. FL_ENOENT when there is no row.
fl_status coord_sql_integer(coord_store *s, int64_t *ret, fl_err *err, const char *sql,
                            const char *types, ...) FL_NODISCARD;

int64_t coord_col_i(sqlite3_stmt *st, int col);
double coord_col_d(sqlite3_stmt *st, int col);
void coord_col_text(sqlite3_stmt *st, int col, char *out, size_t size);
// A blob of exactly `size` bytes; zeros and false for any other.
bool coord_col_blob(sqlite3_stmt *st, int col, void *out, size_t size);

// The layer that puts a sum on every page of state.db (store_pages.c): a name for sqlite3_open_v2.
enum { COORD_PAGE_SUM = 8 }; // bytes reserved at the end of a page
fl_status coord_pages_vfs(const char **ret, fl_err *err) FL_NODISCARD;

void coord_spool_path(const coord_store *s, int64_t spool, char ret_path[COORD_PATH_MAX]);
void coord_spool_close(coord_store *s);
fl_status coord_spool_sync(coord_store *s, fl_err *err) FL_NODISCARD;

fl_status coord_vfs_open(coord_disk *disk, coord_vfs **ret, fl_err *err) FL_NODISCARD;
const char *coord_vfs_name(const coord_vfs *v); // for sqlite3_open_v2; NULL for NULL
void coord_vfs_close(coord_vfs *v);             // NULL is fine

#endif
