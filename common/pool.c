#include "common/pool.h"

#include "common/fault.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

// One job at a time, cut into pieces. Who wants a piece takes the next number of the ticket, by
// compare-and-swap: that succeeds only while the job that was read is still the job. The caller
// waits for the pieces that were taken, never for a worker: on a busy machine one that gets no
// processor does not hold up anybody.
enum { THREADS_MAX = 64, SPINS = 4000 };
static const uint32_t CLOSED = UINT32_MAX; // as next piece: a new job is being described

struct fl_pool {
    unsigned threads; // caller included
    pthread_t thread[THREADS_MAX];
    _Atomic uint64_t ticket; // number of the job << 32 | next piece
    // The job. Written while the ticket is closed; what is read is good if the swap then succeeds.
    _Atomic(fl_pool_fn) fn;
    _Atomic(void *) ctx;
    _Atomic size_t rows, grain, pieces;
    _Atomic size_t done; // pieces
    _Atomic unsigned worker_ids;
    _Atomic bool stop;
    pthread_mutex_t lock; // guards sleeping: a job is opened under it
    pthread_cond_t wake;
};

static void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static uint32_t job_of(uint64_t ticket) {
    return (uint32_t)(ticket >> 32);
}

static void take_pieces(fl_pool *p, unsigned worker) {
    for (;;) {
        uint64_t t = atomic_load_explicit(&p->ticket, memory_order_acquire);
        const fl_pool_fn fn = atomic_load_explicit(&p->fn, memory_order_acquire);
        void *ctx = atomic_load_explicit(&p->ctx, memory_order_acquire);
        const size_t rows = atomic_load_explicit(&p->rows, memory_order_acquire);
        const size_t grain = atomic_load_explicit(&p->grain, memory_order_acquire);
        const size_t pieces = atomic_load_explicit(&p->pieces, memory_order_acquire);
        const uint32_t piece = (uint32_t)t;
        if (piece == CLOSED || piece >= pieces) return;
        if (!atomic_compare_exchange_strong_explicit(&p->ticket, &t, t + 1, memory_order_acq_rel,
                                                     memory_order_acquire))
            continue;
        const size_t begin = piece * grain, left = rows - begin;
        fn(ctx, begin, begin + (left < grain ? left : grain), worker);
        atomic_fetch_add_explicit(&p->done, 1, memory_order_release);
    }
}

static bool news(fl_pool *p, uint32_t seen, uint32_t *ret_job) {
    *ret_job = job_of(atomic_load_explicit(&p->ticket, memory_order_acquire));
    return *ret_job != seen || atomic_load_explicit(&p->stop, memory_order_acquire);
}

static uint32_t wait_for_job(fl_pool *p, uint32_t seen) {
    uint32_t job;
    for (int i = 0; i < SPINS; i++) {
        if (news(p, seen, &job)) return job;
        relax();
    }
    pthread_mutex_lock(&p->lock);
    while (!news(p, seen, &job)) pthread_cond_wait(&p->wake, &p->lock);
    pthread_mutex_unlock(&p->lock);
    return job;
}

static void *work(void *arg) {
    fl_pool *p = arg;
    const unsigned worker = 1 + atomic_fetch_add(&p->worker_ids, 1);
    uint32_t seen = 0;
    for (;;) {
        seen = wait_for_job(p, seen);
        if (atomic_load_explicit(&p->stop, memory_order_acquire)) return NULL;
        take_pieces(p, worker);
    }
}

// Wakes all with a ticket, or to see that the pool stops.
static void announce(fl_pool *p, uint64_t ticket, bool stop) {
    pthread_mutex_lock(&p->lock);
    atomic_store_explicit(&p->stop, stop, memory_order_release);
    atomic_store_explicit(&p->ticket, ticket, memory_order_release);
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->lock);
}

fl_status fl_pool_open(unsigned threads, fl_pool **ret, fl_err *err) {
    if (threads == 0 || threads > THREADS_MAX)
        return FL_FAIL(err, FL_EARG, "%u threads: must be 1 to %d", threads, THREADS_MAX);
    fl_pool *p = fl_fault() ? NULL : calloc(1, sizeof(*p));
    if (p == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory for a thread pool");
    p->threads = 1;
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->wake, NULL);
    for (; p->threads < threads; p->threads++) {
        if (fl_fault() || pthread_create(&p->thread[p->threads], NULL, work, p) != 0) {
            const unsigned refused = p->threads + 1;
            fl_pool_close(p);
            return FL_FAIL(err, FL_EIO, "the system refused to start thread %u", refused);
        }
    }
    *ret = p;
    return FL_OK;
}

void fl_pool_close(fl_pool *p) {
    if (p == NULL) return;
    announce(p, atomic_load(&p->ticket), true);
    for (unsigned i = 1; i < p->threads; i++) pthread_join(p->thread[i], NULL);
    pthread_cond_destroy(&p->wake);
    pthread_mutex_destroy(&p->lock);
    free(p);
}

unsigned fl_pool_threads(const fl_pool *p) {
    return p == NULL ? 1 : p->threads;
}

void fl_pool_run(fl_pool *p, size_t rows, size_t grain, fl_pool_fn fn, void *ctx) {
    FL_ASSERT(grain > 0);
    if (rows == 0) return;
    const size_t pieces = (rows - 1) / grain + 1;
    if (p == NULL || p->threads == 1 || pieces == 1) {
        for (size_t begin = 0; begin < rows; begin += grain)
            fn(ctx, begin, rows - begin < grain ? rows : begin + grain, 0);
        return;
    }
    FL_ASSERT(pieces < CLOSED);
    const uint32_t job = job_of(atomic_load_explicit(&p->ticket, memory_order_relaxed));
    atomic_store_explicit(&p->ticket, (uint64_t)job << 32 | CLOSED, memory_order_relaxed);
    atomic_store_explicit(&p->fn, fn, memory_order_release); // release: not before it is closed
    atomic_store_explicit(&p->ctx, ctx, memory_order_release);
    atomic_store_explicit(&p->rows, rows, memory_order_release);
    atomic_store_explicit(&p->grain, grain, memory_order_release);
    atomic_store_explicit(&p->pieces, pieces, memory_order_release);
    atomic_store_explicit(&p->done, 0, memory_order_relaxed);
    announce(p, (uint64_t)(job + 1) << 32, false);
    take_pieces(p, 0);
    for (int i = 0; atomic_load_explicit(&p->done, memory_order_acquire) != pieces; i++) {
        if (i < SPINS)
            relax();
        else
            sched_yield(); // who has the last piece may be waiting for this very processor
    }
}
