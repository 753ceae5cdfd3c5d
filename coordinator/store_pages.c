// Every page of state.db carries a checksum in its last 8 bytes: SQLite has none, and a bit that
// turned on the disk would change a weight or a seed without anybody's notice. This is a layer
// between SQLite and its own file layer that writes the sum with each page and checks it at each
// read; the write-ahead log has SQLite's own sums and passes through.
//
// A page that does not hold is SQLITE_IOERR_DATA, which coord_sql_fail() calls damaged. State that
// was made before there were sums has no room for them (byte 20 of the file is 0) and passes
// through as well. A page of zeros was never written: the file grew over it.
// Source: sqlite.org/vfs.html; the layout is that of sqlite.org/cksumvfs.html, the sum is BLAKE2b.
#include "common/checked.h"
#include "common/crypto.h"
#include "coordinator/store_sql.h"

#include <sqlite3.h>
#include <string.h>

enum { PAGE = 4096, SUM = COORD_PAGE_SUM, RESERVED_AT = 20, HEAD = 100 };

typedef struct pages_file {
    sqlite3_file base;
    bool sums;          // pages have them
    sqlite3_file *real; // behind this struct
} pages_file;

static sqlite3_vfs *real_vfs(sqlite3_vfs *v) {
    return v->pAppData;
}

static sqlite3_file *real_of(sqlite3_file *f) {
    return ((pages_file *)f)->real;
}

// Of the page's bytes and of its place: a page that was written to another place does not hold.
static void sum_of(const uint8_t page[PAGE], sqlite3_int64 offset, uint8_t ret[SUM]) {
    uint8_t sum[FL_HASH_SIZE];
    fl_hasher h;
    fl_hash_init(&h, (fl_bytes){0}, FL_HASH_SIZE);
    fl_hash_add_u64(&h, (uint64_t)offset);
    fl_hash_add(&h, (fl_bytes){page, PAGE - SUM});
    fl_hash_done(&h, sum);
    memcpy(ret, sum, SUM);
}

static bool is_page(const pages_file *f, int size, sqlite3_int64 offset) {
    return f->sums && size == PAGE && offset % PAGE == 0;
}

static bool all_zero(const uint8_t page[PAGE]) {
    return page[0] == 0 && memcmp(page, page + 1, PAGE - 1) == 0;
}

static int on_close(sqlite3_file *f) {
    return real_of(f)->pMethods->xClose(real_of(f));
}

static int on_read(sqlite3_file *f, void *out, int size, sqlite3_int64 offset) {
    uint8_t sum[SUM];
    const int rc = real_of(f)->pMethods->xRead(real_of(f), out, size, offset);
    if (rc != SQLITE_OK || !is_page((pages_file *)f, size, offset)) return rc;
    sum_of(out, offset, sum);
    const uint8_t *page = out;
    return memcmp(page + PAGE - SUM, sum, SUM) == 0 || all_zero(page) ? SQLITE_OK
                                                                       : SQLITE_IOERR_DATA;
}

static int on_write(sqlite3_file *f, const void *data, int size, sqlite3_int64 offset) {
    pages_file *p = (pages_file *)f;
    uint8_t page[PAGE];
    if (offset == 0 && size >= HEAD) p->sums = ((const uint8_t *)data)[RESERVED_AT] == SUM;
    if (!is_page(p, size, offset))
        return p->real->pMethods->xWrite(p->real, data, size, offset);
    memcpy(page, data, PAGE);
    sum_of(page, offset, page + PAGE - SUM);
    return p->real->pMethods->xWrite(p->real, page, size, offset);
}

static int on_truncate(sqlite3_file *f, sqlite3_int64 size) {
    return real_of(f)->pMethods->xTruncate(real_of(f), size);
}

static int on_sync(sqlite3_file *f, int flags) {
    return real_of(f)->pMethods->xSync(real_of(f), flags);
}

static int on_size(sqlite3_file *f, sqlite3_int64 *ret) {
    return real_of(f)->pMethods->xFileSize(real_of(f), ret);
}

static int on_lock(sqlite3_file *f, int level) {
    return real_of(f)->pMethods->xLock(real_of(f), level);
}

static int on_unlock(sqlite3_file *f, int level) {
    return real_of(f)->pMethods->xUnlock(real_of(f), level);
}

static int on_check_lock(sqlite3_file *f, int *ret) {
    return real_of(f)->pMethods->xCheckReservedLock(real_of(f), ret);
}

static int on_control(sqlite3_file *f, int op, void *arg) {
    return real_of(f)->pMethods->xFileControl(real_of(f), op, arg);
}

static int on_sector(sqlite3_file *f) {
    return real_of(f)->pMethods->xSectorSize(real_of(f));
}

static int on_traits(sqlite3_file *f) {
    return real_of(f)->pMethods->xDeviceCharacteristics(real_of(f));
}

static int on_shm_map(sqlite3_file *f, int page, int size, int extend, void volatile **ret) {
    return real_of(f)->pMethods->xShmMap(real_of(f), page, size, extend, ret);
}

static int on_shm_lock(sqlite3_file *f, int offset, int n, int flags) {
    return real_of(f)->pMethods->xShmLock(real_of(f), offset, n, flags);
}

static void on_shm_barrier(sqlite3_file *f) {
    real_of(f)->pMethods->xShmBarrier(real_of(f));
}

static int on_shm_unmap(sqlite3_file *f, int remove) {
    return real_of(f)->pMethods->xShmUnmap(real_of(f), remove);
}

static int pages_open(sqlite3_vfs *vfs, sqlite3_filename name, sqlite3_file *f, int flags,
                      int *ret_flags) {
    static const sqlite3_io_methods methods = {
        .iVersion = 2, // no xFetch: a mapped page would be read past the sum
        .xClose = on_close,
        .xRead = on_read,
        .xWrite = on_write,
        .xTruncate = on_truncate,
        .xSync = on_sync,
        .xFileSize = on_size,
        .xLock = on_lock,
        .xUnlock = on_unlock,
        .xCheckReservedLock = on_check_lock,
        .xFileControl = on_control,
        .xSectorSize = on_sector,
        .xDeviceCharacteristics = on_traits,
        .xShmMap = on_shm_map,
        .xShmLock = on_shm_lock,
        .xShmBarrier = on_shm_barrier,
        .xShmUnmap = on_shm_unmap,
    };
    sqlite3_vfs *real = real_vfs(vfs);
    pages_file *p = (pages_file *)f;
    uint8_t head[HEAD];
    if ((flags & SQLITE_OPEN_MAIN_DB) == 0) return real->xOpen(real, name, f, flags, ret_flags);
    *p = (pages_file){.real = (sqlite3_file *)(p + 1)};
    const int rc = real->xOpen(real, name, p->real, flags, ret_flags);
    if (rc != SQLITE_OK) return rc;
    p->base.pMethods = &methods;
    const int got = p->real->pMethods->xRead(p->real, head, HEAD, 0);
    p->sums = got == SQLITE_IOERR_SHORT_READ || (got == SQLITE_OK && head[RESERVED_AT] == SUM);
    return SQLITE_OK; // a new one has sums, unless its first page says otherwise
}

fl_status coord_pages_vfs(const char **ret, fl_err *err) {
    static sqlite3_vfs vfs;
    *ret = "fleetune-pages";
    if (sqlite3_vfs_find(*ret) != NULL) return FL_OK;
    sqlite3_vfs *real = sqlite3_vfs_find(NULL);
    if (real == NULL) return FL_FAIL(err, FL_EIO, "SQLite has no file layer");
    vfs = *real; // everything but opening is the system's own
    vfs.szOsFile = (int)sizeof(pages_file) + real->szOsFile;
    vfs.zName = *ret;
    vfs.pNext = NULL;
    vfs.pAppData = real;
    vfs.xOpen = pages_open;
    return sqlite3_vfs_register(&vfs, 0) == SQLITE_OK
               ? FL_OK
               : FL_FAIL(err, FL_ENOMEM, "no memory for the state");
}
