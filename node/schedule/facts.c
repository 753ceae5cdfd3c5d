#include "node/schedule/probe.h"

#include <math.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

enum { PATH_SIZE = 512, CPUS_MAX = 1024 };

// First line of root + path, without its newline. False when it cannot be read.
static bool read_line(const char *root, const char *path, char *line, size_t size) {
    char full[PATH_SIZE];
    snprintf(full, sizeof(full), "%s%s", root, path);
    FILE *f = fopen(full, "re");
    if (f == NULL) return false;
    const bool ok = fgets(line, (int)size, f) != NULL;
    fclose(f);
    if (ok) line[strcspn(line, "\n")] = '\0';
    return ok;
}

static bool read_number(const char *root, const char *path, uint64_t *ret) {
    char line[64], *end;
    if (!read_line(root, path, line, sizeof(line))) return false;
    const unsigned long long v = strtoull(line, &end, 10);
    if (end == line) return false;
    if (*end == 'K')
        *ret = (uint64_t)v << 10;
    else if (*end == 'M')
        *ret = (uint64_t)v << 20;
    else
        *ret = v;
    return true;
}

// "Key:   123 kB" lines of /proc/meminfo.
static void read_meminfo(const char *root, node_facts *f) {
    char full[PATH_SIZE], line[256];
    snprintf(full, sizeof(full), "%s/proc/meminfo", root);
    FILE *file = fopen(full, "re");
    if (file == NULL) return;
    while (fgets(line, sizeof(line), file) != NULL) {
        unsigned long long kib;
        if (sscanf(line, "MemTotal: %llu kB", &kib) == 1) f->memory_total = kib << 10;
        if (sscanf(line, "MemAvailable: %llu kB", &kib) == 1) f->memory_available = kib << 10;
    }
    fclose(file);
}

static void read_cpu_name(const char *root, node_facts *f) {
    char full[PATH_SIZE], line[256];
    snprintf(f->cpu_name, sizeof(f->cpu_name), "unknown");
    if (read_line(root, "/proc/device-tree/model", line, sizeof(line)))
        snprintf(f->cpu_name, sizeof(f->cpu_name), "%.90s", line);
    snprintf(full, sizeof(full), "%s/proc/cpuinfo", root);
    FILE *file = fopen(full, "re");
    if (file == NULL) return;
    while (fgets(line, sizeof(line), file) != NULL) {
        const char *colon = strchr(line, ':');
        if (strncmp(line, "model name", 10) != 0 || colon == NULL) continue;
        line[strcspn(line, "\n")] = '\0';
        snprintf(f->cpu_name, sizeof(f->cpu_name), "%.90s", colon + 2);
        break;
    }
    fclose(file);
}

// Limits of cgroup v2 and v1, as a container or a service unit sees them: at its own root.
static void read_cgroup(const char *root, node_facts *f) {
    static const char *const limits[] = {"/sys/fs/cgroup/memory.max",
                                         "/sys/fs/cgroup/memory/memory.limit_in_bytes"};
    for (size_t i = 0; i < FL_COUNT(limits); i++) {
        uint64_t limit; // "max" is no number; v1 writes a huge one
        if (read_number(root, limits[i], &limit) && limit > 0 && limit < (uint64_t)1 << 50)
            f->memory_limit = limit;
    }
    char line[128];
    double quota, period;
    if (read_line(root, "/sys/fs/cgroup/cpu.max", line, sizeof(line)) &&
        sscanf(line, "%lf %lf", &quota, &period) == 2 && period > 0)
        f->quota_cores = quota / period;
    uint64_t v1_quota, v1_period;
    if (read_number(root, "/sys/fs/cgroup/cpu/cpu.cfs_quota_us", &v1_quota) &&
        read_number(root, "/sys/fs/cgroup/cpu/cpu.cfs_period_us", &v1_period) && v1_period > 0 &&
        v1_quota < (uint64_t)1 << 40) // -1 reads as a huge number
        f->quota_cores = (double)v1_quota / (double)v1_period;
    char controllers[256];
    f->memory_cgroup_off =
        read_line(root, "/sys/fs/cgroup/cgroup.controllers", controllers, sizeof(controllers)) &&
        strstr(controllers, "memory") == NULL;
}

// Speed of a core relative to the others: its capacity where the kernel gives one (arm64), else
// its highest frequency.
static uint32_t core_capacity(const char *root, uint32_t core) {
    char path[128];
    uint64_t v = 0;
    snprintf(path, sizeof(path), "/sys/devices/system/cpu/cpu%u/cpu_capacity", core);
    if (read_number(root, path, &v)) return (uint32_t)v;
    snprintf(path, sizeof(path), "/sys/devices/system/cpu/cpu%u/cpufreq/cpuinfo_max_freq", core);
    return read_number(root, path, &v) ? (uint32_t)(v / 1000) : 1;
}

static void add_core(node_facts *f, uint32_t capacity) {
    uint32_t i = 0;
    while (i < f->kinds && f->kind_capacity[i] > capacity) i++;
    if (i < f->kinds && f->kind_capacity[i] == capacity) {
        f->kind_cores[i]++;
        return;
    }
    if (f->kinds == NODE_CORE_KINDS_MAX) return; // slower than all kinds we keep apart
    memmove(&f->kind_cores[i + 1], &f->kind_cores[i], (f->kinds - i) * sizeof(uint32_t));
    memmove(&f->kind_capacity[i + 1], &f->kind_capacity[i], (f->kinds - i) * sizeof(uint32_t));
    f->kind_cores[i] = 1;
    f->kind_capacity[i] = capacity;
    f->kinds++;
}

static void read_cores(const char *root, node_facts *f) {
    cpu_set_t set;
    CPU_ZERO(&set);
    if (sched_getaffinity(0, sizeof(set), &set) != 0) CPU_SET(0, &set);
    for (uint32_t core = 0; core < CPUS_MAX; core++) {
        if (!CPU_ISSET(core, &set)) continue;
        f->cores++;
        add_core(f, core_capacity(root, core));
    }
    for (uint32_t i = 0; i < 4; i++) {
        char path[128], type[32] = "";
        uint64_t level = 0, size = 0;
        snprintf(path, sizeof(path), "/sys/devices/system/cpu/cpu0/cache/index%u/type", i);
        if (!read_line(root, path, type, sizeof(type)) || type[0] == 'I') continue;
        snprintf(path, sizeof(path), "/sys/devices/system/cpu/cpu0/cache/index%u/level", i);
        if (!read_number(root, path, &level) || level < 1 || level > 3) continue;
        snprintf(path, sizeof(path), "/sys/devices/system/cpu/cpu0/cache/index%u/size", i);
        if (read_number(root, path, &size)) f->cache_bytes[level] = size;
    }
}

double node_busy_s(const char *root) {
    char line[256];
    double user, nice, system, idle, wait, irq, soft, steal;
    if (!read_line(root, "/proc/stat", line, sizeof(line)) ||
        sscanf(line, "cpu %lf %lf %lf %lf %lf %lf %lf %lf", &user, &nice, &system, &idle, &wait,
               &irq, &soft, &steal) != 8)
        return 0;
    return (user + nice + system + irq + soft + steal) / (double)sysconf(_SC_CLK_TCK);
}

double node_busy_own_s(void) {
    struct rusage u;
    if (getrusage(RUSAGE_SELF, &u) != 0) return 0;
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) +
           (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) * 1e-6;
}

double node_facts_temperature(const char *root) {
    char path[64];
    double hottest = NAN;
    for (int zone = 0; zone < 8; zone++) {
        uint64_t milli;
        snprintf(path, sizeof(path), "/sys/class/thermal/thermal_zone%d/temp", zone);
        if (!read_number(root, path, &milli) || milli > 200000) continue;
        const double c = (double)milli / 1000.0;
        if (!(hottest >= c)) hottest = c;
    }
    return hottest;
}

uint32_t node_facts_throttle_bits(const char *root) {
    char line[32];
    if (!read_line(root, "/sys/devices/platform/soc/soc:firmware/get_throttled", line,
                   sizeof(line)))
        return 0;
    return (uint32_t)strtoul(line, NULL, 16);
}

static void hash(uint64_t *h, const void *data, size_t size) { // FNV-1a
    const uint8_t *p = data;
    for (size_t i = 0; i < size; i++) *h = (*h ^ p[i]) * 0x100000001b3u;
}

void node_facts_read(const char *root, node_facts *ret) {
    node_facts f = {.cpu = fl_cpu_detect()};
    read_cpu_name(root, &f);
    read_meminfo(root, &f);
    read_cgroup(root, &f);
    read_cores(root, &f);
    f.temperature_c = node_facts_temperature(root);
    f.throttle_bits = node_facts_throttle_bits(root);
    f.fingerprint = 0xcbf29ce484222325u;
    hash(&f.fingerprint, f.cpu_name, strlen(f.cpu_name));
    hash(&f.fingerprint, &f.cpu, sizeof(f.cpu));
    hash(&f.fingerprint, &f.cores, sizeof(f.cores));
    hash(&f.fingerprint, &f.quota_cores, sizeof(f.quota_cores));
    hash(&f.fingerprint, f.kind_cores, sizeof(f.kind_cores));
    hash(&f.fingerprint, FL_VERSION, strlen(FL_VERSION));
    *ret = f;
}

uint64_t node_facts_memory_budget(const node_facts *f, uint64_t owner_limit) {
    uint64_t budget = f->memory_available != 0 ? f->memory_available : UINT64_MAX;
    if (f->memory_limit != 0 && f->memory_limit < budget) budget = f->memory_limit;
    if (owner_limit != 0 && owner_limit < budget) budget = owner_limit;
    return budget;
}

bool node_facts_differ(const node_facts *was, const node_facts *now) {
    return was->cores != now->cores || was->quota_cores != now->quota_cores ||
           was->memory_limit != now->memory_limit ||
           memcmp(was->kind_cores, now->kind_cores, sizeof(was->kind_cores)) != 0;
}

uint32_t node_facts_threads(const node_facts *f) {
    uint32_t threads = f->kinds == 0 ? 1 : f->kind_cores[0];
    if (f->quota_cores > 0 && (double)threads > ceil(f->quota_cores))
        threads = (uint32_t)ceil(f->quota_cores);
    if (threads > NODE_THREADS_MAX) threads = NODE_THREADS_MAX;
    return threads == 0 ? 1 : threads;
}
