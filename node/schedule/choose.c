#include "node/schedule/cost.h"

#include <stdlib.h>

enum { SEQUENCE_GOOD = 32, SEQUENCE_LEAST = 16, CHUNK_MOST = 2048, CHUNK_LEAST = 64 };
// A larger chunk is as good when it is predicted to take at most this much longer.
static const double AS_GOOD = 1.03;

typedef struct search {
    const node_cost *cost;
    const node_wish *wish;
    node_peak_fn peak;
    void *peak_ctx;
    uint32_t seen;
    node_choice smallest; // of all whose peak was asked for
} search;

static uint32_t at_least(uint32_t v, uint32_t least) {
    return v < least ? least : v;
}

// The peak of a candidate, and whether it fits.
static fl_status ask(search *s, node_choice *c, bool *ret_fits, fl_err *err) {
    FL_TRY(s->peak(s->peak_ctx, c, err));
    if (s->seen++ == 0 || c->peak_bytes < s->smallest.peak_bytes) s->smallest = *c;
    *ret_fits = s->wish->peak_bytes == 0 || c->peak_bytes <= s->wish->peak_bytes;
    return FL_OK;
}

// The least that a window and a sequence can be run with.
static node_choice least_of(const search *s, uint32_t window, uint32_t sequence) {
    const node_wish *w = s->wish;
    const uint32_t split = w->sequence != 0 ? 1 : at_least(w->tokens / sequence, 1);
    return (node_choice){.threads = at_least(w->threads, 1),
                         .window = window,
                         .sequence = sequence,
                         .micro_batch = w->micro_batch != 0 ? w->micro_batch : split,
                         .chunk = w->chunk != 0 ? w->chunk : CHUNK_LEAST,
                         .kept = w->kept == UINT32_MAX ? 0 : w->kept};
}

// What is learned: the widest window, then the longest sequence, of those of `from` tokens down to
// `least`.
static fl_status fit(search *s, uint32_t from, uint32_t least, node_choice *ret, bool *ret_found,
                     fl_err *err) {
    const node_wish *w = s->wish;
    const uint32_t widest = w->window != 0 ? w->window : w->window_max;
    const uint32_t narrowest = w->window != 0 ? w->window : 1;
    for (uint32_t window = widest; window >= narrowest && window > 0; window--) {
        for (uint32_t n = from; n >= least && n > 0; n /= 2) {
            *ret = least_of(s, window, n);
            FL_TRY(ask(s, ret, ret_found, err));
            if (*ret_found) return FL_OK;
        }
    }
    *ret_found = false;
    return FL_OK;
}

static int faster(const void *a, const void *b) {
    const node_choice *x = a, *y = b;
    if (x->seconds != y->seconds) return x->seconds < y->seconds ? -1 : 1;
    return (x->peak_bytes > y->peak_bytes) - (x->peak_bytes < y->peak_bytes);
}

// Threads and kept layers of one chunk, all that fit; the best `max` are left in the list in order.
static fl_status enumerate(search *s, const node_choice *learned, uint32_t chunk, node_choice *list,
                           uint32_t max, uint32_t *ret_count, fl_err *err) {
    const node_wish *w = s->wish;
    const uint32_t thread_last = w->threads != 0 ? w->threads : at_least(w->threads_max, 1);
    const uint32_t kept_last = w->kept != UINT32_MAX ? w->kept : learned->window;
    uint32_t count = 0;
    for (uint32_t t = at_least(w->threads, 1); t <= thread_last; t++) {
        for (uint32_t k = w->kept != UINT32_MAX ? w->kept : 0; k <= kept_last; k++) {
            node_choice c = *learned;
            bool fits;
            c.threads = t, c.kept = k, c.chunk = chunk;
            FL_TRY(ask(s, &c, &fits, err));
            if (!fits) break; // more kept take more
            c.seconds = node_cost_step(s->cost, &c, w->depth);
            if (count == max && c.seconds >= list[max - 1].seconds) continue;
            if (count < max) count++;
            list[count - 1] = c;
            qsort(list, count, sizeof(*list), faster);
        }
    }
    *ret_count = count;
    return FL_OK;
}

// What costs time only. The largest chunk that is as good as the best of all.
static fl_status rank(search *s, const node_choice *learned, node_choice *list, uint32_t max,
                      uint32_t *ret_count, fl_err *err) {
    const uint32_t first = s->wish->chunk != 0 ? s->wish->chunk : CHUNK_MOST;
    const uint32_t last = s->wish->chunk != 0 ? s->wish->chunk : CHUNK_LEAST;
    double best = 0, seconds[8] = {0};
    uint32_t i = 0;
    for (uint32_t chunk = first; chunk >= last && chunk > 0; chunk /= 2, i++) {
        FL_TRY(enumerate(s, learned, chunk, list, max, ret_count, err));
        if (*ret_count == 0) continue;
        seconds[i] = list[0].seconds;
        if (best == 0 || seconds[i] < best) best = seconds[i];
    }
    i = 0;
    for (uint32_t chunk = first; chunk >= last && chunk > 0; chunk /= 2, i++) {
        if (seconds[i] == 0 || seconds[i] > AS_GOOD * best) continue;
        return enumerate(s, learned, chunk, list, max, ret_count, err);
    }
    FL_ASSERT(false); // the smallest chunk of what was learned fits
    return FL_OK;
}

fl_status node_cost_choose(const node_cost *cost, const node_wish *wish, node_peak_fn peak,
                           void *peak_ctx, node_choice *list, uint32_t max, uint32_t *ret_count,
                           uint32_t *ret_seen, fl_err *err) {
    FL_ASSERT(max > 0 && wish->tokens > 0 && (wish->window != 0 || wish->window_max != 0));
    search s = {.cost = cost, .wish = wish, .peak = peak, .peak_ctx = peak_ctx};
    const uint32_t asked = wish->sequence;
    node_choice learned;
    bool found;
    FL_TRY(fit(&s, asked != 0 ? asked : wish->tokens, asked != 0 ? asked : SEQUENCE_GOOD, &learned,
               &found, err));
    if (!found && asked == 0)
        FL_TRY(fit(&s, SEQUENCE_LEAST, SEQUENCE_LEAST, &learned, &found, err));
    *ret_count = 0;
    *ret_seen = s.seen;
    if (!found) {
        list[0] = s.smallest;
        const unsigned long long mib = (s.smallest.peak_bytes >> 20) + 1;
        return FL_FAIL(err, FL_ENOMEM, "nothing fits %llu MiB: the smallest setting needs %llu MiB",
                       (unsigned long long)(wish->peak_bytes >> 20), mib);
    }
    FL_TRY(rank(&s, &learned, list, max, ret_count, err));
    *ret_seen = s.seen;
    return FL_OK;
}
