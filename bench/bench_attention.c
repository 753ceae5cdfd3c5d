// Attention over one sequence, forward and backward, and of one token after many. Threads take the
// pieces that the engine makes: forward 8 tokens by a key/value head, backward a key/value head.
// Limit: the peak of float multiply-adds, for a triangle of scores (backward 2.5 times forward).
// One token goes through layer after layer, whose keys and values together are larger than any
// cache; its limit is reading them.
#include "bench/bench.h"
#include "kernels/dispatch.h"

enum { HEADS = 9, KV_HEADS = 3, SIZE = 64, GRAIN = 8, GROUP = HEADS / KV_HEADS };

typedef struct sequence {
    fl_attention a;
    fl_attention_grad g;
    uint32_t tokens, first; // of `tokens` rows the queries from `first` on
    const fl_attention_variant *v;
    float *memory[9];
    uint32_t *begin, *row;
} sequence;

static sequence sequence_make(uint32_t tokens, uint32_t first) {
    const size_t q = (size_t)tokens * HEADS * SIZE, kv = (size_t)tokens * KV_HEADS * SIZE;
    const size_t counts[] = {q, kv, kv, q, (size_t)tokens * HEADS, q, q, kv, kv};
    sequence s = {.tokens = tokens, .first = first};
    for (size_t i = 0; i < FL_COUNT(s.memory); i++) s.memory[i] = bench_floats(counts[i]);
    s.begin = bench_alloc(tokens * sizeof(*s.begin));
    s.row = bench_alloc(tokens * sizeof(*s.row));
    for (uint32_t t = 0; t < tokens; t++) s.row[t] = t;
    s.a = (fl_attention){.heads = HEADS,
                         .kv_heads = KV_HEADS,
                         .head_size = SIZE,
                         .kv_begin = s.begin,
                         .kv_row = s.row,
                         .q = s.memory[0],
                         .k = s.memory[1],
                         .v = s.memory[2],
                         .out = s.memory[3],
                         .lse = s.memory[4],
                         .q_stride = HEADS * SIZE,
                         .kv_stride = KV_HEADS * SIZE};
    s.g = (fl_attention_grad){s.memory[5], s.memory[6], s.memory[7], s.memory[8]};
    return s;
}

static void sequence_free(sequence *s) {
    for (size_t i = 0; i < FL_COUNT(s->memory); i++) free(s->memory[i]);
    free(s->begin);
    free(s->row);
}

static void forward_piece(void *ctx, size_t piece, unsigned thread) {
    const sequence *s = ctx;
    const uint32_t head = (uint32_t)(piece % KV_HEADS) * GROUP;
    const uint32_t t = s->first + (uint32_t)(piece / KV_HEADS) * GRAIN;
    (void)thread;
    s->v->forward(&s->a, t, t + GRAIN < s->tokens ? t + GRAIN : s->tokens, head, head + GROUP);
}

static void backward_piece(void *ctx, size_t piece, unsigned thread) {
    const sequence *s = ctx;
    (void)thread;
    s->v->backward(&s->a, &s->g, s->tokens, (uint32_t)piece, (uint32_t)piece + 1);
}

static void bench_sequence(const bench_args *args, bench_team *team, uint32_t tokens,
                           uint32_t first) {
    sequence s = sequence_make(tokens, first);
    const uint32_t cpu = fl_cpu_detect(), blocks = (tokens - first + GRAIN - 1) / GRAIN;
    const double seen = 0.5 * ((double)tokens * (tokens + 1) - (double)first * (first + 1));
    const double kv = 4.0 * 2 * tokens * KV_HEADS * SIZE;
    const double q = 4.0 * 2 * (tokens - first) * HEADS * SIZE;
    char text[64];
    snprintf(text, sizeof(text), "%u of %u tokens, heads %d/%d by %d", tokens - first, tokens,
             HEADS, KV_HEADS, SIZE);
    for (const fl_attention_variant *v = fl_attention_variants; v->tag != NULL; v++) {
        if ((v->need & cpu) != v->need || (v->need == 0 && tokens > 256)) continue;
        s.v = v;
        bench_case c = {.kernel = "attention", .tag = v->tag, .shape = text};
        c.job = (bench_job){forward_piece, &s, (size_t)blocks * KV_HEADS, NULL, false};
        c.ops = 4.0 * SIZE * HEADS * seen, c.bytes = kv + q;
        c.rate = bench_rate_float(v->need & ~(uint32_t)FL_CPU_AVX512_BF16);
        c.check = &s.a.out[(size_t)tokens * HEADS * SIZE - 1];
        bench_run(args, team, &c);
        if (first != 0) continue;
        c.kernel = "attention_grad", c.job.fn = backward_piece, c.job.pieces = KV_HEADS;
        c.ops *= 2.5, c.bytes *= 2, c.check = s.g.dk;
        bench_run(args, team, &c);
    }
    sequence_free(&s);
}

// One token of as many layers as fill the memory.
typedef struct decode {
    const fl_attention_variant *v;
    fl_attention *layer;
    size_t *last; // pieces up to the end of each layer
    size_t layers;
    uint32_t begin, row;
} decode;

static void decode_piece(void *ctx, size_t piece, unsigned thread) {
    const decode *d = ctx;
    const uint32_t head = (uint32_t)(piece % KV_HEADS) * GROUP;
    (void)thread;
    d->v->forward(&d->layer[piece / KV_HEADS], 0, 1, head, head + GROUP);
}

static void bench_decode(const bench_args *args, bench_team *team, uint32_t tokens) {
    const size_t kv = (size_t)tokens * KV_HEADS * SIZE, q = (size_t)HEADS * SIZE;
    const size_t layers = args->smoke ? 2 : ((size_t)96 << 20) / (8 * kv) + 1;
    float *rows = bench_floats(2 * kv * layers), *query = bench_floats(q), *out = bench_floats(q);
    decode d = {.layers = layers, .begin = 0, .row = tokens - 1};
    d.layer = bench_alloc(layers * sizeof(*d.layer));
    d.last = bench_alloc(layers * sizeof(*d.last));
    for (size_t i = 0; i < layers; i++) {
        d.layer[i] = (fl_attention){.heads = HEADS,
                                    .kv_heads = KV_HEADS,
                                    .head_size = SIZE,
                                    .kv_begin = &d.begin,
                                    .kv_row = &d.row,
                                    .q = query,
                                    .k = rows + 2 * i * kv,
                                    .v = rows + (2 * i + 1) * kv,
                                    .out = out,
                                    .q_stride = q,
                                    .kv_stride = KV_HEADS * SIZE};
        d.last[i] = (i + 1) * KV_HEADS;
    }
    const uint32_t cpu = fl_cpu_detect();
    char text[64];
    snprintf(text, sizeof(text), "1 of %u tokens, %zu layers", tokens, layers);
    for (d.v = fl_attention_variants; d.v->tag != NULL; d.v++) {
        if ((d.v->need & cpu) != d.v->need || (d.v->need == 0 && !args->smoke)) continue;
        bench_case c = {.kernel = "attention", .tag = d.v->tag, .shape = text, .check = out};
        c.job = (bench_job){decode_piece, &d, layers * KV_HEADS, d.last, false};
        c.ops = 4.0 * SIZE * HEADS * tokens * (double)layers;
        c.bytes = 8.0 * (double)(kv * layers);
        c.stream = rows, c.stream_size = 8 * kv * layers;
        bench_run(args, team, &c);
    }
    free(rows), free(query), free(out), free(d.layer), free(d.last);
}

int main(int argc, char **argv) {
    const bench_args args = bench_args_parse(argc, argv);
    if (!args.smoke) bench_state_print("before");
    for (unsigned threads = 0; bench_next_threads(&args, &threads);) {
        bench_team *team = bench_team_open(threads);
        static const uint32_t lengths[] = {32, 128, 256, 512, 1024};
        for (size_t i = 0; i < (args.smoke ? 1 : FL_COUNT(lengths)); i++)
            bench_sequence(&args, team, lengths[i], 0);
        bench_sequence(&args, team, args.smoke ? 40 : 1024, args.smoke ? 39 : 1023);
        bench_decode(&args, team, args.smoke ? 40 : 512);
        bench_team_close(team);
    }
    if (!args.smoke) bench_state_print("after");
    return 0;
}
