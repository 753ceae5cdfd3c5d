#include "node/model/unicode.h"

// Bytes of the character that starts with `lead`, and the range of its second byte, which is where
// overlong forms and surrogates show.
static size_t lead_length(uint8_t lead, uint8_t *ret_low, uint8_t *ret_high) {
    *ret_low = 0x80, *ret_high = 0xBF;
    if (lead < 0x80) return 1;
    if (lead < 0xC2 || lead > 0xF4) return 0;
    if (lead == 0xE0) *ret_low = 0xA0;
    if (lead == 0xED) *ret_high = 0x9F;
    if (lead == 0xF0) *ret_low = 0x90;
    if (lead == 0xF4) *ret_high = 0x8F;
    return lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
}

// How many of the bytes at `at` agree with a well-formed character; *ret_length is that character's
// length, 0 when the lead byte starts none.
static size_t good_prefix(fl_bytes text, size_t at, size_t *ret_length) {
    uint8_t low, high;
    const size_t length = lead_length(text.data[at], &low, &high);
    *ret_length = length;
    if (length == 0) return 0;
    for (size_t i = 1; i < length; i++) {
        if (at + i >= text.size) return i;
        const uint8_t b = text.data[at + i];
        if (b < (i == 1 ? low : 0x80) || b > (i == 1 ? high : 0xBF)) return i;
    }
    return length;
}

uint32_t node_utf8_next(fl_bytes text, size_t at, size_t *ret_length) {
    size_t length;
    const uint8_t *p = text.data + at;
    if (good_prefix(text, at, &length) != length || length == 0) {
        *ret_length = 1;
        return NODE_UNICODE_BAD + (uint32_t)p[0];
    }
    *ret_length = length;
    uint32_t code = length == 1 ? p[0] : p[0] & (0x7Fu >> length);
    for (size_t i = 1; i < length; i++) code = code << 6 | (p[i] & 0x3Fu);
    return code;
}

size_t node_utf8_check(fl_bytes text) {
    size_t at = 0;
    while (at < text.size) {
        size_t length;
        if (node_utf8_next(text, at, &length) >= NODE_UNICODE_BAD) return at;
        at += length;
    }
    return at;
}

bool node_utf8_valid(fl_bytes text) {
    return node_utf8_check(text) == text.size;
}

size_t node_utf8_unfinished(fl_bytes text) {
    for (size_t back = 1; back <= 3 && back <= text.size; back++) {
        const size_t at = text.size - back;
        if ((text.data[at] & 0xC0) == 0x80) continue;
        size_t length;
        const size_t good = good_prefix(text, at, &length);
        return good == back && good < length ? back : 0;
    }
    return 0;
}

size_t node_utf8_put(uint32_t code, uint8_t *out) {
    if (code < 0x80) {
        out[0] = (uint8_t)code;
        return 1;
    }
    const size_t length = code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    for (size_t i = length - 1; i > 0; i--, code >>= 6) out[i] = (uint8_t)(0x80 | (code & 0x3F));
    static const uint8_t mark[5] = {0, 0, 0xC0, 0xE0, 0xF0};
    out[0] = (uint8_t)(mark[length] | code);
    return length;
}

static bool in_ranges(const node_unicode_range *range, uint32_t count, uint32_t code) {
    uint32_t low = 0, high = count;
    while (low < high) {
        const uint32_t mid = low + (high - low) / 2;
        if (code > range[mid].last)
            low = mid + 1;
        else
            high = mid;
    }
    return low < count && code >= range[low].first;
}

node_class node_unicode_class(uint32_t code) {
    if (code < 0x80) { // most text: no search
        if ((code | 0x20) - 'a' < 26) return NODE_CLASS_LETTER;
        if (code - '0' < 10) return NODE_CLASS_NUMBER;
        return code == ' ' || code - 9 < 5 ? NODE_CLASS_SPACE : NODE_CLASS_OTHER;
    }
    if (in_ranges(node_unicode_letters, node_unicode_letters_count, code)) return NODE_CLASS_LETTER;
    if (in_ranges(node_unicode_numbers, node_unicode_numbers_count, code)) return NODE_CLASS_NUMBER;
    return in_ranges(node_unicode_spaces, node_unicode_spaces_count, code) ? NODE_CLASS_SPACE
                                                                           : NODE_CLASS_OTHER;
}
