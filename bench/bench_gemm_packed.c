// Products with packed matrices: every variant, every width, forward, backward and one token at a
// time. Threads take pieces of rows (backward: of tokens) as the engine's do.
//   forward, backward   the matrices of the models, 256 and 1024 tokens, 4 bits; the gate matrix at
//                       every width; the head in chunks of rows, as the engine takes it. Limit: the
//                       peak of the instruction that multiplies.
//   decode              one token by matrix after matrix of a mapped file larger than any cache; a
//                       barrier ends each matrix. "layers" is a model's matrices in the engine's
//                       order, four barriers a layer. Pieces are 32 rows, or a thread's equal share
//                       of a matrix ("shares"). Limit: reading the same file.
#include "bench/bench.h"
#include "bench/shapes.h"
#include "kernels/dispatch.h"

enum { ROWS = 32, CHUNK = 1024, PRODUCTS_MAX = 4096, PIECES_MAX = 65536 };

// A matrix of random codes at data, whose tiles are all alike.
static void fill_tiles(uint8_t *data, size_t size, uint32_t bits) {
    uint8_t codes[FL_PACKED_CODES];
    uint16_t scale[FL_PACKED_ROWS], minimum[FL_PACKED_ROWS];
    for (size_t i = 0; i < FL_PACKED_CODES; i++) codes[i] = (uint8_t)(i * 37 % (1u << bits));
    for (size_t r = 0; r < FL_PACKED_ROWS; r++) {
        scale[r] = fl_f16_from_f32(0.01f * (float)(r + 1));
        minimum[r] = fl_f16_from_f32(bench_randf());
    }
    const size_t tile = fl_packed_tile_size(bits);
    fl_packed_tile_write(data, bits, codes, scale, minimum);
    for (size_t at = tile; at + tile <= size; at += tile) memcpy(data + at, data, tile);
}

static size_t packed_size(bench_shape shape, uint32_t bits) {
    size_t size;
    if (!fl_packed_size(shape.rows, shape.cols, bits, &size)) abort();
    return size;
}

typedef struct rows8 {
    fl_x8 x8;
    void *memory;
    float *x; // [tokens][cols]
} rows8;

static rows8 rows8_make(uint32_t tokens, uint32_t cols) {
    size_t size;
    if (!fl_x8_size(tokens, cols, &size)) abort();
    rows8 r = {.memory = bench_alloc(size), .x = bench_floats((size_t)tokens * cols)};
    r.x8 = fl_x8_bind(r.memory, tokens, cols);
    for (uint32_t t = 0; t < tokens; t++)
        fl_quantise_x8_ref(r.x + (size_t)t * cols, cols, &r.x8, t);
    return r;
}

static void rows8_free(rows8 *r) {
    free(r->memory);
    free(r->x);
}

// Forward and backward of one matrix. Rows beyond CHUNK go by in chunks that share y.
typedef struct product {
    fl_packed w;
    rows8 in;
    uint32_t chunk;      // rows
    uint32_t share;      // tokens of a piece, backward
    size_t shares;       // of all tokens
    size_t stage[64];    // pieces up to the end of each chunk
    float *y, *dx;       // [tokens][chunk], [tokens][cols]
    uint8_t *scratch[2]; // one a thread
    fl_gemm_packed_fn forward;
    fl_gemm_packed_dx_fn backward;
} product;

static uint32_t least(uint32_t a, uint32_t b) {
    return a < b ? a : b;
}

static void forward_piece(void *ctx, size_t piece, unsigned thread) {
    const product *p = ctx;
    const uint32_t begin = (uint32_t)piece * ROWS, end = least(begin + ROWS, p->w.rows);
    (void)thread;
    p->forward(&p->w, begin, end, &p->in.x8, p->y + begin % p->chunk, p->chunk);
}

// All columns of a thread's share of the tokens, as the engine cuts it with many tokens.
static void backward_piece(void *ctx, size_t piece, unsigned thread) {
    const product *p = ctx;
    const uint32_t chunk = (uint32_t)(piece / p->shares) * p->chunk, tokens = p->in.x8.tokens;
    const uint32_t first = least((uint32_t)(piece % p->shares) * p->share, tokens);
    const uint32_t end = least(first + p->share, tokens);
    const fl_packed_range range = {chunk, least(chunk + p->chunk, p->w.rows), 0, p->w.cols};
    if (first == end) return;
    p->backward(&p->w, &range, end - first, p->y + (size_t)first * p->chunk, p->chunk,
                p->dx + (size_t)first * p->w.cols, p->w.cols, chunk != 0, p->scratch[thread]);
}

// A barrier after each chunk: `pieces` of it.
static bench_job job_of(product *p, bench_piece_fn fn, size_t pieces, size_t all) {
    const size_t chunks = (p->w.rows + p->chunk - 1) / p->chunk;
    if (chunks > FL_COUNT(p->stage)) abort();
    for (size_t i = 0; i < chunks; i++) p->stage[i] = i + 1 == chunks ? all : (i + 1) * pieces;
    return (bench_job){fn, p, all, p->stage, false};
}

static void forward_variants(const bench_args *args, bench_team *team, product *p, bench_case *c) {
    const uint32_t cpu = fl_cpu_detect();
    c->kernel = "gemm_packed", c->check = &p->y[1];
    c->job = job_of(p, forward_piece, p->chunk / ROWS, (p->w.rows + ROWS - 1) / ROWS);
    c->bytes = (double)packed_size((bench_shape){p->w.rows, p->w.cols}, p->w.bits) +
               (double)p->in.x8.tokens * (4.0 * p->w.rows + p->w.cols);
    for (const fl_gemm_packed_variant *v = fl_gemm_packed_variants; v->fn != NULL; v++) {
        if ((v->need & cpu) != v->need || (v->need == 0 && !args->smoke)) continue;
        p->forward = v->fn, c->tag = v->tag, c->rate = bench_rate_int8(v->need);
        bench_run(args, team, c);
    }
}

static void backward_variants(const bench_args *args, bench_team *team, product *p, bench_case *c) {
    const uint32_t cpu = fl_cpu_detect();
    const size_t tokens = p->in.x8.tokens, chunks = (p->w.rows + p->chunk - 1) / p->chunk;
    p->shares = bench_team_threads(team);
    p->share = (uint32_t)((tokens + p->shares - 1) / p->shares + 15) / 16 * 16;
    for (size_t i = 0; i < tokens * p->chunk; i++) p->y[i] = (float)(i % 5 + 1) * 0.25f;
    c->kernel = "gemm_packed_dx", c->check = &p->dx[1];
    c->job = job_of(p, backward_piece, p->shares, chunks * p->shares);
    c->bytes += 4.0 * (double)tokens * p->w.cols;
    for (const fl_gemm_packed_dx_variant *v = fl_gemm_packed_dx_variants; v->fn != NULL; v++) {
        if ((v->need & cpu) != v->need || (v->need == 0 && !args->smoke)) continue;
        p->backward = v->fn, c->tag = v->tag, c->rate = bench_rate_float(v->need);
        bench_run(args, team, c);
    }
}

static void many_tokens(const bench_args *args, bench_team *team, bench_shape shape, uint32_t bits,
                        uint32_t tokens) {
    const size_t size = packed_size(shape, bits);
    const uint32_t chunk = shape.rows > 8 * CHUNK ? CHUNK : shape.rows;
    uint8_t *data = bench_alloc(size);
    char text[64];
    fill_tiles(data, size, bits);
    product p = {.w = {data, shape.rows, shape.cols, bits},
                 .in = rows8_make(tokens, shape.cols),
                 .chunk = chunk,
                 .y = bench_alloc((size_t)tokens * chunk * sizeof(float)),
                 .dx = bench_alloc((size_t)tokens * shape.cols * sizeof(float))};
    for (size_t i = 0; i < FL_COUNT(p.scratch); i++)
        p.scratch[i] = bench_alloc(FL_GEMM_PACKED_DX_SCRATCH);
    snprintf(text, sizeof(text), "%ux%u bits=%u tokens=%u", shape.rows, shape.cols, bits, tokens);
    bench_case c = {.shape = text, .ops = 2.0 * shape.rows * shape.cols * tokens};
    forward_variants(args, team, &p, &c);
    backward_variants(args, team, &p, &c);
    for (size_t i = 0; i < FL_COUNT(p.scratch); i++) free(p.scratch[i]);
    free(p.y), free(p.dx), free(data);
    rows8_free(&p.in);
}

// One token by `count` matrices that lie one after the other in a file.
typedef struct decode {
    fl_packed w[PRODUCTS_MAX];
    size_t first[PRODUCTS_MAX];     // piece of each matrix
    size_t stage[PRODUCTS_MAX + 1]; // pieces up to a barrier
    uint16_t of[PIECES_MAX];        // matrix of a piece
    uint32_t rows[PRODUCTS_MAX];    // of a piece
    size_t count, stages, pieces;
    unsigned shares; // 0: pieces of ROWS
    rows8 in[2];     // of the two lengths of rows
    float *y;
    size_t size; // bytes used of the file
    double ops;
    fl_gemm_packed_fn fn;
} decode;

static void decode_piece(void *ctx, size_t piece, unsigned thread) {
    const decode *d = ctx;
    const size_t i = d->of[piece];
    const fl_packed *w = &d->w[i];
    const uint32_t begin = (uint32_t)(piece - d->first[i]) * d->rows[i];
    const uint32_t end = least(begin + d->rows[i], w->rows);
    const fl_x8 *x = w->cols == d->in[0].x8.groups * FL_X8_GROUP ? &d->in[0].x8 : &d->in[1].x8;
    (void)thread;
    d->fn(w, begin, end, x, d->y + begin, w->rows);
}

// Puts a matrix after the others if the file has room for it.
static bool decode_add(decode *d, const bench_memory *m, bench_shape shape, uint32_t bits,
                       bool barrier) {
    const size_t size = packed_size(shape, bits);
    const uint32_t panels = (shape.rows + FL_PACKED_ROWS - 1) / FL_PACKED_ROWS;
    const uint32_t rows =
        d->shares == 0 ? ROWS : (panels + d->shares - 1) / d->shares * FL_PACKED_ROWS;
    const size_t pieces = (shape.rows + rows - 1) / rows;
    if (d->size + size > m->size || d->count == PRODUCTS_MAX || d->pieces + pieces > PIECES_MAX)
        return false;
    d->w[d->count] = (fl_packed){m->data + d->size, shape.rows, shape.cols, bits};
    d->rows[d->count] = rows;
    d->first[d->count] = d->pieces;
    for (size_t i = 0; i < pieces; i++) d->of[d->pieces++] = (uint16_t)d->count;
    if (barrier) d->stage[d->stages++] = d->pieces;
    d->size += size, d->count++;
    d->ops += 2.0 * shape.rows * shape.cols;
    return true;
}

static void decode_variants(const bench_args *args, bench_team *team, decode *d,
                            const bench_memory *m, const char *text) {
    const uint32_t cpu = fl_cpu_detect();
    d->stage[d->stages] = d->pieces; // the end, should no barrier be there
    bench_case c = {.kernel = "decode", .shape = text, .check = &d->y[1], .rate = BENCH_NONE};
    c.job = (bench_job){decode_piece, d, d->pieces, d->stage, false};
    c.ops = d->ops, c.bytes = (double)d->size;
    c.stream = m->data, c.stream_size = d->size;
    for (const fl_gemm_packed_variant *v = fl_gemm_packed_variants; v->fn != NULL; v++) {
        if ((v->need & cpu) != v->need || (v->need == 0 && !args->smoke)) continue;
        d->fn = v->fn, c.tag = v->tag;
        bench_run(args, team, &c);
    }
}

static void decode_clear(decode *d) {
    d->count = d->stages = d->pieces = d->size = 0;
    d->ops = 0;
}

static void decode_shape(const bench_args *args, bench_team *team, decode *d, const bench_memory *m,
                         bench_shape shape, uint32_t bits) {
    char text[64];
    decode_clear(d);
    while (decode_add(d, m, shape, bits, true)) continue;
    snprintf(text, sizeof(text), "%ux%u bits=%u %zu MiB", shape.rows, shape.cols, bits,
             d->size >> 20);
    decode_variants(args, team, d, m, text);
}

static void decode_layers(const bench_args *args, bench_team *team, decode *d,
                          const bench_memory *m, uint32_t bits) {
    char text[64];
    decode_clear(d);
    for (bool fits = true; fits;)
        for (size_t i = 0; fits && i < FL_COUNT(bench_layer); i++)
            fits = decode_add(d, m, bench_layer[i].shape, bits, bench_layer[i].barrier);
    snprintf(text, sizeof(text), "layers bits=%u %zu MiB%s", bits, d->size >> 20,
             d->shares == 0 ? "" : " shares");
    decode_variants(args, team, d, m, text);
}

static void one_token(const bench_args *args, bench_team *team) {
    // More than three times the last cache, so that nothing of the last call is left in it.
    const size_t least = (size_t)96 << 20, three = 3 * bench_cache_size(3);
    bench_memory m = bench_memory_open(BENCH_PAGES_FILE, args->smoke     ? (size_t)1 << 20
                                                         : three > least ? three
                                                                         : least);
    decode *d = bench_alloc(sizeof(*d));
    d->in[0] = rows8_make(1, bench_shapes[0].cols);
    d->in[1] = rows8_make(1, bench_shapes[3].cols);
    d->y = bench_alloc(bench_shapes[4].rows * sizeof(float));
    for (uint32_t bits = args->smoke ? 7 : FL_PACKED_BITS_MIN; bits <= FL_PACKED_BITS_MAX; bits++) {
        fill_tiles(m.data, m.size, bits);
        for (int shares = 0; shares < 2; shares++) {
            d->shares = shares == 0 ? 0 : bench_team_threads(team);
            decode_layers(args, team, d, &m, bits);
        }
        d->shares = 0;
        for (size_t i = 0; i < FL_COUNT(bench_shapes) && !args->smoke; i++)
            if (bits == 4 || (bits == 8 && i == 4))
                decode_shape(args, team, d, &m, bench_shapes[i], bits);
    }
    rows8_free(&d->in[0]);
    rows8_free(&d->in[1]);
    free(d->y);
    free(d);
    bench_memory_close(&m);
}

int main(int argc, char **argv) {
    const bench_args args = bench_args_parse(argc, argv);
    static const uint32_t tokens[] = {256, 1024};
    if (!args.smoke) bench_state_print("before");
    for (unsigned threads = 0; bench_next_threads(&args, &threads);) {
        bench_team *team = bench_team_open(threads);
        for (uint32_t bits = FL_PACKED_BITS_MIN; bits <= FL_PACKED_BITS_MAX && args.smoke; bits++)
            many_tokens(&args, team, (bench_shape){17, 70}, bits, bits - 1);
        for (uint32_t bits = FL_PACKED_BITS_MIN; bits <= FL_PACKED_BITS_MAX && !args.smoke; bits++)
            many_tokens(&args, team, bench_shapes[2], bits, tokens[0]);
        for (size_t i = 0; i < FL_COUNT(bench_shapes) && !args.smoke; i++)
            for (size_t t = 0; t < FL_COUNT(tokens); t++)
                if (t == 0 || bench_shapes[i].rows < 10000)
                    many_tokens(&args, team, bench_shapes[i], 4, tokens[t]);
        one_token(&args, team);
        bench_team_close(team);
    }
    if (!args.smoke) bench_state_print("after");
    return 0;
}
