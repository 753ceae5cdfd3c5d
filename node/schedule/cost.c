#include "node/schedule/cost.h"

// Of a dense product, what the head's thinned gradient takes: measured at 256 tokens.
static const double HEAD_BACK = 0.5;

static double larger(double a, double b) {
    return a > b ? a : b;
}

// One matrix product forward: operations at the integer rate against its bytes.
static double forward_s(const node_rates *r, uint32_t threads, double weights, double bytes,
                        double tokens) {
    return larger(2.0 * weights * tokens / r->packed_ops[threads], bytes / r->read_bytes[threads]);
}

static double backward_s(const node_rates *r, uint32_t threads, double weights, double bytes,
                         double tokens) {
    return larger(2.0 * weights * tokens / r->float_ops[threads], bytes / r->read_bytes[threads]);
}

// Scores and values of causal attention: half of all pairs, in float.
static double attention_s(const node_shape *s, const node_rates *r, uint32_t threads, double tokens,
                          double sequence) {
    return 2.0 * s->attention_width * tokens * sequence / r->float_ops[threads];
}

double node_cost_step(const node_shape *s, const node_rates *r, const node_choice *c,
                      uint32_t depth) {
    const double tokens = (double)c->micro_batch * c->sequence, window = c->window;
    const double layer = forward_s(r, c->threads, s->layer_weights, s->layer_bytes, tokens) +
                         attention_s(s, r, c->threads, tokens, c->sequence);
    const double layer_back =
        backward_s(r, c->threads, s->layer_weights, s->layer_bytes, tokens) +
        2.5 * attention_s(s, r, c->threads, tokens, c->sequence); // dQ, dK, dV and the scores again
    const double head =
        forward_s(r, c->threads, s->head_weights, s->head_bytes, tokens) +
        HEAD_BACK * backward_s(r, c->threads, s->head_weights, s->head_bytes, tokens);
    // A window layer is run twice forward (recomputed in the backward pass) and once backward.
    return depth * layer + window * (layer + layer_back) + head;
}

double node_cost_prefill(const node_shape *s, const node_rates *r, uint32_t threads,
                         uint32_t tokens) {
    const double layer = forward_s(r, threads, s->layer_weights, s->layer_bytes, tokens) +
                         attention_s(s, r, threads, tokens, tokens);
    return tokens / (s->layers * layer + forward_s(r, threads, s->head_weights, s->head_bytes, 1));
}

double node_cost_decode(const node_shape *s, const node_rates *r, uint32_t threads) {
    return 1.0 / (s->layers * forward_s(r, threads, s->layer_weights, s->layer_bytes, 1) +
                  forward_s(r, threads, s->head_weights, s->head_bytes, 1));
}

typedef struct range {
    uint32_t values[8];
    uint32_t count;
} range;

static range halves(uint32_t from, uint32_t wish, uint32_t least) {
    if (wish != 0) return (range){{wish}, 1};
    range r = {.count = 0};
    for (uint32_t v = from; v >= least && v > 0 && r.count < FL_COUNT(r.values); v /= 2)
        r.values[r.count++] = v;
    return r;
}

fl_status node_cost_choose(const node_shape *s, const node_rates *r, const node_choice *wish,
                           uint64_t budget_bytes, node_peak_fn peak, void *peak_ctx,
                           node_choice *ret, fl_err *err) {
    const uint32_t deepest = (s->layers + s->exits - 1) / s->exits;
    const range windows = halves(deepest, wish->window, 1);
    const range batches = halves(4, wish->micro_batch, 1);
    const range sequences = halves(256, wish->sequence, 32);
    const range chunks = halves(4096, wish->chunk, 512);
    node_choice best = {0};
    double best_rate = 0;
    uint64_t smallest = UINT64_MAX;
    for (uint32_t w = 0; w < windows.count && best_rate == 0; w++) {
        for (uint32_t i = 0; i < batches.count * sequences.count * chunks.count; i++) {
            node_choice c = {
                .threads = wish->threads != 0 ? wish->threads : r->threads_compute,
                .window = windows.values[w],
                .micro_batch = batches.values[i % batches.count],
                .sequence = sequences.values[i / batches.count % sequences.count],
                .chunk = chunks.values[i / batches.count / sequences.count],
            };
            FL_TRY(peak(peak_ctx, &c, &c.peak_bytes, err));
            if (c.peak_bytes < smallest) smallest = c.peak_bytes;
            if (c.peak_bytes > budget_bytes) continue;
            c.seconds = node_cost_step(s, r, &c, s->layers);
            // Documents are cut at the sequence's end, so a longer one is worth a little speed.
            const double rate =
                (double)c.micro_batch * c.sequence / c.seconds * (c.sequence >= 128 ? 1.0 : 0.5);
            if (rate <= best_rate) continue;
            best_rate = rate;
            best = c;
        }
    }
    if (best_rate == 0)
        return FL_FAIL(err, FL_ENOMEM,
                       "nothing fits %llu MB: the smallest setting needs %llu MB (--memory %lluM)",
                       (unsigned long long)(budget_bytes >> 20),
                       (unsigned long long)((smallest >> 20) + 1),
                       (unsigned long long)((smallest >> 20) + 1));
    *ret = best;
    return FL_OK;
}
