// simulate: many seeds of the whole federation, on all cores.
#include "common/clock.h"
#include "common/crypto.h"
#include "common/log.h"
#include "coordinator/commands/commands.h"
#include "coordinator/registry.h"
#include "sim/sim.h"

#include <malloc.h>
#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>

typedef struct simulate_opts {
    int64_t seeds, first, nodes, rounds, threads;
    double loss, crashes, attackers;
    bool trace, json;
} simulate_opts;

#define ROW(field, key, kind, unit, min, max, otherwise, help)                                     \
    { NULL, key, kind, unit, min, max, otherwise, help, NULL, offsetof(simulate_opts, field) }
static const fl_setting table[] = {
    ROW(seeds, "seeds", FL_KIND_INTEGER, "seeds", 1, 1e12, "100", "how many to run"),
    ROW(first, "first-seed", FL_KIND_INTEGER, "", 0, 9e15, "1", "the first of them"),
    ROW(nodes, "nodes", FL_KIND_INTEGER, "nodes", 1, COORD_NODES_MAX, "20", "in the fleet"),
    ROW(rounds, "rounds", FL_KIND_INTEGER, "rounds", 1, 1000, "30", "after which a run ends"),
    ROW(threads, "threads", FL_KIND_INTEGER, "threads", 0, 1024, "0",
        "seeds that run at the same time; 0: one a core"),
    ROW(loss, "loss", FL_KIND_NUMBER, "", 0, 0.9, "0.05",
        "most of its frames that a link loses; half as many come twice"),
    ROW(crashes, "crashes", FL_KIND_NUMBER, "", 0, 1000, "6",
        "of the coordinator in a run, on average; nodes die as well"),
    ROW(attackers, "attackers", FL_KIND_NUMBER, "", 0, 0.9, "0.1",
        "share of nodes that send what must be refused"),
    ROW(trace, "trace", FL_KIND_FLAG, NULL, 0, 0, "no", "every event on standard error"),
    ROW(json, "json", FL_KIND_FLAG, NULL, 0, 0, "no", "one JSON object for machines"),
};

typedef struct fleet { // what the threads share
    const simulate_opts *o;
    atomic_llong next; // seed to run
    atomic_bool stop;
    pthread_mutex_t lock; // of what follows
    sim_result total;     // sums; digest: of all seeds' digests, in any order
    int64_t done, failed_seed;
    fl_status status;
    fl_err err;
} fleet;

static void add(fleet *f, int64_t seed, const sim_result *r) {
    sim_result *t = &f->total;
    f->done++;
    t->digest += (r->digest ^ (uint64_t)seed) * 0x9e3779b97f4a7c15u;
    t->virtual_ms += r->virtual_ms;
    t->events += r->events;
    t->frames += r->frames;
    t->rounds += r->rounds;
    t->updates += r->updates;
    t->acknowledged += r->acknowledged;
    t->refused += r->refused;
    t->checks += r->checks;
    t->crashes += r->crashes;
    t->power_cuts += r->power_cuts;
    t->node_crashes += r->node_crashes;
    t->recoveries_compared += r->recoveries_compared;
    if (!r->failed || (t->failed && seed > f->failed_seed)) return;
    t->failed = true;
    f->failed_seed = seed;
    snprintf(t->problem, sizeof(t->problem), "%s", r->problem);
}

static void *worker(void *arg) {
    fleet *f = arg;
    const simulate_opts *o = f->o;
    while (!atomic_load(&f->stop)) {
        const int64_t seed = atomic_fetch_add(&f->next, 1);
        if (seed >= o->first + o->seeds) break;
        const sim_opts opts = {.seed = (uint64_t)seed,
                               .nodes = (uint32_t)o->nodes,
                               .rounds = (uint32_t)o->rounds,
                               .loss = o->loss,
                               .crashes = o->crashes,
                               .attackers = o->attackers,
                               .trace = o->trace ? stderr : NULL};
        sim_result r;
        fl_err err;
        const fl_status st = sim_run(&opts, &r, &err);
        pthread_mutex_lock(&f->lock);
        if (st != FL_OK) {
            f->status = st;
            f->err = err;
        } else {
            add(f, seed, &r);
        }
        pthread_mutex_unlock(&f->lock);
        if (st != FL_OK || r.failed) atomic_store(&f->stop, true);
    }
    return NULL;
}

static void run_threads(fleet *f) {
    pthread_t threads[1024];
    const int64_t cores = (int64_t)sysconf(_SC_NPROCESSORS_ONLN);
    int64_t want = f->o->threads != 0 ? f->o->threads : cores, count = 0;
    if (f->o->trace) want = 1;
    while (count < want - 1 && pthread_create(&threads[count], NULL, worker, f) == 0) count++;
    worker(f);
    for (int64_t i = 0; i < count; i++) pthread_join(threads[i], NULL);
}

static void print_text(const fleet *f, double real_s) {
    const sim_result *t = &f->total;
    const double virtual_s = (double)t->virtual_ms / 1000.0;
    if (t->failed)
        printf("seed %lld: %s\nreplay: fleetune-coordinator simulate --first-seed %lld --seeds 1"
               " --nodes %lld --rounds %lld --loss %g --crashes %g --attackers %g --trace\n",
               (long long)f->failed_seed, t->problem, (long long)f->failed_seed,
               (long long)f->o->nodes, (long long)f->o->rounds, f->o->loss, f->o->crashes,
               f->o->attackers);
    printf("%lld seeds, %llu rounds, %llu updates counted, %llu acknowledged, %llu refused;"
           " %llu crashes of the coordinator (%llu power cuts), %llu of nodes;"
           " %llu recoveries compared\n",
           (long long)f->done, (unsigned long long)t->rounds, (unsigned long long)t->updates,
           (unsigned long long)t->acknowledged, (unsigned long long)t->refused,
           (unsigned long long)t->crashes, (unsigned long long)t->power_cuts,
           (unsigned long long)t->node_crashes, (unsigned long long)t->recoveries_compared);
    printf("%llu frames, %llu events, %llu checks; %.0f s of virtual time in %.1f s: %.0f x;"
           " digest %016llx\n",
           (unsigned long long)t->frames, (unsigned long long)t->events,
           (unsigned long long)t->checks, virtual_s, real_s, virtual_s / real_s,
           (unsigned long long)t->digest);
}

static int print_json(const fleet *f, double real_s) {
    const sim_result *t = &f->total;
    char digest[32];
    fl_json *j = coord_cmd_object();
    if (j == NULL) return FL_EXIT_FAILED;
    snprintf(digest, sizeof(digest), "%016llx", (unsigned long long)t->digest);
    fl_json_set_bool(j, "failed", t->failed);
    if (t->failed) {
        fl_json_set_integer(j, "failed_seed", f->failed_seed);
        fl_json_set_string(j, "problem", t->problem);
    }
    const struct {
        const char *name;
        uint64_t value;
    } numbers[] = {
        {"seeds", (uint64_t)f->done},
        {"rounds", t->rounds},
        {"updates", t->updates},
        {"acknowledged", t->acknowledged},
        {"refused", t->refused},
        {"crashes", t->crashes},
        {"power_cuts", t->power_cuts},
        {"node_crashes", t->node_crashes},
        {"recoveries_compared", t->recoveries_compared},
        {"frames", t->frames},
        {"events", t->events},
        {"checks", t->checks},
        {"virtual_ms", t->virtual_ms},
        {"real_ms", (uint64_t)(real_s * 1000.0)},
    };
    for (size_t i = 0; i < FL_COUNT(numbers); i++)
        fl_json_set_integer(j, numbers[i].name, (int64_t)numbers[i].value);
    fl_json_set_string(j, "digest", digest);
    return coord_cmd_print(j);
}

static int run(const void *options) {
    const simulate_opts *o = options;
    fleet f = {.o = o, .lock = PTHREAD_MUTEX_INITIALIZER};
    fl_err err;
    if (fl_crypto_init(&err) != FL_OK) return fl_cli_fail(&err);
    fl_log_init(FL_LOG_ERROR, false);
#ifdef M_TRIM_THRESHOLD // a simulation is made and thrown away: its memory is used again
    (void)mallopt(M_MMAP_THRESHOLD, 1 << 30);
    (void)mallopt(M_TRIM_THRESHOLD, 1 << 30);
#endif
    atomic_store(&f.next, o->first);
    const double start = fl_clock_s();
    run_threads(&f);
    const double real_s = fl_clock_s() - start;
    if (f.status != FL_OK) return fl_cli_fail(&f.err);
    int status = FL_EXIT_OK;
    if (o->json)
        status = print_json(&f, real_s);
    else
        print_text(&f, real_s);
    return f.total.failed ? FL_EXIT_FAILED : status;
}

const fl_command coord_cmd_simulate = {
    .name = "simulate",
    .summary = "run the whole federation in virtual time with everything that can go wrong",
    .example = "fleetune-coordinator simulate --seeds 1000 --nodes 20 --rounds 30",
    .table = table,
    .count = FL_COUNT(table),
    .options_size = sizeof(simulate_opts),
    .run = run,
};
