// eval: held-out loss of a text under a model, with or without an adapter, exit by exit and voted.
#include "node/tune/evaluate.h"

#include "common/clock.h"
#include "common/json.h"
#include "node/commands/commands.h"
#include "node/commands/setup.h"
#include "node/exits/head.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct eval_opts {
    char model[FL_SETTING_TEXT_MAX], adapter[FL_SETTING_TEXT_MAX], text[FL_SETTING_TEXT_MAX];
    int64_t tokens, threads, window, vote, split;
    uint64_t memory;
    bool any_base, json;
} eval_opts;

enum { PART_ALL, PART_HELD, PART_TRAIN };

#define SET(field) NULL, offsetof(eval_opts, field)
static const fl_setting table[] = {
    {NULL, "MODEL", FL_KIND_TEXT, "FILE", 0, 0, NULL, "a GGUF model, plain or compressed",
     SET(model)},
    {NULL, "text", FL_KIND_TEXT, "FILE", 0, 0, NULL, "text to score, or a folder of texts",
     SET(text)},
    {NULL, "adapter", FL_KIND_TEXT, "ADAPTER", 0, 0, "", "adapter to evaluate", SET(adapter)},
    {NULL, "part", FL_KIND_CHOICE, NULL, 0, 0, "all",
     "score everything, or the documents that tuning holds out or trains on", "all|held|train",
     offsetof(eval_opts, split)},
    {NULL, "vote", FL_KIND_CHOICE, NULL, 0, 0, "adapter",
     "the adapter's vote, the last exit, or the paper's max rule", "adapter|last|max",
     offsetof(eval_opts, vote)},
    {NULL, "tokens", FL_KIND_INTEGER, "N", 0, 0, "0", "stop after so many; 0: all", SET(tokens)},
    {NULL, "window", FL_KIND_INTEGER, "TOKENS", 16, 8192, "512", "context of a score", SET(window)},
    {NULL, "any-base", FL_KIND_FLAG, NULL, 0, 0, "no",
     "accept an adapter of a model with the same shapes but other weights", SET(any_base)},
    {NULL, "memory", FL_KIND_SIZE, "SIZE", 0, 0, "0",
     "resident memory of the whole process; 0: what is free", SET(memory)},
    {NULL, "threads", FL_KIND_INTEGER, "N", 0, 64, "0", "threads; 0: the machine's fast cores",
     SET(threads)},
    {NULL, "json", FL_KIND_FLAG, NULL, 0, 0, "no", "one JSON object for machines", SET(json)},
};

static fl_status print_json(const node_setup *s, const node_eval_result *r, double seconds,
                            uint64_t peak, fl_err *err) {
    const node_model *m = s->model;
    fl_json *root = fl_json_object();
    fl_json_set_integer(root, "tokens", (int64_t)r->tokens);
    fl_json_set_number(root, "nll", r->nll);
    fl_json_set_number(root, "perplexity", exp(r->nll));
    fl_json_set_number(root, "last_exit_nll", r->last_exit_nll);
    fl_json *exits = fl_json_add_array(root, "exits");
    for (uint32_t t = 0; t < r->exits; t++) {
        const uint32_t e = m->exits - r->exits + t; // only the last when it alone was looked at
        fl_json *x = fl_json_add_object(exits, NULL);
        fl_json_set_integer(x, "layer", m->exit_layer[e]);
        fl_json_set_number(x, "nll", r->exit_nll[t]);
        fl_json_set_number(x, "weight", (double)r->vote.weight[e]);
    }
    fl_json_set_string(root, "vote", node_vote_mode_name(r->vote.mode));
    fl_json_set_bool(root, "vote_fell_back", r->vote.fell_back);
    fl_json_set_number(root, "seconds", seconds);
    fl_json_set_integer(root, "peak_rss_bytes", (int64_t)node_rss_peak());
    fl_json_set_integer(root, "planned_peak_bytes", (int64_t)peak);
    node_setup_add_streamed(s, root);
    const fl_status st = fl_json_print(root, stdout, err);
    fl_json_free(root);
    return st;
}

static void print_text(const node_setup *s, const node_eval_result *r, double seconds,
                       uint64_t peak) {
    const node_model *m = s->model;
    printf("%llu tokens: %.4f nats a token, perplexity %.3f (vote: %s%s; last exit alone %.4f)\n",
           (unsigned long long)r->tokens, r->nll, exp(r->nll), node_vote_mode_name(r->vote.mode),
           r->vote.fell_back ? ", it did not beat the last exit" : "", r->last_exit_nll);
    for (uint32_t t = 0; t < r->exits && r->exits > 1; t++)
        printf("  exit after layer %2u: %8.4f nats, weight %.3f\n", m->exit_layer[t],
               r->exit_nll[t], (double)r->vote.weight[t]);
    printf("%.1f s, %.0f tokens/s, peak %.1f MB (planned %.1f)\n", seconds,
           (double)r->tokens / seconds, (double)node_rss_peak() / 1e6, (double)peak / 1e6);
    node_setup_print_streamed(s, seconds, stdout);
}

static fl_status score(const eval_opts *o, node_setup *s, const node_docs *docs,
                       node_eval_result *ret, uint64_t *ret_peak, fl_err *err) {
    node_vote vote;
    node_vote_init(&vote, s->model->exits);
    if (s->adapter != NULL && o->vote == 0) vote = s->adapter->vote;
    if (o->vote == 2) vote.mode = NODE_VOTE_MAX;
    const node_eval_opts opts = {.window = (uint32_t)o->window,
                                 .threads = fl_pool_threads(s->pool),
                                 .all_exits = s->adapter != NULL || o->vote == 2,
                                 .tokens_max = (uint64_t)o->tokens};
    node_eval *eval = NULL;
    const node_lora *lora = s->adapter == NULL ? NULL : &s->adapter->lora;
    const node_resident_use use = {.layers = s->model->layers, .head_rows = NODE_HEAD_CHUNK};
    const size_t rows = (size_t)o->window * s->model->exits * sizeof(float);
    FL_TRY(node_setup_fit(s, &use, o->memory, node_eval_size(s->model, lora, &opts) + rows,
                          ret_peak, err));
    FL_TRY(node_eval_open(&s->engine, s->model, lora, &opts, &eval, err));
    const fl_status st = node_eval_run(eval, &vote, docs, ret, err);
    node_eval_close(eval);
    return st;
}

static int run(const void *options) {
    const eval_opts *o = options;
    node_setup s = {0};
    node_corpus *corpus = NULL;
    node_eval_result r;
    fl_err err;
    const node_setup_opts opts = {
        .model = o->model, .adapter = o->adapter, .threads = o->threads, .any_base = o->any_base};
    fl_status st = node_setup_open(&opts, &s, &err);
    if (st == FL_OK) {
        const node_corpus_opts split = {.no_split = o->split == PART_ALL};
        st = node_corpus_open(o->text, s.tokenizer, &split, &corpus, &err);
    }
    node_tokenizer_close(s.tokenizer); // megabytes that scoring has better use for
    s.tokenizer = NULL;
    const double start = fl_clock_s();
    uint64_t peak = 0;
    if (st == FL_OK) {
        const node_docs *docs = o->split == PART_HELD ? &corpus->held : &corpus->train;
        st = score(o, &s, docs, &r, &peak, &err);
    }
    if (st == FL_OK && o->json)
        st = print_json(&s, &r, fl_clock_s() - start, peak, &err);
    else if (st == FL_OK)
        print_text(&s, &r, fl_clock_s() - start, peak);
    node_corpus_close(corpus);
    node_setup_close(&s);
    return st == FL_OK ? FL_EXIT_OK : fl_cli_fail(&err);
}

const fl_command node_cmd_eval = {
    .name = "eval",
    .summary = "scores a text: nats a token of every exit and of the vote",
    .example = "fleetune-node eval smollm2-4bit.gguf --adapter notes.adapter --text held-out.txt",
    .table = table,
    .count = FL_COUNT(table),
    .options_size = sizeof(eval_opts),
    .run = run,
};
