#include "bench/bench.h"

static const double SHARE_LEAST = 0.97, SAMPLE_S = 3e-3, PEAK_MS = 1;

bench_args bench_args_parse(int argc, char **argv) {
    bench_args a = {.only = ""};
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--smoke") == 0) {
            a.smoke = true;
        } else if (strncmp(argv[i], "--threads=", 10) == 0) {
            a.threads = (unsigned)strtoul(argv[i] + 10, NULL, 10);
        } else if (strncmp(argv[i], "--only=", 7) == 0) {
            a.only = argv[i] + 7;
        } else {
            fprintf(stderr, "usage: %s [--smoke] [--threads=N] [--only=TEXT]\n", argv[0]);
            exit(2);
        }
    }
    return a;
}

bool bench_next_threads(const bench_args *args, unsigned *threads) {
    if (args->threads != 0) {
        const bool first = *threads == 0;
        *threads = args->threads;
        return first;
    }
    return ++*threads <= 2;
}

void *bench_alloc(size_t size) {
    const size_t whole = (size + 63) / 64 * 64;
    void *p = aligned_alloc(64, whole);
    if (p == NULL) abort();
    return memset(p, 0, whole);
}

float bench_randf(void) {
    static uint32_t state = 1;
    state = state * 1664525u + 1013904223u;
    return (float)(int32_t)state * 0x1p-31f;
}

float *bench_floats(size_t count) {
    float *p = bench_alloc(count * sizeof(*p));
    for (size_t i = 0; i < count; i++) p[i] = bench_randf();
    return p;
}

static int by_size(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *v, size_t count) {
    if (count == 0) return 0;
    qsort(v, count, sizeof(*v), by_size);
    return v[count / 2];
}

static double limit_sample(const bench_args *args, bench_team *team, const bench_case *c) {
    if (args->smoke && c->rate != BENCH_NONE) return bench_peak_sample(team, c->rate, 1e-3);
    if (c->stream != NULL) return bench_read_sample(team, c->stream, c->stream_size, 1);
    return bench_rate_here(c->rate) ? bench_peak_sample(team, c->rate, PEAK_MS) : 0;
}

void bench_run(const bench_args *args, bench_team *team, const bench_case *c) {
    if (strstr(c->kernel, args->only) == NULL && strstr(c->tag, args->only) == NULL &&
        strstr(c->shape, args->only) == NULL)
        return;
    double runs[BENCH_TRIES], limits[BENCH_TRIES], share;
    size_t good = 0, known = 0, thrown = 0;
    const double once = bench_team_run(team, &c->job, 1, &share);
    const size_t calls = args->smoke || once > SAMPLE_S ? 1 : (size_t)(SAMPLE_S / once) + 1;
    const size_t wanted = args->smoke ? 1 : BENCH_RUNS;
    for (int i = 0; i < BENCH_TRIES && good < wanted; i++) {
        const double limit = limit_sample(args, team, c);
        const double s = bench_team_run(team, &c->job, calls, &share);
        if (limit > 0) limits[known++] = limit;
        if (share >= SHARE_LEAST || args->smoke)
            runs[good++] = s / (double)calls;
        else
            thrown++;
    }
    const double s = median(runs, good), limit = median(limits, known);
    const double got = (c->stream != NULL ? c->bytes : c->ops) / s * 1e-9;
    printf("%s\t%s\t%s\t%u thr\t%.0f ns\t%.1f GOP/s\t%.2f GB/s\t", c->kernel, c->tag, c->shape,
           bench_team_threads(team), s * 1e9, c->ops / s * 1e-9, c->bytes / s * 1e-9);
    if (limit > 0)
        printf("%.0f %% of %.1f %s", 100 * got / limit, limit,
               c->stream != NULL ? "GB/s read" : bench_rate_name(c->rate));
    printf("\tthrown %zu\tcheck=%.6g\n", thrown, (double)*c->check);
}
