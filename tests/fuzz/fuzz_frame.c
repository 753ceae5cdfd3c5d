// Property: any bytes that decode as a frame, from either side, encode back to exactly those bytes,
// and a clear frame made of its parts decodes to the same parts.
#include "proto/frame.h"
#include "tests/fuzz/fuzz.h"

#include <string.h>

static void try_from(const uint8_t *data, size_t size, fl_msg_from from) {
    fl_frame f;
    if (fl_frame_decode((fl_bytes){data, size}, from, &f, NULL) != FL_OK) return;
    uint8_t head[FL_FRAME_HEAD];
    const fl_msg_info *info = fl_msg_info_of((uint32_t)f.type);
    fl_frame_head(&f, head);
    FL_ASSERT(memcmp(head, data, FL_FRAME_HEAD) == 0);
    FL_ASSERT(f.body.data + f.body.size == data + size);
    FL_ASSERT(info != NULL && ((unsigned)info->from & (unsigned)from) != 0);
    FL_ASSERT((f.session == 0) == (f.counter == 0));
    FL_ASSERT(f.body.size <= info->body_max + (f.session == 0 ? 0 : FL_FRAME_TAG));
    if (f.session != 0 || f.body.size > 2048) return;
    uint8_t out[FL_FRAME_HEAD + 2048];
    size_t made = 0;
    FL_ASSERT(fl_frame_encode(&f, out, sizeof(out), &made, NULL) == FL_OK);
    FL_ASSERT(made == size && memcmp(out, data, size) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    try_from(data, size, FL_FROM_NODE);
    try_from(data, size, FL_FROM_COORDINATOR);
    return 0;
}
