// Folding dense updates into exact sums, as a coordinator does for each byte that a node sends, and
// one optimiser step. Updates lie in memory that no cache holds and are read once, one after the
// other; what limits a fold is reading the same bytes.
//   one layer    every update is of one layer, whose sums stay in the nearest caches
//   7 layers     updates go through the layers of one window
//   30 layers    all of a model of 30, each of 41 472 + 576 values (rank 8, 576 wide)
//   TinyLlama    one layer of TinyLlama-1.1B at rank 8: 143 360 values
//   4 M values   the largest layer: its sums pass through memory too, 16 bytes for 4 of the update
#include "bench/bench.h"
#include "coordinator/aggregate.h"

#include "common/clock.h"

enum { COUNT = 41472 + 576, TINYLLAMA = 143360, LAYERS = 30, LARGE = 4 << 20, REPEATS = 100 };

typedef struct work {
    coord_sum sum[LAYERS];
    size_t layers, next;   // which layer comes next
    const float *values;   // [size]
    size_t size, count, at;
    uint64_t tokens;
    float check;
} work;

static void fold(void *ctx, size_t piece, unsigned thread) {
    work *w = ctx;
    fl_err err;
    (void)piece, (void)thread;
    coord_sum *s = &w->sum[w->next++ % w->layers];
    if (s->bound > COORD_LANE_MAX / 2) coord_sum_reset(s); // as the end of a round does
    if (w->at + w->count > w->size) w->at = 0;
    if (coord_sum_fold_f32(s, w->values + w->at, w->count, coord_weight(w->tokens, 0), COORD_ONE,
                           &err) != FL_OK)
        abort();
    w->at += w->count;
    w->check = (float)s->lane[0];
}

static void measure(const bench_args *args, bench_team *team, const bench_memory *m,
                    const fl_fold_variant *v, const char *shape, size_t layers, size_t count) {
    work w = {.layers = layers,
              .values = (const float *)(const void *)m->data,
              .size = m->size / sizeof(float),
              .count = count,
              .tokens = 4096};
    fl_err err;
    for (size_t l = 0; l < layers; l++) {
        if (coord_sum_init(&w.sum[l], count, &err) != FL_OK) abort();
        w.sum[l].fold = v;
    }
    const bench_case c = {.kernel = "fold_f32",
                          .tag = v->tag,
                          .shape = shape,
                          .job = {.fn = fold, .ctx = &w, .pieces = 1, .fixed = true},
                          .ops = 2.0 * (double)count,
                          .bytes = 4.0 * (double)count,
                          .rate = BENCH_NONE,
                          .stream = m->data,
                          .stream_size = m->size,
                          .check = &w.check};
    bench_run(args, team, &c);
    for (size_t l = 0; l < layers; l++) coord_sum_done(&w.sum[l]);
}

static void fold_all(const bench_args *args) {
    bench_team *team = bench_team_open(1);
    bench_memory m = bench_memory_open(BENCH_PAGES_HUGE, (size_t)(args->smoke ? 32 : 256) << 20);
    float *values = (float *)(void *)m.data;
    for (size_t i = 0; i < m.size / sizeof(float); i++) values[i] = 0.01f * bench_randf();
    const uint32_t cpu = fl_cpu_detect();
    for (const fl_fold_variant *v = fl_fold_variants; v->tag != NULL; v++) {
        if ((v->need & cpu) != v->need) continue;
        measure(args, team, &m, v, "one layer", 1, COUNT);
        measure(args, team, &m, v, "7 layers", 7, COUNT);
        measure(args, team, &m, v, "30 layers", LAYERS, COUNT);
        measure(args, team, &m, v, "TinyLlama", 1, TINYLLAMA);
        measure(args, team, &m, v, "4 M values", 1, LARGE);
    }
    bench_memory_close(&m);
    bench_team_close(team);
}

static int step_one(const bench_args *args) {
    const int repeats = args->smoke ? 2 : REPEATS;
    double *mean = bench_alloc(COUNT * sizeof(*mean));
    double *moments = bench_alloc(2 * COUNT * sizeof(*moments));
    float *theta = bench_alloc(COUNT * sizeof(*theta)), *values = bench_floats(COUNT);
    coord_sum sum;
    fl_err err;
    if (coord_sum_init(&sum, COUNT, &err) != FL_OK ||
        coord_sum_fold_f32(&sum, values, COUNT, coord_weight(1000, 0), COORD_ONE, &err) != FL_OK)
        return 1;
    const coord_opt opt = {COORD_FEDADAM, .01, .9, .99, 1e-3};
    coord_opt_start(&opt, COUNT, moments);
    const double began = fl_clock_s();
    for (int r = 0; r < repeats; r++) {
        if (coord_sum_mean(&sum, 0x1p-32, 0.0, mean, &err) != FL_OK ||
            coord_opt_step(&opt, COUNT, mean, theta, moments, &err) != FL_OK)
            return 1;
    }
    const double step_s = (fl_clock_s() - began) / repeats;
    printf("mean and fedadam step of %d values: %.0f us, check %.9g\n", COUNT, step_s * 1e6,
           (double)theta[0]);
    coord_sum_done(&sum);
    free(values);
    free(mean);
    free(moments);
    free(theta);
    return 0;
}

// What other frameworks do when a round ends: the weighted mean of updates that are all in memory.
// bench/peer_aggregate.py runs theirs beside it.
static int whole_round(const bench_args *args) {
    enum { UPDATES = 64 };
    float *values = bench_floats((size_t)UPDATES * COUNT);
    double *mean = bench_alloc(COUNT * sizeof(*mean)), best = 1e9;
    coord_sum sum;
    fl_err err;
    if (coord_sum_init(&sum, COUNT, &err) != FL_OK) return 1;
    for (int run = 0; run < (args->smoke ? 1 : BENCH_RUNS); run++) {
        const double began = fl_clock_s();
        coord_sum_reset(&sum);
        for (size_t k = 0; k < UPDATES; k++) {
            if (coord_sum_fold_f32(&sum, values + k * COUNT, COUNT, coord_weight(1000 + k, 0),
                                   COORD_ONE, &err) != FL_OK)
                return 1;
        }
        if (coord_sum_mean(&sum, 0x1p-32, 0.0, mean, &err) != FL_OK) return 1;
        const double s = fl_clock_s() - began;
        best = s < best ? s : best;
    }
    printf("weighted mean of %d updates of %d values: %.3f ms, %.2f GB/s, check %.9g\n", UPDATES,
           COUNT, best * 1e3, 4.0 * UPDATES * COUNT / best * 1e-9, mean[0]);
    coord_sum_done(&sum);
    free(values);
    free(mean);
    return 0;
}

int main(int argc, char **argv) {
    const bench_args args = bench_args_parse(argc, argv);
    if (!args.smoke) bench_state_print("before");
    fold_all(&args);
    const int failed = step_one(&args) + whole_round(&args);
    if (!args.smoke) bench_state_print("after");
    return failed;
}
