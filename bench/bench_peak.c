// The limits of this machine, with one thread and with two: arithmetic by instruction, reading by
// place. Other benchmarks print their share of these.
#include "bench/bench.h"

enum { RUNS = 9 };

static double best(double a, double b) {
    return a > b ? a : b;
}

static void reading(const bench_args *args, bench_team *team, const char *name, bench_pages pages,
                    size_t size) {
    const unsigned threads = bench_team_threads(team);
    bench_memory m = bench_memory_open(pages, size * threads);
    const size_t passes = args->smoke ? 1 : ((size_t)128 << 20) / size + 1;
    double rate = 0;
    for (int i = 0; i < (args->smoke ? 1 : RUNS); i++)
        rate = best(rate, bench_read_sample(team, m.data, m.size, passes));
    printf("read %-16s %u thr\t%zu KiB a thread\t%.1f GB/s\n", name, threads, size >> 10, rate);
    bench_memory_close(&m);
}

static void all(const bench_args *args, bench_team *team) {
    for (unsigned r = 0; r < BENCH_RATES; r++) {
        double rate = 0;
        if (!bench_rate_here((bench_rate)r)) continue;
        for (int i = 0; i < (args->smoke ? 1 : RUNS); i++)
            rate = best(rate, bench_peak_sample(team, (bench_rate)r, args->smoke ? 0.01 : 2));
        printf("peak %-16s %u thr\t%.1f GOP/s\n", bench_rate_name((bench_rate)r),
               bench_team_threads(team), rate);
    }
    const size_t l1 = bench_cache_size(1), l2 = bench_cache_size(2), l3 = bench_cache_size(3);
    const size_t ram = args->smoke ? 1 << 20 : (size_t)256 << 20;
    if (l1 != 0) reading(args, team, "L1", BENCH_PAGES_HUGE, l1 / 2);
    if (l2 != 0) reading(args, team, "L2", BENCH_PAGES_HUGE, l2 / 2);
    if (l3 != 0) reading(args, team, "L3", BENCH_PAGES_HUGE, l3 / 8);
    reading(args, team, "RAM huge pages", BENCH_PAGES_HUGE, ram);
    reading(args, team, "RAM small pages", BENCH_PAGES_SMALL, ram);
    reading(args, team, "mapped file", BENCH_PAGES_FILE, ram);
}

int main(int argc, char **argv) {
    const bench_args args = bench_args_parse(argc, argv);
    if (!args.smoke) bench_state_print("before");
    for (unsigned threads = 0; bench_next_threads(&args, &threads);) {
        bench_team *team = bench_team_open(threads);
        all(&args, team);
        bench_team_close(team);
    }
    if (!args.smoke) bench_state_print("after");
    return 0;
}
