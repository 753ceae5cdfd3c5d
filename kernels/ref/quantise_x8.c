// The definition: what every other variant is compared with. And the view's sizes.
#include "kernels/quantise_x8.h"

#include "common/checked.h"

#include <math.h>
#include <string.h>

// A view's three parts, each a multiple of 64 bytes, in the order codes, scales, sums.
static bool part_sizes(uint32_t tokens, uint32_t cols, size_t *ret_codes, size_t *ret_floats) {
    const size_t groups = (size_t)cols / FL_X8_GROUP + (cols % FL_X8_GROUP != 0);
    size_t count;
    return fl_mul_size(tokens, groups, &count) && fl_mul_size(count, FL_X8_GROUP, ret_codes) &&
           fl_mul_size(count, sizeof(float), &count) && fl_round_up(count, 64, ret_floats);
}

bool fl_x8_size(uint32_t tokens, uint32_t cols, size_t *ret) {
    size_t codes, floats, size;
    if (!part_sizes(tokens, cols, &codes, &floats) || !fl_add_size(floats, floats, &floats) ||
        !fl_add_size(codes, floats, &size))
        return false;
    *ret = size;
    return true;
}

fl_x8 fl_x8_bind(void *memory, uint32_t tokens, uint32_t cols) {
    size_t codes = 0, floats = 0;
    FL_ASSERT(part_sizes(tokens, cols, &codes, &floats));
    uint8_t *p = memory;
    return (fl_x8){.codes = (int8_t *)memory,
                   .scales = (float *)(void *)(p + codes),
                   .sums = (float *)(void *)(p + codes + floats),
                   .tokens = tokens,
                   .groups = cols / FL_X8_GROUP + (cols % FL_X8_GROUP != 0)};
}

fl_x8 fl_x8_slice(const fl_x8 *x, uint32_t begin, uint32_t end) {
    const size_t skip = (size_t)begin * x->groups;
    return (fl_x8){.codes = x->codes + skip * FL_X8_GROUP,
                   .scales = x->scales + skip,
                   .sums = x->sums + skip,
                   .tokens = end - begin,
                   .groups = x->groups};
}

static uint32_t abs_bits(float v) {
    uint32_t u;
    memcpy(&u, &v, sizeof(u));
    return u & 0x7fffffffu;
}

void fl_quantise_x8_ref(const float *x, uint32_t cols, const fl_x8 *ret, uint32_t token) {
    for (uint32_t g = 0; g < ret->groups; g++, x += FL_X8_GROUP) {
        const size_t at = (size_t)token * ret->groups + g;
        const uint32_t left = cols - g * FL_X8_GROUP;
        const uint32_t count = left < FL_X8_GROUP ? left : FL_X8_GROUP;
        int8_t *codes = ret->codes + at * FL_X8_GROUP;
        memset(codes, 0, FL_X8_GROUP);
        // Magnitudes compared as integers order infinities and NaNs above every number.
        uint32_t max = 0;
        for (uint32_t k = 0; k < count; k++) max = abs_bits(x[k]) > max ? abs_bits(x[k]) : max;
        float maxabs;
        memcpy(&maxabs, &max, sizeof(maxabs));
        if (max >= 0x7f800000u || maxabs < 0x1p-100f) {
            ret->scales[at] = ret->sums[at] = max >= 0x7f800000u ? NAN : 0.0f;
            continue;
        }
        const float inverse = 127.0f / maxabs;
        int32_t sum = 0;
        for (uint32_t k = 0; k < count; k++) {
            codes[k] = (int8_t)rintf(x[k] * inverse);
            sum += codes[k];
        }
        ret->scales[at] = maxabs / 127.0f;
        ret->sums[at] = ret->scales[at] * (float)sum;
    }
}
