// Input: the file in which measured rates are kept; its fingerprint is taken as this machine's, so
// that what follows is reached too.
// Property: no crash and no read outside, whatever the bytes; rates that were accepted index
// nothing outside their arrays, and come back from a file written of them; refused bytes leave the
// result alone.
#include "node/schedule/probe.h"
#include "tests/fuzz/fuzz.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

// The fingerprint of the file, when it has one.
static uint64_t fingerprint_of(const uint8_t *data, size_t size) {
    static const char mark[] = "fleetune-rates 1 ";
    char digits[17] = {0};
    if (size < sizeof(mark) - 1 || memcmp(data, mark, sizeof(mark) - 1) != 0) return 0;
    const size_t left = size - (sizeof(mark) - 1);
    memcpy(digits, data + sizeof(mark) - 1, left < 16 ? left : 16);
    return strtoull(digits, NULL, 16);
}

static void check(const node_rates *r) {
    FL_ASSERT(r->threads >= 1 && r->threads <= NODE_THREADS_MAX);
    FL_ASSERT(r->threads_compute >= 1 && r->threads_compute <= r->threads);
    FL_ASSERT(r->threads_stream >= 1 && r->threads_stream <= r->threads);
    for (uint32_t n = 1; n <= r->threads; n++)
        FL_ASSERT(r->packed_ops[n] > 0 && r->float_ops[n] > 0 && r->read_bytes[n] > 0);
}

// A file in memory: its name is the open file's, so nothing is left behind.
static int file_of(const uint8_t *data, size_t size, char path[static 32]) {
    const int fd = memfd_create("rates", MFD_CLOEXEC);
    FL_ASSERT(fd >= 0);
    FL_ASSERT(size == 0 || write(fd, data, size) == (ssize_t)size);
    snprintf(path, 32, "/proc/self/fd/%d", fd);
    return fd;
}

static void write_and_read(const node_facts *facts, const node_rates *rates) {
    char folder[] = "/tmp/fuzz_rates.XXXXXX", path[64];
    node_rates back = {0};
    FL_ASSERT(mkdtemp(folder) != NULL);
    snprintf(path, sizeof(path), "%s/rates", folder);
    FL_ASSERT(node_rates_write(path, facts, rates, NULL) == FL_OK);
    FL_ASSERT(node_rates_read(path, facts, &back, NULL) == FL_OK);
    FL_ASSERT(back.threads == rates->threads && back.threads_compute == rates->threads_compute);
    FL_ASSERT(back.threads_stream == rates->threads_stream);
    check(&back);
    unlink(path);
    rmdir(folder);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    const node_facts facts = {.fingerprint = fingerprint_of(data, size)};
    node_rates rates, before;
    char path[32];
    memset(&rates, 0x5a, sizeof(rates));
    memcpy(&before, &rates, sizeof(rates));
    const int fd = file_of(data, size, path);
    if (node_rates_read(path, &facts, &rates, NULL) == FL_OK) {
        check(&rates);
        write_and_read(&facts, &rates);
    } else {
        FL_ASSERT(memcmp(&rates, &before, sizeof(rates)) == 0);
    }
    close(fd);
    return 0;
}
