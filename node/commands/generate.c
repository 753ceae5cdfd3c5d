// generate: continues a prompt, one token after another, by the vote of all exits.
#include "node/model/generate.h"

#include "common/clock.h"
#include "node/commands/commands.h"
#include "node/commands/setup.h"
#include "node/exits/head.h"
#include "node/model/unicode.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>

typedef struct generate_opts {
    char model[FL_SETTING_TEXT_MAX], adapter[FL_SETTING_TEXT_MAX], prompt[FL_SETTING_TEXT_MAX];
    int64_t tokens, seed, top_k, threads;
    uint64_t memory;
    double temperature, top_p;
    bool chat, any_base, stats;
} generate_opts;

#define SET(field) NULL, offsetof(generate_opts, field)
static const fl_setting table[] = {
    {NULL, "MODEL", FL_KIND_TEXT, "FILE", 0, 0, NULL, "a GGUF model, plain or compressed",
     SET(model)},
    {NULL, "prompt", FL_KIND_TEXT, "TEXT", 0, 0, NULL, "text to continue", SET(prompt)},
    {NULL, "adapter", FL_KIND_TEXT, "ADAPTER", 0, 0, "", "adapter to write with", SET(adapter)},
    {NULL, "tokens", FL_KIND_INTEGER, "N", 1, 100000, "128", "write at most so many", SET(tokens)},
    {NULL, "temperature", FL_KIND_NUMBER, "T", 0, 10, "0", "0: always the most probable token",
     SET(temperature)},
    {NULL, "top-k", FL_KIND_INTEGER, "K", 0, 1000000, "0", "only the K most probable; 0: all",
     SET(top_k)},
    {NULL, "top-p", FL_KIND_NUMBER, "P", 0.001, 1, "1", "only the fewest that reach P in sum",
     SET(top_p)},
    {NULL, "seed", FL_KIND_INTEGER, "S", 0, 0, "1", "seed of the draws", SET(seed)},
    {NULL, "chat", FL_KIND_FLAG, NULL, 0, 0, "no", "put the prompt as a user's turn", SET(chat)},
    {NULL, "any-base", FL_KIND_FLAG, NULL, 0, 0, "no",
     "accept an adapter of a model with the same shapes but other weights", SET(any_base)},
    {NULL, "stats", FL_KIND_FLAG, NULL, 0, 0, "no", "print tokens a second on standard error",
     SET(stats)},
    {NULL, "memory", FL_KIND_SIZE, "SIZE", 0, 0, "0",
     "resident memory of the whole process; 0: what is free", SET(memory)},
    {NULL, "threads", FL_KIND_INTEGER, "N", 0, 64, "0", "threads; 0: the machine's fast cores",
     SET(threads)},
};

static volatile sig_atomic_t stop;
static void on_signal(int number) {
    (void)number;
    stop = 1;
}

// What one generation works with, all of it in one block.
typedef struct writer {
    node_setup *setup;
    node_session *session;
    node_head head;
    node_scratch *scratch;
    float *logits, *p; // [exits][vocabulary], [vocabulary]
    node_candidate *candidates;
    uint64_t peak; // planned
} writer;

static fl_status encode(const generate_opts *o, const node_setup *s, int32_t **ret_ids,
                        size_t *ret_count, fl_err *err) {
    char text[FL_SETTING_TEXT_MAX + 64];
    snprintf(text, sizeof(text), "%s%s%s", o->chat ? "<|im_start|>user\n" : "", o->prompt,
             o->chat ? "<|im_end|>\n<|im_start|>assistant\n" : "");
    const fl_bytes bytes = {(const uint8_t *)text, strlen(text)};
    if (!node_utf8_valid(bytes)) return FL_FAIL(err, FL_EARG, "the prompt is not UTF-8");
    const size_t most = node_tokenizer_ids_max(bytes.size);
    int32_t *ids = malloc((most + 1) * sizeof(*ids));
    if (ids == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory for the prompt");
    const unsigned flags = NODE_ENCODE_ENDS | (o->chat ? NODE_ENCODE_SPECIAL : 0);
    const fl_status st =
        node_tokenizer_encode(s->tokenizer, bytes, flags, ids, most, ret_count, err);
    if (st == FL_OK && *ret_count == 0) ids[(*ret_count)++] = node_tokenizer_bos(s->tokenizer);
    if (st != FL_OK || ids[0] < 0) {
        free(ids);
        return st != FL_OK ? st : FL_FAIL(err, FL_EARG, "the prompt is empty");
    }
    *ret_ids = ids;
    return FL_OK;
}

static void bind(writer *w, const node_session_opts *opts, fl_arena *a) {
    const node_model *m = w->setup->model;
    w->session = node_session_bind(m, opts, a);
    node_head_bind(&w->head, m, m->exits, 1, 0, a);
    w->scratch = node_scratch_bind(m, m->exits, opts->threads, a);
    w->logits = FL_ARENA_NEW(a, float, (size_t)m->exits * m->vocabulary);
    w->p = FL_ARENA_NEW(a, float, m->vocabulary);
    w->candidates = FL_ARENA_NEW(a, node_candidate, m->vocabulary);
}

static fl_status open_writer(writer *w, size_t prompt, const generate_opts *o, void **ret_block,
                             fl_err *err) {
    const node_model *m = w->setup->model;
    const uint64_t context = prompt + (uint64_t)o->tokens;
    if (prompt >= m->context)
        return FL_FAIL(err, FL_EARG, "the prompt has %zu tokens, the model's context is %u", prompt,
                       m->context);
    const node_session_opts opts = {
        .context = context < m->context ? (uint32_t)context : m->context,
        .chunk = prompt < 256 ? (uint32_t)prompt : 256,
        .threads = fl_pool_threads(w->setup->pool),
        .rank = w->setup->adapter == NULL ? 0 : w->setup->adapter->lora.rank};
    size_t session_size;
    FL_TRY(node_session_plan(m, &opts, &session_size, err));
    fl_arena arena; // the session cannot be bound by counting alone: its plan says its size
    fl_arena_init_counting(&arena);
    node_head_bind(&w->head, m, m->exits, 1, 0, &arena);
    node_scratch_bind(m, m->exits, opts.threads, &arena);
    const size_t rest =
        arena.peak + m->vocabulary * (sizeof(float) * (m->exits + 1) + sizeof(node_candidate));
    const size_t size = session_size + rest + 4096; // seams between the parts
    const node_resident_use use = {.layers = m->layers, .head_rows = w->head.chunk};
    FL_TRY(node_setup_fit(w->setup, &use, o->memory, size, &w->peak, err));
    FL_TRY(node_block_take(size, ret_block, err));
    fl_arena_init(&arena, *ret_block, size);
    bind(w, &opts, &arena);
    return FL_OK;
}

static void print_piece(const node_setup *s, int32_t id) {
    const fl_bytes piece = node_tokenizer_piece(s->tokenizer, id, false);
    fwrite(piece.data, 1, piece.size, stdout);
    fflush(stdout);
}

static fl_status write_text(writer *w, const generate_opts *o, const int32_t *ids, size_t count,
                            fl_err *err) {
    const node_setup *s = w->setup;
    const node_lora *lora = s->adapter == NULL ? NULL : &s->adapter->lora;
    node_vote vote;
    node_vote_init(&vote, s->model->exits);
    if (s->adapter != NULL) vote = s->adapter->vote;
    const node_sample_opts sample = {.temperature = (float)o->temperature,
                                     .top_k = (uint32_t)o->top_k,
                                     .top_p = (float)o->top_p,
                                     .seed = (uint64_t)o->seed};
    const float *hidden = NULL;
    const double start = fl_clock_s();
    FL_TRY(node_session_feed(w->session, &s->engine, lora, ids, count, &hidden, err));
    const double prompt_s = fl_clock_s() - start;
    int64_t written = 0;
    for (; written < o->tokens && !stop; written++) {
        node_head_vote(&s->engine, &w->head, s->model, lora, &vote, hidden, w->logits, w->p,
                       w->scratch);
        const int32_t id =
            node_sample(&sample, (uint64_t)written, w->p, s->model->vocabulary, w->candidates);
        if (id < 0 || node_tokenizer_is_end(s->tokenizer, id)) break;
        print_piece(s, id);
        if (written + 1 == o->tokens || node_session_length(w->session) == s->model->context)
            continue;
        FL_TRY(node_session_feed(w->session, &s->engine, lora, &id, 1, &hidden, err));
    }
    printf("\n");
    const double write_s = fl_clock_s() - start - prompt_s;
    if (!o->stats) return FL_OK;
    fprintf(stderr,
            "prompt %zu tokens, %.1f/s; written %lld, %.1f/s; peak %.1f MB (planned %.1f)\n", count,
            (double)count / prompt_s, (long long)written, (double)written / write_s,
            (double)node_rss_peak() / 1e6, (double)w->peak / 1e6);
    node_setup_print_streamed(s, prompt_s + write_s, stderr);
    return FL_OK;
}

static int run(const void *options) {
    const generate_opts *o = options;
    const struct sigaction action = {.sa_handler = on_signal};
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    node_setup s = {0};
    writer w = {.setup = &s};
    int32_t *ids = NULL;
    size_t count = 0;
    void *block = NULL;
    fl_err err;
    const node_setup_opts opts = {
        .model = o->model, .adapter = o->adapter, .threads = o->threads, .any_base = o->any_base};
    fl_status st = node_setup_open(&opts, &s, &err);
    if (st == FL_OK && s.adapter == NULL) node_model_set_exits(s.model, 1); // no vote: one exit
    if (st == FL_OK) st = encode(o, &s, &ids, &count, &err);
    if (st == FL_OK) st = open_writer(&w, count, o, &block, &err);
    if (st == FL_OK) st = write_text(&w, o, ids, count, &err);
    free(block);
    free(ids);
    node_setup_close(&s);
    return st == FL_OK ? FL_EXIT_OK : fl_cli_fail(&err);
}

const fl_command node_cmd_generate = {
    .name = "generate",
    .summary = "continues a text",
    .example = "fleetune-node generate smollm2-4bit.gguf --prompt \"Once upon a time\"",
    .table = table,
    .count = FL_COUNT(table),
    .options_size = sizeof(generate_opts),
    .run = run,
};
