#include "bench/team.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

enum { THREADS_MAX = 64, SPINS = 20000 };

struct bench_team {
    unsigned threads;
    pthread_t thread[THREADS_MAX];
    _Atomic unsigned round; // a new number is a new job
    _Atomic unsigned ready; // threads that wait for this round's start
    _Atomic unsigned ended; // threads that have left this round
    _Atomic bool stop;
    const bench_job *job;
    size_t calls;
    _Atomic size_t next, done; // pieces, over all calls
    double share[THREADS_MAX];
    _Atomic unsigned ids;
};

static double seconds(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void relax(int spins) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
    if (spins > SPINS) sched_yield(); // more threads than processors
}

static void wait_for_pieces(bench_team *t, size_t count) {
    for (int i = 0; atomic_load_explicit(&t->done, memory_order_acquire) < count; i++) relax(i);
}

static void run_piece(bench_team *t, size_t call, size_t piece, size_t stage_begin,
                      unsigned thread) {
    wait_for_pieces(t, call * t->job->pieces + stage_begin);
    t->job->fn(t->job->ctx, piece, thread);
    atomic_fetch_add_explicit(&t->done, 1, memory_order_release);
}

static void run_pieces(bench_team *t, unsigned thread) {
    const bench_job *job = t->job;
    if (job->fixed) {
        for (size_t c = 0; c < t->calls; c++) run_piece(t, c, thread, 0, thread);
        return;
    }
    const size_t total = t->calls * job->pieces;
    size_t stage = 0, call = 0;
    for (;;) {
        const size_t n = atomic_fetch_add_explicit(&t->next, 1, memory_order_relaxed);
        if (n >= total) return;
        if (n / job->pieces != call) call = n / job->pieces, stage = 0;
        const size_t piece = n % job->pieces;
        while (job->last != NULL && job->last[stage] <= piece) stage++;
        run_piece(t, call, piece, job->last == NULL || stage == 0 ? 0 : job->last[stage - 1],
                  thread);
    }
}

static void take_part(bench_team *t, unsigned thread) {
    atomic_fetch_add(&t->ready, 1);
    for (int i = 0; atomic_load(&t->ready) < t->threads; i++) relax(i);
    const double cpu = seconds(CLOCK_THREAD_CPUTIME_ID), wall = seconds(CLOCK_MONOTONIC);
    run_pieces(t, thread);
    wait_for_pieces(t, t->calls * t->job->pieces);
    const double used = seconds(CLOCK_THREAD_CPUTIME_ID) - cpu;
    t->share[thread] = used / (seconds(CLOCK_MONOTONIC) - wall);
    atomic_fetch_add(&t->ended, 1);
}

static void *work(void *arg) {
    bench_team *t = arg;
    const unsigned thread = 1 + atomic_fetch_add(&t->ids, 1);
    unsigned seen = 0;
    for (;;) {
        for (int i = 0; atomic_load(&t->round) == seen; i++) relax(i);
        seen = atomic_load(&t->round);
        if (atomic_load(&t->stop)) return NULL;
        take_part(t, thread);
    }
}

// A core that slept gives its full speed only after some ten milliseconds.
static void warm_piece(void *ctx, size_t piece, unsigned thread) {
    const double end = seconds(CLOCK_MONOTONIC) + 0.1;
    (void)ctx, (void)piece, (void)thread;
    while (seconds(CLOCK_MONOTONIC) < end) continue;
}

bench_team *bench_team_open(unsigned threads) {
    bench_team *t = calloc(1, sizeof(*t));
    if (t == NULL || threads == 0 || threads > THREADS_MAX) abort();
    t->threads = threads;
    for (unsigned i = 1; i < threads; i++)
        if (pthread_create(&t->thread[i], NULL, work, t) != 0) abort();
    double share;
    bench_team_run(t, &(bench_job){.fn = warm_piece, .pieces = threads, .fixed = true}, 1, &share);
    return t;
}

void bench_team_close(bench_team *t) {
    if (t == NULL) return;
    atomic_store(&t->stop, true);
    atomic_fetch_add(&t->round, 1);
    for (unsigned i = 1; i < t->threads; i++) pthread_join(t->thread[i], NULL);
    free(t);
}

unsigned bench_team_threads(const bench_team *t) {
    return t->threads;
}

double bench_team_run(bench_team *t, const bench_job *job, size_t calls, double *ret_share) {
    FL_ASSERT(!job->fixed || job->pieces == t->threads);
    t->job = job, t->calls = calls;
    atomic_store(&t->next, 0);
    atomic_store(&t->done, 0);
    atomic_store(&t->ready, 0);
    atomic_store(&t->ended, 0);
    atomic_fetch_add(&t->round, 1);
    for (int i = 0; atomic_load(&t->ready) < t->threads - 1; i++) relax(i);
    const double start = seconds(CLOCK_MONOTONIC);
    take_part(t, 0);
    const double took = seconds(CLOCK_MONOTONIC) - start;
    for (int i = 0; atomic_load(&t->ended) < t->threads; i++) relax(i);
    *ret_share = 1;
    for (unsigned i = 0; i < t->threads; i++)
        if (t->share[i] < *ret_share) *ret_share = t->share[i];
    return took;
}
