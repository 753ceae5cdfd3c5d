// Goal: the federation keeps its promises on every path that a seed leads to, and a seed leads to
// one path. Method: fleets of several sizes, with and without harm, are simulated (sim/sim.h says
// what is real in them and sim/check.c what is held against them); one seed is run twice and must
// give the same events to the byte; the simulated disk is asked to forget, and must.
#include "tests/check.h"

#include "common/crypto.h"
#include "common/log.h"
#include "sim/disk.h"
#include "sim/sim.h"

#ifdef FL_FAULTS // built with sanitizers, about ten times slower
enum { SHARE = 4 };
#else
enum { SHARE = 1 };
#endif

static sim_result run(uint64_t seed, uint32_t nodes, uint32_t rounds, double harm) {
    const sim_opts opts = {.seed = seed,
                           .nodes = nodes,
                           .rounds = rounds,
                           .loss = 0.1 * harm,
                           .crashes = 6.0 * harm,
                           .attackers = 0.2 * harm};
    sim_result r;
    fl_err err;
    T_OK(fl_crypto_init(&err), err);
    fl_log_init(FL_LOG_ERROR, false); // what the coordinator would tell its owner
    T_OK(sim_run(&opts, &r, &err), err);
    T_CHECK(!r.failed, "seed %llu, %u nodes, %u rounds: %s", (unsigned long long)seed, nodes,
            rounds, r.problem);
    return r;
}

static void test_a_quiet_fleet_ends_its_rounds(void) {
    const sim_result r = run(t_seed, 8, 10, 0.0);
    T_EQ(r.rounds, 10);
    T_EQ(r.crashes, 0);
    T_CHECK(r.acknowledged == r.updates && r.updates > 0, "%llu of %llu acknowledged",
            (unsigned long long)r.acknowledged, (unsigned long long)r.updates);
}

static void test_a_seed_is_one_run(void) {
    const sim_result a = run(t_seed, 6, 6, 1.0), b = run(t_seed, 6, 6, 1.0);
    const sim_result c = run(t_seed + 1, 6, 6, 1.0);
    T_EQ(a.digest, b.digest);
    T_EQ(a.events, b.events);
    T_CHECK(a.digest != c.digest, "two seeds gave the same events");
}

static void test_many_seeds(void) {
    static const uint32_t sizes[][3] = {{1, 3, 20}, {2, 4, 20}, {4, 3, 60}, {10, 10, 20}};
    uint64_t crashes = 0, power_cuts = 0, refused = 0;
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        for (uint64_t k = 0; k < sizes[i][2] / SHARE; k++) {
            const sim_result r = run(t_seed + k, sizes[i][0], sizes[i][1], 1.0);
            crashes += r.crashes;
            power_cuts += r.power_cuts;
            refused += r.refused;
        }
    }
    // The canary: what is to be survived did happen.
    T_CHECK(crashes > 100 / SHARE, "%llu crashes", (unsigned long long)crashes);
    T_CHECK(power_cuts > 30 / SHARE, "%llu power cuts", (unsigned long long)power_cuts);
    T_CHECK(refused > 100 / SHARE, "%llu refused", (unsigned long long)refused);
}

// ---- the disk itself

static coord_file *open_file(sim_disk *d, const char *path) {
    coord_disk *t = sim_disk_table(d);
    coord_file *f = NULL;
    fl_err err;
    T_OK(t->ops->open(t, path, true, &f, &err), err);
    return f;
}

static void write_byte(sim_disk *d, coord_file *f, uint64_t at, uint8_t byte) {
    coord_disk *t = sim_disk_table(d);
    fl_err err;
    T_OK(t->ops->write(t, f, at, (fl_bytes){&byte, 1}, &err), err);
}

static int byte_at(sim_disk *d, coord_file *f, uint64_t at) { // -1: the file ends before
    coord_disk *t = sim_disk_table(d);
    uint8_t byte = 0;
    size_t got = 0;
    fl_err err;
    T_OK(t->ops->read(t, f, at, &byte, 1, &got, &err), err);
    return got == 1 ? byte : -1;
}

static void test_the_disk_forgets(void) {
    unsigned kept = 0, lost = 0, names_kept = 0, names_lost = 0;
    for (uint64_t seed = 0; seed < 300; seed++) {
        sim_disk *d = sim_disk_new(seed, NULL);
        coord_disk *t = sim_disk_table(d);
        fl_err err;
        coord_file *f = open_file(d, "/d/synced");
        write_byte(d, f, 0, 1);
        T_OK(t->ops->sync(t, f, &err), err);
        T_OK(t->ops->sync_folder(t, "/d", &err), err);
        write_byte(d, f, 0, 2);
        t->ops->close(t, f);
        t->ops->close(t, open_file(d, "/d/new"));
        sim_disk_restart(d, true);
        T_CHECK(t->ops->exists(t, "/d/synced"), "a synced name is gone");
        f = open_file(d, "/d/synced");
        const int byte = byte_at(d, f, 0);
        T_CHECK(byte == 1 || byte == 2, "seed %llu: %d", (unsigned long long)seed, byte);
        kept += byte == 2;
        lost += byte == 1;
        names_kept += t->ops->exists(t, "/d/new");
        names_lost += !t->ops->exists(t, "/d/new");
        t->ops->close(t, f);
        sim_disk_free(d);
    }
    T_CHECK(kept > 50 && lost > 50, "%u kept, %u lost", kept, lost);
    T_CHECK(names_kept > 50 && names_lost > 50, "%u kept, %u lost", names_kept, names_lost);
}

static void test_the_disk_dies_when_told(void) {
    for (uint64_t k = 1; k <= 4; k++) {
        sim_disk *d = sim_disk_new(k, NULL);
        coord_disk *t = sim_disk_table(d);
        const uint8_t bytes[2] = {1, 2};
        sim_disk_arm(d, k);
        const fl_status st = coord_disk_replace(t, "/d/x", (fl_bytes){bytes, 2}, NULL);
        T_CHECK(st == FL_EIO && sim_disk_dead(d), "change %llu", (unsigned long long)k);
        sim_disk_restart(d, false);
        uint8_t *data = NULL;
        size_t size = 0;
        const fl_status read = coord_disk_read_all(t, "/d/x", 8, &data, &size, NULL);
        T_CHECK(read == FL_ENOENT || size == 2, "half a file after change %llu",
                (unsigned long long)k);
        free(data);
        sim_disk_free(d);
    }
}

T_MAIN({"a_quiet_fleet_ends_its_rounds", test_a_quiet_fleet_ends_its_rounds},
       {"a_seed_is_one_run", test_a_seed_is_one_run}, {"many_seeds", test_many_seeds},
       {"the_disk_forgets", test_the_disk_forgets},
       {"the_disk_dies_when_told", test_the_disk_dies_when_told})
