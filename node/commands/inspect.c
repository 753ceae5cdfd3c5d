// inspect: what a model file is: shapes, tensors, exits, and the policy it was compressed with.
#include "common/json.h"
#include "node/commands/commands.h"
#include "node/model/model.h"

#include <stdlib.h>
#include <string.h>

typedef struct inspect_opts {
    char file[FL_SETTING_TEXT_MAX];
    bool json;
} inspect_opts;

static const fl_setting table[] = {
    {NULL, "FILE", FL_KIND_TEXT, "FILE", 0, 0, NULL, "a GGUF model, plain or compressed", NULL,
     offsetof(inspect_opts, file)},
    {NULL, "json", FL_KIND_FLAG, NULL, 0, 0, "no", "one JSON object for machines", NULL,
     offsetof(inspect_opts, json)},
};

// Bits a weight of a layer's matrices, each by its size.
static double mean_bits(const node_layer *l) {
    double bits = 0, weights = 0;
    for (int k = 0; k < NODE_MODULES; k++) {
        const double size = (double)l->linear[k].rows * l->linear[k].cols;
        bits += size * l->linear[k].bits;
        weights += size;
    }
    return bits / weights;
}

static void add_policy(fl_json *root, const node_model *m) {
    fl_json *policy = fl_json_add_array(root, "policy");
    for (uint32_t i = 0; i < m->layers; i++) {
        fl_json *layer = fl_json_add_object(policy, NULL);
        fl_json_set_integer(layer, "layer", i);
        fl_json_set_integer(layer, "bits", m->policy.bits[i]);
        fl_json_set_number(layer, "mean_bits", mean_bits(&m->layer[i]));
        fl_json *matrices = fl_json_add_array(layer, "matrix_bits"); // q k v o gate up down
        for (int k = 0; k < NODE_MODULES; k++)
            fl_json_set_integer(matrices, NULL, m->layer[i].linear[k].bits);
        fl_json_set_number(layer, "sparsity", (double)m->policy.sparsity[i]);
        fl_json_set_number(layer, "sensitivity_quant", (double)m->policy.sensitivity_quant[i]);
        fl_json_set_number(layer, "sensitivity_prune", (double)m->policy.sensitivity_prune[i]);
        fl_json_set_integer(layer, "heads", m->layer[i].heads);
        fl_json_set_integer(layer, "ffn", m->layer[i].ffn);
    }
    fl_json_set_string(root, "policy_name", m->policy.name);
    fl_json_set_integer(root, "head_bits", m->policy.head_bits);
}

static fl_status print_json(const node_model *m, fl_err *err) {
    fl_json *root = fl_json_object();
    fl_json_set_string(root, "architecture", m->architecture);
    fl_json_set_string(root, "name", m->name);
    fl_json_set_integer(root, "layers", m->layers);
    fl_json_set_integer(root, "hidden", m->hidden);
    fl_json_set_integer(root, "ffn", m->ffn);
    fl_json_set_integer(root, "heads", m->heads);
    fl_json_set_integer(root, "kv_heads", m->kv_heads);
    fl_json_set_integer(root, "vocabulary", m->vocabulary);
    fl_json_set_integer(root, "context", m->context);
    fl_json_set_integer(root, "tensors", (int64_t)node_gguf_tensor_count(m->file));
    fl_json_set_integer(root, "bytes", (int64_t)m->bytes);
    fl_json *exits = fl_json_add_array(root, "exits");
    for (uint32_t i = 0; i < m->exits; i++) fl_json_set_integer(exits, NULL, m->exit_layer[i]);
    if (m->compressed) add_policy(root, m);
    const fl_status st = fl_json_print(root, stdout, err);
    fl_json_free(root);
    return st;
}

static void print_text(const node_model *m) {
    printf("%s (%s)%s\n", m->name[0] ? m->name : "unnamed model", m->architecture,
           m->compressed ? ", compressed" : "");
    printf("  layers %u, hidden %u, ffn %u, heads %u (%u key/value), vocabulary %u, context %u\n",
           m->layers, m->hidden, m->ffn, m->heads, m->kv_heads, m->vocabulary, m->context);
    printf("  %zu tensors, %.1f MB, exits after layers", node_gguf_tensor_count(m->file),
           (double)m->bytes / 1e6);
    for (uint32_t i = 0; i < m->exits; i++) printf(" %u", m->exit_layer[i]);
    printf("\n");
    if (!m->compressed) return;
    printf("  policy %s, head and embedding at %u bits\n", m->policy.name, m->policy.head_bits);
    printf("                bits of each matrix       sparsity        error of\n");
    printf("  layer  bits   q k v o gate up down             rounding     pruning  heads   ffn\n");
    for (uint32_t i = 0; i < m->layers; i++) {
        const node_layer *l = &m->layer[i];
        printf("  %5u  %4.2f  ", i, mean_bits(l));
        for (int k = NODE_Q; k <= NODE_O; k++) printf(" %u", l->linear[k].bits);
        printf("  %3u  %u    %u", l->linear[NODE_GATE].bits, l->linear[NODE_UP].bits,
               l->linear[NODE_DOWN].bits);
        printf("     %5.1f%%  %9.6f  %10.6f  %5u  %4u\n", 100.0 * (double)m->policy.sparsity[i],
               (double)m->policy.sensitivity_quant[i], (double)m->policy.sensitivity_prune[i],
               l->heads, l->ffn);
    }
}

static int run(const void *options) {
    const inspect_opts *o = options;
    node_model *model = NULL;
    fl_err err;
    fl_status st = node_model_open(o->file, &model, &err);
    if (st != FL_OK) return fl_cli_fail(&err);
    if (o->json)
        st = print_json(model, &err);
    else
        print_text(model);
    node_model_close(model);
    return st == FL_OK ? FL_EXIT_OK : fl_cli_fail(&err);
}

const fl_command node_cmd_inspect = {
    .name = "inspect",
    .summary = "shows what a model file holds",
    .example = "fleetune-node inspect smollm2-4bit.gguf",
    .table = table,
    .count = FL_COUNT(table),
    .options_size = sizeof(inspect_opts),
    .run = run,
};
