// probe.h: what this machine is, asked of the system, and how fast, measured.
//
// Facts come from files under a root ("" in the programs, a made tree in the tests) and from
// sched_getaffinity; rates from short timed runs of the very kernels that will be used. A probe
// takes about half a second and is cached under a fingerprint of the facts, so that a new kernel,
// core or memory limit is measured again.
#ifndef NODE_SCHEDULE_PROBE_H
#define NODE_SCHEDULE_PROBE_H

#include "common/pool.h"
#include "kernels/dispatch.h"

enum { NODE_THREADS_MAX = 16, NODE_CORE_KINDS_MAX = 4 };

// What the system says. Unknown numbers are 0, unknown temperatures NAN.
typedef struct node_facts {
    char cpu_name[96];
    uint32_t cpu;                             // FL_CPU_* bits
    uint32_t cores;                           // this process may run on
    double quota_cores;                       // cgroup limit in cores; 0: none
    uint32_t kinds;                           // kinds of core (big.LITTLE)
    uint32_t kind_cores[NODE_CORE_KINDS_MAX]; // fastest kind first
    uint32_t kind_capacity[NODE_CORE_KINDS_MAX];
    uint64_t cache_bytes[4];                 // [1] L1 data, [2], [3]; of core 0
    uint64_t memory_total, memory_available; // bytes
    uint64_t memory_limit;                   // tightest cgroup limit; 0: none
    bool memory_cgroup_off;                  // Raspberry Pi OS: limits are silently ignored
    double temperature_c;
    uint32_t throttle_bits; // Raspberry Pi firmware word; 0 also when unknown
    uint64_t fingerprint;   // of everything that does not change by itself
} node_facts;

void node_facts_read(const char *root, node_facts *ret);
// Bytes a program may use: the least of what is available, the limit, and what the owner allows
// (0: no opinion).
uint64_t node_facts_memory_budget(const node_facts *facts, uint64_t owner_limit);
// Threads worth having: cores of the fastest kind, not above the quota.
uint32_t node_facts_threads(const node_facts *facts);
// Has something changed that a plan was made for: cores, their quota, the limit of memory?
bool node_facts_differ(const node_facts *was, const node_facts *now);
// Processor seconds that all processes together have taken since the start, and those of this one:
// how a measurement learns that others took part of the machine. 0 when the system does not say.
double node_busy_s(const char *root);
double node_busy_own_s(void);
// Temperature now, in degrees Celsius; NAN when the machine does not say.
double node_facts_temperature(const char *root);
uint32_t node_facts_throttle_bits(const char *root);

// Measured with 1 .. threads threads. Rates are of the whole machine, not of a thread.
typedef struct node_rates {
    uint32_t threads;
    double packed_ops[NODE_THREADS_MAX + 1];    // 4-bit integer product, operations/s (2 a MAC)
    double float_ops[NODE_THREADS_MAX + 1];     // dX through packed weights, operations/s
    double attention_ops[NODE_THREADS_MAX + 1]; // its forward pass at 256 tokens, operations/s
    double stream_bytes[NODE_THREADS_MAX + 1];  // packed weights against one token, bytes/s
    double read_bytes[NODE_THREADS_MAX + 1];    // memory read, bytes/s
    double storage_bytes;     // cold sequential read of the model's storage, bytes/s; 0: unknown
    uint32_t threads_compute; // the number that does best at products
    uint32_t threads_stream;  // the least number within 5 % of the best of stream_bytes
} node_rates;

// memory_max: bytes that measuring may take, 0: no opinion. The buffer for the memory rates is
// 64 MiB, or half of that. FL_ENOMEM when it cannot be had; FL_EIO when threads cannot be started.
// storage_bytes is left at 0.
fl_status node_rates_measure(const fl_kern *kern, uint32_t threads_max, uint64_t memory_max,
                             node_rates *ret, fl_err *err) FL_NODISCARD;
// For a run too short to be worth a measurement: a slow machine whose threads add up.
node_rates node_rates_assumed(uint32_t threads);
// Reads at most 32 MiB of a file, at most half a second long, after asking the system to forget
// what it has of it. A file that another process has in use may be read from memory all the same:
// then the rate is that of such a read. FL_ENOENT, FL_EIO.
fl_status node_rates_storage(const char *path, double *ret, fl_err *err) FL_NODISCARD;
// The cache: one small text file. Reading gives FL_ENOENT when there is none or it is of another
// machine, FL_EFORMAT when it was damaged or is of another version; in all cases measure again.
fl_status node_rates_read(const char *path, const node_facts *facts, node_rates *ret,
                          fl_err *err) FL_NODISCARD;
fl_status node_rates_write(const char *path, const node_facts *facts, const node_rates *rates,
                           fl_err *err) FL_NODISCARD;

#endif
