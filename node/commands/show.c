#include "node/commands/show.h"

enum { SHOWN = 8 };

void node_show_rates_json(const node_rates *r, fl_json *root) {
    fl_json *measured = fl_json_add_array(root, "rates");
    for (uint32_t n = 1; n <= r->threads; n++) {
        fl_json *t = fl_json_add_object(measured, NULL);
        fl_json_set_integer(t, "threads", n);
        fl_json_set_number(t, "packed_operations_per_second", r->packed_ops[n]);
        fl_json_set_number(t, "float_operations_per_second", r->float_ops[n]);
        fl_json_set_number(t, "attention_operations_per_second", r->attention_ops[n]);
        fl_json_set_number(t, "stream_bytes_per_second", r->stream_bytes[n]);
        fl_json_set_number(t, "read_bytes_per_second", r->read_bytes[n]);
    }
    fl_json_set_integer(root, "threads_compute", r->threads_compute);
    fl_json_set_integer(root, "threads_stream", r->threads_stream);
    if (r->storage_bytes > 0)
        fl_json_set_number(root, "storage_bytes_per_second", r->storage_bytes);
}

void node_show_rates(const node_rates *r, FILE *out) {
    for (uint32_t n = 1; n <= r->threads; n++)
        fprintf(out,
                "  %2u thread%s  4-bit products %6.1f Gop/s, gradients %6.1f, attention %6.1f; "
                "weights by one token %5.1f GB/s, memory %5.1f GB/s\n",
                n, n == 1 ? " " : "s", r->packed_ops[n] / 1e9, r->float_ops[n] / 1e9,
                r->attention_ops[n] / 1e9, r->stream_bytes[n] / 1e9, r->read_bytes[n] / 1e9);
    if (r->storage_bytes > 0)
        fprintf(out, "  storage of the model %.2f GB/s\n", r->storage_bytes / 1e9);
}

static double rate(const node_choice *c, double seconds) {
    return (double)c->micro_batch * c->sequence / seconds;
}

static void add_choice(fl_json *o, const node_choice *c) {
    fl_json_set_integer(o, "threads", c->threads);
    fl_json_set_integer(o, "window", c->window);
    fl_json_set_integer(o, "micro_batches", c->micro_batch);
    fl_json_set_integer(o, "sequence", c->sequence);
    fl_json_set_integer(o, "chunk", c->chunk);
    fl_json_set_integer(o, "kept_layers", c->kept);
    fl_json_set_integer(o, "peak_bytes", (int64_t)c->peak_bytes);
    fl_json_set_number(o, "predicted_tokens_per_second", rate(c, c->seconds));
    if (c->measured > 0) fl_json_set_number(o, "measured_tokens_per_second", rate(c, c->measured));
}

// The first few, and all that were measured.
static bool is_shown(const node_schedule *s, uint32_t i) {
    return i < SHOWN || s->list[i].measured > 0;
}

void node_show_schedule_json(const node_schedule *s, fl_json *root) {
    fl_json *o = fl_json_add_object(root, "schedule");
    fl_json_set_bool(o, "measured_rates", s->measured);
    fl_json_set_bool(o, "calibrated", s->cost.calibrated);
    fl_json_set_bool(o, "disturbed", s->disturbed);
    fl_json_set_integer(o, "candidates_seen", s->seen);
    add_choice(fl_json_add_object(o, "choice"), &s->choice);
    fl_json *list = fl_json_add_array(o, "candidates");
    for (uint32_t i = 0; i < s->count; i++)
        if (is_shown(s, i)) add_choice(fl_json_add_object(list, NULL), &s->list[i]);
}

static void print_choice(const node_choice *c, bool chosen, FILE *out) {
    fprintf(out, "%s %2u threads, %2u layers kept, %6.1f MB: predicted %7.1f tokens/s",
            chosen ? "->" : "  ", c->threads, c->kept, (double)c->peak_bytes / 1e6,
            rate(c, c->seconds));
    if (c->measured > 0)
        fprintf(out, ", measured %7.1f (%+.1f %%)", rate(c, c->measured),
                100 * (c->seconds / c->measured - 1));
    fprintf(out, "\n");
}

void node_show_schedule(const node_schedule *s, FILE *out) {
    const node_choice *c = &s->choice;
    fprintf(out,
            "tuning: a window of %u layers, %u x %u tokens a step, vocabulary %u at a time; "
            "%u candidates, %s\n",
            c->window, c->micro_batch, c->sequence, c->chunk, s->seen,
            s->cost.calibrated ? "predicted from this model's own steps"
            : s->measured      ? "predicted from the rates alone"
                               : "predicted from assumed rates: nothing was measured here yet");
    if (s->disturbed)
        fprintf(out, "other programs were busy meanwhile: measured again the next time\n");
    for (uint32_t i = 0; i < s->count; i++)
        if (is_shown(s, i))
            print_choice(&s->list[i],
                         s->list[i].threads == c->threads && s->list[i].kept == c->kept, out);
}
