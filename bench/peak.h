// peak.h: what this machine can do at most, measured: arithmetic by kind of instruction, reading by
// where the bytes lie, and the state that a virtual machine is in.
//
// The loops are assembly, so that no compiler stands between a number and the instruction that it
// is of: independent accumulators, operands in registers, nothing else.
#ifndef FL_BENCH_PEAK_H
#define FL_BENCH_PEAK_H

#include "bench/team.h"
#include "kernels/cpu.h"

// name, FL_CPU_* bits it needs
#define BENCH_RATE_LIST(X)                                                                         \
    FL_ON_X86(X(fma_ymm, FL_CPU_AVX2 | FL_CPU_FMA))                                                \
    FL_ON_X86(X(maddubs_ymm, FL_CPU_AVX2))                                                         \
    FL_ON_X86(X(fma_zmm, FL_CPU_AVX512_VNNI))                                                      \
    FL_ON_X86(X(vpdpbusd_zmm, FL_CPU_AVX512_VNNI))                                                 \
    FL_ON_X86(X(vdpbf16ps_zmm, FL_CPU_AVX512_VNNI | FL_CPU_AVX512_BF16))                           \
    FL_ON_ARM64(X(fmla, FL_CPU_NEON))                                                              \
    FL_ON_ARM64(X(smull, FL_CPU_NEON))                                                             \
    FL_ON_ARM64(X(sdot, FL_CPU_NEON | FL_CPU_DOTPROD))

typedef enum bench_rate {
#define X(name, need) BENCH_##name,
    BENCH_RATE_LIST(X)
#undef X
        BENCH_RATES,
    BENCH_NONE = BENCH_RATES,
} bench_rate;

const char *bench_rate_name(bench_rate rate);
bool bench_rate_here(bench_rate rate); // does this machine have the instruction?

// The instruction that a variant with these needs multiplies floats or bytes by; BENCH_NONE for
// references. bf16 products are told by their need.
bench_rate bench_rate_float(uint32_t need);
bench_rate bench_rate_int8(uint32_t need);

// One sample of about `ms` milliseconds by all threads of the team: GOP/s, or 0 when a thread had
// not the processor for itself.
double bench_peak_sample(bench_team *team, bench_rate rate, double ms);
// GB/s of reading memory `passes` times, cut into one part a thread; 0 as above.
double bench_read_sample(bench_team *team, const void *data, size_t size, size_t passes);

// Memory to read from, kept until bench_memory_close.
typedef enum bench_pages {
    BENCH_PAGES_FILE, // of a mapped file in the page cache: what weights lie in
    BENCH_PAGES_SMALL,
    BENCH_PAGES_HUGE,
} bench_pages;

typedef struct bench_memory {
    uint8_t *data;
    size_t size;
} bench_memory;

bench_memory bench_memory_open(bench_pages pages, size_t size); // written once, so it is there
void bench_memory_close(bench_memory *m);

// Cache sizes in bytes; 0 where the system does not say.
size_t bench_cache_size(int level);

// Processor time that others took, for whole programs, whose threads may sleep: seconds of all
// processors since the machine started, less what this process used. The difference of two readings
// over wall time and processors is their share; above 5 % a run is worth nothing.
double bench_foreign_s(void);

// Hypervisors move virtual processors between cores. Two threads tell where they are:
//   smt      both share one core: FMA by two threads is below 1.6 times one's. Measure later.
//   near     a cache line goes to and fro within 300 ns: one last-level cache
//   far      it takes longer: two of them
//   single   one processor only
typedef struct bench_state {
    const char *word;
    double fma_one, fma_two;   // GFLOP/s
    double read_one, read_two; // GB/s of RAM, huge pages
    double ping_ns;            // round trip of a cache line
} bench_state;

bench_state bench_state_probe(void);
void bench_state_print(const char *when); // probes and prints a line

#endif
