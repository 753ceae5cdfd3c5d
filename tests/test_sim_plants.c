// Goal: the simulator finds bugs. Method: each bug of common/plant.h is compiled in and switched on
// alone, small fleets are simulated from seed 1 on, and one of the first seeds must fail; with none
// switched on, none may. The table that is printed is that of docs/TESTING.md.
#include "tests/check.h"

#include "common/crypto.h"
#include "common/log.h"
#include "common/plant.h"
#include "sim/sim.h"

#ifdef FL_FAULTS // built with sanitizers, about ten times slower: some of them, and fewer seeds
enum { CLEAN = 20, STRIDE = 6, SEEDS = 100 };
#else
enum { CLEAN = 100, STRIDE = 1, SEEDS = 2000 };
#endif

_Thread_local fl_plant_id fl_planted;

static const struct {
    const char *name, *text;
} plants[FL_PLANT_COUNT] = {
#define X(id, what) [FL_PLANT_##id] = {#id, what},
    FL_PLANT_LIST(X)
#undef X
};

static sim_result run(uint64_t seed) {
    const sim_opts opts = {
        .seed = seed, .nodes = 6, .rounds = 6, .loss = 0.05, .crashes = 8, .attackers = 0.3};
    sim_result r;
    fl_err err;
    T_OK(fl_crypto_init(&err), err);
    fl_log_init(FL_LOG_ERROR, false); // what the coordinator would tell its owner
    T_OK(sim_run(&opts, &r, &err), err);
    return r;
}

static void test_nothing_is_found_where_nothing_is(void) {
    fl_planted = FL_PLANT_NONE;
    for (uint64_t seed = 1; seed <= CLEAN; seed++) {
        const sim_result r = run(seed);
        T_CHECK(!r.failed, "seed %llu: %s", (unsigned long long)seed, r.problem);
    }
}

static void test_every_plant_is_found(void) {
    const char *asked = getenv("FL_SIM_PLANT_SEEDS");
    const uint64_t max = asked != NULL ? strtoull(asked, NULL, 10) : SEEDS;
    for (int p = FL_PLANT_NONE + 1; p < FL_PLANT_COUNT; p += STRIDE) {
        sim_result r = {0};
        uint64_t seed = 0;
        fl_planted = (fl_plant_id)p;
        while (!r.failed && seed < max) r = run(++seed);
        T_CHECK(r.failed, "%s was not found in %llu seeds", plants[p].name,
                (unsigned long long)max);
        printf("| %s | %s | %llu | %s |\n", plants[p].name, plants[p].text,
               (unsigned long long)seed, r.failed ? r.problem : "not found");
    }
    fl_planted = FL_PLANT_NONE;
}

T_MAIN({"nothing_is_found_where_nothing_is", test_nothing_is_found_where_nothing_is},
       {"every_plant_is_found", test_every_plant_is_found})
