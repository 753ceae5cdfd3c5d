// peer.h: the node's end of a session: frames in, messages out and the other way round. Pure, like
// the channel it drives: random bytes are an argument, frames to send are written where the caller
// says.
#ifndef NODE_CLIENT_PEER_H
#define NODE_CLIENT_PEER_H

#include "proto/channel.h"

enum { NODE_PEER_HELLO_MS = 3000 }; // a HELLO without an answer is sent again after this

typedef struct node_peer {
    fl_channel *channel; // owned by the caller
    uint64_t hello_ms;   // when the last HELLO was sent; 0: none is under way
    bool up;
} node_peer;

void node_peer_init(node_peer *peer, fl_channel *channel);
// Forgets the session: the next tick shakes hands anew.
void node_peer_drop(node_peer *peer);

// A frame to be sent now (a HELLO that is due), or *ret_size = 0. out[FL_FRAME_MAX].
fl_status node_peer_tick(node_peer *peer, uint64_t now_ms, const uint8_t random[FL_CHANNEL_RANDOM],
                         fl_arena *scratch, uint8_t *out, size_t *ret_size,
                         fl_err *err) FL_NODISCARD;

typedef enum node_peer_got {
    NODE_PEER_NOTHING, // a handshake step, or a forged hint
    NODE_PEER_UP,      // the session is live; out[*ret_size] must be sent first
    NODE_PEER_MESSAGE, // *ret is a message, in `scratch`
    NODE_PEER_HINT,    // *ret is an ERROR in the clear: it proves nothing
} node_peer_got;

// One received frame. plain[FL_BODY_MAX] holds an opened body as long as *ret is used.
//   FL_EFORMAT, FL_ELIMIT, FL_EAUTH, FL_ESTATE ... the frame is to be dropped, nothing has changed
fl_status node_peer_receive(node_peer *peer, fl_bytes frame, fl_arena *scratch, uint8_t *plain,
                            uint8_t *out, size_t *ret_size, fl_msg *ret, node_peer_got *ret_got,
                            fl_err *err) FL_NODISCARD;

// A sealed frame for a message, into out[FL_FRAME_MAX].
fl_status node_peer_send(node_peer *peer, const fl_msg *message, fl_arena *scratch, uint8_t *out,
                         size_t *ret_size, fl_err *err) FL_NODISCARD;

#endif
