#include "common/checked.h"

#include <string.h>

bool fl_mul_size(size_t a, size_t b, size_t *ret) {
    size_t n;
    if (__builtin_mul_overflow(a, b, &n)) return false;
    *ret = n;
    return true;
}

bool fl_add_size(size_t a, size_t b, size_t *ret) {
    size_t n;
    if (__builtin_add_overflow(a, b, &n)) return false;
    *ret = n;
    return true;
}

bool fl_round_up(size_t n, size_t multiple, size_t *ret) {
    FL_ASSERT(multiple > 0);
    const size_t rest = n % multiple;
    return rest == 0 ? (*ret = n, true) : fl_add_size(n, multiple - rest, ret);
}

uint16_t fl_get_u16(const uint8_t *p) {
    return (uint16_t)(p[0] | p[1] << 8);
}

uint32_t fl_get_u32(const uint8_t *p) {
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

uint64_t fl_get_u64(const uint8_t *p) {
    return (uint64_t)fl_get_u32(p) | (uint64_t)fl_get_u32(p + 4) << 32;
}

float fl_get_f32(const uint8_t *p) {
    const uint32_t u = fl_get_u32(p);
    float v;
    memcpy(&v, &u, sizeof(v));
    return v;
}

void fl_put_u16(uint8_t *p, uint16_t v) {
    p[0] = (uint8_t)v;
    p[1] = (uint8_t)(v >> 8);
}

void fl_put_u32(uint8_t *p, uint32_t v) {
    for (int i = 0; i < 4; i++) p[i] = (uint8_t)(v >> (8 * i));
}

void fl_put_u64(uint8_t *p, uint64_t v) {
    for (int i = 0; i < 8; i++) p[i] = (uint8_t)(v >> (8 * i));
}

void fl_put_f32(uint8_t *p, float v) {
    uint32_t u;
    memcpy(&u, &v, sizeof(u));
    fl_put_u32(p, u);
}

size_t fl_reader_left(const fl_reader *r) {
    return r->bad ? 0 : r->in.size - r->at;
}

fl_bytes fl_read_bytes(fl_reader *r, uint64_t size) {
    if (r->bad || size > r->in.size - r->at) {
        r->bad = true;
        return (fl_bytes){0};
    }
    const fl_bytes view = {r->in.data + r->at, (size_t)size};
    r->at += (size_t)size;
    return view;
}

uint8_t fl_read_u8(fl_reader *r) {
    const fl_bytes b = fl_read_bytes(r, 1);
    return b.size == 0 ? 0 : b.data[0];
}

uint16_t fl_read_u16(fl_reader *r) {
    const fl_bytes b = fl_read_bytes(r, 2);
    return b.size == 0 ? 0 : fl_get_u16(b.data);
}

uint32_t fl_read_u32(fl_reader *r) {
    const fl_bytes b = fl_read_bytes(r, 4);
    return b.size == 0 ? 0 : fl_get_u32(b.data);
}

uint64_t fl_read_u64(fl_reader *r) {
    const fl_bytes b = fl_read_bytes(r, 8);
    return b.size == 0 ? 0 : fl_get_u64(b.data);
}
