// checked.h: sizes that cannot wrap, and little-endian bytes that do not care who reads them.
#ifndef FL_COMMON_CHECKED_H
#define FL_COMMON_CHECKED_H

#include "common/base.h"

// true when the result fits; *ret is written only then.
bool fl_mul_size(size_t a, size_t b, size_t *ret) FL_NODISCARD;
bool fl_add_size(size_t a, size_t b, size_t *ret) FL_NODISCARD;
bool fl_round_up(size_t n, size_t multiple, size_t *ret) FL_NODISCARD; // multiple > 0

// Unaligned little-endian access.
uint16_t fl_get_u16(const uint8_t *p);
uint32_t fl_get_u32(const uint8_t *p);
uint64_t fl_get_u64(const uint8_t *p);
float fl_get_f32(const uint8_t *p);
void fl_put_u16(uint8_t *p, uint16_t v);
void fl_put_u32(uint8_t *p, uint32_t v);
void fl_put_u64(uint8_t *p, uint64_t v);
void fl_put_f32(uint8_t *p, float v);

// A reader that cannot leave its bytes. After a failed read, `bad` stays set and every later read
// gives zeros, so a parser may check once at the end of a group of fields.
typedef struct fl_reader {
    fl_bytes in;
    size_t at;
    bool bad;
} fl_reader;

uint8_t fl_read_u8(fl_reader *r);
uint16_t fl_read_u16(fl_reader *r);
uint32_t fl_read_u32(fl_reader *r);
uint64_t fl_read_u64(fl_reader *r);
fl_bytes fl_read_bytes(fl_reader *r, uint64_t size); // a view into `in`
size_t fl_reader_left(const fl_reader *r);

#endif
