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
    T_OK(node_rates_measure(&kern, 2, 256u << 20, &r, &err), err);
    for (uint32_t n = 1; n <= 2; n++)
        T_CHECK(r.packed_ops[n] > 1e6 && r.float_ops[n] > 1e6 && r.attention_ops[n] > 1e6 &&
                    r.stream_bytes[n] > 1e6 && r.read_bytes[n] > r.stream_bytes[n] / 4,
                "%g %g %g %g %g", r.packed_ops[n], r.float_ops[n], r.attention_ops[n],
                r.stream_bytes[n], r.read_bytes[n]);
    T_OK(node_rates_storage("/proc/self/exe", &r.storage_bytes, &err), err);
    T_CHECK(r.storage_bytes > 1e3, "%g", r.storage_bytes);
    T_EQ(node_rates_storage("/nonexistent", &r.storage_bytes, &err), FL_ENOENT);
    T_EQ(node_rates_storage("/dev/null", &r.storage_bytes, &err), FL_EIO);
    T_OK(node_rates_write(path, &f, &r, &err), err);
    T_OK(node_rates_read(path, &f, &back, &err), err);
    T_NEAR(back.float_ops[2], r.float_ops[2], 1e-5 * r.float_ops[2], "float rate");
    T_NEAR(back.storage_bytes, r.storage_bytes, 1e-5 * r.storage_bytes, "storage rate");
    T_EQ(back.threads_stream, r.threads_stream);
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

static void test_facts_that_change_a_plan(void) {
    node_facts was, now;
    node_facts_read("", &was);
    now = was;
    now.temperature_c = 99;
    now.memory_available /= 2;
    T_CHECK(!node_facts_differ(&was, &now), "heat and free memory change by themselves");
    now = was, now.cores++;
    T_CHECK(node_facts_differ(&was, &now), "cores");
    now = was, now.quota_cores = 0.5;
    T_CHECK(node_facts_differ(&was, &now), "quota");
    now = was, now.memory_limit = 1 << 28;
    T_CHECK(node_facts_differ(&was, &now), "memory limit");
    T_CHECK(!node_policy_spare(69.9, 75, false) && node_policy_spare(70, 75, false), "gets warm");
    T_CHECK(node_policy_spare(65, 75, true) && !node_policy_spare(64.9, 75, true), "cools down");
    T_CHECK(!node_policy_spare(NAN, 75, true), "says nothing");
    T_EQ(node_policy_threads(2, 2, 0.0), 2);
    T_EQ(node_policy_threads(2, 2, 0.4), 2);
    T_EQ(node_policy_threads(2, 2, 0.67), 1); // three threads on two processors
    T_EQ(node_policy_threads(2, 2, 5.0), 1);
    T_EQ(node_policy_threads(4, 64, 40.0), 4); // others are busy elsewhere
    T_EQ(node_policy_threads(4, 4, 2.0), 2);
    T_EQ(node_policy_threads(4, 4, NAN), 1);
}

static const node_cost machine = {.shape = {.layers = 30,
                                            .hidden = 576,
                                            .vocabulary = 49152,
                                            .exits = 4,
                                            .layer_weights = 3.54e6,
                                            .first_weights = 0.55e6,
                                            .head_weights = 28.3e6,
                                            .layer_bytes = 2e6,
                                            .head_bytes = 30e6,
                                            .attention_width = 576,
                                            .adapter_weights = 8e4,
                                            .trained = 4e4,
                                            .kept_floats = 7000},
                                  .rates = {.threads = 2,
                                            .packed_ops = {0, 1e11, 2e11},
                                            .float_ops = {0, 5e10, 9e10},
                                            .attention_ops = {0, 3e10, 5e10},
                                            .stream_bytes = {0, 1e10, 1.5e10},
                                            .read_bytes = {0, 1e10, 1.5e10},
                                            .threads_compute = 2,
                                            .threads_stream = 2}};
static const node_choice usual = {
    .threads = 2, .window = 4, .micro_batch = 1, .sequence = 128, .chunk = 1024};

static void test_cost_grows_with_work(void) {
    node_choice c = usual;
    const double base = node_cost_step(&machine, &c, 30);
    T_CHECK(node_cost_step(&machine, &c, 15) < base, "an early exit is cheaper");
    c.window = 8;
    const double wide = node_cost_step(&machine, &c, 30);
    c.window = 12;
    T_CHECK(wide > base, "a wide window costs more");
    T_NEAR(node_cost_step(&machine, &c, 30) - wide, wide - base, 1e-9, "linear in the window");
    c = usual, c.threads = 1;
    T_CHECK(node_cost_step(&machine, &c, 30) > base, "one thread is slower");
    c.threads = 7;
    T_NEAR(node_cost_step(&machine, &c, 30), base, 0, "threads without a rate: the most that has");
    c = usual, c.chunk = 64;
    T_CHECK(node_cost_step(&machine, &c, 30) > base, "many chunks cost more");
    c = usual, c.kept = 4;
    T_CHECK(node_cost_step(&machine, &c, 30) < base, "what is kept is not computed again");
    c = usual, c.micro_batch = 3;
    const double three = node_cost_step(&machine, &c, 30);
    T_CHECK(three > 2.9 * base && three < 3 * base, "three sequences, one update: %g, %g", three,
            base);
    c = usual, c.sequence = 256;
    T_CHECK(node_cost_step(&machine, &c, 30) > 2 * base - 1e-3, "attention's square");
    // One token is bound by memory: bytes of all layers and of the head over the read rate.
    T_NEAR(node_cost_decode(&machine, 2), 1.5e10 / (30 * 2e6 + 30e6), 1e-6, "decode");
    T_CHECK(node_cost_prefill(&machine, 2, 512) > 3 * node_cost_decode(&machine, 2),
            "reading a prompt is bound by compute");
}

static void test_storage_bounds_a_step(void) {
    node_cost slow = machine;
    node_choice c = usual;
    const double base = node_cost_step(&slow, &c, 30);
    c.stream_bytes = 60000000;
    T_NEAR(node_cost_step(&slow, &c, 30), base, 0, "an unknown storage is no bound");
    slow.rates.storage_bytes = 1e12;
    T_NEAR(node_cost_step(&slow, &c, 30), base, 0, "a fast one hides behind the work");
    slow.rates.storage_bytes = 2e7;
    T_NEAR(node_cost_step(&slow, &c, 30), 3.0, 0.01, "60 MB at 20 MB/s");
}

// A machine whose parts take what the roofline says times a + b / tokens.
static const double true_a[NODE_PARTS] = {1.3, 1.5, 0.8, 2.0, 1.2, 4.0};
static const double true_b[NODE_PARTS] = {20, 30, 40, 5, 10, 0};

static double true_s(const node_cost *c, node_part p, uint32_t threads, uint32_t n) {
    return node_cost_roofline(c, p, threads, n) * (true_a[p] + true_b[p] / n);
}

static node_timing timing_of(const node_cost *c, uint32_t threads, uint32_t n, uint32_t chunks) {
    const double window_s = 2 * true_s(c, NODE_PART_WINDOW, threads, n);
    const double spared = 2.0 * c->shape.first_weights * n / c->rates.float_ops[threads];
    const double back = (2 * node_cost_roofline(c, NODE_PART_BACK, threads, n) - spared) *
                        (true_a[NODE_PART_BACK] + true_b[NODE_PART_BACK] / n);
    return (node_timing){.threads = threads,
                         .tokens = n,
                         .below = 28,
                         .window = 2,
                         .chunks = chunks,
                         .below_s = 28 * true_s(c, NODE_PART_BELOW, threads, n),
                         .window_s = window_s,
                         .head_s = true_s(c, NODE_PART_HEAD, threads, n) +
                                   chunks * true_s(c, NODE_PART_CHUNK, threads, n),
                         .back_s = window_s + back,
                         .update_s = 2 * true_s(c, NODE_PART_UPDATE, threads, n)};
}

static void calibrate(node_cost *c, uint32_t threads) {
    static const uint32_t points[] = {32, 192};
    for (uint32_t i = 0; i < FL_COUNT(points); i++) {
        const node_timing t[2] = {timing_of(c, threads, points[i], 192),
                                  timing_of(c, threads, points[i], 24)};
        node_calibration_set(c, i, t);
    }
}

static void test_calibration_finds_what_the_roofline_misses(void) {
    node_cost c = machine;
    calibrate(&c, 2);
    T_CHECK(c.calibrated, "calibrated");
    for (uint32_t n = 16; n <= 256; n *= 2)
        for (int p = 0; p < NODE_PARTS; p++) {
            const double want = true_s(&c, (node_part)p, 2, n);
            T_NEAR(node_cost_part(&c, (node_part)p, 2, n), want, 1e-9 * want, "a part");
        }
    const double one = node_cost_part(&c, NODE_PART_BACK, 1, 64);
    T_NEAR(one, node_cost_roofline(&c, NODE_PART_BACK, 1, 64) * (1.2 + 10.0 / 64), 1e-9 * one,
           "one thread was not measured: it is as far from its roofline as two");
    c.shape.below_adapted = true;
    node_cost plain = c;
    plain.shape.below_adapted = false;
    T_CHECK(node_cost_step(&c, &usual, 30) > node_cost_step(&plain, &usual, 30), "adapters below");
}

static void test_calibration_cache(void) {
    make_root();
    char path[128];
    snprintf(path, sizeof(path), "%s/calibration", root);
    node_facts f;
    node_facts_read("", &f);
    node_cost c = machine, other = machine;
    const uint64_t key = node_calibration_key(&f, &c.shape);
    calibrate(&c, 1);
    calibrate(&c, 2);
    c.calibration.key = key;
    c.calibration.decode[1] = 1.25;
    fl_err err;
    node_calibration back;
    T_EQ(node_calibration_read(path, key, &back, &err), FL_ENOENT);
    T_OK(node_calibration_write(path, &c.calibration, &err), err);
    T_OK(node_calibration_read(path, key, &back, &err), err);
    other.calibrated = true;
    other.calibration = back;
    T_NEAR(node_cost_step(&other, &usual, 30), node_cost_step(&c, &usual, 30), 1e-6, "the same");
    T_NEAR(back.decode[1], 1.25, 1e-6, "decode");
    other.shape.layer_bytes /= 2;
    T_CHECK(node_calibration_key(&f, &other.shape) != key, "another model, another key");
    T_EQ(node_calibration_read(path, key + 1, &back, &err), FL_ENOENT);
    uint8_t *data = NULL;
    size_t size = 0;
    T_OK(fl_file_read(path, 1 << 14, &data, &size, &err), err);
    for (size_t n = 0; n < size; n++) {
        T_EQ(fl_file_replace(path, (fl_bytes){data, n}, NULL), FL_OK);
        T_CHECK(node_calibration_read(path, key, &back, &err) != FL_OK, "%zu of %zu", n, size);
    }
    free(data);
    remove_root();
}

// A made-up plan: a base, and what every choice adds.
static uint64_t peak_of(const node_choice *c) {
    return 100 + 10ull * c->window + c->sequence / 8 + c->chunk / 64 + 8ull * c->kept +
           2ull * c->threads;
}

static fl_status peak(void *ctx, node_choice *c, fl_err *err) {
    (void)ctx, (void)err;
    c->peak_bytes = peak_of(c);
    return FL_OK;
}

static const node_wish all_free = {
    .threads_max = 2, .window_max = 8, .kept = UINT32_MAX, .tokens = 128, .depth = 30};

static node_choice chosen(const node_cost *cost, const node_wish *wish) {
    node_choice list[NODE_CHOICES_MAX];
    uint32_t count = 0, seen = 0;
    fl_err err;
    T_OK(node_cost_choose(cost, wish, peak, NULL, list, FL_COUNT(list), &count, &seen, &err), err);
    T_CHECK(count > 0 && count <= seen, "%u of %u", count, seen);
    for (uint32_t i = 0; i < count; i++) {
        T_CHECK(wish->peak_bytes == 0 || list[i].peak_bytes <= wish->peak_bytes, "%u fits", i);
        T_EQ(list[i].peak_bytes, peak_of(&list[i]));
        T_CHECK(i == 0 || list[i - 1].seconds <= list[i].seconds, "%u in order", i);
        T_CHECK(list[i].window == list[0].window && list[i].sequence == list[0].sequence &&
                    list[i].micro_batch == list[0].micro_batch && list[i].chunk == list[0].chunk,
                "%u learns the same", i);
    }
    return list[0];
}

static void test_choice_without_a_limit(void) {
    const node_choice c = chosen(&machine, &all_free);
    T_EQ(c.window, 8);
    T_EQ(c.sequence, 128);
    T_EQ(c.micro_batch, 1);
    T_EQ(c.threads, 2);
    T_EQ(c.kept, 8);
    T_EQ(c.chunk, 2048);
    node_wish w = all_free;
    w.window = 3, w.sequence = 64, w.kept = 1, w.chunk = 96, w.threads = 1, w.micro_batch = 5;
    const node_choice fixed = chosen(&machine, &w);
    T_CHECK(fixed.window == 3 && fixed.sequence == 64 && fixed.kept == 1 && fixed.chunk == 96 &&
                fixed.threads == 1 && fixed.micro_batch == 5,
            "the owner's choices stay");
}

static void test_choice_fits(void) {
    uint32_t window_before = 0, sequence_before = 0;
    for (uint64_t budget = 120; budget < 400; budget++) {
        node_wish w = all_free;
        w.peak_bytes = budget;
        const node_choice c = chosen(&machine, &w);
        T_EQ(c.micro_batch * c.sequence, 128); // a step is the same number of tokens
        // More memory never takes away what is learned.
        T_CHECK(c.window > window_before ||
                    (c.window == window_before && c.sequence >= sequence_before) ||
                    (sequence_before == 16 && c.sequence > 16),
                "%llu: %u, %u after %u, %u", (unsigned long long)budget, c.window, c.sequence,
                window_before, sequence_before);
        window_before = c.window, sequence_before = c.sequence;
    }
    node_wish w = all_free;
    w.peak_bytes = 100;
    node_choice list[4];
    uint32_t count, seen;
    fl_err err;
    T_EQ(node_cost_choose(&machine, &w, peak, NULL, list, 4, &count, &seen, &err), FL_ENOMEM);
    T_CHECK(list[0].window == 1 && list[0].sequence == 16 && list[0].kept == 0, "the smallest");
}

// A machine on which two threads wait for one another longer than they work.
static void test_fewer_threads_when_that_is_faster(void) {
    node_cost c = machine;
    calibrate(&c, 1);
    c.calibration.threads = 2;
    for (int i = 0; i < NODE_POINTS; i++)
        for (int p = 0; p < NODE_PARTS; p++)
            c.calibration.part[2][i][p] = 3 * c.calibration.part[1][i][p];
    T_EQ(chosen(&c, &all_free).threads, 1);
}

// Where memory is slow, what was kept costs more than to compute it again.
static void test_computes_again_when_memory_is_slow(void) {
    node_cost c = machine;
    c.rates.read_bytes[1] = c.rates.read_bytes[2] = 1e8;
    T_EQ(chosen(&c, &all_free).kept, 0);
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
       {"facts_that_change_a_plan", test_facts_that_change_a_plan},
       {"rates_cache", test_rates_cache}, {"cost_grows_with_work", test_cost_grows_with_work},
       {"storage_bounds_a_step", test_storage_bounds_a_step},
       {"calibration_finds_what_the_roofline_misses",
        test_calibration_finds_what_the_roofline_misses},
       {"calibration_cache", test_calibration_cache},
       {"choice_without_a_limit", test_choice_without_a_limit}, {"choice_fits", test_choice_fits},
       {"fewer_threads_when_that_is_faster", test_fewer_threads_when_that_is_faster},
       {"computes_again_when_memory_is_slow", test_computes_again_when_memory_is_slow},
       {"policy", test_policy})
