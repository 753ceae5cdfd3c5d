// Property, for every type of message (the first byte selects it): whatever decodes is legal, so it
// encodes; what was encoded decodes again to the same bytes; nothing outside the arena is touched
// and a refusal leaves the arena as it was.
#include "proto/codec.h"
#include "tests/fuzz/fuzz.h"

#include <string.h>

static const fl_msg_type types[] = {
#define X(name, number, from, form, body_max) FL_MSG_##name,
    FL_MSG_LIST(X)
#undef X
};
static _Alignas(16) uint8_t block_in[FL_CODEC_ARENA], block_out[FL_CODEC_ARENA];
static _Alignas(16) uint8_t block_back[FL_CODEC_ARENA], block_again[FL_CODEC_ARENA];

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size == 0) return 0;
    const fl_msg_type type = types[data[0] % FL_COUNT(types)];
    fl_arena in, out, back, again;
    fl_msg m, n;
    fl_bytes body, body2;
    fl_arena_init(&in, block_in, sizeof(block_in));
    if (fl_msg_decode(type, (fl_bytes){data + 1, size - 1}, &in, &m, NULL) != FL_OK) {
        FL_ASSERT(in.used == 0);
        return 0;
    }
    FL_ASSERT(m.type == type);
    fl_arena_init(&out, block_out, sizeof(block_out));
    fl_arena_init(&back, block_back, sizeof(block_back));
    fl_arena_init(&again, block_again, sizeof(block_again));
    FL_ASSERT(fl_msg_encode(&m, &out, &body, NULL) == FL_OK);
    FL_ASSERT(fl_msg_decode(type, body, &back, &n, NULL) == FL_OK);
    FL_ASSERT(fl_msg_encode(&n, &again, &body2, NULL) == FL_OK);
    FL_ASSERT(body.size == body2.size && memcmp(body.data, body2.data, body.size) == 0);
    return 0;
}
