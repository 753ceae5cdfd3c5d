#include "node/schedule/cost.h"

// Of a dense product, what the head's thinned gradient takes before it is measured.
static const double HEAD_BACK = 0.5;
// Of the forward pass, what attention takes backward: dQ, dK, dV and the scores again.
static const double ATTENTION_BACK = 2.5;
// Passes over a float that an update takes: norm, clipping, gradient, two moments, value.
static const double UPDATE_PASSES = 8;
enum { PREFILL_CHUNK = 256 };

static double larger(double a, double b) {
    return a > b ? a : b;
}

// Threads for which there is a rate.
static uint32_t known(const node_cost *c, uint32_t threads) {
    return threads < 1 ? 1 : threads > c->rates.threads ? c->rates.threads : threads;
}

// One matrix product forward: operations at the integer rate against its bytes.
static double forward_s(const node_cost *c, uint32_t threads, double weights, double bytes,
                        double tokens) {
    return larger(2.0 * weights * tokens / c->rates.packed_ops[threads],
                  bytes / c->rates.stream_bytes[threads]);
}

static double backward_s(const node_cost *c, uint32_t threads, double weights, double bytes,
                         double tokens) {
    return larger(2.0 * weights * tokens / c->rates.float_ops[threads],
                  bytes / c->rates.read_bytes[threads]);
}

// Scores and values of causal attention: half of all pairs.
static double attention_s(const node_cost *c, uint32_t threads, double tokens, double sequence) {
    return 2.0 * c->shape.attention_width * tokens * sequence / c->rates.attention_ops[threads];
}

static double layer_s(const node_cost *c, uint32_t threads, double tokens, double sequence) {
    return forward_s(c, threads, c->shape.layer_weights, c->shape.layer_bytes, tokens) +
           attention_s(c, threads, tokens, sequence);
}

double node_cost_roofline(const node_cost *c, node_part part, uint32_t threads, uint32_t tokens) {
    const node_shape *s = &c->shape;
    const uint32_t n = known(c, threads);
    const double float_s = 1.0 / c->rates.float_ops[n], byte_s = 1.0 / c->rates.read_bytes[n];
    const double adapter = 2.0 * s->adapter_weights * tokens * float_s;
    switch (part) {
    case NODE_PART_BELOW:
        return layer_s(c, n, tokens, tokens);
    case NODE_PART_WINDOW:
        return layer_s(c, n, tokens, tokens) + adapter;
    case NODE_PART_HEAD:
        return forward_s(c, n, s->head_weights, s->head_bytes, tokens) +
               HEAD_BACK * backward_s(c, n, s->head_weights, s->head_bytes, tokens);
    case NODE_PART_CHUNK: // rows quantised, the sum of the gradient read and written
        return 4.0 * sizeof(float) * tokens * s->hidden * byte_s;
    case NODE_PART_BACK:
        return backward_s(c, n, s->layer_weights, s->layer_bytes, tokens) +
               ATTENTION_BACK * attention_s(c, n, tokens, tokens) + 1.5 * adapter;
    case NODE_PART_UPDATE: // one thread's work
        return UPDATE_PASSES * sizeof(float) * s->trained / c->rates.read_bytes[1];
    case NODE_PARTS:
        break;
    }
    return 0;
}

// The measured threads nearest to those asked for, the larger of two; 0: none.
static uint32_t nearest(const double *value_of, size_t stride, uint32_t threads) {
    for (uint32_t d = 0; d <= NODE_THREADS_MAX; d++) {
        if (threads + d <= NODE_THREADS_MAX && value_of[(threads + d) * stride] > 0)
            return threads + d;
        if (d < threads && value_of[(threads - d) * stride] > 0) return threads - d;
    }
    return 0;
}

static double quotient(const node_cost *c, node_part part, uint32_t threads, uint32_t tokens) {
    const node_calibration *k = &c->calibration;
    const size_t stride = sizeof(k->part[0]) / sizeof(double);
    if (!c->calibrated) return 1;
    const uint32_t n = nearest(&k->part[0][0][part], stride, known(c, threads));
    if (n == 0) return 1;
    const double few = k->part[n][0][part], many = k->part[n][1][part];
    if (!(many > 0) || k->tokens[0] == k->tokens[1]) return few;
    const double x0 = 1.0 / k->tokens[0], x1 = 1.0 / k->tokens[1];
    const double q = many + (few - many) * (1.0 / tokens - x1) / (x0 - x1);
    return larger(q,
                  0.1 * (few < many ? few : many)); // far outside the points a line may fall to 0
}

double node_cost_part(const node_cost *c, node_part part, uint32_t threads, uint32_t tokens) {
    return node_cost_roofline(c, part, threads, tokens) * quotient(c, part, threads, tokens);
}

static double chunks_of(const node_cost *c, uint32_t chunk) {
    const uint32_t n = chunk == 0 || chunk > c->shape.vocabulary ? c->shape.vocabulary : chunk;
    return (double)((c->shape.vocabulary + n - 1) / n);
}

// The lowest layer of a window is not gone back through to its input: q, k and v are left out.
static double spared_s(const node_cost *c, uint32_t threads, uint32_t tokens) {
    const uint32_t n = known(c, threads);
    return backward_s(c, n, c->shape.first_weights, 0, tokens);
}

double node_cost_step(const node_cost *c, const node_choice *w, uint32_t depth) {
    const uint32_t n = w->sequence, t = w->threads, window = w->window < depth ? w->window : depth;
    const uint32_t kept = w->kept < window ? w->kept : window;
    const double inner = node_cost_part(c, NODE_PART_WINDOW, t, n);
    const double below = c->shape.below_adapted ? inner : node_cost_part(c, NODE_PART_BELOW, t, n);
    const double back = window * node_cost_roofline(c, NODE_PART_BACK, t, n) - spared_s(c, t, n);
    // Kept activations are written to memory and read again; computed ones stay in the cache.
    const double kept_s =
        2.0 * sizeof(float) * c->shape.kept_floats * n * kept / c->rates.read_bytes[known(c, t)];
    const double work = (depth - window) * below + (2.0 * window - kept) * inner +
                        back * quotient(c, NODE_PART_BACK, t, n) + kept_s +
                        node_cost_part(c, NODE_PART_HEAD, t, n) +
                        chunks_of(c, w->chunk) * node_cost_part(c, NODE_PART_CHUNK, t, n);
    const double storage =
        c->rates.storage_bytes > 0 ? (double)w->stream_bytes / c->rates.storage_bytes : 0;
    return w->micro_batch * larger(work, storage) +
           window * node_cost_part(c, NODE_PART_UPDATE, t, n);
}

double node_cost_prefill(const node_cost *c, uint32_t threads, uint32_t tokens) {
    const uint32_t n = known(c, threads);
    const uint32_t piece = tokens < PREFILL_CHUNK ? tokens : PREFILL_CHUNK;
    const double layers = c->shape.layers;
    const double one =
        larger(0, layers * (layer_s(c, n, tokens, tokens) - layer_s(c, n, tokens, 0))) +
        tokens * layers * layer_s(c, n, piece, 0) / piece;
    const uint32_t m = nearest(c->calibration.prefill, 1, n);
    const double q = c->calibrated && m != 0 ? c->calibration.prefill[m] : 1;
    return tokens / (one * q);
}

double node_cost_decode(const node_cost *c, uint32_t threads) {
    const uint32_t n = known(c, threads);
    const double one =
        c->shape.layers * forward_s(c, n, c->shape.layer_weights, c->shape.layer_bytes, 1) +
        forward_s(c, n, c->shape.head_weights, c->shape.head_bytes, 1);
    const uint32_t m = nearest(c->calibration.decode, 1, n);
    const double q = c->calibrated && m != 0 ? c->calibration.decode[m] : 1;
    return 1.0 / (one * q);
}

static double over(double measured, double roofline) {
    const double q = roofline > 0 ? measured / roofline : 1;
    return q > 1e-3 ? q : 1e-3; // a difference of two measurements may come out below zero
}

void node_calibration_set(node_cost *c, uint32_t point, const node_timing s[2]) {
    const uint32_t threads = s[0].threads, n = s[0].tokens;
    FL_ASSERT(point < NODE_POINTS && threads <= NODE_THREADS_MAX && s[0].chunks != s[1].chunks);
    node_calibration *k = &c->calibration;
    double *part = k->part[threads][point];
    // Two turns of everything but the head: their mean.
    const double window_s = (s[0].window_s + s[1].window_s) / 2;
    const double back_s = (s[0].back_s + s[1].back_s) / 2 - window_s;
    const double chunk_s = (s[0].head_s - s[1].head_s) / ((double)s[0].chunks - s[1].chunks);
    const double head_s = s[1].head_s - larger(chunk_s, 0) * s[1].chunks;
    k->tokens[point] = n;
    if (threads > k->threads) k->threads = threads;
    if (s[0].below > 0)
        part[NODE_PART_BELOW] = over((s[0].below_s + s[1].below_s) / 2 / s[0].below,
                                     node_cost_roofline(c, NODE_PART_BELOW, threads, n));
    part[NODE_PART_WINDOW] =
        over(window_s / s[0].window, node_cost_roofline(c, NODE_PART_WINDOW, threads, n));
    if (s[0].below == 0) part[NODE_PART_BELOW] = part[NODE_PART_WINDOW];
    part[NODE_PART_HEAD] = over(head_s, node_cost_roofline(c, NODE_PART_HEAD, threads, n));
    part[NODE_PART_CHUNK] = over(chunk_s, node_cost_roofline(c, NODE_PART_CHUNK, threads, n));
    part[NODE_PART_BACK] =
        over(back_s, s[0].window * node_cost_roofline(c, NODE_PART_BACK, threads, n) -
                         spared_s(c, threads, n));
    part[NODE_PART_UPDATE] = over((s[0].update_s + s[1].update_s) / 2 / s[0].window,
                                  node_cost_roofline(c, NODE_PART_UPDATE, threads, n));
    c->calibrated = true;
}
