#include "proto/codec.h"

#include "proto/codec_internal.h"

#include <fleetune.pb-c.h>
#include <stdalign.h>

typedef struct budget {
    fl_arena *arena;
    bool spent; // tells "out of scratch" from "malformed": the decoder returns NULL for both
} budget;

static void *budget_alloc(void *ctx, size_t size) {
    budget *b = ctx;
    void *p = fl_arena_alloc(b->arena, size == 0 ? 1 : size, 1, alignof(max_align_t));
    if (p == NULL) b->spent = true;
    return p;
}

static void budget_free(void *ctx, void *p) {
    (void)ctx, (void)p; // the arena is rewound as a whole
}

static const ProtobufCMessageDescriptor *descriptor_of(fl_msg_type type) {
    switch (type) {
    case FL_MSG_JOIN_REQUEST:
        return &fleetune__v1__join_request__descriptor;
    case FL_MSG_JOIN_REPLY:
        return &fleetune__v1__join_reply__descriptor;
    case FL_MSG_HELLO:
        return &fleetune__v1__hello__descriptor;
    case FL_MSG_HELLO_REPLY:
        return &fleetune__v1__hello_reply__descriptor;
    case FL_MSG_HELLO_FINISH:
        return &fleetune__v1__hello_finish__descriptor;
    case FL_MSG_ERROR:
        return &fleetune__v1__error__descriptor;
    case FL_MSG_TASK_REQUEST:
        return &fleetune__v1__task_request__descriptor;
    case FL_MSG_TASK:
        return &fleetune__v1__task__descriptor;
    case FL_MSG_WAIT:
        return &fleetune__v1__wait__descriptor;
    case FL_MSG_CHUNK_REQUEST:
        return &fleetune__v1__chunk_request__descriptor;
    case FL_MSG_CHUNK:
        return &fleetune__v1__chunk__descriptor;
    case FL_MSG_UPDATE_BEGIN:
        return &fleetune__v1__update_begin__descriptor;
    case FL_MSG_UPDATE_WANT:
        return &fleetune__v1__update_want__descriptor;
    case FL_MSG_UPDATE_CHUNK:
        return &fleetune__v1__update_chunk__descriptor;
    case FL_MSG_UPDATE_COMMIT:
        return &fleetune__v1__update_commit__descriptor;
    case FL_MSG_UPDATE_ACK:
        return &fleetune__v1__update_ack__descriptor;
    case FL_MSG_HEARTBEAT:
        return &fleetune__v1__heartbeat__descriptor;
    case FL_MSG_HEARTBEAT_ACK:
        return &fleetune__v1__heartbeat_ack__descriptor;
    case FL_MSG_REPORT:
        return &fleetune__v1__report__descriptor;
    case FL_MSG_REPORT_ACK:
        return &fleetune__v1__report_ack__descriptor;
    }
    return NULL;
}

fl_status fl_msg_decode(fl_msg_type type, fl_bytes body, fl_arena *scratch, fl_msg *ret,
                        fl_err *err) {
    const size_t mark = scratch->used;
    const fl_msg_info *info = fl_msg_info_of((uint32_t)type);
    budget b = {scratch, false};
    ProtobufCAllocator alloc = {budget_alloc, budget_free, &b};
    fl_msg m = {.type = type};
    fl_status st;

    if (info == NULL) return FL_FAIL(err, FL_EUNSUPPORTED, "message type %u is unknown", type);
    if (body.size > info->body_max)
        return FL_FAIL(err, FL_ELIMIT, "%s of %zu bytes", info->name, body.size);
    static const uint8_t nothing; // an empty message is legal protobuf, and may come as NULL
    const ProtobufCMessage *pb = protobuf_c_message_unpack(
        descriptor_of(type), &alloc, body.size, body.data == NULL ? &nothing : body.data);
    if (pb == NULL)
        st = b.spent ? FL_FAIL(err, FL_ENOMEM, "%s needs more than the scratch arena", info->name)
                     : FL_FAIL(err, FL_EFORMAT, "%s does not parse", info->name);
    else
        st = fl_codec_read(pb, scratch, &m, err);
    if (st == FL_OK) st = fl_codec_check(&m, err);
    if (st == FL_OK)
        *ret = m;
    else
        fl_arena_rewind(scratch, mark);
    return st;
}

fl_status fl_msg_encode(const fl_msg *m, fl_arena *scratch, fl_bytes *ret, fl_err *err) {
    const size_t mark = scratch->used;
    const fl_msg_info *info = fl_msg_info_of((uint32_t)m->type);
    ProtobufCMessage *pb = NULL;

    FL_ASSERT(info != NULL);
    if (fl_codec_check(m, err) != FL_OK) {
        if (err != NULL) err->status = FL_EARG;
        return FL_EARG;
    }
    fl_status st = fl_codec_write(m, scratch, &pb, err);
    if (st != FL_OK) goto out;
    const size_t size = protobuf_c_message_get_packed_size(pb);
    if (size > info->body_max) {
        st = FL_FAIL(err, FL_EARG, "%s would be %zu bytes; %u are allowed", info->name, size,
                     info->body_max);
        goto out;
    }
    uint8_t *bytes = fl_arena_alloc(scratch, size == 0 ? 1 : size, 1, 1);
    if (bytes == NULL) {
        st = FL_FAIL(err, FL_ENOMEM, "%s needs more than the scratch arena", info->name);
        goto out;
    }
    protobuf_c_message_pack(pb, bytes);
    *ret = (fl_bytes){bytes, size};
out:
    if (st != FL_OK) fl_arena_rewind(scratch, mark);
    return st;
}

const char *fl_code_name(uint32_t code) {
    switch (code) {
#define X(name, number, text)                                                                      \
    case number:                                                                                   \
        return #name;
        FL_CODE_LIST(X)
#undef X
    default:
        return "UNKNOWN";
    }
}

const char *fl_code_text(uint32_t code) {
    switch (code) {
#define X(name, number, text)                                                                      \
    case number:                                                                                   \
        return text;
        FL_CODE_LIST(X)
#undef X
    default:
        return "unknown reason";
    }
}
