#include "proto/channel.h"

#include "common/checked.h"

#include <string.h>

// Random bytes of one handshake message: ephemeral scalar, nonce, session id (coordinator).
enum { RANDOM_NONCE = 32, RANDOM_SESSION = 64 };
enum { WINDOW_WORDS = FL_CHANNEL_WINDOW / 64, KEYS_SIZE = 2 * FL_SEAL_KEY };

// A handshake under way: the peer's half, and ours.
typedef struct pending {
    bool waiting;
    fl_hello hello;       // node: as sent; coordinator: as received
    fl_hello_reply reply; // coordinator only: as sent
    uint8_t transcript[FL_HASH_SIZE];
} pending;

typedef struct session {
    uint64_t id; // 0: none
    uint64_t sent;
    uint64_t newest;               // largest counter received
    uint64_t window[WINDOW_WORDS]; // bit c % FL_CHANNEL_WINDOW: counter c was received
    uint8_t update_key[FL_KEY_SIZE];
} session;

struct fl_channel { // in locked memory
    fl_channel_role role;
    const fl_secret *identity;
    const fl_pk *pk;
    uint8_t identity_key[FL_KEY_SIZE], peer_key[FL_KEY_SIZE], update_key[FL_KEY_SIZE];
    uint64_t counter_max;
    pending next;
    session live;
    uint8_t ephemeral[FL_DH_KEY]; // of the handshake under way; wiped when it ends
    uint8_t next_keys[KEYS_SIZE]; // coordinator: of the session that HELLO_FINISH will confirm
    uint8_t keys[KEYS_SIZE];      // node to coordinator, then coordinator to node
};

fl_status fl_channel_open(const fl_channel_opts *opts, fl_channel **ret, fl_err *err) {
    const fl_pk *pk = opts->pk == NULL ? &fl_pk_real : opts->pk;
    fl_channel *ch = pk->take(sizeof(*ch));
    if (ch == NULL) return FL_FAIL(err, FL_ENOMEM, "no locked memory for a session");
    ch->role = opts->role;
    ch->identity = opts->identity;
    ch->pk = pk;
    ch->counter_max = opts->counter_max == 0 ? FL_CHANNEL_COUNTER_MAX : opts->counter_max;
    memcpy(ch->identity_key, opts->identity_key, FL_KEY_SIZE);
    memcpy(ch->peer_key, opts->peer_key, FL_KEY_SIZE);
    if (opts->role == FL_CHANNEL_COORDINATOR) memcpy(ch->update_key, opts->update_key, FL_KEY_SIZE);
    *ret = ch;
    return FL_OK;
}

void fl_channel_close(fl_channel *ch) {
    if (ch != NULL) ch->pk->give(ch);
}

void fl_channel_drop(fl_channel *ch) {
    memset(&ch->live, 0, sizeof(ch->live));
    fl_wipe(ch->keys, sizeof(ch->keys));
}

static void forget_handshake(fl_channel *ch) {
    memset(&ch->next, 0, sizeof(ch->next));
    fl_wipe(ch->ephemeral, sizeof(ch->ephemeral));
    fl_wipe(ch->next_keys, sizeof(ch->next_keys));
}

bool fl_channel_live(const fl_channel *ch) {
    return ch->live.id != 0;
}

uint64_t fl_channel_session(const fl_channel *ch) {
    return ch->live.id;
}

const uint8_t *fl_channel_update_key(const fl_channel *ch) {
    return ch->role == FL_CHANNEL_NODE && ch->live.id != 0 ? ch->live.update_key : NULL;
}

// ---- handshake

static void add_key(fl_hasher *h, const uint8_t key[FL_KEY_SIZE]) {
    fl_hash_add_framed(h, (fl_bytes){key, FL_KEY_SIZE});
}

static void make_transcript(const uint8_t node[FL_KEY_SIZE], const uint8_t coordinator[FL_KEY_SIZE],
                            const fl_hello *hello, const fl_hello_reply *reply,
                            uint8_t ret[FL_HASH_SIZE]) {
    static const char label[] = "fleetune/1 handshake";
    fl_hasher h;
    fl_hash_init(&h, (fl_bytes){NULL, 0}, FL_HASH_SIZE);
    fl_hash_add_framed(&h, (fl_bytes){(const uint8_t *)label, sizeof(label) - 1});
    fl_hash_add_u64(&h, hello->protocol);
    fl_hash_add_u64(&h, reply->protocol);
    add_key(&h, node);
    add_key(&h, coordinator);
    add_key(&h, hello->ephemeral_key);
    add_key(&h, reply->ephemeral_key);
    add_key(&h, hello->nonce);
    add_key(&h, reply->nonce);
    fl_hash_add_u64(&h, reply->session);
    add_key(&h, reply->update_key);
    fl_hash_done(&h, ret);
}

// What is signed: a prefix that says which side signs, then the transcript.
typedef struct signed_text {
    uint8_t bytes[64];
} signed_text;

static signed_text text_to_sign(fl_channel_role signer, const uint8_t transcript[FL_HASH_SIZE]) {
    static const char *const prefix[] = {
        [FL_CHANNEL_NODE] = "fleetune/1 node signs",
        [FL_CHANNEL_COORDINATOR] = "fleetune/1 coordinator signs",
    };
    signed_text t = {{0}};
    memcpy(t.bytes, prefix[signer], strlen(prefix[signer]));
    memcpy(t.bytes + 32, transcript, FL_HASH_SIZE);
    return t;
}

static fl_status derive(const fl_pk *pk, const uint8_t secret[FL_DH_KEY],
                        const uint8_t peer[FL_DH_KEY], const uint8_t transcript[FL_HASH_SIZE],
                        uint8_t ret_keys[KEYS_SIZE], fl_err *err) {
    static const char label[] = "fleetune/1 keys";
    uint8_t shared[FL_DH_KEY];
    FL_TRY(pk->dh(secret, peer, shared, err));
    fl_hasher h;
    fl_hash_init(&h, (fl_bytes){shared, sizeof(shared)}, KEYS_SIZE);
    fl_hash_add_framed(&h, (fl_bytes){(const uint8_t *)label, sizeof(label) - 1});
    fl_hash_add(&h, (fl_bytes){transcript, FL_HASH_SIZE});
    fl_hash_done(&h, ret_keys);
    fl_wipe(shared, sizeof(shared));
    return FL_OK;
}

fl_status fl_channel_hello(fl_channel *ch, const uint8_t random[FL_CHANNEL_RANDOM], fl_hello *ret,
                           fl_err *err) {
    FL_ASSERT(ch->role == FL_CHANNEL_NODE);
    (void)err; // nothing here can fail
    fl_hello hello = {.protocol = FL_PROTOCOL};
    ch->pk->dh_key(random, hello.ephemeral_key);
    memcpy(hello.identity_key, ch->identity_key, FL_KEY_SIZE);
    memcpy(hello.nonce, random + RANDOM_NONCE, FL_KEY_SIZE);
    memcpy(hello.software, "fleetune-" FL_VERSION, sizeof("fleetune-" FL_VERSION));
    fl_channel_drop(ch);
    forget_handshake(ch);
    memcpy(ch->ephemeral, random, FL_DH_KEY);
    ch->next.hello = hello;
    ch->next.waiting = true;
    *ret = hello;
    return FL_OK;
}

fl_status fl_channel_on_hello(fl_channel *ch, const fl_hello *hello,
                              const uint8_t random[FL_CHANNEL_RANDOM], fl_hello_reply *ret,
                              fl_err *err) {
    FL_ASSERT(ch->role == FL_CHANNEL_COORDINATOR);
    if (hello->protocol != FL_PROTOCOL)
        return FL_FAIL(err, FL_EUNSUPPORTED,
                       "node speaks protocol %u, this coordinator %d; "
                       "upgrade the older one",
                       hello->protocol, FL_PROTOCOL);
    if (!fl_equal(hello->identity_key, ch->peer_key, FL_KEY_SIZE))
        return FL_FAIL(err, FL_EAUTH, "the identity is not the one this node enrolled with");
    fl_hello_reply reply = {.protocol = FL_PROTOCOL};
    uint8_t transcript[FL_HASH_SIZE], keys[KEYS_SIZE];
    reply.session = fl_get_u64(random + RANDOM_SESSION);
    while (reply.session == 0 || reply.session == ch->live.id) reply.session++; // 0 means clear
    memcpy(reply.nonce, random + RANDOM_NONCE, FL_KEY_SIZE);
    memcpy(reply.update_key, ch->update_key, FL_KEY_SIZE);
    ch->pk->dh_key(random, reply.ephemeral_key);
    make_transcript(ch->peer_key, ch->identity_key, hello, &reply, transcript);
    FL_TRY(derive(ch->pk, random, hello->ephemeral_key, transcript, keys, err));
    const signed_text t = text_to_sign(FL_CHANNEL_COORDINATOR, transcript);
    const fl_status st =
        ch->pk->sign(ch->identity, (fl_bytes){t.bytes, sizeof(t.bytes)}, reply.signature, err);
    if (st == FL_OK) {
        forget_handshake(ch);
        ch->next.waiting = true;
        ch->next.reply = reply;
        memcpy(ch->next.transcript, transcript, FL_HASH_SIZE);
        memcpy(ch->next_keys, keys, KEYS_SIZE);
        *ret = reply;
    }
    fl_wipe(keys, sizeof(keys));
    return st;
}

fl_status fl_channel_on_reply(fl_channel *ch, const fl_hello_reply *reply, fl_hello_finish *ret,
                              fl_err *err) {
    FL_ASSERT(ch->role == FL_CHANNEL_NODE);
    if (!ch->next.waiting) return FL_FAIL(err, FL_ESTATE, "an answer to no handshake");
    if (reply->protocol != FL_PROTOCOL)
        return FL_FAIL(err, FL_EUNSUPPORTED,
                       "coordinator speaks protocol %u, this node %d; "
                       "upgrade the older one",
                       reply->protocol, FL_PROTOCOL);
    uint8_t transcript[FL_HASH_SIZE], keys[KEYS_SIZE];
    make_transcript(ch->identity_key, ch->peer_key, &ch->next.hello, reply, transcript);
    const signed_text theirs = text_to_sign(FL_CHANNEL_COORDINATOR, transcript);
    if (!ch->pk->sign_check(ch->peer_key, (fl_bytes){theirs.bytes, sizeof(theirs.bytes)},
                       reply->signature))
        return FL_FAIL(err, FL_EAUTH, "whoever answers is not the coordinator this node joined");
    FL_TRY(derive(ch->pk, ch->ephemeral, reply->ephemeral_key, transcript, keys, err));
    fl_hello_finish finish = {.session = reply->session};
    const signed_text mine = text_to_sign(FL_CHANNEL_NODE, transcript);
    const fl_bytes text = {mine.bytes, sizeof(mine.bytes)};
    const fl_status st = ch->pk->sign(ch->identity, text, finish.signature, err);
    if (st == FL_OK) {
        forget_handshake(ch);
        ch->live = (session){.id = reply->session};
        memcpy(ch->live.update_key, reply->update_key, FL_KEY_SIZE);
        memcpy(ch->keys, keys, KEYS_SIZE);
        *ret = finish;
    }
    fl_wipe(keys, sizeof(keys));
    return st;
}

fl_status fl_channel_on_finish(fl_channel *ch, const fl_hello_finish *finish, fl_err *err) {
    FL_ASSERT(ch->role == FL_CHANNEL_COORDINATOR);
    if (!ch->next.waiting || finish->session != ch->next.reply.session)
        return FL_FAIL(err, FL_ESTATE, "the end of no handshake");
    const signed_text t = text_to_sign(FL_CHANNEL_NODE, ch->next.transcript);
    if (!ch->pk->sign_check(ch->peer_key, (fl_bytes){t.bytes, sizeof(t.bytes)}, finish->signature))
        return FL_FAIL(err, FL_EAUTH, "the node's signature does not hold");
    ch->live = (session){.id = finish->session};
    memcpy(ch->keys, ch->next_keys, KEYS_SIZE);
    forget_handshake(ch);
    return FL_OK;
}

// ---- sealed messages

static const uint8_t *key_for(const fl_channel *ch, fl_channel_role sender) {
    return sender == FL_CHANNEL_NODE ? ch->keys : ch->keys + FL_SEAL_KEY;
}

static fl_channel_role other(fl_channel_role role) {
    return role == FL_CHANNEL_NODE ? FL_CHANNEL_COORDINATOR : FL_CHANNEL_NODE;
}

static void make_nonce(uint64_t counter, uint8_t nonce[FL_SEAL_NONCE]) {
    memset(nonce, 0, FL_SEAL_NONCE);
    fl_put_u64(nonce, counter);
}

fl_status fl_channel_seal(fl_channel *ch, fl_msg_type type, fl_bytes body, uint8_t *out,
                          size_t out_size, size_t *ret_size, fl_err *err) {
    const fl_msg_info *info = fl_msg_info_of((uint32_t)type);
    FL_ASSERT(info != NULL && ((unsigned)info->form & FL_FORM_SEALED) != 0);
    if (ch->live.id == 0) return FL_FAIL(err, FL_ESTATE, "there is no session; shake hands first");
    if (ch->live.sent >= ch->counter_max)
        return FL_FAIL(err, FL_ESTATE, "the session is used up; shake hands again");
    if (body.size > info->body_max || out_size < FL_FRAME_HEAD + FL_FRAME_TAG ||
        body.size > out_size - FL_FRAME_HEAD - FL_FRAME_TAG)
        return FL_FAIL(err, FL_ELIMIT, "%s of %zu bytes does not fit", info->name, body.size);
    const fl_frame f = {
        .type = type,
        .session = ch->live.id,
        .counter = ++ch->live.sent, // spent even if sending fails: a nonce is never used twice
        .body = {NULL, body.size + FL_FRAME_TAG},
    };
    uint8_t nonce[FL_SEAL_NONCE];
    fl_frame_head(&f, out);
    make_nonce(f.counter, nonce);
    fl_seal(key_for(ch, ch->role), nonce, (fl_bytes){out, FL_FRAME_HEAD}, body,
            out + FL_FRAME_HEAD);
    *ret_size = FL_FRAME_HEAD + f.body.size;
    return FL_OK;
}

// Source of the window: RFC 6479, IPsec Anti-Replay Algorithm without Bit Shifting, section 2; here
// one bit a counter, cleared as the newest counter passes.
static bool seen_or_too_old(const session *s, uint64_t counter) {
    if (counter > s->newest) return false;
    if (s->newest - counter >= FL_CHANNEL_WINDOW) return true;
    const uint64_t at = counter % FL_CHANNEL_WINDOW;
    return (s->window[at / 64] >> (at % 64) & 1) != 0;
}

static void mark_seen(session *s, uint64_t counter) {
    if (counter > s->newest) {
        const uint64_t ahead = counter - s->newest;
        const uint64_t steps = ahead < FL_CHANNEL_WINDOW ? ahead : FL_CHANNEL_WINDOW;
        for (uint64_t i = 1; i <= steps; i++) { // counters between newest and this one: not seen
            const uint64_t at = (counter - steps + i) % FL_CHANNEL_WINDOW;
            s->window[at / 64] &= ~((uint64_t)1 << (at % 64));
        }
        s->newest = counter;
    }
    const uint64_t at = counter % FL_CHANNEL_WINDOW;
    s->window[at / 64] |= (uint64_t)1 << (at % 64);
}

fl_status fl_channel_unseal(fl_channel *ch, const fl_frame *frame, uint8_t *out, size_t out_size,
                            fl_bytes *ret, fl_err *err) {
    if (ch->live.id == 0 || frame->session != ch->live.id)
        return FL_FAIL(err, FL_ESTATE, "frame of a session that is over; shake hands again");
    FL_ASSERT(frame->head.size == FL_FRAME_HEAD);
    if (frame->body.size < FL_FRAME_TAG) return FL_FAIL(err, FL_EAUTH, "frame without a seal");
    const size_t size = frame->body.size - FL_FRAME_TAG;
    if (size > out_size) return FL_FAIL(err, FL_ELIMIT, "body of %zu bytes has no room", size);
    if (frame->counter == 0 || frame->counter > ch->counter_max)
        return FL_FAIL(err, FL_EAUTH, "counter is outside the session's");
    if (seen_or_too_old(&ch->live, frame->counter))
        return FL_FAIL(err, FL_EAUTH, "frame was received before, or is too late");
    uint8_t nonce[FL_SEAL_NONCE];
    make_nonce(frame->counter, nonce);
    FL_TRY(fl_unseal(key_for(ch, other(ch->role)), nonce, frame->head, frame->body, out, err));
    mark_seen(&ch->live, frame->counter);
    *ret = (fl_bytes){out, size};
    return FL_OK;
}
