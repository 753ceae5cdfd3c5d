#include "proto/link_keys.h"

#include <stdlib.h>
#include <string.h>

enum {
    MUTE_MS = 3000,  // having said nothing at all for so long, or
    IDLE_MS = 60000, // silent for so long, a key that is not admitted makes room for another
    WINDOW_MS = 60000,
    PER_ADDRESS = FL_LINK_ENROL_MAX / 4,
};

uint64_t fl_link_hash(const uint8_t *p, size_t size) { // FNV-1a: keys are random already
    uint64_t h = 0xcbf29ce484222325u;
    for (size_t i = 0; i < size; i++) h = (h ^ p[i]) * 0x100000001b3u;
    return h ^ h >> 32;
}

static void bucket_put(fl_link_keys *k, uint32_t slot) {
    size_t at = fl_link_hash(k->entries[slot].key, FL_LINK_KEY) & (k->bucket_count - 1);
    while (k->buckets[at] != 0) at = (at + 1) & (k->bucket_count - 1);
    k->buckets[at] = slot + 1;
}

static void rehash(fl_link_keys *k) {
    memset(k->buckets, 0, k->bucket_count * sizeof(*k->buckets));
    for (size_t i = 0; i < k->entry_count; i++) {
        if (k->entries[i].used) bucket_put(k, (uint32_t)i);
    }
}

static fl_link_entry *find(fl_link_keys *k, const uint8_t key[FL_LINK_KEY]) {
    if (k->bucket_count == 0) return NULL;
    size_t at = fl_link_hash(key, FL_LINK_KEY) & (k->bucket_count - 1);
    for (; k->buckets[at] != 0; at = (at + 1) & (k->bucket_count - 1)) {
        fl_link_entry *e = &k->entries[k->buckets[at] - 1];
        if (memcmp(e->key, key, FL_LINK_KEY) == 0) return e;
    }
    return NULL;
}

static bool grow(fl_link_keys *k) {
    const size_t count = k->entry_count == 0 ? 64 : k->entry_count * 2;
    if (count > 1u << 24) return false;
    fl_link_entry *entries = calloc(count, sizeof(*entries));
    uint32_t *buckets = calloc(count * 2, sizeof(*buckets));
    if (entries == NULL || buckets == NULL) {
        free(entries);
        free(buckets);
        return false;
    }
    if (k->entry_count != 0) memcpy(entries, k->entries, k->entry_count * sizeof(*entries));
    free(k->entries);
    free(k->buckets);
    k->entries = entries;
    k->buckets = buckets;
    k->entry_count = count;
    k->bucket_count = count * 2;
    rehash(k);
    return true;
}

// A slot for a new key: a free one, else a revoked key's, whose number nobody may use any more.
static fl_link_entry *insert(fl_link_keys *k, const uint8_t key[FL_LINK_KEY], fl_link_class class) {
    fl_link_entry *free_slot = NULL, *revoked = NULL;
    for (size_t i = 0; i < k->entry_count && free_slot == NULL; i++) {
        if (!k->entries[i].used)
            free_slot = &k->entries[i];
        else if (k->entries[i].class == 0)
            revoked = &k->entries[i];
    }
    if (free_slot == NULL && revoked != NULL) free_slot = revoked;
    if (free_slot == NULL) {
        const size_t old = k->entry_count;
        if (!grow(k)) return NULL;
        free_slot = &k->entries[old];
    }
    *free_slot = (fl_link_entry){.used = true, .class = (uint8_t) class};
    memcpy(free_slot->key, key, FL_LINK_KEY);
    rehash(k);
    return free_slot;
}

static void forget_enrol(fl_link_keys *k, fl_link_entry *e) {
    e->class = 0;
    e->used = false;
    k->enrol_count--;
    rehash(k);
}

// Who never spoke makes room before who did, and of alike ones who was silent longest.
static bool goes_before(const fl_link_entry *a, const fl_link_entry *b) {
    return a->routed != b->routed ? !a->routed : a->seen_ms < b->seen_ms;
}

// May one more unknown key come in? Makes room by forgetting the one that was silent longest.
static bool enrol_room(fl_link_keys *k, uint64_t address, uint64_t now) {
    size_t same = 0;
    fl_link_entry *oldest = NULL, *oldest_same = NULL;
    for (size_t i = 0; i < k->entry_count; i++) {
        fl_link_entry *e = &k->entries[i];
        if (!e->used || e->class != FL_LINK_ENROL) continue;
        if (oldest == NULL || goes_before(e, oldest)) oldest = e;
        if (e->address != address) continue;
        same++;
        if (oldest_same == NULL || goes_before(e, oldest_same)) oldest_same = e;
    }
    if (same >= PER_ADDRESS)
        oldest = oldest_same;
    else if (k->enrol_count < FL_LINK_ENROL_MAX)
        return true;
    const uint64_t patience = oldest != NULL && oldest->routed ? IDLE_MS : MUTE_MS;
    if (oldest == NULL || now - oldest->seen_ms < patience) return false;
    forget_enrol(k, oldest);
    return true;
}

void fl_link_keys_done(fl_link_keys *k) {
    free(k->entries);
    free(k->buckets);
    *k = (fl_link_keys){.enrolment = false};
}

bool fl_link_keys_admit(fl_link_keys *k, const uint8_t key[FL_LINK_KEY]) {
    fl_link_entry *e = find(k, key);
    if (e == NULL) return insert(k, key, FL_LINK_ADMITTED) != NULL;
    k->enrol_count -= e->class == FL_LINK_ENROL;
    e->class = FL_LINK_ADMITTED;
    return true;
}

void fl_link_keys_revoke(fl_link_keys *k, const uint8_t key[FL_LINK_KEY]) {
    fl_link_entry *e = find(k, key);
    if (e == NULL) return;
    k->enrol_count -= e->class == FL_LINK_ENROL;
    e->class = 0;
}

int fl_link_keys_ask(fl_link_keys *k, const uint8_t key[FL_LINK_KEY], uint64_t address,
                     uint64_t now_ms) {
    fl_link_entry *e = find(k, key);
    if (e != NULL) {
        e->seen_ms = now_ms;
        if (now_ms < e->shut_ms) return 0;
        return e->class == FL_LINK_ENROL && !k->enrolment ? 0 : e->class;
    }
    if (!k->enrolment || !enrol_room(k, address, now_ms)) return 0;
    e = insert(k, key, FL_LINK_ENROL);
    if (e == NULL) return 0;
    k->enrol_count++;
    e->address = address;
    e->seen_ms = e->window_ms = now_ms;
    return FL_LINK_ENROL;
}

fl_link_peer fl_link_keys_frame(fl_link_keys *k, const uint8_t key[FL_LINK_KEY], size_t size,
                                size_t frame_max, uint32_t route, uint64_t now_ms,
                                fl_link_class *ret_class) {
    // A connection that was let in outlives its place in the books when that was needed for
    // another.
    if (find(k, key) == NULL) fl_link_keys_ask(k, key, 0, now_ms);
    fl_link_entry *e = find(k, key);
    if (e == NULL || e->class == 0 || now_ms < e->shut_ms) return 0;
    if (e->class == FL_LINK_ENROL) {
        if (!k->enrolment) return 0;
        e->seen_ms = now_ms;
        if (now_ms - e->window_ms >= WINDOW_MS) {
            e->window_ms = now_ms;
            e->frames_window = 0;
        }
        if (size > FL_LINK_ENROL_FRAME_MAX || e->frames_window >= FL_LINK_ENROL_FRAMES) return 0;
        e->frames_window++;
    } else if (size > frame_max) {
        return 0;
    }
    e->route = route;
    e->routed = true;
    *ret_class = (fl_link_class)e->class;
    return ((uint64_t)(e - k->entries) + 1) << 32 | route;
}

bool fl_link_keys_reachable(const fl_link_keys *k, fl_link_peer peer) {
    const uint64_t slot = (peer >> 32) - 1; // peer 0 becomes a slot beyond any
    if (slot >= k->entry_count) return false;
    const fl_link_entry *e = &k->entries[slot];
    return e->used && e->class != 0 && e->routed && e->route == (uint32_t)peer;
}

fl_guard_id fl_link_keys_connection(fl_link_keys *k, const uint8_t key[FL_LINK_KEY],
                                    fl_guard_id now) {
    fl_link_entry *e = find(k, key);
    if (e == NULL) return (fl_guard_id){.fd = -1};
    const fl_guard_id before = e->connection;
    if (now.cookie != 0) e->connection = now;
    return before;
}

void fl_link_keys_shut(fl_link_keys *k, const uint8_t key[FL_LINK_KEY], uint64_t until_ms) {
    fl_link_entry *e = find(k, key);
    if (e != NULL) e->shut_ms = until_ms;
}
