// Goal: the coordinator's process holds out against an enrolled node that lies, with the settings
// that everybody has: its layers are what the robust rule makes of the ledger, to the bit, also
// after a kill; who keeps pointing away is put away by name; and a round that the fleet's reports
// call harmful is undone, once, by a new version with the old content.
// Method: the built program, seven nodes made from proto/ (tests/fleet.h) that agree on a direction
// but for one; the rule itself is tests/test_robust's, here it is given what the nodes remember.
#include "coordinator/robust.h"
#include "tests/fleet.h"

enum { FLEET = 7, LIAR = 6 };

static node nodes[FLEET];
static int64_t told[FLEET][LAYERS][COUNT]; // newest update of each
static uint64_t weights[FLEET][LAYERS];

static void open_seven(void) {
    char url[FL_INVITE_URL_MAX + 2];
    token(url, sizeof(url), "7", true);
    for (int i = 0; i < FLEET; i++) {
        char name[24];
        snprintf(name, sizeof(name), "node-%d", i + 1);
        node_open(&nodes[i], name);
        T_EQ(node_join(&nodes[i], url).verdict, FL_VERDICT_ACCEPTED);
        T_NEED(node_session(&nodes[i], PATIENCE_MS), "a session for node %d", i);
    }
}

// What honest nodes have in common is the same in every round, so that it can be pointed away from.
static void say(parcel *p, int who, uint32_t layer) {
    float values[COUNT];
    fl_update u;
    fl_err err;
    for (int i = 0; i < COUNT; i++) {
        const float common = 0.01f * (float)sin(i * 1.7 + layer);
        values[i] = (who == LIAR ? -1.0f : 1.0f) * (common + 0.008f * t_randf());
    }
    const fl_update_info info = {.encoding = FL_UPDATE_INT16,
                                 .layer = layer,
                                 .count = COUNT,
                                 .base_version = p->begin.key.base_version,
                                 .tokens = p->begin.tokens};
    T_OK(fl_update_encode(&info, values, 1, p->payload, p->payload_size, NULL, &err), err);
    T_OK(fl_update_open((fl_bytes){p->payload, p->payload_size}, &u, &err), err);
    fl_update_fixed(&u, 0, COUNT, told[who][layer]);
    weights[who][layer] = coord_weight(info.tokens, 0);
}

static fl_task task_of_node(int who) {
    for (int tries = 0; tries < 200; tries++) {
        const fl_msg m = request_task(&nodes[who]);
        if (m.type == FL_MSG_TASK && m.task.kind == FL_TASK_TRAIN) return m.task;
        usleep(20000); // the round is closing
    }
    T_NEED(false, "no work for node %d", who);
    return (fl_task){0};
}

static void report(int who, const fl_task *t, double loss) {
    fl_msg m = {.type = FL_MSG_REPORT};
    fl_report *r = &m.report;
    memcpy(r->run_id, t->run_id, FL_ID_SIZE);
    r->round = t->round;
    r->task_id = t->task_id;
    r->sequence = ++nodes[who].sequence;
    r->tokens = 100000;
    r->nll_base_q20 = llrint(3.0 * 100000 * 0x1p20);
    r->nll_voted_q20 = llrint(loss * 100000 * 0x1p20);
    const fl_msg a = ask(&nodes[who], &m, FL_MSG_REPORT_ACK, FL_MSG_REPORT_ACK);
    T_CHECK(a.type == FL_MSG_REPORT_ACK && a.report_ack.verdict == FL_VERDICT_ACCEPTED, "report");
}

// Every node's task of a round; each reports `loss` before its updates when there is one.
static void one_round(const double *loss) {
    for (int i = 0; i < FLEET; i++) {
        const fl_task t = task_of_node(i);
        fl_layer_version bases[LAYERS];
        const size_t count = t.base_count;
        memcpy(bases, t.bases, count * sizeof(bases[0]));
        if (loss != NULL) report(i, &t, loss[i]);
        for (size_t k = 0; k < count; k++) {
            static parcel p;
            pack(&nodes[i], &t, bases[k].layer, bases[k].version, &p);
            say(&p, i, bases[k].layer);
            seal(&nodes[i], &p);
            T_EQ(deliver(&nodes[i], &p).verdict, FL_VERDICT_ACCEPTED);
        }
    }
}

static void wait_for_round(int64_t closed) {
    for (int tries = 0; tries < 500; tries++) {
        coord_store *s = NULL;
        coord_round_row row;
        size_t count = 0;
        fl_err err;
        T_OK(coord_store_open(dir, &s, &err), err);
        T_OK(coord_store_rounds(s, &row, 1, &count, &err), err);
        coord_store_close(s);
        if (count == 1 && row.round > closed) return;
        usleep(10000);
    }
    T_NEED(false, "round %d never closed", (int)closed);
}

static int64_t load_layer(uint32_t layer, float *theta) {
    coord_store *s = NULL;
    coord_layer_row rows[LAYERS];
    uint8_t *data = NULL;
    size_t count = 0, size = 0;
    fl_layer l;
    fl_err err;
    memset(theta, 0, COUNT * sizeof(*theta));
    T_OK(coord_store_open(dir, &s, &err), err);
    T_OK(coord_store_layers(s, rows, LAYERS, &count, &err), err);
    if (rows[layer].version > 0) {
        T_OK(coord_store_get_object(s, rows[layer].digest, 1 << 20, &data, &size, &err), err);
        T_OK(fl_layer_open((fl_bytes){data, size}, &l, &err), err);
        fl_layer_values(&l, 0, COUNT, theta);
        free(data);
    }
    coord_store_close(s);
    return rows[layer].version;
}

static fl_status read_told(void *ctx, uint32_t v, size_t first, size_t n, int64_t *out,
                           fl_err *err) {
    (void)err;
    memcpy(out, told[v][*(const uint32_t *)ctx] + first, n * sizeof(*out));
    return FL_OK;
}

// The step that the settings' rule makes of what the nodes remember.
static void expected_step(uint32_t layer, float *theta) {
    static const coord_robust_opts opts = {.rule = COORD_RULE_CENTRED,
                                           .byzantine = 0.2,
                                           .clip = 1,
                                           .filter = true,
                                           .iterations = 3,
                                           .root = COORD_NO_ROOT,
                                           .unit = 0x1p-32};
    double mean[COUNT] = {0};
    coord_voice voices[FLEET];
    coord_opinion opinions[FLEET];
    coord_robust_result r;
    fl_err err;
    for (int i = 0; i < FLEET; i++) voices[i].weight = weights[i][layer];
    T_OK(coord_robust_run(&opts, voices, FLEET, COUNT, read_told, &layer, mean, opinions, &r, &err),
         err);
    T_CHECK(opinions[LIAR].cosine < -0.3, "the liar points away: %.2f", opinions[LIAR].cosine);
    for (int i = 0; i < COUNT; i++) theta[i] = (float)((double)theta[i] + mean[i]);
}

static int events_of(const char *kind) {
    static coord_event_row events[2000];
    coord_store *s = NULL;
    size_t count = 0;
    int found = 0;
    fl_err err;
    T_OK(coord_store_open(dir, &s, &err), err);
    T_OK(coord_store_events(s, events, 2000, &count, &err), err);
    coord_store_close(s);
    for (size_t i = 0; i < count; i++) found += strcmp(events[i].kind, kind) == 0;
    return found;
}

static void close_seven(void) {
    for (int i = 0; i < FLEET; i++) node_close(&nodes[i]);
    T_EQ(stop(SIGTERM), 0);
    T_EQ(COMMAND(NULL, 0, "verify", dir), 0);
}

static void test_a_liar_among_seven(void) {
    float want[LAYERS][COUNT] = {{0}}, got[COUNT];
    setenv("FLEETUNE_COORDINATOR_SERVER_RULE", "centred-clip", 1); // fleet.h's is the plain mean
    set_up("7", "last");
    start();
    open_seven();
    for (int round = 1; round <= 4; round++) {
        if (round == 2) { // the conduct of the first round and all of the ledger is on the disk
            T_EQ(stop(SIGKILL), 128 + SIGKILL);
            start();
        }
        one_round(NULL);
        wait_for_round(round);
        for (uint32_t l = 3; l < LAYERS && round <= 3; l++) { // nobody is put away before
            expected_step(l, want[l]);
            T_EQ(load_layer(l, got), round);
            T_CHECK(memcmp(got, want[l], sizeof(got)) == 0, "round %d, layer %u: %a and not %a",
                    round, l, (double)got[7], (double)want[l][7]);
        }
    }
    T_EQ(events_of("node.quarantined"), 1);
    T_CHECK(has_event("node.quarantined", "point away"), "the reason is told");
    close_seven();
}

static void test_a_harmful_round_is_undone_once(void) {
    static const double before[] = {2.0, 2.1, 2.2, 1.9, 2.0, 2.0, 2.0},
                        better[] = {1.8, 1.9, 2.0, 1.7, 1.8, 1.8, 9.0},
                        worse[] = {2.8, 2.9, 3.0, 2.7, 2.8, 1.8, 0.1},
                        lies[] = {1.8, 1.9, 2.0, 1.7, 1.8, 9.0, 9.0};
    float good[COUNT], got[COUNT];
    setenv("FLEETUNE_COORDINATOR_SERVER_RULE", "centred-clip", 1);
    set_up("7", "last");
    start();
    open_seven();
    one_round(before); // of version 0
    wait_for_round(1);
    one_round(better); // of version 1, which is good then
    wait_for_round(2);
    T_EQ(load_layer(4, got), 2);
    T_EQ(events_of("model.rollback"), 0);
    coord_store *s = NULL; // what version 1 was, from the history
    uint8_t digest[COORD_DIGEST], *data = NULL;
    size_t size = 0;
    fl_layer l;
    fl_err err;
    T_OK(coord_store_open(dir, &s, &err), err);
    T_OK(coord_store_find_layer(s, 4, 1, digest, &err), err);
    T_OK(coord_store_get_object(s, digest, 1 << 20, &data, &size, &err), err);
    T_OK(fl_layer_open((fl_bytes){data, size}, &l, &err), err);
    fl_layer_values(&l, 0, COUNT, good);
    free(data);
    coord_store_close(s);
    one_round(worse); // of version 2; two say otherwise
    wait_for_round(3);
    T_EQ(events_of("model.rollback"), 1);
    T_EQ(load_layer(4, got), 3); // versions rise
    T_CHECK(memcmp(got, good, sizeof(good)) == 0, "version 3 is version 1 again");
    T_EQ(stop(SIGKILL), 128 + SIGKILL);
    start();
    one_round(lies); // of version 3: two of seven cry wolf
    wait_for_round(4);
    T_EQ(events_of("model.rollback"), 1);
    T_EQ(load_layer(4, got), 4);
    T_CHECK(memcmp(got, good, sizeof(good)) != 0, "and training goes on");
    close_seven();
}

static void test_three_nodes_fall_back_and_say_so(void) {
    node few[NODES];
    setenv("FLEETUNE_COORDINATOR_SERVER_RULE", "krum", 1);
    set_up("3", "last");
    start();
    open_fleet(few);
    for (int i = 0; i < NODES; i++) T_CHECK(work(&few[i], i + 1), "node %d has work", i);
    wait_for_round(1);
    T_CHECK(has_event("rule.fallback", "krum cannot work with 3 nodes, 1 of them bad: trimmed"),
            "the fallback has its reason");
    T_EQ(events_of("rule.fallback"), 1); // not once a layer
    for (int i = 0; i < NODES; i++) node_close(&few[i]);
    T_EQ(stop(SIGTERM), 0);
}

static void test_the_plain_mean_stays_exact(void) {
    node few[NODES];
    setenv("FLEETUNE_COORDINATOR_SERVER_RULE", "mean", 1);
    set_up("3", "last");
    start();
    open_fleet(few);
    for (int i = 0; i < NODES; i++) T_CHECK(work(&few[i], i + 1), "node %d has work", i);
    wait_for_round(1);
    for (int i = 0; i < NODES; i++) node_close(&few[i]);
    T_EQ(stop(SIGTERM), 0);
    T_EQ(check_whole_history(), 1);
}

T_MAIN({"a_liar_among_seven", test_a_liar_among_seven},
       {"a_harmful_round_is_undone_once", test_a_harmful_round_is_undone_once},
       {"three_nodes_fall_back_and_say_so", test_three_nodes_fall_back_and_say_so},
       {"the_plain_mean_stays_exact", test_the_plain_mean_stays_exact})
