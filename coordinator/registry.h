// registry.h: who may take part, with which keys and how much of us they may use. Pure: a table in
// memory that the loop fills from the store; time is an argument.
#ifndef COORD_REGISTRY_H
#define COORD_REGISTRY_H

#include "common/arena.h"
#include "common/status.h"
#include "proto/codec.h"

enum { COORD_NODES_MAX = 16384 };
#define COORD_NOBODY UINT32_MAX

typedef enum coord_member_state {
    COORD_MEMBER_PENDING,
    COORD_MEMBER_ACTIVE,
    COORD_MEMBER_REVOKED
} coord_member_state;

// A bucket that fills with rate_s a second up to `burst`; zeroed is full at its first use.
typedef struct coord_quota {
    uint64_t thousandths; // what is left, in thousandths
    uint64_t last_ms;
    bool used;
} coord_quota;
// Takes `amount` if there is as much. burst >= 1, all below 2^40.
bool coord_quota_take(coord_quota *q, uint64_t rate_s, uint64_t burst, uint64_t amount,
                      uint64_t now_ms);

typedef struct coord_member {
    int64_t id; // of the store
    coord_member_state state;
    char name[FL_NAME_MAX + 1];
    uint8_t sign_key[FL_KEY_SIZE], transport_key[FL_KEY_SIZE];
    coord_quota frames, bytes;
} coord_member;

// What members are found by. Each has heads of chains by the last bits of the id or of the key, so
// that a frame costs the same in a fleet of ten and of ten thousand.
typedef enum coord_name { COORD_BY_ID, COORD_BY_SIGN, COORD_BY_TRANSPORT, COORD_NAMES } coord_name;

typedef struct coord_registry {
    coord_member *members; // [max]; a member never moves, so its index names it
    uint32_t count, max;
    uint32_t buckets;            // a power of two
    uint32_t *head[COORD_NAMES]; // [buckets] index of a member, or COORD_NOBODY
    uint32_t *next[COORD_NAMES]; // [max] of the same chain
} coord_registry;

size_t coord_registry_size(uint32_t max); // bytes of the arena that init needs
// Room for `max` members in the arena. FL_ENOMEM.
fl_status coord_registry_init(coord_registry *r, uint32_t max, fl_arena *arena,
                              fl_err *err) FL_NODISCARD;
// Adds a member or updates the one with this id: state and name change, keys never do.
// FL_ELIMIT: the fleet is full. FL_ESTATE: keys differ, or a revoked one would come back.
fl_status coord_registry_put(coord_registry *r, const coord_member *member, uint32_t *ret_index,
                             fl_err *err) FL_NODISCARD;
// COORD_NOBODY when there is none.
uint32_t coord_registry_by_id(const coord_registry *r, int64_t id);
uint32_t coord_registry_by_sign_key(const coord_registry *r, const uint8_t key[FL_KEY_SIZE]);
uint32_t coord_registry_by_transport_key(const coord_registry *r, const uint8_t key[FL_KEY_SIZE]);
uint32_t coord_registry_active(const coord_registry *r); // how many

// What to answer a JOIN_REQUEST.
typedef struct coord_join {
    const fl_join_request *request;
    const uint8_t *transport_key; // with which the request came, as the link saw it
    bool proof_holds;             // the token is known and the proof was made with it
    int64_t uses;                 // left of that token
    bool auto_approve;
} coord_join;
typedef struct coord_join_answer {
    fl_verdict verdict;
    fl_code code;
    bool add;      // a new member, active when verdict is ACCEPTED, else pending
    bool take_use; // of the token
    bool approve;  // a pending member becomes active
} coord_join_answer;
// Rules: the same keys ask again and get today's answer without a second use of the token; a key
// pair that is half known, and a name that another member has, are refused.
coord_join_answer coord_registry_join(const coord_registry *r, const coord_join *join);

#endif
