// settings.h: everything the owner may choose, in one table: the parser of DIR/coordinator.ini, the
// options of init, --help and the sample file are made from it.
#ifndef COORD_SETTINGS_H
#define COORD_SETTINGS_H

#include "common/conf.h"
#include "coordinator/aggregate.h"
#include "coordinator/registry.h"
#include "coordinator/robust.h"
#include "coordinator/round.h"

#define COORD_ENV_PREFIX "FLEETUNE_COORDINATOR"

typedef char coord_text[FL_SETTING_TEXT_MAX];

// field, C type, section, key, kind, unit, min, max, default, help, choices
#define COORD_SETTING_LIST(X)                                                                      \
    X(listen, coord_text, "network", "listen", TEXT, "ENDPOINT", 0, 0, "tcp://*:7878",             \
      "where nodes connect", NULL)                                                                 \
    X(advertise, coord_text, "network", "advertise", TEXT, "HOST[:PORT]", 0, 0, "",                \
      "address in join URLs; empty: this machine's address and the port listened on", NULL)        \
    X(nodes_max, int64_t, "network", "nodes-max", INTEGER, "nodes", 1, COORD_NODES_MAX, "256",     \
      "most nodes in the fleet", NULL)                                                             \
    X(frames_per_s, int64_t, "network", "frames-per-second", INTEGER, "frames", 1, 100000, "200",  \
      "most frames a second from one node", NULL)                                                  \
    X(bytes_per_s, uint64_t, "network", "bytes-per-second", SIZE, "BYTES", 65536, 1e12, "64M",     \
      "most bytes a second from one node", NULL)                                                   \
    X(uploads_max, uint64_t, "network", "uploads-max", SIZE, "BYTES", 1048576, 1e12, "64M",        \
      "memory for updates that are on their way, of all nodes", NULL)                              \
    X(rounds, int64_t, "rounds", "rounds", INTEGER, "rounds", 0, 1e9, "0",                         \
      "rounds after which the run is finished; 0: never", NULL)                                    \
    X(updates, int64_t, "rounds", "updates-per-round", INTEGER, "nodes", 0, COORD_NODES_MAX, "0",  \
      "contributions that close a round; 0: one of every active node", NULL)                       \
    X(updates_min, int64_t, "rounds", "min-updates", INTEGER, "nodes", 1, COORD_NODES_MAX, "1",    \
      "contributions without which a round never closes", NULL)                                    \
    X(deadline_s, int64_t, "rounds", "deadline", INTEGER, "seconds", 1, 604800, "600",             \
      "a round closes after this if it has its minimum", NULL)                                     \
    X(staleness_max, int64_t, "rounds", "staleness-max", INTEGER, "versions", 0, 1000, "8",        \
      "older updates are refused", NULL)                                                           \
    X(retry_ms, int64_t, "rounds", "retry", INTEGER, "milliseconds", 50, 3600000, "1000",          \
      "when a node that has nothing to do asks again", NULL)                                       \
    X(exits, int64_t, "model", "exits", INTEGER, "exits", 1, 8, "4",                               \
      "exits of the model, evenly spaced", NULL)                                                   \
    X(rank, int64_t, "model", "rank", INTEGER, "", 1, 64, "8", "rank of the adapters", NULL)       \
    X(alpha, double, "model", "alpha", NUMBER, "", 0.01, 1024, "16",                               \
      "adapters count alpha / rank times", NULL)                                                   \
    X(seed, int64_t, "model", "seed", INTEGER, "", 0, 9e15, "0",                                   \
      "of the frozen matrices; 0: drawn at init", NULL)                                            \
    X(windows, int64_t, "training", "windows", CHOICE, "", 0, 0, "last",                           \
      "which exits are trained: the last, mostly the last, or all alike", "last|last-heavy|even")  \
    X(window, int64_t, "training", "window", INTEGER, "layers", 0, FL_LAYERS_MAX, "0",             \
      "most layers in a window; 0: down to the exit before", NULL)                                 \
    X(steps, int64_t, "training", "steps", INTEGER, "steps", 1, FL_STEPS_MAX, "32",                \
      "steps in a task", NULL)                                                                     \
    X(sequence, int64_t, "training", "sequence", INTEGER, "tokens", 16, FL_SEQUENCE_MAX, "128",    \
      "tokens in a sequence", NULL)                                                                \
    X(micro_batch, int64_t, "training", "micro-batch", INTEGER, "sequences", 1,                    \
      FL_MICRO_BATCH_MAX, "1", "sequences in a step", NULL)                                        \
    X(rate, double, "training", "lr", NUMBER, "", 1e-9, 1, "0.005", "nodes' learning rate", NULL)  \
    X(eval_tokens, int64_t, "training", "eval-tokens", INTEGER, "tokens", 0, 1e9, "1024",          \
      "held-out tokens that a node scores for its report; 0: all", NULL)                           \
    X(task_deadline_s, int64_t, "training", "task-deadline", INTEGER, "seconds", 1, 604800,        \
      "3600", "a node gives a task up after this", NULL)                                           \
    X(encoding, int64_t, "training", "encoding", CHOICE, "", 0, 0, "sparse4",                      \
      "the most that an update carries: all values in so many bits, or the largest of them",       \
      "int16|int8|int4|sparse8|sparse4")                                                           \
    X(density, double, "training", "density", NUMBER, "share", 0.0001, 1, "0.05",                  \
      "of a layer's values that a sparse update names, at most", NULL)                             \
    X(optimiser, int64_t, "server", "server-optimiser", CHOICE, "", 0, 0, "fedavg",                \
      "what is done with the mean of the updates", "fedavg|fedavgm|fedadam|fedyogi")               \
    X(server_rate, double, "server", "server-lr", NUMBER, "", 1e-6, 100, "1",                      \
      "server's learning rate", NULL)                                                              \
    X(beta1, double, "server", "beta1", NUMBER, "", 0, 0.9999, "0.9", "momentum", NULL)            \
    X(beta2, double, "server", "beta2", NUMBER, "", 0, 0.999999, "0.99", "second momentum", NULL)  \
    X(tau, double, "server", "tau", NUMBER, "", 1e-9, 1, "0.001", "floor of adaptive steps", NULL) \
    X(shrink, double, "server", "shrink", NUMBER, "", 0, 1000, "0",                                \
      "n updates count n / (n + shrink): damps layers that few nodes sent", NULL)                  \
    X(share_cap, double, "server", "share-cap", NUMBER, "", 0.01, 1, "0.5",                        \
      "no node weighs more than this share of a layer that three or more sent; 1: no cap", NULL)   \
    X(rule, int64_t, "server", "rule", CHOICE, "", 0, 0, "centred-clip",                           \
      "how a layer's updates become one; all but mean put nodes away that point elsewhere",        \
      "mean|clipped-mean|median|trimmed-mean|krum|multi-krum|centred-clip|fltrust")                \
    X(byzantine, double, "server", "byzantine", NUMBER, "nodes", 0, COORD_NODES_MAX, "0.2",        \
      "nodes that may be bad: a share when below 1, or a count", NULL)                             \
    X(batch_clip, double, "server", "batch-clip", NUMBER, "", 0, 1000, "1",                        \
      "norms in a round are cut to this times their median; 0: they are not", NULL)                \
    X(root_node, coord_text, "server", "root-node", TEXT, "NAME", 0, 0, "",                        \
      "the owner's own node, whose update fltrust goes by", NULL)                                  \
    X(rollback, double, "server", "rollback", NUMBER, "nats", 0, 100, "0.02",                      \
      "layers that lose more than this on most nodes' held-out text are undone; 0: never", NULL)   \
    X(clip, double, "server", "clip-factor", NUMBER, "", 1, 1e9, "4",                              \
      "an update's norm is cut to this times the median", NULL)                                    \
    X(refuse, double, "server", "refuse-factor", NUMBER, "", 1, 1e9, "20",                         \
      "above this times the median it is refused", NULL)                                           \
    X(norms_min, int64_t, "server", "norms-min", INTEGER, "updates", 1, COORD_NORMS_MAX, "6",      \
      "updates of a layer before its median is believed", NULL)                                    \
    X(vote_gain, double, "server", "vote-gain", NUMBER, "nats", 0, 1, "0.00001",                   \
      "least gain a token for which new voting weights are published", NULL)                       \
    X(versions_kept, int64_t, "server", "versions-kept", INTEGER, "versions", 1, 1000, "4",        \
      "old versions of a layer that stay on the disk", NULL)

typedef struct coord_settings {
#define X(field, ctype, section, key, kind, unit, min, max, otherwise, help, choices) ctype field;
    COORD_SETTING_LIST(X)
#undef X
} coord_settings;

extern const fl_setting coord_setting_table[]; // offsets into coord_settings
extern const size_t coord_setting_count;

// DIR/coordinator.ini and the environment. FL_ENOENT, FL_EARG, FL_EFORMAT.
fl_status coord_settings_load(const char *dir, coord_settings *ret, fl_err *err) FL_NODISCARD;
// Writes DIR/coordinator.ini, every key with its help. Atomic.
fl_status coord_settings_save(const char *dir, const coord_settings *s, fl_err *err) FL_NODISCARD;

// Exits after s->exits evenly spaced layers of `layers`, and what else rounds need. FL_EARG when
// the settings contradict each other or the model.
fl_status coord_settings_round(const coord_settings *s, uint32_t layers, coord_round_opts *ret,
                               fl_err *err) FL_NODISCARD;

#endif
