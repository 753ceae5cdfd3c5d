// status: how the run is doing.
#include "common/crypto.h"
#include "coordinator/commands/commands.h"
#include "coordinator/settings.h"

#include <math.h>
#include <string.h>

enum { EVENTS_SHOWN = 10 };

static const fl_setting table[] = {COORD_ROW_DIR, COORD_ROW_JSON};

typedef struct picture {
    coord_settings settings;
    coord_layer_row layers[COORD_LAYERS_MAX];
    size_t layer_count;
    coord_round_row rounds[2]; // the last closed one, if any, and the open one
    size_t round_count;
    coord_vote_row vote;
    coord_event_row events[EVENTS_SHOWN];
    size_t event_count;
    int64_t nodes[COORD_NODE_STATE_COUNT];
    int64_t waiting; // updates in the open buffer
    char model[2 * COORD_DIGEST + 1];
    char endpoint[256];
} picture;

static fl_status count_node(void *ctx, const coord_node_row *row, fl_err *err) {
    picture *p = ctx;
    (void)err;
    p->nodes[row->state]++;
    return FL_OK;
}

static fl_status count_update(void *ctx, const coord_update_row *row, fl_err *err) {
    picture *p = ctx;
    (void)row, (void)err;
    p->waiting++;
    return FL_OK;
}

static fl_status look(coord_store *s, picture *p, fl_err *err) {
    uint8_t digest[COORD_DIGEST] = {0};
    size_t size = 0;
    FL_TRY(coord_store_layers(s, p->layers, COORD_LAYERS_MAX, &p->layer_count, err));
    FL_TRY(coord_store_rounds(s, p->rounds, 2, &p->round_count, err));
    fl_status st = coord_store_last_vote(s, &p->vote, err);
    if (st != FL_OK && st != FL_ENOENT) return st;
    FL_TRY(coord_store_events(s, p->events, EVENTS_SHOWN, &p->event_count, err));
    FL_TRY(coord_store_each_node(s, count_node, p, err));
    FL_TRY(coord_store_each_open_update(s, count_update, p, err));
    FL_TRY(coord_store_get_value(s, "model_digest", digest, sizeof(digest), &size, err));
    coord_digest_text(digest, p->model);
    st = coord_store_get_value(s, "endpoint", p->endpoint, sizeof(p->endpoint) - 1, &size, err);
    return st == FL_ENOENT ? FL_OK : st;
}

static int64_t changed_layers(const picture *p) {
    int64_t n = 0;
    for (size_t l = 0; l < p->layer_count; l++) n += p->layers[l].version > 0;
    return n;
}

static int64_t open_round(const picture *p) {
    return p->round_count == 0 ? 0 : p->rounds[p->round_count - 1].round;
}

static bool finished(const picture *p) {
    return p->settings.rounds != 0 && open_round(p) > p->settings.rounds;
}

static double last_loss(const picture *p) {
    return p->round_count == 2 ? p->rounds[0].loss : (double)NAN;
}

static void print_text(const picture *p) {
    if (finished(p))
        printf("finished: %lld rounds\n", (long long)p->settings.rounds);
    else
        printf("round %lld%s, %lld updates in its buffer\n", (long long)open_round(p),
               p->settings.rounds == 0 ? "" : " of the run", (long long)p->waiting);
    printf("nodes: %lld active, %lld waiting for approval, %lld revoked\n",
           (long long)p->nodes[COORD_NODE_ACTIVE], (long long)p->nodes[COORD_NODE_PENDING],
           (long long)p->nodes[COORD_NODE_REVOKED]);
    printf("model: %zu layers, %lld of them tuned, %.16s\n", p->layer_count,
           (long long)changed_layers(p), p->model);
    if (isfinite(last_loss(p))) printf("held-out loss of the vote: %.4f\n", last_loss(p));
    if (p->vote.exits > 0) {
        printf("vote %lld:", (long long)p->vote.version);
        for (uint32_t t = 0; t < p->vote.exits; t++) printf(" %.3f", p->vote.weights[t]);
        printf("\n");
    }
    for (size_t i = 0; i < p->event_count; i++)
        printf("  %-16s %s\n", p->events[i].kind, p->events[i].text);
}

static int print_json(const picture *p) {
    fl_json *j = coord_cmd_object();
    if (j == NULL) return FL_EXIT_FAILED;
    fl_json_set_integer(j, "round", open_round(p));
    fl_json_set_integer(j, "rounds", p->settings.rounds);
    fl_json_set_bool(j, "finished", finished(p));
    fl_json_set_integer(j, "updates_waiting", p->waiting);
    fl_json *nodes = fl_json_add_object(j, "nodes");
    for (int k = 0; k < COORD_NODE_STATE_COUNT; k++)
        fl_json_set_integer(nodes, coord_node_state_text((coord_node_state)k), p->nodes[k]);
    fl_json_set_integer(j, "layers", (int64_t)p->layer_count);
    fl_json_set_integer(j, "layers_tuned", changed_layers(p));
    fl_json_set_string(j, "model_digest", p->model);
    fl_json_set_string(j, "endpoint", p->endpoint);
    fl_json_set_number(j, "loss", last_loss(p));
    fl_json *vote = fl_json_add_object(j, "vote");
    fl_json_set_integer(vote, "version", p->vote.version);
    fl_json *weights = fl_json_add_array(vote, "weights");
    for (uint32_t t = 0; t < p->vote.exits; t++)
        fl_json_set_number(weights, NULL, p->vote.weights[t]);
    fl_json *events = fl_json_add_array(j, "events");
    for (size_t i = 0; i < p->event_count; i++) {
        fl_json *e = fl_json_add_object(events, NULL);
        fl_json_set_integer(e, "time", p->events[i].time_s);
        fl_json_set_string(e, "kind", p->events[i].kind);
        fl_json_set_integer(e, "node", p->events[i].node);
        fl_json_set_string(e, "text", p->events[i].text);
    }
    return coord_cmd_print(j);
}

static int run(const void *options) {
    static picture p;
    const coord_dir_opts *o = options;
    coord_store *s = NULL;
    fl_err err;
    fl_status st = coord_store_open(o->dir, &s, &err);
    if (st == FL_OK) st = coord_settings_load(o->dir, &p.settings, &err);
    if (st == FL_OK) st = look(s, &p, &err);
    coord_store_close(s);
    if (st != FL_OK) return fl_cli_fail(&err);
    if (o->json) return print_json(&p);
    print_text(&p);
    return FL_EXIT_OK;
}

const fl_command coord_cmd_status = {
    .name = "status",
    .summary = "show how the run is doing, and the newest events",
    .example = "fleetune-coordinator status home",
    .table = table,
    .count = FL_COUNT(table),
    .options_size = sizeof(coord_dir_opts),
    .run = run,
};
