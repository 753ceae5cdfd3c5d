// Frames in, answers out: who says it, may he, what is it, and to whom does it go.
#include "common/log.h"
#include "common/plant.h"
#include "coordinator/loop_state.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

enum {
    COMPLAIN_MS = 10000, // one event about a peer's bad frames in this time
    REFUSALS_MS = 2000,  // from a refused key to the event about it
    REFUSALS_BURST = 10, // such events at once; then one a minute
    HELLO_RATE = 5,      // handshakes a second of one node: each costs us a signature
    HELLO_BURST = 20,
};

fl_status coord_loop_event(coord_loop *loop, const char *kind, uint32_t node, fl_err *err,
                           const char *fmt, ...) {
    char text[COORD_TEXT_MAX];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    const bool known = node != COORD_NOBODY;
    const coord_member *m = known ? &loop->registry.members[node] : NULL;
    fl_log(FL_LOG_INFO, kind, "%s%s%s", known ? m->name : "", known ? ": " : "", text);
    FL_TRY(coord_store_begin(loop->store, err));
    return coord_store_add_event(loop->store, loop->world.wall_s(loop->world.ctx), kind,
                                 known ? m->id : 0, text, err);
}

// A lost answer is asked for again, so a peer that has gone or does not read is no failure.
static void send_frame(coord_loop *loop, uint32_t node, fl_link_peer peer, size_t size) {
    const coord_world *w = &loop->world;
    const fl_status st = w->send(w->ctx, peer, (fl_bytes){loop->frame, size}, NULL);
    if (st == FL_OK && node != COORD_NOBODY) loop->sessions[node].bytes_down += (int64_t)size;
}

static void send_answer(coord_loop *loop, const coord_answer *a, fl_bytes body) {
    size_t size = 0;
    if (a->node == COORD_NOBODY) {
        const fl_frame f = {.type = a->type, .body = body};
        if (fl_frame_encode(&f, loop->frame, FL_FRAME_MAX, &size, NULL) == FL_OK)
            send_frame(loop, COORD_NOBODY, a->peer, size);
        return;
    }
    coord_session *s = &loop->sessions[a->node];
    if (s->channel != NULL &&
        fl_channel_seal(s->channel, a->type, body, loop->frame, FL_FRAME_MAX, &size, NULL) == FL_OK)
        send_frame(loop, a->node, s->peer, size);
}

fl_status coord_loop_commit(coord_loop *loop, fl_err *err) {
    if (!fl_plant(EARLY_ACK)) FL_TRY(coord_store_commit(loop->store, err));
    for (size_t i = 0; i < loop->outbox_count; i++) {
        const coord_answer *a = &loop->outbox[i];
        send_answer(loop, a, (fl_bytes){loop->outbox_bytes + a->at, a->size});
    }
    loop->outbox_count = loop->outbox_used = 0;
    if (fl_plant(EARLY_ACK)) FL_TRY(coord_store_commit(loop->store, err));
    return FL_OK;
}

// Encodes into the outbox, which is sent when everything before it is durable.
static fl_status answer(coord_loop *loop, uint32_t node, fl_link_peer peer, const fl_msg *msg,
                        fl_err *err) {
    fl_bytes body;
    const size_t mark = loop->scratch.used;
    FL_TRY(fl_msg_encode(msg, &loop->scratch, &body, err));
    coord_answer a = {.node = node, .peer = peer, .type = msg->type, .size = body.size};
    if (msg->type == FL_MSG_CHUNK) { // large, and only bytes that have long been durable
        send_answer(loop, &a, body);
        fl_arena_rewind(&loop->scratch, mark);
        return FL_OK;
    }
    if (loop->outbox_count == COORD_OUTBOX_MAX ||
        body.size > COORD_OUTBOX_BYTES - loop->outbox_used)
        FL_TRY(coord_loop_commit(loop, err));
    a.at = loop->outbox_used;
    memcpy(loop->outbox_bytes + a.at, body.data, body.size);
    loop->outbox_used += body.size;
    loop->outbox[loop->outbox_count++] = a;
    fl_arena_rewind(&loop->scratch, mark);
    return FL_OK;
}

fl_status coord_loop_answer(coord_loop *loop, uint32_t node, const fl_msg *msg, fl_err *err) {
    return answer(loop, node, loop->sessions[node].peer, msg, err);
}

fl_status coord_loop_answer_clear(coord_loop *loop, fl_link_peer peer, const fl_msg *msg,
                                  fl_err *err) {
    return answer(loop, COORD_NOBODY, peer, msg, err);
}

static fl_status answer_error(coord_loop *loop, fl_link_peer peer, fl_code code, uint64_t session,
                              fl_err *err) {
    fl_msg m = {.type = FL_MSG_ERROR, .error = {.code = code, .session = session}};
    snprintf(m.error.text, sizeof(m.error.text), "%s", fl_code_text(code));
    return answer(loop, COORD_NOBODY, peer, &m, err);
}

// A frame that no honest node sends. Written down once in a while: a flood of them is one event.
static fl_status complain(coord_loop *loop, uint32_t node, uint64_t now_ms, const char *kind,
                          const char *text, fl_err *err) {
    coord_session *s = &loop->sessions[node];
    if (s->complained_ms != 0 && now_ms - s->complained_ms < COMPLAIN_MS) return FL_OK;
    s->complained_ms = now_ms + 1;
    return coord_loop_event(loop, kind, node, err, "%s", text);
}

static fl_status on_hello(coord_loop *loop, uint32_t node, const fl_msg *in, uint64_t now_ms,
                          fl_err *err) {
    coord_session *s = &loop->sessions[node];
    if (!coord_quota_take(&s->hellos, HELLO_RATE, HELLO_BURST, 1, now_ms))
        return complain(loop, node, now_ms, "quota.spent", "too many handshakes", err);
    uint8_t random[FL_CHANNEL_RANDOM];
    fl_msg out = {.type = FL_MSG_HELLO_REPLY};
    if (s->channel == NULL) {
        const fl_channel_opts opts = {.role = FL_CHANNEL_COORDINATOR,
                                      .identity = loop->keys.identity,
                                      .identity_key = loop->keys.identity_key,
                                      .peer_key = loop->registry.members[node].sign_key,
                                      .update_key = loop->keys.update_key,
                                      .pk = loop->world.pk};
        FL_TRY(fl_channel_open(&opts, &s->channel, err));
    }
    loop->world.random(loop->world.ctx, random, sizeof(random));
    const fl_status st =
        fl_channel_on_hello(s->channel, &in->hello, random, &out.hello_reply, NULL);
    if (st == FL_EUNSUPPORTED) return answer_error(loop, s->peer, FL_CODE_PROTOCOL, 0, err);
    if (st != FL_OK) return FL_OK; // not the identity of this key: nothing to say to it
    return answer(loop, COORD_NOBODY, s->peer, &out, err);
}

static fl_status on_finish(coord_loop *loop, uint32_t node, const fl_msg *in, uint64_t now_ms,
                           fl_err *err) {
    coord_session *s = &loop->sessions[node];
    if (s->channel == NULL)
        return answer_error(loop, s->peer, FL_CODE_SESSION, in->hello_finish.session, err);
    fl_err why;
    if (fl_channel_on_finish(s->channel, &in->hello_finish, &why) != FL_OK)
        return complain(loop, node, now_ms, "session.refused", why.text, err);
    fl_log(FL_LOG_INFO, "session.open", "%s", loop->registry.members[node].name);
    return FL_OK;
}

typedef fl_status (*handler)(coord_loop *loop, uint32_t node, const fl_msg *msg, uint64_t now_ms,
                             fl_err *err);
static const struct {
    fl_msg_type type;
    handler handle;
} handlers[] = {
    {FL_MSG_TASK_REQUEST, coord_loop_on_request},
    {FL_MSG_CHUNK_REQUEST, coord_loop_on_chunk_request},
    {FL_MSG_UPDATE_BEGIN, coord_loop_on_begin},
    {FL_MSG_UPDATE_CHUNK, coord_loop_on_update_chunk},
    {FL_MSG_UPDATE_COMMIT, coord_loop_on_commit},
    {FL_MSG_HEARTBEAT, coord_loop_on_heartbeat},
    {FL_MSG_REPORT, coord_loop_on_report},
};

static fl_status dispatch(coord_loop *loop, uint32_t node, const fl_msg *msg, uint64_t now_ms,
                          fl_err *err) {
    for (size_t i = 0; i < FL_COUNT(handlers); i++) {
        if (handlers[i].type == msg->type) return handlers[i].handle(loop, node, msg, now_ms, err);
    }
    return FL_OK; // an ERROR of the node: nothing to do about it
}

static fl_status sealed(coord_loop *loop, uint32_t node, const fl_frame *frame, uint64_t now_ms,
                        fl_err *err) {
    coord_session *s = &loop->sessions[node];
    fl_bytes body;
    fl_err why;
    fl_msg msg;
    if (s->channel == NULL)
        return answer_error(loop, s->peer, FL_CODE_SESSION, frame->session, err);
    const fl_status st =
        fl_channel_unseal(s->channel, frame, loop->plain, FL_BODY_MAX, &body, &why);
    if (st == FL_ESTATE) return answer_error(loop, s->peer, FL_CODE_SESSION, frame->session, err);
    if (st != FL_OK) return complain(loop, node, now_ms, "frame.refused", why.text, err);
    s->seen = true;
    const size_t mark = loop->scratch.used;
    if (fl_msg_decode(frame->type, body, &loop->scratch, &msg, &why) != FL_OK) {
        FL_TRY(complain(loop, node, now_ms, "frame.refused", why.text, err));
        fl_msg out = {.type = FL_MSG_ERROR, .error = {.code = FL_CODE_MALFORMED}};
        snprintf(out.error.text, sizeof(out.error.text), "%.*s", FL_TEXT_MAX, why.text);
        return coord_loop_answer(loop, node, &out, err);
    }
    const fl_status done = dispatch(loop, node, &msg, now_ms, err);
    fl_arena_rewind(&loop->scratch, mark);
    return done;
}

static fl_status clear(coord_loop *loop, uint32_t node, const fl_link_message *m,
                       const fl_frame *frame, uint64_t now_ms, fl_err *err) {
    const size_t mark = loop->scratch.used;
    fl_msg msg;
    fl_status st = fl_msg_decode(frame->type, frame->body, &loop->scratch, &msg, NULL);
    if (st != FL_OK) return FL_OK; // anybody may send such bytes
    if (msg.type == FL_MSG_JOIN_REQUEST)
        st = coord_loop_join(loop, m, &msg.join_request, now_ms, err);
    else if (node != COORD_NOBODY && msg.type == FL_MSG_HELLO)
        st = on_hello(loop, node, &msg, now_ms, err);
    else if (node != COORD_NOBODY && msg.type == FL_MSG_HELLO_FINISH)
        st = on_finish(loop, node, &msg, now_ms, err);
    fl_arena_rewind(&loop->scratch, mark);
    return st;
}

fl_status coord_loop_frame(coord_loop *loop, const fl_link_message *m, uint64_t now_ms,
                           fl_err *err) {
    fl_frame frame;
    fl_err why;
    uint32_t node = coord_registry_by_transport_key(&loop->registry, m->key);
    if (node != COORD_NOBODY &&
        (m->from != FL_LINK_ADMITTED || loop->registry.members[node].state != COORD_MEMBER_ACTIVE))
        node = COORD_NOBODY; // waits for approval, or revoked: may only ask to join
    const fl_status st = fl_frame_decode(m->frame, FL_FROM_NODE, &frame, &why);
    if (node == COORD_NOBODY) {
        if (st == FL_OK && frame.type == FL_MSG_JOIN_REQUEST)
            return clear(loop, node, m, &frame, now_ms, err);
        loop->strangers++;
        memcpy(loop->stranger_key, m->key, sizeof(loop->stranger_key));
        return FL_OK;
    }
    coord_session *s = &loop->sessions[node];
    coord_member *member = &loop->registry.members[node];
    s->peer = m->peer;
    s->bytes_up += (int64_t)m->frame.size;
    const uint64_t frames_s = (uint64_t)loop->settings.frames_per_s;
    const uint64_t bytes_s = loop->settings.bytes_per_s;
    if (!coord_quota_take(&member->frames, frames_s, 4 * frames_s, 1, now_ms) ||
        !coord_quota_take(&member->bytes, bytes_s, 4 * bytes_s, m->frame.size, now_ms))
        return complain(loop, node, now_ms, "quota.spent", fl_code_text(FL_CODE_QUOTA), err);
    if (st != FL_OK) return complain(loop, node, now_ms, "frame.refused", why.text, err);
    return frame.session == 0 ? clear(loop, node, m, &frame, now_ms, err)
                              : sealed(loop, node, &frame, now_ms, err);
}

fl_status coord_loop_watch_link(coord_loop *loop, uint64_t now_ms, fl_err *err) {
    fl_link_stats stats;
    loop->world.stats(loop->world.ctx, &stats);
    const uint64_t refusals = stats.zap_refused + stats.dropped + loop->strangers;
    const uint64_t count = refusals - loop->refusals;
    if (count == 0) return FL_OK;
    if (loop->refusals_ms == 0) loop->refusals_ms = now_ms + 1;
    // Who knocks just before its token is known here is a member a moment later.
    if (now_ms - loop->refusals_ms < REFUSALS_MS || now_ms < loop->refusals_ms) return FL_OK;
    const uint8_t *k = stats.zap_refused + stats.dropped != loop->refusals_link
                           ? stats.refused_key
                           : loop->stranger_key;
    const uint32_t node = coord_registry_by_transport_key(&loop->registry, k);
    const bool revoked =
        node != COORD_NOBODY && loop->registry.members[node].state == COORD_MEMBER_REVOKED;
    const bool write = node == COORD_NOBODY || revoked;
    if (write && !coord_quota_take(&loop->refusal_events, 1, REFUSALS_BURST * 60, 60, now_ms))
        return FL_OK;
    loop->refusals = refusals;
    loop->refusals_link = stats.zap_refused + stats.dropped;
    loop->refusals_ms = 0;
    if (!write) return FL_OK; // it waits for approval, and the owner knows
    if (revoked)
        return coord_loop_event(loop, "key.refused", node, err, "revoked (refusals: %llu)",
                                (unsigned long long)count);
    return coord_loop_event(loop, "key.refused", node, err,
                            "unknown key %02x%02x%02x%02x (refusals: %llu)", k[0], k[1], k[2], k[3],
                            (unsigned long long)count);
}

// The last that a node hears, so that it stops and says why.
static void say_revoked(coord_loop *loop, uint32_t node) {
    coord_session *s = &loop->sessions[node];
    fl_msg m = {.type = FL_MSG_ERROR, .error = {.code = FL_CODE_REVOKED}};
    snprintf(m.error.text, sizeof(m.error.text), "%s", fl_code_text(FL_CODE_REVOKED));
    const size_t mark = loop->scratch.used;
    const coord_answer a = {.node = node, .peer = s->peer, .type = m.type};
    fl_bytes body;
    if (s->channel != NULL && fl_msg_encode(&m, &loop->scratch, &body, NULL) == FL_OK)
        send_answer(loop, &a, body);
    fl_arena_rewind(&loop->scratch, mark);
}

fl_status coord_loop_expel(coord_loop *loop, uint32_t node, uint64_t now_ms, fl_err *err) {
    coord_session *s = &loop->sessions[node];
    coord_effect fx;
    say_revoked(loop, node);
    if (loop->listening)
        loop->world.revoke(loop->world.ctx, loop->registry.members[node].transport_key);
    fl_channel_close(s->channel);
    s->channel = NULL;
    coord_loop_drop_upload(loop, node);
    const coord_event ev = {.kind = COORD_EV_LEAVE, .node = node, .now_ms = now_ms};
    FL_TRY(coord_round_step(&loop->round, &ev, &fx, err));
    FL_TRY(coord_store_begin(loop->store, err));
    return coord_loop_effect(loop, node, &fx, err);
}
