#include "coordinator/registry.h"

#include "common/checked.h"

#include <string.h>

bool coord_quota_take(coord_quota *q, uint64_t rate_s, uint64_t burst, uint64_t amount,
                      uint64_t now_ms) {
    const uint64_t full = burst * 1000;
    if (!q->used) {
        *q = (coord_quota){.thousandths = full, .last_ms = now_ms, .used = true};
    } else if (now_ms > q->last_ms) {
        const uint64_t elapsed = now_ms - q->last_ms, missing = full - q->thousandths;
        const bool fills = rate_s > 0 && elapsed > missing / rate_s;
        q->thousandths = fills ? full : q->thousandths + elapsed * rate_s;
        q->last_ms = now_ms;
    }
    if (q->thousandths < amount * 1000) return false;
    q->thousandths -= amount * 1000;
    return true;
}

static uint32_t buckets_of(uint32_t max) {
    uint32_t n = 1;
    while (n < max) n *= 2;
    return n;
}

size_t coord_registry_size(uint32_t max) {
    const size_t words = (size_t)COORD_NAMES * (buckets_of(max) + max);
    return max * sizeof(coord_member) + words * sizeof(uint32_t) + 128;
}

fl_status coord_registry_init(coord_registry *r, uint32_t max, fl_arena *arena, fl_err *err) {
    FL_ASSERT(max <= COORD_NODES_MAX);
    *r = (coord_registry){.members = FL_ARENA_NEW(arena, coord_member, max),
                          .max = max,
                          .buckets = buckets_of(max)};
    bool all = r->members != NULL;
    for (int n = 0; n < COORD_NAMES; n++) {
        r->head[n] = FL_ARENA_NEW(arena, uint32_t, r->buckets);
        r->next[n] = FL_ARENA_NEW(arena, uint32_t, max);
        all = all && r->head[n] != NULL && r->next[n] != NULL;
        if (all) memset(r->head[n], 0xff, r->buckets * sizeof(uint32_t)); // COORD_NOBODY
    }
    return all ? FL_OK : FL_FAIL(err, FL_ENOMEM, "no memory for %u nodes", max);
}

static uint32_t *chain(const coord_registry *r, coord_name name, uint64_t bits) {
    return &r->head[name][bits & (r->buckets - 1)];
}

static uint64_t bits_of(const uint8_t key[FL_KEY_SIZE]) {
    return fl_get_u64(key + FL_KEY_SIZE - 16); // the top of an X25519 key has bits that are fixed
}

static void link_member(coord_registry *r, uint32_t i) {
    const coord_member *m = &r->members[i];
    uint32_t *const heads[COORD_NAMES] = {
        [COORD_BY_ID] = chain(r, COORD_BY_ID, (uint64_t)m->id),
        [COORD_BY_SIGN] = chain(r, COORD_BY_SIGN, bits_of(m->sign_key)),
        [COORD_BY_TRANSPORT] = chain(r, COORD_BY_TRANSPORT, bits_of(m->transport_key)),
    };
    for (int n = 0; n < COORD_NAMES; n++) {
        r->next[n][i] = *heads[n];
        *heads[n] = i;
    }
}

fl_status coord_registry_put(coord_registry *r, const coord_member *member, uint32_t *ret_index,
                             fl_err *err) {
    uint32_t i = coord_registry_by_id(r, member->id);
    if (i == COORD_NOBODY) {
        if (r->count == r->max)
            return FL_FAIL(err, FL_ELIMIT, "the fleet is full: %u nodes", r->max);
        i = r->count++;
        r->members[i] = *member;
        link_member(r, i);
    }
    coord_member *m = &r->members[i];
    if (memcmp(m->sign_key, member->sign_key, FL_KEY_SIZE) != 0 ||
        memcmp(m->transport_key, member->transport_key, FL_KEY_SIZE) != 0)
        return FL_FAIL(err, FL_ESTATE, "node %lld has other keys", (long long)member->id);
    if (m->state == COORD_MEMBER_REVOKED && member->state != COORD_MEMBER_REVOKED)
        return FL_FAIL(err, FL_ESTATE, "node %lld is revoked", (long long)member->id);
    m->state = member->state;
    memcpy(m->name, member->name, sizeof(m->name));
    *ret_index = i;
    return FL_OK;
}

uint32_t coord_registry_by_id(const coord_registry *r, int64_t id) {
    uint32_t i = *chain(r, COORD_BY_ID, (uint64_t)id);
    while (i != COORD_NOBODY && r->members[i].id != id) i = r->next[COORD_BY_ID][i];
    return i;
}

uint32_t coord_registry_by_sign_key(const coord_registry *r, const uint8_t key[FL_KEY_SIZE]) {
    uint32_t i = *chain(r, COORD_BY_SIGN, bits_of(key));
    while (i != COORD_NOBODY && memcmp(r->members[i].sign_key, key, FL_KEY_SIZE) != 0)
        i = r->next[COORD_BY_SIGN][i];
    return i;
}

uint32_t coord_registry_by_transport_key(const coord_registry *r, const uint8_t key[FL_KEY_SIZE]) {
    uint32_t i = *chain(r, COORD_BY_TRANSPORT, bits_of(key));
    while (i != COORD_NOBODY && memcmp(r->members[i].transport_key, key, FL_KEY_SIZE) != 0)
        i = r->next[COORD_BY_TRANSPORT][i];
    return i;
}

uint32_t coord_registry_active(const coord_registry *r) {
    uint32_t active = 0;
    for (uint32_t i = 0; i < r->count; i++) active += r->members[i].state == COORD_MEMBER_ACTIVE;
    return active;
}

static bool name_is_taken(const coord_registry *r, const char *name) {
    for (uint32_t i = 0; i < r->count; i++) {
        if (r->members[i].state != COORD_MEMBER_REVOKED && strcmp(r->members[i].name, name) == 0)
            return true;
    }
    return false;
}

static coord_join_answer refuse(fl_code code) {
    return (coord_join_answer){.verdict = FL_VERDICT_REFUSED, .code = code};
}

// A member with these very keys asks again.
static coord_join_answer join_again(const coord_member *m, const coord_join *join) {
    switch (m->state) {
    case COORD_MEMBER_ACTIVE:
        return (coord_join_answer){.verdict = FL_VERDICT_ACCEPTED};
    case COORD_MEMBER_REVOKED:
        return refuse(FL_CODE_REVOKED);
    default:
        break;
    }
    if (join->auto_approve && join->uses > 0) // a better token than the one it came with
        return (coord_join_answer){
            .verdict = FL_VERDICT_ACCEPTED, .take_use = true, .approve = true};
    return (coord_join_answer){.verdict = FL_VERDICT_PENDING, .code = FL_CODE_PENDING};
}

coord_join_answer coord_registry_join(const coord_registry *r, const coord_join *join) {
    const fl_join_request *q = join->request;
    if (!join->proof_holds) return refuse(FL_CODE_TOKEN);
    if (q->protocol != FL_PROTOCOL) return refuse(FL_CODE_PROTOCOL);
    // The key that the transport saw is the one that will be admitted: it must be the one named.
    if (memcmp(q->curve_key, join->transport_key, FL_KEY_SIZE) != 0)
        return refuse(FL_CODE_MALFORMED);
    const uint32_t by_sign = coord_registry_by_sign_key(r, q->identity_key);
    const uint32_t by_transport = coord_registry_by_transport_key(r, q->curve_key);
    if (by_sign != by_transport) return refuse(FL_CODE_STATE);
    if (by_sign != COORD_NOBODY) return join_again(&r->members[by_sign], join);
    if (join->uses <= 0) return refuse(FL_CODE_TOKEN);
    if (name_is_taken(r, q->name)) return refuse(FL_CODE_NAME);
    if (r->count == r->max) return refuse(FL_CODE_FULL);
    if (join->auto_approve)
        return (coord_join_answer){.verdict = FL_VERDICT_ACCEPTED, .add = true, .take_use = true};
    return (coord_join_answer){
        .verdict = FL_VERDICT_PENDING, .code = FL_CODE_PENDING, .add = true, .take_use = true};
}
