#include "proto/frame.h"

#include "common/checked.h"

#include <string.h>

static const fl_msg_info infos[] = {
#define X(name, number, from, form, body_max) {FL_MSG_##name, #name, from, form, body_max},
    FL_MSG_LIST(X)
#undef X
};

const fl_msg_info *fl_msg_info_of(uint32_t type) {
    for (size_t i = 0; i < FL_COUNT(infos); i++) {
        if ((uint32_t)infos[i].type == type) return &infos[i];
    }
    return NULL;
}

const char *fl_msg_name(uint32_t type) {
    const fl_msg_info *info = fl_msg_info_of(type);
    return info == NULL ? "unknown" : info->name;
}

fl_status fl_frame_decode(fl_bytes in, fl_msg_from from, fl_frame *ret, fl_err *err) {
    const uint8_t *p = in.data;
    if (in.size < FL_FRAME_HEAD) return FL_FAIL(err, FL_EFORMAT, "a frame of %zu bytes", in.size);
    if (memcmp(p, "FLT1", 4) != 0) return FL_FAIL(err, FL_EFORMAT, "not a frame");
    if (p[4] != FL_FRAME_VERSION)
        return FL_FAIL(err, FL_EUNSUPPORTED, "frame version %u; this program speaks %d", p[4],
                       FL_FRAME_VERSION);
    const fl_msg_info *info = fl_msg_info_of(p[5]);
    if (info == NULL) return FL_FAIL(err, FL_EUNSUPPORTED, "message type %u is unknown", p[5]);
    const uint64_t session = fl_get_u64(p + 8), counter = fl_get_u64(p + 16);
    const uint32_t size = fl_get_u32(p + 24);
    if (fl_get_u16(p + 6) != 0 || fl_get_u32(p + 28) != 0)
        return FL_FAIL(err, FL_EFORMAT, "reserved bytes are set");
    if ((session == 0) != (counter == 0))
        return FL_FAIL(err, FL_EFORMAT, "session and counter contradict each other");
    const uint32_t extra = session == 0 ? 0 : FL_FRAME_TAG;
    if (size > info->body_max + extra)
        return FL_FAIL(err, FL_ELIMIT, "%s with a body of %u bytes; %u are allowed", info->name,
                       size, info->body_max + extra);
    if (size < extra || in.size - FL_FRAME_HEAD != size)
        return FL_FAIL(err, FL_EFORMAT, "%s: size is %u, %zu bytes follow", info->name, size,
                       in.size - FL_FRAME_HEAD);
    if (((unsigned)info->from & (unsigned)from) == 0)
        return FL_FAIL(err, FL_ESTATE, "%s came from the wrong side", info->name);
    const unsigned form = session == 0 ? FL_FORM_CLEAR : FL_FORM_SEALED;
    if (((unsigned)info->form & form) == 0)
        return FL_FAIL(err, FL_ESTATE, "%s must%s be sealed", info->name,
                       session == 0 ? "" : " not");
    *ret = (fl_frame){
        .type = info->type,
        .session = session,
        .counter = counter,
        .head = {p, FL_FRAME_HEAD},
        .body = {p + FL_FRAME_HEAD, size},
    };
    return FL_OK;
}

void fl_frame_head(const fl_frame *f, uint8_t head[FL_FRAME_HEAD]) {
    FL_ASSERT(f->body.size <= UINT32_MAX);
    memset(head, 0, FL_FRAME_HEAD);
    memcpy(head, "FLT1", 4);
    head[4] = FL_FRAME_VERSION;
    head[5] = (uint8_t)f->type;
    fl_put_u64(head + 8, f->session);
    fl_put_u64(head + 16, f->counter);
    fl_put_u32(head + 24, (uint32_t)f->body.size);
}

fl_status fl_frame_encode(const fl_frame *f, uint8_t *out, size_t out_size, size_t *ret_size,
                          fl_err *err) {
    const fl_msg_info *info = fl_msg_info_of((uint32_t)f->type);
    FL_ASSERT(info != NULL && f->session == 0 && f->counter == 0);
    if (((unsigned)info->form & FL_FORM_CLEAR) == 0)
        return FL_FAIL(err, FL_ESTATE, "%s must be sealed", info->name);
    if (f->body.size > info->body_max || out_size < FL_FRAME_HEAD ||
        f->body.size > out_size - FL_FRAME_HEAD)
        return FL_FAIL(err, FL_ELIMIT, "%s with a body of %zu bytes does not fit", info->name,
                       f->body.size);
    fl_frame_head(f, out);
    if (f->body.size != 0) memcpy(out + FL_FRAME_HEAD, f->body.data, f->body.size);
    *ret_size = FL_FRAME_HEAD + f->body.size;
    return FL_OK;
}
