#include "node/prefix_disk.h"

#include "common/checked.h"
#include "common/crypto.h"
#include "common/fault.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

// A name for the moment between creating and unlinking; a crash just then leaves an empty file of
// this name, which the next start removes.
static const char file_name[] = "fleetune-prefix.tmp";
enum { PATH_SIZE = 4096, TRIES = 8 };

_Static_assert((int)NODE_PREFIX_ROOM >= (int)FL_SEAL_TAG, "an entry is sealed where it lies");

struct node_prefix_disk {
    int fd;
    fl_secret *key;
    uint64_t *stamp; // [places] the nonce each place was last sealed with; 0: never
    uint64_t stamps; // nonces used
    uint32_t places;
    uint64_t written;
};

// Two processes that share a folder may remove each other's name, which neither needs any more.
static int open_nameless(const char *path) {
    for (int i = 0; i < TRIES; i++) {
        if (unlink(path) != 0 && errno != ENOENT) return -1;
        const int fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
        if (fd < 0 && errno == EEXIST) continue;
        if (fd >= 0 && unlink(path) != 0 && errno != ENOENT) {
            close(fd);
            return -1;
        }
        return fd;
    }
    return -1;
}

fl_status node_prefix_disk_open(const char *folder, const node_prefix_shape *shape,
                                node_prefix_disk **ret, fl_err *err) {
    char path[PATH_SIZE];
    const int length = snprintf(path, sizeof(path), "%s/%s", folder, file_name);
    if (length < 0 || (size_t)length >= sizeof(path))
        return FL_FAIL(err, FL_EARG, "the name of the prefix cache's folder is too long");
    node_prefix_disk *d = calloc(1, sizeof(*d));
    uint64_t *stamp = calloc(shape->store_places + 1u, sizeof(*stamp));
    if (d == NULL || stamp == NULL) {
        free(d);
        free(stamp);
        return FL_FAIL(err, FL_ENOMEM, "no memory for the prefix cache's file");
    }
    d->fd = -1;
    d->stamp = stamp;
    d->places = shape->store_places;
    fl_status st = fl_crypto_init(err);
    if (st == FL_OK) st = fl_secret_random(FL_SEAL_KEY, &d->key, err);
    if (st == FL_OK) {
        d->fd = fl_fault() ? -1 : open_nameless(path);
        if (d->fd < 0)
            st = FL_FAIL(err, FL_EIO, "cannot make a file in %s: %s", folder, strerror(errno));
    }
    if (st != FL_OK) {
        node_prefix_disk_close(d);
        return st;
    }
    *ret = d;
    return FL_OK;
}

void node_prefix_disk_close(node_prefix_disk *d) {
    if (d == NULL) return;
    if (d->fd >= 0) close(d->fd);
    fl_secret_close(d->key);
    free(d->stamp);
    free(d);
}

static void make_nonce(uint64_t stamp, uint8_t nonce[FL_SEAL_NONCE]) {
    memset(nonce, 0, FL_SEAL_NONCE);
    fl_put_u64(nonce, stamp);
}

// Moves all bytes or says that it could not; both calls may do a part at a time.
static bool write_all(node_prefix_disk *d, const uint8_t *data, size_t size, off_t at) {
    while (size > 0) {
        const ssize_t n = fl_fault() ? -1 : pwrite(d->fd, data, size, at);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return false;
        d->written += (uint64_t)n;
        data += n, size -= (size_t)n, at += n;
    }
    return true;
}

static bool read_all(const node_prefix_disk *d, uint8_t *data, size_t size, off_t at) {
    while (size > 0) {
        const ssize_t n = fl_fault() ? 0 : pread(d->fd, data, size, at);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return false;
        data += n, size -= (size_t)n, at += n;
    }
    return true;
}

static bool put(void *self, uint32_t place, uint8_t *entry, size_t size) {
    node_prefix_disk *d = self;
    uint8_t nonce[FL_SEAL_NONCE], label[4];
    FL_ASSERT(place < d->places);
    d->stamp[place] = 0; // until the whole of it is there
    make_nonce(++d->stamps, nonce);
    fl_put_u32(label, place);
    fl_seal(fl_secret_view(d->key).data, nonce, (fl_bytes){label, sizeof(label)},
            (fl_bytes){entry, size}, entry);
    const off_t at = (off_t)place * (off_t)(size + FL_SEAL_TAG);
    if (!write_all(d, entry, size + FL_SEAL_TAG, at)) return false;
    d->stamp[place] = d->stamps;
    return true;
}

static bool get(void *self, uint32_t place, uint8_t *entry, size_t size) {
    const node_prefix_disk *d = self;
    uint8_t nonce[FL_SEAL_NONCE], label[4];
    FL_ASSERT(place < d->places);
    if (d->stamp[place] == 0) return false;
    make_nonce(d->stamp[place], nonce);
    fl_put_u32(label, place);
    const off_t at = (off_t)place * (off_t)(size + FL_SEAL_TAG);
    if (!read_all(d, entry, size + FL_SEAL_TAG, at)) return false;
    return fl_unseal(fl_secret_view(d->key).data, nonce, (fl_bytes){label, sizeof(label)},
                     (fl_bytes){entry, size + FL_SEAL_TAG}, entry, NULL) == FL_OK;
}

node_prefix_store node_prefix_disk_store(node_prefix_disk *d) {
    if (d == NULL) return (node_prefix_store){0};
    return (node_prefix_store){.self = d, .places = d->places, .put = put, .get = get};
}

uint64_t node_prefix_disk_written(const node_prefix_disk *d) {
    return d == NULL ? 0 : d->written;
}

fl_status node_prefix_home_open(const node_prefix_shape *shape, const char *folder,
                                node_prefix_home *ret, fl_err *err) {
    const size_t size = node_prefix_size(shape);
    node_prefix_home home = {.block = aligned_alloc(64, (size + 64) / 64 * 64)};
    if (home.block == NULL)
        return FL_FAIL(err, FL_ENOMEM, "no memory: %zu bytes are needed for the prefix cache",
                       size);
    if (shape->store_places > 0) {
        const fl_status st = node_prefix_disk_open(folder, shape, &home.disk, err);
        if (st != FL_OK) {
            free(home.block);
            return st;
        }
    }
    const node_prefix_store store = node_prefix_disk_store(home.disk);
    fl_arena arena;
    fl_arena_init(&arena, home.block, size);
    node_prefix_bind(&home.prefix, shape, &store, &arena);
    *ret = home;
    return FL_OK;
}

void node_prefix_home_close(node_prefix_home *home) {
    node_prefix_disk_close(home->disk);
    free(home->block);
    *home = (node_prefix_home){0};
}
