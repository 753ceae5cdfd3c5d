// Goal: a plan for the weights keeps its word. Whatever the limit, what is mapped stays below it,
// the bytes read are the file's, the order of use may be anything, and less memory means more
// reading, never more memory.
// Method: a model of a few megabytes as a file; passes as tuning and generation make them, each
// part read through and summed; the kernel's own count of the mapping's resident pages after every
// step.
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/fault.h"
#include "node/model/resident.h"
#include "tests/check.h"
#include "tests/model_fixtures.h"

enum { LAYERS = 8, ROWS = 1024, HIDDEN = 128, LOOSE = 4, AROUND = 64 << 10 };
static const char path[] = "test_resident.gguf";

static node_model *open_model(bool untied) {
    t_model_opts o = t_model_even();
    o.layers = LAYERS;
    o.hidden = HIDDEN, o.head_size = 32, o.ffn = 512;
    o.vocabulary = 8192;
    o.untied = untied;
    fl_err err;
    node_model *m = NULL;
    T_OK(t_model_write(path, &o, &err), err);
    // A file just written lies in the system's cache in pages of any size, and one is mapped whole:
    // out of it, so that what is read comes in pages.
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    T_CHECK(fd >= 0 && fsync(fd) == 0 && posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED) == 0, "sync");
    close(fd);
    T_OK(node_model_open(path, &m, &err), err);
    unlink(path);
    return m;
}

static const node_resident_use tuning = {.layers = LAYERS, .window = 2, .head_rows = ROWS};

// Bytes of the mapping in this process's page tables.
static uint64_t mapped_bytes(const node_model *m) {
    const uintptr_t base = (uintptr_t)node_gguf_bytes(m->file).data;
    const uintptr_t end = base + node_gguf_bytes(m->file).size;
    FILE *f = fopen("/proc/self/smaps", "re");
    char line[512];
    bool ours = false;
    uint64_t sum = 0;
    T_CHECK(f != NULL, "smaps");
    while (fgets(line, sizeof(line), f) != NULL) {
        uintptr_t from, to;
        unsigned long long kb;
        // Advice may have cut the mapping into several.
        if (sscanf(line, "%" SCNxPTR "-%" SCNxPTR " ", &from, &to) == 2)
            ours = from < end && to > base;
        else if (ours && sscanf(line, "Rss: %llu kB", &kb) == 1)
            sum += kb << 10;
    }
    fclose(f);
    return sum;
}

static uint64_t sum_bytes(const uint8_t *data, size_t size) {
    uint64_t h = 0xcbf29ce484222325u;
    for (size_t i = 0; i < size; i += 61) h = (h ^ data[i]) * 0x100000001b3u;
    return h;
}

static uint64_t read_layer(const node_model *m, uint32_t layer) {
    uint64_t h = 0;
    node_resident_layer(m, layer);
    for (int i = 0; i < NODE_MODULES; i++)
        h = h * 31 + sum_bytes(m->layer[layer].linear[i].data, m->layer[layer].linear[i].size);
    return h;
}

static uint64_t read_rows(const node_model *m, uint32_t first) {
    const size_t row = m->head.size / m->head.rows;
    node_resident_head(m, first, first + ROWS);
    return sum_bytes(m->head.data + first * row, ROWS * row);
}

static uint64_t read_loose(const node_model *m, const node_matrix *table, uint32_t seed) {
    float row[HIDDEN];
    uint64_t h = 0;
    for (uint32_t i = 0; i < LOOSE; i++) {
        node_resident_row(m, table, (seed * 7919 + i * 2741) % m->vocabulary, row);
        h = h * 31 + sum_bytes((const uint8_t *)row, sizeof(row));
    }
    return h;
}

typedef struct sums {
    uint64_t value, most;
} sums;

static void note(const node_model *m, uint64_t value, sums *s) {
    const uint64_t now = mapped_bytes(m);
    s->value = s->value * 1000003 + value;
    if (now > s->most) s->most = now;
}

// One step of tuning: layers, head, target rows, back through the window.
static void tuning_pass(const node_model *m, uint32_t seed, sums *s) {
    const node_resident_pass pass = {
        .last = LAYERS - 1, .heads = 1, .low = LAYERS - 2, .back = true};
    node_resident_begin(m, &pass);
    note(m, read_loose(m, &m->embedding, seed), s);
    for (uint32_t l = 0; l < LAYERS; l++) note(m, read_layer(m, l), s);
    for (uint32_t r = 0; r < m->vocabulary; r += ROWS) note(m, read_rows(m, r), s);
    note(m, read_loose(m, &m->head, seed), s);
    for (uint32_t l = LAYERS; l-- > LAYERS - 2;) note(m, read_layer(m, l), s);
}

static void test_every_limit(bool untied) {
    node_model *m = open_model(untied);
    node_resident_plan whole, plan;
    T_CHECK(node_resident_make_plan(m, &tuning, 0, &whole), "no limit");
    T_CHECK(whole.ring == 0 && whole.streamed == 0, "nothing passes without a limit");
    T_CHECK(!node_resident_make_plan(m, &tuning, 1, &plan), "a byte is not enough");
    const uint64_t least = plan.least;
    T_CHECK(!node_resident_make_plan(m, &tuning, least - 1, &plan), "the bound is sharp");
    sums want = {0};
    for (uint32_t i = 0; i < 3; i++) tuning_pass(m, i, &want);
    node_resident_drop(m);
    uint64_t streamed = UINT64_MAX;
    for (int i = 0; i <= 6; i++) {
        const uint64_t limit = least + (whole.bytes - 1 - least) * (uint64_t)i / 6;
        sums got = {0};
        fl_err err;
        node_resident_stats stats;
        T_CHECK(node_resident_make_plan(m, &tuning, limit, &plan), "limit %" PRIu64, limit);
        T_CHECK(plan.bytes <= limit && plan.fixed + plan.ring == plan.bytes, "within the limit");
        T_CHECK(plan.streamed <= streamed && plan.streamed > 0, "more memory, less reading");
        streamed = plan.streamed;
        T_OK(node_resident_open(m, &plan, i % 2 == 1, &err), err);
        for (uint32_t p = 0; p < 3; p++) tuning_pass(m, p, &got);
        node_resident_read_stats(m, &stats);
        node_resident_close(m);
        node_resident_drop(m);
        T_EQ(got.value, want.value);
        T_CHECK(got.most <= limit + 2 * AROUND, "%" PRIu64 " mapped, limit %" PRIu64, got.most,
                limit);
        T_CHECK(stats.streamed_bytes >= plan.streamed * 2, "%" PRIu64 " read in three passes",
                stats.streamed_bytes);
    }
    node_model_close(m);
}

static void test_every_limit_tied(void) {
    test_every_limit(false);
}

static void test_every_limit_untied(void) {
    test_every_limit(true);
}

// Whoever takes parts in another order than was said waits longer, no more.
static void test_any_order(void) {
    node_model *m = open_model(false);
    node_resident_plan plan;
    fl_err err;
    uint64_t want[LAYERS];
    for (uint32_t l = 0; l < LAYERS; l++) want[l] = read_layer(m, l);
    T_CHECK(!node_resident_make_plan(m, &tuning, 1, &plan), "the least");
    const uint64_t limit = plan.least + plan.least / 2;
    T_CHECK(node_resident_make_plan(m, &tuning, limit, &plan), "a plan");
    T_OK(node_resident_open(m, &plan, false, &err), err);
    for (uint32_t i = 0; i < 60; i++) {
        const uint32_t l = (uint32_t)(t_rand() % LAYERS);
        if (i % 20 == 7) {
            const node_resident_pass pass = {.first = l, .last = LAYERS - 1};
            node_resident_begin(m, &pass);
        }
        T_EQ(read_layer(m, l), want[l]);
        if (i % 7 == 3) (void)read_rows(m, (i % 8) * ROWS);
    }
    node_model_close(m); // closes what reads ahead, whatever it is doing
}

static void test_open_survives_every_failure(void) {
    node_model *m = open_model(false);
    node_resident_plan plan;
    T_CHECK(!node_resident_make_plan(m, &tuning, 1, &plan), "the least");
    T_CHECK(node_resident_make_plan(m, &tuning, plan.least, &plan), "a plan");
#ifdef FL_FAULTS
    unsigned n = 0;
    bool fired;
    do {
        fl_fault_arm(++n);
        const fl_status st = node_resident_open(m, &plan, false, NULL);
        fired = fl_fault_fired();
        fl_fault_arm(0);
        T_EQ(st == FL_OK, !fired);
        T_EQ(m->resident == NULL, fired);
        node_resident_close(m);
    } while (fired && n < 100);
    T_CHECK(n == 3, "memory and a thread can be refused: %u calls", n - 1);
#endif
    node_model_close(m);
}

T_MAIN({"every_limit_tied", test_every_limit_tied}, {"every_limit_untied", test_every_limit_untied},
       {"any_order", test_any_order},
       {"open_survives_every_failure", test_open_survives_every_failure})
