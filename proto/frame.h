// frame.h: the outer envelope of every message between a node and the coordinator.
//
//   offset  size  field      (integers little-endian)
//   0       4     magic      "FLT1"
//   4       1     version    1
//   5       1     type       fl_msg_type
//   6       2     zero       must be 0 in version 1
//   8       8     session    0: the body is clear; else the session whose keys seal it
//   16      8     counter    0 when clear; else 1, 2, 3... per session and direction, never twice
//   24      4     body_size  bytes that follow; the frame ends exactly there
//   28      4     zero       must be 0 in version 1
//   32      ...   body       protobuf message, or its sealed form (16 bytes longer)
//
// The 32 bytes of the head are the associated data of the seal: none of them can be altered.
#ifndef FL_PROTO_FRAME_H
#define FL_PROTO_FRAME_H

#include "common/status.h"

enum {
    FL_FRAME_HEAD = 32,
    FL_FRAME_VERSION = 1,
    FL_FRAME_TAG = 16, // what sealing adds to a body
    FL_CHUNK_MAX = 256 << 10,
    FL_BODY_MAX = FL_CHUNK_MAX + 4096,                         // the largest clear body of any type
    FL_FRAME_MAX = FL_FRAME_HEAD + FL_BODY_MAX + FL_FRAME_TAG, // the largest legal frame
    // What a node sends is smaller: the coordinator's transport holds one frame of anybody who
    // connects before it knows who that is.
    FL_UPLOAD_CHUNK_MAX = 63 << 10,
    FL_UPLOAD_FRAME_MAX = 64 << 10,
    FL_UPLOAD_BODY_MAX = FL_UPLOAD_FRAME_MAX - FL_FRAME_HEAD - FL_FRAME_TAG,
};

// Where a message may come from, and whether it travels in the clear (before a session exists),
// sealed, or either way.
typedef enum fl_msg_from {
    FL_FROM_NODE = 1,
    FL_FROM_COORDINATOR = 2,
    FL_FROM_BOTH = 3,
} fl_msg_from;
typedef enum fl_msg_form { FL_FORM_CLEAR = 1, FL_FORM_SEALED = 2, FL_FORM_EITHER = 3 } fl_msg_form;

// name, number on the wire, from, form, largest clear body
#define FL_MSG_LIST(X)                                                                             \
    X(JOIN_REQUEST, 1, FL_FROM_NODE, FL_FORM_CLEAR, 1024)                                          \
    X(JOIN_REPLY, 2, FL_FROM_COORDINATOR, FL_FORM_CLEAR, 1024)                                     \
    X(HELLO, 3, FL_FROM_NODE, FL_FORM_CLEAR, 512)                                                  \
    X(HELLO_REPLY, 4, FL_FROM_COORDINATOR, FL_FORM_CLEAR, 512)                                     \
    X(HELLO_FINISH, 5, FL_FROM_NODE, FL_FORM_CLEAR, 256)                                           \
    X(ERROR, 6, FL_FROM_BOTH, FL_FORM_EITHER, 512)                                                 \
    X(TASK_REQUEST, 16, FL_FROM_NODE, FL_FORM_SEALED, 16384)                                       \
    X(TASK, 17, FL_FROM_COORDINATOR, FL_FORM_SEALED, 65536)                                        \
    X(WAIT, 18, FL_FROM_COORDINATOR, FL_FORM_SEALED, 512)                                          \
    X(CHUNK_REQUEST, 19, FL_FROM_NODE, FL_FORM_SEALED, 256)                                        \
    X(CHUNK, 20, FL_FROM_COORDINATOR, FL_FORM_SEALED, FL_BODY_MAX)                                 \
    X(UPDATE_BEGIN, 21, FL_FROM_NODE, FL_FORM_SEALED, 512)                                         \
    X(UPDATE_WANT, 22, FL_FROM_COORDINATOR, FL_FORM_SEALED, 256)                                   \
    X(UPDATE_CHUNK, 23, FL_FROM_NODE, FL_FORM_SEALED, FL_UPLOAD_BODY_MAX)                          \
    X(UPDATE_COMMIT, 24, FL_FROM_NODE, FL_FORM_SEALED, 256)                                        \
    X(UPDATE_ACK, 25, FL_FROM_COORDINATOR, FL_FORM_SEALED, 512)                                    \
    X(HEARTBEAT, 26, FL_FROM_NODE, FL_FORM_SEALED, 512)                                            \
    X(HEARTBEAT_ACK, 27, FL_FROM_COORDINATOR, FL_FORM_SEALED, 256)                                 \
    X(REPORT, 28, FL_FROM_NODE, FL_FORM_SEALED, 4096)                                              \
    X(REPORT_ACK, 29, FL_FROM_COORDINATOR, FL_FORM_SEALED, 256)

typedef enum fl_msg_type {
#define X(name, number, from, form, body_max) FL_MSG_##name = (number),
    FL_MSG_LIST(X)
#undef X
} fl_msg_type;

typedef struct fl_msg_info {
    fl_msg_type type;
    const char *name; // "TASK_REQUEST"
    fl_msg_from from;
    fl_msg_form form;
    uint32_t body_max; // bytes in the clear
} fl_msg_info;

// NULL when no such type exists in version 1. Accepts any number.
const fl_msg_info *fl_msg_info_of(uint32_t type);
const char *fl_msg_name(uint32_t type); // "unknown" for what does not exist

typedef struct fl_frame {
    fl_msg_type type;
    uint64_t session; // 0: clear
    uint64_t counter; // 0 exactly when session is 0
    fl_bytes head;    // the 32 bytes of the head, as received; set by decode
    fl_bytes body;    // borrows from the decoded input
} fl_frame;

// Parses hostile bytes sent by `from`. *ret is written only on FL_OK.
//   FL_EFORMAT       not a frame, or lengths, zeros, session and counter contradict each other
//   FL_EUNSUPPORTED  another version of the protocol, or a type that this version does not have
//   FL_ELIMIT        body larger than its type may have
//   FL_ESTATE        a type that this side may not send, or clear where sealed is asked
fl_status fl_frame_decode(fl_bytes in, fl_msg_from from, fl_frame *ret, fl_err *err) FL_NODISCARD;

// Writes the head of f (f->head is ignored, f->body.data may be NULL: only its size counts).
void fl_frame_head(const fl_frame *f, uint8_t head[FL_FRAME_HEAD]);

// A whole clear frame (JOIN_*, HELLO*, ERROR) into out[out_size]; FL_ELIMIT when it does not fit or
// is above its type's limit. f->session and f->counter must be 0.
fl_status fl_frame_encode(const fl_frame *f, uint8_t *out, size_t out_size, size_t *ret_size,
                          fl_err *err) FL_NODISCARD;

#endif
