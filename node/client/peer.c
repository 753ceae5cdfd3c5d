#include "node/client/peer.h"

#include <string.h>

void node_peer_init(node_peer *p, fl_channel *channel) {
    *p = (node_peer){.channel = channel};
}

void node_peer_drop(node_peer *p) {
    fl_channel_drop(p->channel);
    p->up = false;
    p->hello_ms = 0;
}

// A handshake message, in the clear.
static fl_status encode_clear(const fl_msg *m, fl_arena *scratch, uint8_t *out, size_t *ret_size,
                              fl_err *err) {
    const size_t mark = scratch->used;
    fl_bytes body;
    fl_status st = fl_msg_encode(m, scratch, &body, err);
    if (st == FL_OK) {
        const fl_frame f = {.type = m->type, .body = body};
        st = fl_frame_encode(&f, out, FL_FRAME_MAX, ret_size, err);
    }
    fl_arena_rewind(scratch, mark);
    return st;
}

fl_status node_peer_tick(node_peer *p, uint64_t now_ms, const uint8_t random[FL_CHANNEL_RANDOM],
                         fl_arena *scratch, uint8_t *out, size_t *ret_size, fl_err *err) {
    *ret_size = 0;
    if (p->up) return FL_OK;
    if (p->hello_ms != 0 && now_ms - p->hello_ms < NODE_PEER_HELLO_MS) return FL_OK;
    fl_msg m = {.type = FL_MSG_HELLO};
    FL_TRY(fl_channel_hello(p->channel, random, &m.hello, err));
    p->hello_ms = now_ms == 0 ? 1 : now_ms;
    return encode_clear(&m, scratch, out, ret_size, err);
}

static fl_status on_hello_reply(node_peer *p, const fl_msg *m, fl_arena *scratch, uint8_t *out,
                                size_t *ret_size, node_peer_got *ret_got, fl_err *err) {
    fl_msg finish = {.type = FL_MSG_HELLO_FINISH};
    FL_TRY(fl_channel_on_reply(p->channel, &m->hello_reply, &finish.hello_finish, err));
    FL_TRY(encode_clear(&finish, scratch, out, ret_size, err));
    p->up = true;
    p->hello_ms = 0;
    *ret_got = NODE_PEER_UP;
    return FL_OK;
}

fl_status node_peer_receive(node_peer *p, fl_bytes frame, fl_arena *scratch, uint8_t *plain,
                            uint8_t *out, size_t *ret_size, fl_msg *ret, node_peer_got *ret_got,
                            fl_err *err) {
    *ret_size = 0;
    *ret_got = NODE_PEER_NOTHING;
    fl_frame f;
    FL_TRY(fl_frame_decode(frame, FL_FROM_COORDINATOR, &f, err));
    fl_bytes body = f.body;
    if (f.session != 0)
        FL_TRY(fl_channel_unseal(p->channel, &f, plain, FL_BODY_MAX, &body, err));
    FL_TRY(fl_msg_decode(f.type, body, scratch, ret, err));
    if (f.session != 0) {
        *ret_got = NODE_PEER_MESSAGE;
        return FL_OK;
    }
    if (ret->type == FL_MSG_HELLO_REPLY)
        return on_hello_reply(p, ret, scratch, out, ret_size, ret_got, err);
    if (ret->type == FL_MSG_ERROR) *ret_got = NODE_PEER_HINT;
    return FL_OK;
}

fl_status node_peer_send(node_peer *p, const fl_msg *message, fl_arena *scratch, uint8_t *out,
                         size_t *ret_size, fl_err *err) {
    const size_t mark = scratch->used;
    fl_bytes body;
    fl_status st = fl_msg_encode(message, scratch, &body, err);
    if (st == FL_OK)
        st = fl_channel_seal(p->channel, message->type, body, out, FL_FRAME_MAX, ret_size, err);
    fl_arena_rewind(scratch, mark);
    return st;
}
