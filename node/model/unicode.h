// unicode.h: UTF-8 and the three character classes that pre-tokenizers ask for.
//
// Everything here takes any bytes. A byte that is not part of a well-formed character is a
// character of its own, with the code NODE_UNICODE_BAD + byte, so that text which is not UTF-8 can
// still be cut into pieces and put together again without loss.
#ifndef NODE_MODEL_UNICODE_H
#define NODE_MODEL_UNICODE_H

#include "common/base.h"

enum { NODE_UNICODE_BAD = 0x110000 }; // one above the last code point

typedef enum node_class {
    NODE_CLASS_OTHER,
    NODE_CLASS_LETTER,
    NODE_CLASS_NUMBER,
    NODE_CLASS_SPACE
} node_class;

// Code of the character at text.data[at], at < text.size, and its length in bytes (1..4).
// Overlong forms, surrogates and codes above U+10FFFF are not well-formed (Unicode 15, table 3-7).
uint32_t node_utf8_next(fl_bytes text, size_t at, size_t *ret_length);

// The offset of the first byte that is not part of a well-formed character; text.size when all are.
size_t node_utf8_check(fl_bytes text);
bool node_utf8_valid(fl_bytes text);

// How many bytes at the end are the beginning of a character that is not finished (0..3): a printer
// of a stream holds them back until the rest comes.
size_t node_utf8_unfinished(fl_bytes text);

// Writes a code point below NODE_UNICODE_BAD, out[4]; returns its length.
size_t node_utf8_put(uint32_t code, uint8_t *out);

// Class by general category L*, N*, and the White_Space property.
node_class node_unicode_class(uint32_t code);

// Sorted ranges without overlap, both ends included.
typedef struct node_unicode_range {
    uint32_t first, last;
} node_unicode_range;
extern const node_unicode_range node_unicode_letters[], node_unicode_numbers[],
    node_unicode_spaces[];
extern const uint32_t node_unicode_letters_count, node_unicode_numbers_count,
    node_unicode_spaces_count;

#endif
