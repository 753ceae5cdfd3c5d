// state.h: what the simulator's files share. Not for others: include sim.h.
#ifndef SIM_STATE_H
#define SIM_STATE_H

#include "coordinator/loop_state.h"
#include "node/client/client.h"
#include "node/client/peer.h"
#include "proto/invite.h"
#include "sim/crypto.h"
#include "sim/disk.h"
#include "sim/sim.h"

#define SIM_DIR "/sim"
enum {
    SIM_LAYERS_MAX = 8,
    SIM_VALUES_MAX = 40,
    SIM_VERSIONS_MAX = 1024, // of a layer, of which digests are remembered
    SIM_TICK_MS = 1000,      // of a node
    SIM_POLL_MS = 500,       // of the coordinator
};

// ---- time and network (net.c)

typedef enum sim_event_kind {
    SIM_EV_TO_COORDINATOR, // frame of a node
    SIM_EV_TO_NODE,        // frame for a node
    SIM_EV_NODE_TICK,
    SIM_EV_NODE_TRAINED, // its task is done
    SIM_EV_NODE_BOOT,
    SIM_EV_NODE_CRASH,
    SIM_EV_STEP,    // the coordinator looks at what came
    SIM_EV_POLL,    // and does so when nothing came
    SIM_EV_BOOT,    // the coordinator starts again
    SIM_EV_COMPARE, // memory against a second recovery
    SIM_EV_OWNER,   // the owner revokes a node, or a clock jumps
} sim_event_kind;

typedef struct sim_event {
    uint64_t at_ms, order; // what comes first; order: of being made
    sim_event_kind kind;
    uint32_t node;
    uint64_t boot; // of the node or the coordinator that it is for; an older one's is void
    uint8_t *frame;
    uint32_t size;
} sim_event;

typedef struct sim_queue {
    sim_event *heap;
    size_t count, room;
    uint64_t made;
} sim_queue;

void sim_push(sim_queue *q, sim_event ev);
bool sim_pop(sim_queue *q, sim_event *ret); // the frame is the caller's to free
void sim_queue_done(sim_queue *q);

typedef struct sim_path { // one node's way to the coordinator
    uint64_t delay_ms, jitter_ms;
    double loss, twice, late; // late: by seconds, behind everything
    uint64_t cut_until_ms;    // a partition
} sim_path;

// ---- nodes (node.c)

typedef enum sim_malice {
    SIM_HONEST,
    SIM_NAN,         // a scale that is no number
    SIM_WRONG_BASE,  // of a version from the future
    SIM_WRONG_LAYER, // header and announcement differ
    SIM_WRONG_SIZE,
    SIM_HUGE,     // legal values, far too large
    SIM_FORGED,   // the signature does not hold
    SIM_DAMAGED,  // bytes do not have their digest
    SIM_TWICE,    // a second update for the same layer and version
    SIM_OLDER,    // for a version before the one it was given
    SIM_MALICE_COUNT
} sim_malice;

// One update that a node made: what the checker holds against the ledger.
typedef struct sim_made {
    fl_update_begin begin;
    uint8_t *sealed; // [begin.size] while it is in the node's spool
    uint32_t count;
    int64_t values[SIM_VALUES_MAX]; // fixed point
    double norm;
    bool valid;        // nothing in it that must be refused
    bool acknowledged; // the node was told that it counts
    bool refused;      // the node was told that it does not
    int64_t row;       // of the ledger; 0: not there
    int64_t round;     // that counted it; 0: open
} sim_made;

typedef struct sim_node {
    struct sim *sim;
    uint32_t index;
    sim_rng rng;
    sim_path path;
    sim_malice malice;
    uint64_t step_ms; // of training
    uint32_t window_max;

    // what is durable
    fl_secret *identity;
    uint8_t identity_key[FL_KEY_SIZE], curve_key[FL_KEY_SIZE];
    sim_made *made; // by sequence - 1
    size_t made_count, made_room;
    uint64_t *spool; // sequences, oldest first
    size_t spool_count, spool_room;
    uint64_t dropped; // newest sequence taken out of the spool: after a crash it may be back
    uint64_t reports;
    bool has_model;
    bool enrolled; // it was told that it is a member
    bool revoked;

    // what a crash takes
    bool up;
    bool admitted; // by the coordinator's link
    uint64_t boot; // how often it started
    uint64_t born_ms;
    fl_channel *channel;
    node_peer peer;
    node_client *client;
    uint8_t *fetched; // of the object on its way
    size_t fetched_size;
    bool training;
    uint32_t trainings; // an older one's end is void
    bool done;          // the run is over for it
} sim_node;

fl_status sim_node_init(struct sim *s, uint32_t index, fl_err *err) FL_NODISCARD;
void sim_node_done(sim_node *n);
void sim_node_boot(sim_node *n);
void sim_node_crash(sim_node *n);
void sim_node_tick(sim_node *n);
void sim_node_frame(sim_node *n, fl_bytes frame);
void sim_node_trained(sim_node *n);
sim_made *sim_made_of(sim_node *n, uint64_t sequence); // NULL: it made no such update

// ---- joining (join.c)

uint32_t sim_node_of_key(const struct sim *s, const uint8_t key[FL_LINK_KEY]); // or COORD_NOBODY
void sim_join_draw(struct sim *s); // who is no member at first
fl_status sim_join_token(const struct sim *s, coord_store *st, fl_err *err) FL_NODISCARD;
void sim_join_ask(sim_node *n);
void sim_join_answer(sim_node *n, fl_bytes frame);
void sim_join_check(struct sim *s); // who was told so is in, and the token was used once for each

// ---- training (train.c)

// Makes the update of one layer as its node would, honest or not, and puts it into the spool.
sim_made *sim_make_update(sim_node *n, uint32_t layer, uint64_t base, uint64_t tokens);
fl_report sim_make_report(sim_node *n, const fl_task *task);

// ---- the coordinator's machine (host.c)

typedef struct sim_host {
    sim_disk *disk;
    coord_world world;
    coord_settings settings;
    coord_keys keys;
    coord_loop *loop; // NULL: down
    uint64_t boot, born_ms;
    uint64_t wall_ms;
    sim_event *inbox; // frames that wait, oldest first
    size_t inbox_count, inbox_room, inbox_next;
    uint8_t *current; // frame that the loop looks at
    bool step_due;
} sim_host;

fl_status sim_host_init(struct sim *s, fl_err *err) FL_NODISCARD;
void sim_host_done(struct sim *s);
void sim_host_boot(struct sim *s);
void sim_host_receive(struct sim *s, sim_event ev); // takes the frame
void sim_host_step(struct sim *s);
void sim_host_owner(struct sim *s);

// ---- invariants (check.c)

typedef struct sim_row { // what the checker saw in the ledger
    uint32_t node, layer, clip;
    uint64_t weight, sequence;
} sim_row;

typedef struct sim_layer {
    uint64_t version;
    uint32_t count; // 0: not known yet
    float theta[SIM_VALUES_MAX];
    double moments[2 * SIM_VALUES_MAX];
    bool started;
    uint8_t digests[SIM_VERSIONS_MAX][FL_DIGEST_SIZE]; // by version
    double norms[COORD_NORMS_MAX];                     // newest last
    uint32_t norms_count;
    coord_wide sum[SIM_VALUES_MAX]; // of the open buffer: weight * clip * value
    uint64_t weight;
    coord_uwide squares;
    int64_t updates;
} sim_layer;

typedef struct sim_truth {
    int64_t round;      // open
    int64_t open_first; // first row of the open buffer; rows have no gaps
    sim_row *rows;      // by row - 1
    size_t rows_count, rows_room;
    uint64_t *last; // [nodes][layers]: 1 + newest base that counts; 0: none
    sim_layer layer[SIM_LAYERS_MAX];
} sim_truth;

void sim_check(struct sim *s);          // after every step and recovery
void sim_check_recovered(struct sim *s); // after a recovery, before anything else
void sim_check_compare(struct sim *s);  // memory against a second recovery
void sim_check_object(struct sim *s, uint32_t layer, uint64_t version,
                      const uint8_t digest[FL_DIGEST_SIZE]);
void sim_truth_init(struct sim *s);
void sim_truth_done(sim_truth *t);

// ---- the whole

typedef struct sim {
    sim_opts opts;
    sim_result result;
    sim_rng rng;
    uint64_t now_ms;
    sim_queue queue;
    sim_host host;
    sim_node *nodes; // [opts.nodes]
    sim_truth truth;
    uint32_t layers, exits;
    uint32_t counts[SIM_LAYERS_MAX]; // values of each layer
    bool pinned;                     // they are in the store from the start
    uint8_t run_id[FL_ID_SIZE], model_digest[FL_DIGEST_SIZE];
    uint64_t model_size;
    uint8_t token_secret[FL_INVITE_SECRET];
    uint32_t token_uses; // nodes that are no members at first
    uint64_t calm_ms;  // from here on nothing bad happens
    uint64_t limit_ms; // by then the run must be over
    fl_arena scratch;  // of the node that has the floor
    uint8_t *plain, *frame;
} sim;

// The first problem ends the run.
void sim_fail(sim *s, const char *fmt, ...) FL_PRINTF(2, 3);
void sim_trace(sim *s, const char *what, uint32_t node, uint64_t a, uint64_t b);
void sim_send_to_node(sim *s, uint32_t node, fl_bytes frame);
void sim_send_to_coordinator(sim *s, uint32_t node, fl_bytes frame);

#endif
