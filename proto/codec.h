// codec.h: the only door between protobuf-c and the rest of the code. Callers see plain structs.
//
// Decoding takes hostile bytes; every limit named here is checked, numbers are finite, texts are
// printable ASCII, so that whoever gets an fl_msg may rely on it. Encoding checks the same limits
// with the same code and gives FL_EARG for what the other side would refuse.
// Unknown fields are ignored; an absent field is zero, and is refused where zero is not legal.
#ifndef FL_PROTO_CODEC_H
#define FL_PROTO_CODEC_H

#include "common/arena.h"
#include "common/status.h"
#include "proto/frame.h"

enum {
    FL_PROTOCOL = 1, // version spoken in HELLO and JOIN_REQUEST
    FL_ID_SIZE = 16, // run id, node id, token id (8)
    FL_TOKEN_ID_SIZE = 8,
    FL_KEY_SIZE = 32,    // Ed25519, X25519 and CURVE public keys, nonces, digests
    FL_DIGEST_SIZE = 32, // BLAKE2b-256
    FL_SIGNATURE_SIZE = 64,
    FL_NAME_MAX = 63,    // node names: 1..63 of A-Z a-z 0-9 . _ -
    FL_TEXT_MAX = 200,   // reasons for people
    FL_LAYERS_MAX = 256, // layers of a model: ids 0..255
    FL_EXITS_MAX = 16,
    FL_TASK_RANK_MAX = 256,
    FL_STEPS_MAX = 100000,
    FL_TASK_ENCODINGS = 5, // encodings that a task may name
    FL_SEQUENCE_MAX = 8192, // tokens in one training sequence
    FL_MICRO_BATCH_MAX = 1024,
    FL_CODEC_ARENA = 640 << 10, // a scratch arena of this size holds any legal message, either way
};
#define FL_TOKENS_MAX        ((uint64_t)1 << 40)  // in one report or task
#define FL_UPDATE_TOKENS_MAX ((uint64_t)1 << 32)  // claimed by one update; weights are capped lower
#define FL_OBJECT_MAX        ((uint64_t)1 << 38)  // bytes of one fetched object (a model file)
#define FL_UPDATE_MAX        ((uint64_t)32 << 20) // bytes of one sealed layer update
#define FL_WAIT_MS_MAX       ((uint64_t)3600000)  // no wait on the wire is longer than an hour
#define FL_DEADLINE_MS_MAX   ((uint64_t)7 * 24 * 3600000)

// Sums that many nodes add up travel as integers in units of 2^-20, so that any order of addition
// gives the same bits. |x| < 2^42.
#define FL_Q20 1048576.0

// Reason codes of JOIN_REPLY, UPDATE_ACK, REPORT_ACK, WAIT and ERROR. Numbers are the wire's and
// are never reused; a number that this version does not know reads as NONE.
#define FL_CODE_LIST(X)                                                                            \
    X(NONE, 0, "no reason")                                                                        \
    X(PROTOCOL, 1, "protocol version is not supported")                                            \
    X(SESSION, 2, "session is unknown or over: shake hands again")                                 \
    X(MALFORMED, 3, "message is malformed")                                                        \
    X(STATE, 4, "message is not legal now")                                                        \
    X(QUOTA, 5, "quota is spent")                                                                  \
    X(INTERNAL, 6, "the other side failed; try again later")                                       \
    X(TOKEN, 16, "join token is unknown, used up or expired")                                      \
    X(NAME, 17, "name is taken or not allowed")                                                    \
    X(PENDING, 18, "waiting for the owner's approval")                                             \
    X(REVOKED, 19, "node was revoked or refused by the owner")                                     \
    X(FULL, 20, "fleet is full")                                                                   \
    X(NO_WORK, 32, "no task at the moment")                                                        \
    X(ROUND_CLOSING, 33, "round is closing; the next one opens soon")                              \
    X(PAUSED, 34, "run is paused by the owner")                                                    \
    X(FINISHED, 35, "run is finished")                                                             \
    X(TOO_SMALL, 36, "node cannot hold the smallest window")                                       \
    X(NO_OBJECT, 48, "no object has this digest")                                                  \
    X(RUN, 64, "update belongs to another run")                                                    \
    X(BASE, 65, "update is based on a version that is not accepted")                               \
    X(SIGNATURE, 66, "signature or seal does not hold")                                            \
    X(DIGEST, 67, "bytes do not have the announced digest")                                        \
    X(SHAPE, 68, "update does not have this layer's size")                                         \
    X(NOT_FINITE, 69, "update has values that are not finite or out of range")                     \
    X(NORM, 70, "update's norm is far above the others'")                                          \
    X(LATE, 71, "update came too late to count")                                                   \
    X(NOT_ASSIGNED, 72, "node has no task for this layer")                                         \
    X(ENCODING, 73, "update's encoding is not supported")

typedef enum fl_code {
#define X(name, number, text) FL_CODE_##name = (number),
    FL_CODE_LIST(X)
#undef X
} fl_code;
const char *fl_code_name(uint32_t code); // "QUOTA"; "UNKNOWN" for a number that is none of these
const char *fl_code_text(uint32_t code);

enum { // fl_capability.flags
    FL_THROTTLE_UNDERVOLT = 1 << 0,
    FL_THROTTLE_CAPPED = 1 << 1,
    FL_THROTTLE_THROTTLED = 1 << 2,
    FL_THROTTLE_SOFT_LIMIT = 1 << 3,
    FL_HAS_TEMPERATURE = 1 << 16,
    FL_ON_BATTERY = 1 << 17,
    FL_OWNER_BUSY = 1 << 18, // policy says: do not train now
};
typedef enum fl_verdict {     // JOIN_REPLY, UPDATE_ACK, REPORT_ACK
    FL_VERDICT_ACCEPTED = 1,  // an update: durable, will be counted once
    FL_VERDICT_PENDING = 2,   // join only: ask again later
    FL_VERDICT_DUPLICATE = 3, // update, report: it was already accepted; nothing to resend
    FL_VERDICT_REFUSED = 4,   // with a reason code; sending the same again is useless
} fl_verdict;
typedef enum fl_vote_mode { FL_VOTE_MIXTURE = 1, FL_VOTE_MAX = 2, FL_VOTE_LAST = 3 } fl_vote_mode;
typedef enum fl_task_kind { FL_TASK_TRAIN = 1, FL_TASK_EVAL = 2 } fl_task_kind;
typedef enum fl_node_state {
    FL_NODE_IDLE = 1,
    FL_NODE_FETCHING = 2,
    FL_NODE_TRAINING = 3,
    FL_NODE_EVALUATING = 4,
    FL_NODE_SENDING = 5,
    FL_NODE_PAUSED = 6,
} fl_node_state;
typedef enum fl_order { FL_ORDER_CONTINUE = 1, FL_ORDER_ABANDON = 2 } fl_order;

typedef struct fl_capability {
    uint64_t memory_bytes, disk_free_bytes;
    float tokens_per_second; // finite, >= 0
    int32_t temperature_mc;  // thousandths of a degree Celsius, only with FL_HAS_TEMPERATURE
    uint32_t flags;          // FL_THROTTLE_*, FL_HAS_*, FL_ON_*
    uint32_t cores;
    uint32_t window_max; // layers it can train at once; 0: it may not train now
} fl_capability;

typedef struct fl_layer_version {
    uint32_t layer;   // 0..FL_LAYERS_MAX-1
    uint64_t version; // 0: untouched, all zeros; no object is needed
} fl_layer_version;

typedef struct fl_layer_object { // a layer's state, to be fetched by digest (update.h: fl_layer)
    uint32_t layer;
    uint64_t version; // >= 1
    uint8_t digest[FL_DIGEST_SIZE];
    uint64_t size; // 1..FL_UPDATE_MAX
} fl_layer_object;

typedef struct fl_update_key { // with the node's identity: names one update for ever
    uint32_t layer;
    uint64_t base_version;
    uint64_t sequence; // the node's own count of updates made, kept on its disk; >= 1
} fl_update_key;

// name and software are NUL-terminated here; on the wire they are 1..63 characters.
typedef struct fl_join_request {
    uint8_t token_id[FL_TOKEN_ID_SIZE];
    uint8_t identity_key[FL_KEY_SIZE], curve_key[FL_KEY_SIZE];
    char name[FL_NAME_MAX + 1];
    fl_capability capability;
    uint8_t nonce[FL_KEY_SIZE];
    uint8_t proof[FL_KEY_SIZE]; // fl_invite_prove
    uint32_t protocol;          // any; the receiver answers what it does not speak
    char software[FL_NAME_MAX + 1];
} fl_join_request;

typedef struct fl_join_reply {
    fl_verdict verdict; // ACCEPTED, PENDING, REFUSED
    fl_code code;
    char text[FL_TEXT_MAX + 1];
    uint8_t identity_key[FL_KEY_SIZE]; // the coordinator's Ed25519 key, to be pinned
    uint8_t node_id[FL_ID_SIZE];       // fl_node_id of the node's identity key
    uint8_t proof[FL_KEY_SIZE];        // zeros only when refused for an unknown token
} fl_join_reply;

typedef struct fl_hello {
    uint32_t protocol;
    uint8_t identity_key[FL_KEY_SIZE], ephemeral_key[FL_KEY_SIZE], nonce[FL_KEY_SIZE];
    char software[FL_NAME_MAX + 1];
} fl_hello;

typedef struct fl_hello_reply {
    uint32_t protocol;
    uint64_t session; // never 0
    uint8_t ephemeral_key[FL_KEY_SIZE], nonce[FL_KEY_SIZE];
    uint8_t update_key[FL_KEY_SIZE]; // X25519: updates are sealed to it
    uint8_t signature[FL_SIGNATURE_SIZE];
} fl_hello_reply;

typedef struct fl_hello_finish {
    uint64_t session;
    uint8_t signature[FL_SIGNATURE_SIZE];
} fl_hello_finish;

typedef struct fl_error { // clear: only a hint, proves nothing; sealed: the peer's word
    fl_code code;
    char text[FL_TEXT_MAX + 1];
    uint64_t session; // the session it speaks of (FL_CODE_SESSION), or 0
} fl_error;

typedef struct fl_task_request {
    fl_capability capability;
    bool has_run; // run_id and model_digest are set
    uint8_t run_id[FL_ID_SIZE];
    uint8_t model_digest[FL_DIGEST_SIZE];
    size_t layer_count;             // 0..FL_LAYERS_MAX
    const fl_layer_version *layers; // what the node holds; strictly ascending layer
    uint64_t vote_version;
    uint64_t tokens_local; // training tokens it has, as far as it wants to say
} fl_task_request;

typedef struct fl_vote {
    uint64_t version;
    fl_vote_mode mode;
    size_t count;                     // exits, 1..FL_EXITS_MAX
    float weights[FL_EXITS_MAX];      // >= 0, sum within 1e-3 of 1
    float temperatures[FL_EXITS_MAX]; // 0.01..100
} fl_vote;

typedef struct fl_task {
    fl_task_kind kind;
    uint8_t run_id[FL_ID_SIZE];
    uint64_t round, task_id;              // task_id >= 1, unique in the run
    uint8_t model_digest[FL_DIGEST_SIZE]; // of the compressed model file
    uint64_t model_size;
    uint32_t rank; // of the adapter, 1..FL_TASK_RANK_MAX
    float alpha;   // > 0
    uint64_t a_seed;
    size_t exit_count;                  // 1..FL_EXITS_MAX
    uint32_t exit_layers[FL_EXITS_MAX]; // strictly ascending; the layer after which the exit sits
    uint32_t layer_first, layer_last;   // the window: first <= last <= exit_layer
    uint32_t exit_layer;                // one of exit_layers
    uint32_t steps, sequence, micro_batch; // EVAL: steps is 0
    float learning_rate;                   // > 0, <= 1
    uint64_t seed;
    size_t base_count; // EVAL: 0. TRAIN: last - first + 1, layer_first + i each
    const fl_layer_version *bases;
    size_t object_count; // only layers newer than what TASK_REQUEST said; strictly ascending layer
    const fl_layer_object *objects;
    fl_vote vote;
    uint64_t deadline_ms; // from receipt, 1..FL_DEADLINE_MS_MAX
    uint32_t encoding;    // of updates: 1 or 2, for a node that knows no others (update.h)
    // For one that does: the richest encoding that is wanted, 1..5; the node sends this or less.
    // 0: `encoding` is all there is, and what a number reads as that this version does not know.
    uint32_t encoding_most;
    uint32_t keep_ppm; // values of a layer that a sparse update names at most, 0..1000000 of a
                       // million; 0: as many as the node likes
    uint32_t eval_tokens; // held-out tokens to score for the report; 0: as many as there are
} fl_task;

typedef struct fl_wait {
    fl_code reason;
    uint64_t retry_after_ms; // 1..FL_WAIT_MS_MAX
    char text[FL_TEXT_MAX + 1];
} fl_wait;

typedef struct fl_chunk_request {
    uint8_t digest[FL_DIGEST_SIZE]; // of the whole object
    uint64_t offset;
    uint32_t size; // at most this many bytes, 1..FL_CHUNK_MAX
} fl_chunk_request;

typedef struct fl_chunk {
    uint8_t digest[FL_DIGEST_SIZE];
    uint64_t offset, total;
    fl_bytes data; // 1..FL_CHUNK_MAX; offset + size <= total
} fl_chunk;

typedef struct fl_update_begin {
    fl_update_key key;
    uint8_t run_id[FL_ID_SIZE];
    uint64_t round, task_id;
    uint64_t tokens;                // trained on; 1..FL_UPDATE_TOKENS_MAX
    uint64_t size;                  // of the sealed payload; 1..FL_UPDATE_MAX
    uint8_t digest[FL_DIGEST_SIZE]; // of the sealed payload
} fl_update_begin;

typedef struct fl_update_want { // send from this offset on; offset == size: send COMMIT
    fl_update_key key;
    uint64_t offset;
} fl_update_want;

typedef struct fl_update_chunk {
    fl_update_key key;
    uint64_t offset;
    fl_bytes data; // 1..FL_UPLOAD_CHUNK_MAX
} fl_update_chunk;

typedef struct fl_update_commit {
    fl_update_key key;
    uint8_t digest[FL_DIGEST_SIZE];
} fl_update_commit;

typedef struct fl_update_ack {
    fl_update_key key;
    fl_verdict verdict; // ACCEPTED, DUPLICATE, REFUSED
    fl_code code;
    char text[FL_TEXT_MAX + 1];
} fl_update_ack;

typedef struct fl_heartbeat {
    fl_capability capability;
    fl_node_state state;
    uint64_t task_id; // 0: none
    uint32_t step, steps;
    uint64_t tokens;
    float loss; // finite; 0 when there is none
    uint64_t bytes_up, bytes_down;
} fl_heartbeat;

typedef struct fl_heartbeat_ack {
    fl_order order;
    uint64_t task_id; // the task the order is about, or 0
} fl_heartbeat_ack;

typedef struct fl_exit_sums {
    int64_t nll_q20;
    uint64_t responsibility_q20; // R_t of architecture 1.4; the sum over exits is tokens
    uint64_t correct;
} fl_exit_sums;

typedef struct fl_report { // held-out losses and the sums of one EM step for the vote
    uint8_t run_id[FL_ID_SIZE];
    uint64_t round, task_id;
    uint64_t sequence; // the node's own count of reports, for exactly-once; >= 1
    uint64_t vote_version;
    uint8_t layers_digest[FL_DIGEST_SIZE]; // over the (layer, version) pairs it was measured with
    uint64_t tokens;                       // N_k, 1..FL_TOKENS_MAX; every sum below is over them
    int64_t nll_base_q20, nll_local_q20, nll_voted_q20;
    size_t exit_count; // 0..FL_EXITS_MAX
    fl_exit_sums exits[FL_EXITS_MAX];
    uint64_t peak_rss_bytes;
} fl_report;

typedef struct fl_report_ack {
    uint64_t sequence;
    fl_verdict verdict; // ACCEPTED, DUPLICATE, REFUSED
    fl_code code;
} fl_report_ack;

typedef struct fl_msg {
    fl_msg_type type;
    union {
        fl_join_request join_request;
        fl_join_reply join_reply;
        fl_hello hello;
        fl_hello_reply hello_reply;
        fl_hello_finish hello_finish;
        fl_error error;
        fl_task_request task_request;
        fl_task task;
        fl_wait wait;
        fl_chunk_request chunk_request;
        fl_chunk chunk;
        fl_update_begin update_begin;
        fl_update_want update_want;
        fl_update_chunk update_chunk;
        fl_update_commit update_commit;
        fl_update_ack update_ack;
        fl_heartbeat heartbeat;
        fl_heartbeat_ack heartbeat_ack;
        fl_report report;
        fl_report_ack report_ack;
    };
} fl_msg;

// Decodes and validates the clear body of a message of this type. What *ret points to lives in
// `scratch`, whose size is the hard limit on what a peer can make us allocate; rewind it when done.
// On failure the arena is as before and *ret untouched.
//   FL_EFORMAT  does not parse, or a fixed-size field has another size, or a text is not printable
//   FL_ELIMIT   a field or a count is outside its range
//   FL_ENOMEM   more than the scratch arena (never for a legal message with FL_CODEC_ARENA)
fl_status fl_msg_decode(fl_msg_type type, fl_bytes body, fl_arena *scratch, fl_msg *ret,
                        fl_err *err) FL_NODISCARD;

// The body of m, in `scratch`. FL_EARG: the other side would refuse it. FL_ENOMEM as above.
fl_status fl_msg_encode(const fl_msg *m, fl_arena *scratch, fl_bytes *ret,
                        fl_err *err) FL_NODISCARD;

#endif
