// compress: layer-wise unified compression of a GGUF model.
#include "node/luc/compress.h"

#include "common/file.h"
#include "common/json.h"
#include "common/progress.h"
#include "node/commands/commands.h"
#include "node/commands/setup.h"
#include "node/tune/evaluate.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct compress_opts {
    char model[FL_SETTING_TEXT_MAX], out[FL_SETTING_TEXT_MAX], calibration[FL_SETTING_TEXT_MAX];
    double bits, sparsity;
    int64_t policy, prune, head_bits, tokens, seed, threads;
    bool json;
} compress_opts;

#define SET(field) NULL, offsetof(compress_opts, field)
static const fl_setting table[] = {
    {NULL, "MODEL", FL_KIND_TEXT, "FILE", 0, 0, NULL, "the GGUF model to compress", SET(model)},
    {NULL, "out", FL_KIND_TEXT, "FILE", 0, 0, NULL, "where the compressed model is written",
     SET(out)},
    {NULL, "bits", FL_KIND_NUMBER, "B", 2, 8, "4", "mean bits of the layers' weights", SET(bits)},
    {NULL, "sparsity", FL_KIND_NUMBER, "S", 0, 0.7, "0", "mean share of weights removed",
     SET(sparsity)},
    {NULL, "policy", FL_KIND_CHOICE, NULL, 0, 0, "luc", "how bits and sparsity are spread",
     "luc|uniform|paper", offsetof(compress_opts, policy)},
    {NULL, "prune", FL_KIND_CHOICE, NULL, 0, 0, "structured", "what is removed",
     "structured|unstructured", offsetof(compress_opts, prune)},
    {NULL, "head-bits", FL_KIND_INTEGER, "B", 2, 8, "8", "bits of the embedding and the head",
     SET(head_bits)},
    {NULL, "calibration", FL_KIND_TEXT, "FILE", 0, 0, "",
     "text like what the model will read (default: a text of ours)", SET(calibration)},
    {NULL, "calibration-tokens", FL_KIND_INTEGER, "N", 64, 16384, "2048", "of it to use",
     SET(tokens)},
    {NULL, "seed", FL_KIND_INTEGER, "S", 0, 0, "1", "chooses the pieces of the calibration text",
     SET(seed)},
    {NULL, "threads", FL_KIND_INTEGER, "N", 0, 64, "0", "threads; 0: the machine's fast cores",
     SET(threads)},
    {NULL, "json", FL_KIND_FLAG, NULL, 0, 0, "no", "one JSON object for machines", SET(json)},
};

static void show(void *ctx, const char *stage, uint32_t done, uint32_t total) {
    fl_progress_step(ctx, done, total, stage);
}

// The last fifth of the calibration text, at a line's end: never used to calibrate.
static size_t split_at(fl_bytes text) {
    size_t at = text.size - text.size / 5;
    while (at < text.size && text.data[at] != '\n') at++;
    return at < text.size ? at + 1 : text.size;
}

// Over twice as many tokens as calibrate, at most: a quick compression is not followed by a long
// reading.
static fl_status loss_of(const node_setup *s, const node_model *m, fl_bytes text, int64_t tokens,
                         double *ret, fl_err *err) {
    enum { SCORED_MAX = 4096 };
    const int64_t most = 2 * tokens < SCORED_MAX ? 2 * tokens : SCORED_MAX;
    node_corpus *corpus = NULL;
    const node_corpus_opts split = {.no_split = true};
    FL_TRY(node_corpus_from_text(text, "the calibration text", s->tokenizer, &split, &corpus, err));
    const node_eval_opts opts = {.threads = fl_pool_threads(s->pool), .tokens_max = (uint32_t)most};
    node_eval *eval = NULL;
    node_eval_result r;
    fl_status st = node_eval_open(&s->engine, m, NULL, &opts, &eval, err);
    if (st == FL_OK) st = node_eval_run(eval, NULL, &corpus->train, &r, err);
    if (st == FL_OK) *ret = r.last_exit_nll;
    node_eval_close(eval);
    node_corpus_close(corpus);
    return st;
}

static fl_status print_json(const node_compress_result *r, double before, double after,
                            fl_err *err) {
    fl_json *root = fl_json_object();
    fl_json *policy = fl_json_add_array(root, "policy");
    for (uint32_t i = 0; i < r->layers; i++) {
        const node_compress_layer *l = &r->layer[i];
        fl_json *x = fl_json_add_object(policy, NULL);
        fl_json_set_integer(x, "layer", i);
        fl_json_set_integer(x, "bits", l->bits);
        fl_json_set_number(x, "sparsity", l->sparsity);
        fl_json_set_number(x, "sensitivity_quant", l->sensitivity_quant);
        fl_json_set_number(x, "sensitivity_prune", l->sensitivity_prune);
    }
    fl_json_set_number(root, "mean_bits", r->mean_bits);
    fl_json_set_number(root, "mean_sparsity", r->mean_sparsity);
    fl_json_set_integer(root, "head_bits", r->head_bits);
    fl_json_set_integer(root, "bytes_in", (int64_t)r->bytes_in);
    fl_json_set_integer(root, "bytes_out", (int64_t)r->bytes_out);
    fl_json_set_number(root, "nll_before", before);
    fl_json_set_number(root, "nll_after", after);
    fl_json_set_integer(root, "peak_rss_bytes", (int64_t)node_rss_peak());
    const fl_status st = fl_json_print(root, stdout, err);
    fl_json_free(root);
    return st;
}

// Writes the file, opens it as any command would, and scores it: a file that cannot be used is
// not left behind.
static fl_status compress(const compress_opts *o, const node_setup *s, fl_bytes text,
                          node_compress_result *r, double *before, double *after, fl_err *err) {
    static const node_policy_kind policies[] = {NODE_POLICY_LUC, NODE_POLICY_UNIFORM,
                                                NODE_POLICY_PAPER};
    static const node_prune_kind prunes[] = {NODE_PRUNE_STRUCTURED, NODE_PRUNE_UNSTRUCTURED};
    const size_t cut = split_at(text);
    const fl_bytes held = {text.data + cut, text.size - cut};
    fl_progress bar;
    fl_progress_init(&bar, "compressing", o->json);
    const node_compress_opts opts = {.policy = policies[o->policy],
                                     .prune = prunes[o->prune],
                                     .bits = o->bits,
                                     .sparsity = o->sparsity,
                                     .head_bits = (uint32_t)o->head_bits,
                                     .calibration = {text.data, cut},
                                     .tokens = (uint32_t)o->tokens,
                                     .seed = (uint64_t)o->seed,
                                     .progress = show,
                                     .ctx = &bar};
    FL_TRY(loss_of(s, s->model, held.size > 0 ? held : text, o->tokens, before, err));
    fl_status st = node_compress(&s->engine, s->model, &opts, o->out, r, err);
    fl_progress_done(&bar);
    FL_TRY(st);
    node_model *made = NULL;
    st = node_model_open(o->out, &made, err);
    if (st == FL_OK) st = loss_of(s, made, held.size > 0 ? held : text, o->tokens, after, err);
    node_model_close(made);
    if (st != FL_OK) unlink(o->out);
    return st;
}

static int run(const void *options) {
    const compress_opts *o = options;
    node_setup s = {0};
    static node_compress_result r;
    uint8_t *text = NULL;
    double before = 0, after = 0;
    fl_err err;
    fl_bytes calibration = {(const uint8_t *)node_luc_text, strlen(node_luc_text)};
    const node_setup_opts setup = {.model = o->model, .threads = o->threads};
    fl_status st = node_setup_open(&setup, &s, &err);
    if (st == FL_OK && o->calibration[0] != '\0') {
        st = node_read_text(o->calibration, &text, &calibration.size, &err);
        calibration.data = text;
    }
    if (st == FL_OK) st = compress(o, &s, calibration, &r, &before, &after, &err);
    if (st == FL_OK && o->json)
        st = print_json(&r, before, after, &err);
    else if (st == FL_OK)
        printf("%.1f MB -> %.1f MB: %.2f bits a weight of the layers, %.1f%% removed, head at %u "
               "bits\nheld-out loss %.4f -> %.4f nats; written to %s\n",
               (double)r.bytes_in / 1e6, (double)r.bytes_out / 1e6, r.mean_bits,
               100 * r.mean_sparsity, r.head_bits, before, after, o->out);
    free(text);
    node_setup_close(&s);
    return st == FL_OK ? FL_EXIT_OK : fl_cli_fail(&err);
}

const fl_command node_cmd_compress = {
    .name = "compress",
    .summary = "compresses a model, each layer by what it can bear",
    .example = "fleetune-node compress SmolLM2.gguf --out smollm2-4bit.gguf --bits 4",
    .table = table,
    .count = FL_COUNT(table),
    .options_size = sizeof(compress_opts),
    .run = run,
};
