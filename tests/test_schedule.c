// Goal: the scheduler sees the machine as it is, never plans above the memory, and pauses when the
// owner's rules say so. Method: made trees of system files; cost monotone in what should cost more;
// a peak function with known answers; the policy's whole truth table around each limit.
#include "common/file.h"
#include "node/schedule/cost.h"
#include "node/schedule/policy.h"
#include "tests/check.h"

#include <sys/stat.h>

static char root[64];

static void put(const char *path, const char *text) {
    char full[256];
    snprintf(full, sizeof(full), "%s%s", root, path);
    for (char *p = full + strlen(root) + 1; *p != '\0'; p++) {
        if (*p != '/') continue;
        *p = '\0';
        mkdir(full, 0700);
        *p = '/';
    }
    const fl_bytes bytes = {(const uint8_t *)text, strlen(text)};
    T_NEED(fl_file_replace(full, bytes, NULL) == FL_OK, "%s", full);
}

static void make_root(void) {
    snprintf(root, sizeof(root), "/tmp/fleetune_root_XXXXXX");
    T_NEED(mkdtemp(root) != NULL, "a temporary folder");
}

static void remove_root(void) {
    char command[128];
    snprintf(command, sizeof(command), "rm -rf '%s'", root);
    FILE *p = popen(command, "r");
    if (p != NULL) pclose(p);
}

static void test_facts_of_a_pi(void) {
    make_root();
    put("/proc/device-tree/model", "Raspberry Pi 4 Model B Rev 1.4");
    put("/proc/meminfo", "MemTotal:        3884360 kB\nMemFree: 1 kB\nMemAvailable: 2000000 kB\n");
    put("/sys/class/thermal/thermal_zone0/temp", "71234\n");
    put("/sys/devices/platform/soc/soc:firmware/get_throttled", "50005\n");
    put("/sys/fs/cgroup/cgroup.controllers", "cpuset cpu io pids\n");
    put("/sys/fs/cgroup/memory.max", "max\n");
    put("/sys/fs/cgroup/cpu.max", "50000 100000\n");
    node_facts f;
    node_facts_read(root, &f);
    T_STR(f.cpu_name, "Raspberry Pi 4 Model B Rev 1.4");
    T_EQ(f.memory_total, 3884360ull << 10);
    T_EQ(f.memory_limit, 0);
    T_NEAR(f.quota_cores, 0.5, 0, "half a core");
    T_EQ(node_facts_threads(&f), 1);
    T_NEAR(f.temperature_c, 71.234, 1e-9, "temperature");
    T_EQ(f.throttle_bits, 0x50005);
    T_CHECK(f.memory_cgroup_off, "the memory cgroup is off");
    T_EQ(node_facts_memory_budget(&f, 0), 2000000ull << 10);
    T_EQ(node_facts_memory_budget(&f, 300u << 20), 300u << 20);
    put("/sys/fs/cgroup/memory.max", "268435456\n");
    node_facts_read(root, &f);
    T_EQ(node_facts_memory_budget(&f, 300u << 20), 256u << 20);
    remove_root();
}

static void test_facts_of_nothing(void) {
    node_facts f;
    node_facts_read("/nonexistent", &f);
    T_CHECK(f.cores >= 1 && isnan(f.temperature_c), "%u cores", f.cores);
    T_EQ(node_facts_memory_budget(&f, 7), 7);
    T_CHECK(node_facts_threads(&f) >= 1, "threads");
}

static void test_rates_cache(void) {
    make_root();
    char path[128];
    snprintf(path, sizeof(path), "%s/rates", root);
    node_facts f;
    node_facts_read("", &f);
    fl_kern kern;
    fl_kern_select(&kern, fl_cpu_detect());
    node_rates r, back;
    fl_err err;
    T_EQ(node_rates_read(path, &f, &back, &err), FL_ENOENT);
    T_OK(node_rates_measure(&kern, 2, &r, &err), err);
    T_CHECK(r.packed_ops[1] > 1e6 && r.read_bytes[1] > 1e6, "%g %g", r.packed_ops[1],
            r.read_bytes[1]);
    T_OK(node_rates_write(path, &f, &r, &err), err);
    T_OK(node_rates_read(path, &f, &back, &err), err);
    T_NEAR(back.float_ops[2], r.float_ops[2], 1e-5 * r.float_ops[2], "float rate");
    node_facts other = f;
    other.fingerprint++;
    T_EQ(node_rates_read(path, &other, &back, &err), FL_ENOENT);
    uint8_t *data = NULL;
    size_t size = 0;
    T_OK(fl_file_read(path, 4096, &data, &size, &err), err);
    for (size_t n = 0; n < size; n++) { // every truncation
        T_EQ(fl_file_replace(path, (fl_bytes){data, n}, NULL), FL_OK);
        T_CHECK(node_rates_read(path, &f, &back, &err) != FL_OK, "%zu of %zu bytes", n, size);
    }
    free(data);
    remove_root();
}

static const node_shape shape = {.layers = 30,
                                 .hidden = 576,
                                 .vocabulary = 49152,
                                 .exits = 4,
                                 .layer_weights = 3.54e6,
                                 .head_weights = 28.3e6,
                                 .layer_bytes = 2e6,
                                 .head_bytes = 30e6,
                                 .attention_width = 576};
static const node_rates rates = {.threads = 2,
                                 .packed_ops = {0, 1e11, 2e11},
                                 .float_ops = {0, 5e10, 9e10},
                                 .read_bytes = {0, 1e10, 1.5e10},
                                 .threads_compute = 2,
                                 .threads_stream = 2};

static void test_cost_grows_with_work(void) {
    node_choice c = {.threads = 2, .window = 4, .micro_batch = 1, .sequence = 128};
    const double base = node_cost_step(&shape, &rates, &c, 30);
    T_CHECK(node_cost_step(&shape, &rates, &c, 15) < base, "an early exit is cheaper");
    c.window = 8;
    T_CHECK(node_cost_step(&shape, &rates, &c, 30) > base, "a wide window costs more");
    c.window = 4;
    c.threads = 1;
    T_CHECK(node_cost_step(&shape, &rates, &c, 30) > base, "one thread is slower");
    // One token is bound by memory: bytes of all layers and of the head over the read rate.
    T_NEAR(node_cost_decode(&shape, &rates, 2), 1.5e10 / (30 * 2e6 + 30e6), 1e-6, "decode");
    T_CHECK(node_cost_prefill(&shape, &rates, 2, 512) > 3 * node_cost_decode(&shape, &rates, 2),
            "reading a prompt is bound by compute");
}

// A made-up plan: a base, and what window and tokens add.
static fl_status peak(void *ctx, const node_choice *c, uint64_t *ret, fl_err *err) {
    (void)ctx, (void)err;
    *ret = 100 + 10ull * c->window + (uint64_t)c->micro_batch * c->sequence / 32 + c->chunk / 512;
    return FL_OK;
}

static void test_choice_fits(void) {
    fl_err err;
    const node_choice free_choice = {0};
    node_choice c;
    T_OK(node_cost_choose(&shape, &rates, &free_choice, 1000, peak, NULL, &c, &err), err);
    T_EQ(c.window, 8);
    T_EQ(c.threads, 2);
    for (uint64_t budget = 113; budget < 260; budget++) {
        T_OK(node_cost_choose(&shape, &rates, &free_choice, budget, peak, NULL, &c, &err), err);
        T_CHECK(c.peak_bytes <= budget, "%llu of %llu", (unsigned long long)c.peak_bytes,
                (unsigned long long)budget);
    }
    T_EQ(node_cost_choose(&shape, &rates, &free_choice, 111, peak, NULL, &c, &err), FL_ENOMEM);
    const node_choice wish = {.window = 3, .sequence = 64};
    T_OK(node_cost_choose(&shape, &rates, &wish, 1000, peak, NULL, &c, &err), err);
    T_EQ(c.window, 3);
    T_EQ(c.sequence, 64);
}

static void test_policy(void) {
    const node_rules r = {.pause_c = 75,
                          .resume_c = 65,
                          .busy_max = 0.25,
                          .hour_first = 22,
                          .hour_last = 6,
                          .disk_free_min = 100,
                          .mains_only = true};
    const node_observed good = {
        .temperature_c = 60, .busy_others = 0.1, .hour = 23, .disk_free = 100, .on_mains = true};
    T_EQ(node_policy_ask(&r, &good, NODE_MAY_TRAIN), NODE_MAY_TRAIN);
    node_observed o = good;
    o.temperature_c = 74.9;
    T_EQ(node_policy_ask(&r, &o, NODE_MAY_TRAIN), NODE_MAY_TRAIN);
    T_EQ(node_policy_ask(&r, &o, NODE_MAY_NOT_HOT), NODE_MAY_NOT_HOT);
    o.temperature_c = 75;
    T_EQ(node_policy_ask(&r, &o, NODE_MAY_TRAIN), NODE_MAY_NOT_HOT);
    o.temperature_c = 64.9;
    T_EQ(node_policy_ask(&r, &o, NODE_MAY_NOT_HOT), NODE_MAY_TRAIN);
    o.temperature_c = NAN;
    T_EQ(node_policy_ask(&r, &o, NODE_MAY_TRAIN), NODE_MAY_TRAIN);
    o.throttle_bits = 0x50000; // happened since boot, not now
    T_EQ(node_policy_ask(&r, &o, NODE_MAY_TRAIN), NODE_MAY_TRAIN);
    o.throttle_bits = 1;
    T_EQ(node_policy_ask(&r, &o, NODE_MAY_TRAIN), NODE_MAY_NOT_POWER);
    o = good, o.busy_others = 0.2;
    T_EQ(node_policy_ask(&r, &o, NODE_MAY_TRAIN), NODE_MAY_TRAIN);
    T_EQ(node_policy_ask(&r, &o, NODE_MAY_NOT_BUSY), NODE_MAY_NOT_BUSY);
    o = good;
    static const struct {
        uint32_t hour;
        node_may want;
    } hours[] = {{21, NODE_MAY_NOT_HOUR},
                 {22, NODE_MAY_TRAIN},
                 {0, NODE_MAY_TRAIN},
                 {5, NODE_MAY_TRAIN},
                 {6, NODE_MAY_NOT_HOUR}};
    for (size_t i = 0; i < FL_COUNT(hours); i++) {
        o.hour = hours[i].hour;
        T_EQ(node_policy_ask(&r, &o, NODE_MAY_TRAIN), hours[i].want);
    }
    o = good, o.disk_free = 99;
    T_EQ(node_policy_ask(&r, &o, NODE_MAY_TRAIN), NODE_MAY_NOT_DISK);
    o = good, o.on_mains = false;
    T_EQ(node_policy_ask(&r, &o, NODE_MAY_TRAIN), NODE_MAY_NOT_BATTERY);
}

T_MAIN({"facts_of_a_pi", test_facts_of_a_pi}, {"facts_of_nothing", test_facts_of_nothing},
       {"rates_cache", test_rates_cache}, {"cost_grows_with_work", test_cost_grows_with_work},
       {"choice_fits", test_choice_fits}, {"policy", test_policy})
