#include "common/checked.h"
#include "proto/update_impl.h"

#include <math.h>
#include <string.h>

// Positions as Rice codes of the gaps, a parameter for each page: on a layer of SmolLM2-135M with
// 5 % kept they take 1.5 KB, where a bitmap takes 5.2 KB, a byte for each place 2.2 KB and varint
// gaps 2.1 KB (bench_update); r = 0 is the bitmap, so dense pages need no second form.
enum { RICE_COUNT = 8, KEPT_BITS = 13, RICE_MAX = 8, SCALE_FINEST = 255 };
static const uint8_t rice_of[RICE_COUNT] = {0, 1, 2, 3, 4, 5, 6, RICE_MAX};

static uint32_t bits_of(fl_update_encoding e) {
    return e == FL_UPDATE_SPARSE8 ? 8 : 4;
}

static uint32_t pages_of(uint32_t count) {
    return (count + FL_UPDATE_PAGE - 1) / FL_UPDATE_PAGE;
}

static uint32_t page_count(uint32_t count, uint32_t page) {
    const uint32_t left = count - page * FL_UPDATE_PAGE;
    return left < FL_UPDATE_PAGE ? left : FL_UPDATE_PAGE;
}

static size_t bytes_of(uint64_t bits) {
    return (size_t)((bits + 7) / 8);
}

// Padme (Nikitin, Barman, Lueks, Underwood, Hubaux, Ford, PETS 2019): of a size of e + 1 bits the
// lowest e - log2(e) - 1 are 0, rounded up. At most 12 % more, less the larger it is.
static size_t bucket(size_t size) {
    unsigned e = 0, s = 1;
    while (size >> (e + 1) != 0) e++;
    while (e >> s != 0) s++;
    const size_t mask = e > s ? ((size_t)1 << (e - s)) - 1 : 0;
    return (size + mask) & ~mask;
}

static size_t fixed_part(uint32_t count) {
    return FL_UPDATE_HEAD + FL_SPARSE_HEAD + (size_t)2 * pages_of(count);
}

size_t fl_sparse_size_min(uint32_t count) {
    return bucket(fixed_part(count));
}

// r = 0 takes at most a bit for each place of the page, r = 8 at most 9 for each value and 16.
size_t fl_sparse_size_max(uint32_t count, uint32_t bits, uint32_t kept) {
    const uint64_t pages = pages_of(count), sparse = 9 * (uint64_t)kept + 16 * pages;
    const uint64_t blocks = (uint64_t)FL_PAGE_BLOCKS * pages;
    const uint64_t places = sparse < count ? sparse : count;
    return bucket(fixed_part(count) + pages * (2 + 1 + 1) + bytes_of(places) +
                  (size_t)(kept < blocks ? kept : blocks) + bytes_of((uint64_t)kept * bits));
}

size_t fl_sparse_size_about(uint32_t count, uint32_t bits, uint32_t kept) {
    if (kept == 0) return fl_sparse_size_min(count);
    const double n = count, k = kept;
    double least = n;
    for (unsigned i = 1; i < RICE_COUNT; i++) {
        const double part = ldexp(1.0, -rice_of[i]), zeros = (n - k) * part - k * (1.0 - part) / 2;
        const double cost = k * (1.0 + rice_of[i]) + (zeros > 0.0 ? zeros : 0.0);
        if (cost < least) least = cost;
    }
    const uint32_t pages = pages_of(count);
    const double all = (double)count / FL_UPDATE_BLOCK + 1.0, blocks = all < k ? all : k;
    const size_t size =
        fixed_part(count) + (size_t)(least / 8 + blocks) + bytes_of((uint64_t)kept * bits);
    return bucket(size + (size_t)pages * 3);
}

// ---- what is kept

static uint64_t size_of(int64_t v) {
    return (uint64_t)(v < 0 ? -v : v);
}

typedef struct choice {
    uint64_t least; // every larger magnitude is kept,
    uint32_t equal; // and the first `equal` that are this large
} choice;

// The keep-th largest magnitude, ten bits of it at a time from the top: no memory, no order of
// comparisons that could differ between machines. Zeros are never kept.
static choice choose(const int64_t *values, uint32_t count, uint32_t keep) {
    enum { STEP = 10, TOP = 4 * STEP };
    uint64_t known = 0;
    uint32_t left = keep;
    for (int shift = TOP - STEP; shift >= 0; shift -= STEP) {
        uint32_t seen[1 << STEP] = {0};
        for (uint32_t i = 0; i < count; i++) {
            const uint64_t m = size_of(values[i]);
            if (m >> (shift + STEP) == known >> (shift + STEP))
                seen[m >> shift & ((1 << STEP) - 1)]++;
        }
        uint32_t digit = (1 << STEP) - 1;
        while (digit > 0 && seen[digit] < left) left -= seen[digit--];
        known |= (uint64_t)digit << shift;
    }
    return known == 0 ? (choice){1, UINT32_MAX} : (choice){known, left};
}

static bool taken(choice *c, int64_t v) {
    const uint64_t m = size_of(v);
    if (m > c->least) return true;
    if (m < c->least || c->equal == 0) return false;
    c->equal--;
    return true;
}

// ---- scales: a byte says how far a block's step lies below the layer's; exact in double.

static double step_of(float scale, uint32_t code) {
    return (double)scale * (double)(16 - code % 8) * ldexp(1.0, -4 - (int)(code / 8));
}

// The finest step of which `max` reach the largest value of the block.
static uint32_t scale_for(float scale, double largest, uint32_t max) {
    uint32_t code = 0;
    while (code < SCALE_FINEST && step_of(scale, code + 1) * max >= largest) code++;
    return code;
}

// ---- bits

typedef struct bits {
    uint8_t *out;
    size_t at; // in bits
} bits;

static void put_bits(bits *b, uint32_t value, uint32_t n) {
    for (uint32_t i = 0; i < n; i++, b->at++) {
        if (b->at % 8 == 0) b->out[b->at / 8] = 0;
        b->out[b->at / 8] |= (uint8_t)((value >> i & 1) << (b->at % 8));
    }
}

typedef struct draft {
    uint32_t kept, blocks;
    uint16_t at[FL_UPDATE_PAGE];
    uint8_t code[FL_UPDATE_PAGE]; // sign in bit 7
    uint8_t scale[FL_PAGE_BLOCKS];
} draft;

static uint32_t best_rice(const draft *d) {
    uint32_t best = 0;
    uint64_t least = UINT64_MAX;
    for (uint32_t r = 0; r < RICE_COUNT; r++) {
        uint64_t cost = (uint64_t)d->kept * (1u + rice_of[r]);
        for (uint32_t i = 0, next = 0; i < d->kept; next = d->at[i++] + 1u)
            cost += (d->at[i] - next) >> rice_of[r];
        if (cost < least) least = cost, best = r;
    }
    return best;
}

static size_t write_page(const draft *d, uint32_t width, uint8_t *out) {
    if (d->kept == 0) return 0;
    const uint32_t rice = best_rice(d), r = rice_of[rice];
    fl_put_u16(out, (uint16_t)(d->kept | rice << KEPT_BITS));
    bits b = {out + 2, 0};
    for (uint32_t i = 0, next = 0; i < d->kept; next = d->at[i++] + 1u) {
        const uint32_t gap = d->at[i] - next;
        for (uint32_t zeros = gap >> r; zeros > 0; zeros--) put_bits(&b, 0, 1);
        put_bits(&b, 1, 1);
        put_bits(&b, gap, r);
    }
    uint8_t *p = out + 2 + bytes_of(b.at);
    memcpy(p, d->scale, d->blocks);
    p += d->blocks;
    b = (bits){p, 0};
    for (uint32_t i = 0; i < d->kept; i++) {
        put_bits(&b, d->code[i], width - 1);
        put_bits(&b, d->code[i] >> 7, 1);
    }
    return (size_t)(p - out) + bytes_of(b.at);
}

// Rounds what is chosen of one block; its values that do not become 0 are named.
static void draft_block(const int64_t *values, const uint16_t *chosen, uint32_t n, float scale,
                        uint32_t max, uint64_t key, uint64_t first, draft *d) {
    uint64_t largest = 0;
    for (uint32_t i = 0; i < n; i++) {
        const uint64_t m = size_of(values[chosen[i]]);
        if (m > largest) largest = m;
    }
    if (largest == 0) return;
    const uint32_t code = scale_for(scale, (double)largest * 0x1p-32, max), before = d->kept;
    const double step = step_of(scale, code);
    for (uint32_t i = 0; i < n; i++) {
        const int64_t v = values[chosen[i]];
        const double q = (double)size_of(v) * 0x1p-32 / step;
        const double up = floor(q + fl_update_uniform(key, first + chosen[i]));
        const uint32_t m = up > max ? max : (uint32_t)up;
        if (m == 0) continue;
        d->at[d->kept] = chosen[i];
        d->code[d->kept++] = (uint8_t)((m - 1) | (v < 0 ? 0x80u : 0u));
    }
    if (d->kept > before) d->scale[d->blocks++] = (uint8_t)code;
}

static void draft_page(const int64_t *values, uint32_t n, choice *c, float scale, uint32_t max,
                       uint64_t key, uint64_t first, draft *d) {
    d->kept = d->blocks = 0;
    for (uint32_t block = 0; block < n; block += FL_UPDATE_BLOCK) {
        uint16_t chosen[FL_UPDATE_BLOCK];
        uint32_t k = 0;
        for (uint32_t i = block; i < n && i < block + FL_UPDATE_BLOCK; i++) {
            if (taken(c, values[i])) chosen[k++] = (uint16_t)i;
        }
        draft_block(values, chosen, k, scale, max, key, first, d);
    }
}

// Of the layer: rounded down, so that no value that is read lies beyond the largest.
static float layer_scale(const int64_t *values, uint32_t count, uint32_t max) {
    uint64_t largest = 0;
    for (uint32_t i = 0; i < count; i++) {
        const uint64_t m = size_of(values[i]);
        if (m > largest) largest = m;
    }
    const double real = (double)largest * 0x1p-32;
    const float scale = (float)(real / max);
    return (double)scale * max > real ? nextafterf(scale, 0.0f) : scale;
}

size_t fl_sparse_encode(const fl_update_info *info, uint32_t keep, const int64_t *values,
                        uint64_t key, uint8_t *out) {
    const uint32_t width = bits_of(info->encoding), max = 1u << (width - 1);
    const uint32_t pages = pages_of(info->count);
    const float scale = layer_scale(values, info->count, max);
    choice c = choose(values, info->count, keep);
    uint8_t *sizes = out + FL_SPARSE_HEAD, *p = sizes + (size_t)2 * pages;
    uint32_t kept = 0;
    for (uint32_t page = 0; page < pages; page++) {
        const uint32_t first = page * FL_UPDATE_PAGE, n = page_count(info->count, page);
        draft d;
        draft_page(values + first, n, &c, scale, max, key, first, &d);
        const size_t size = write_page(&d, width, p);
        fl_put_u16(sizes + (size_t)2 * page, (uint16_t)size);
        kept += d.kept;
        p += size;
    }
    fl_put_u32(out, kept);
    fl_put_f32(out + 4, kept == 0 ? 0.0f : scale);
    const size_t used = (size_t)(p - out), all = bucket(FL_UPDATE_HEAD + used) - FL_UPDATE_HEAD;
    memset(p, 0, all - used);
    return all;
}

// ---- reading

static bool get_bit(fl_bytes in, size_t *at, uint32_t *ret) {
    if (*at / 8 >= in.size) return false;
    *ret = in.data[*at / 8] >> (*at % 8) & 1;
    (*at)++;
    return true;
}

// The next place, or false when the bits end or lead out of the page.
static bool read_gap(fl_bytes in, size_t *at, uint32_t r, uint32_t n, uint32_t *next) {
    uint32_t place = *next, bit = 0;
    while (place < n) {
        if (!get_bit(in, at, &bit)) return false;
        if (bit == 1) break;
        place += 1u << r;
    }
    if (bit != 1) return false;
    for (uint32_t i = 0; i < r; i++) {
        if (!get_bit(in, at, &bit)) return false;
        place += bit << i;
    }
    *next = place;
    return place < n;
}

// Bits that fill up a byte are 0, so that the same numbers have one spelling.
static bool fill_is_zero(fl_bytes in, size_t at) {
    return at % 8 == 0 || in.data[at / 8] >> (at % 8) == 0;
}

static const char *parse_page(fl_bytes in, uint32_t n, uint32_t width, float scale,
                              fl_sparse_page *ret) {
    if (in.size < 2) return "is too short";
    const uint32_t head = fl_get_u16(in.data), r = rice_of[head >> KEPT_BITS];
    const fl_bytes rest = {in.data + 2, in.size - 2};
    ret->kept = head & ((1u << KEPT_BITS) - 1);
    ret->bits = width;
    if (ret->kept == 0 || ret->kept > n) return "has an impossible count";
    size_t at = 0, blocks = 0;
    bool here[FL_PAGE_BLOCKS] = {false};
    for (uint32_t i = 0, next = 0; i < ret->kept; i++, next++) {
        if (!read_gap(rest, &at, r, n, &next)) return "names a place that it does not have";
        ret->at[i] = (uint16_t)next;
        blocks += !here[next / FL_UPDATE_BLOCK];
        here[next / FL_UPDATE_BLOCK] = true;
    }
    const size_t gaps = bytes_of(at), codes = bytes_of((uint64_t)ret->kept * width);
    if (rest.size != gaps + blocks + codes) return "has another length";
    ret->codes = rest.data + gaps + blocks;
    if (!fill_is_zero(rest, at) ||
        !fill_is_zero((fl_bytes){ret->codes, codes}, (size_t)ret->kept * width))
        return "has bits set that are to be 0";
    for (uint32_t b = 0, k = 0; b < FL_PAGE_BLOCKS; b++)
        ret->step[b] = here[b] ? step_of(scale, rest.data[gaps + k++]) : 0.0;
    return NULL;
}

double fl_sparse_value(const fl_sparse_page *p, uint32_t i) {
    const uint32_t byte = p->codes[p->bits == 8 ? i : i / 2];
    const uint32_t code = p->bits == 8 ? byte : i % 2 == 0 ? byte & 15 : byte >> 4;
    const uint32_t sign = 1u << (p->bits - 1);
    const double v = (double)((code & (sign - 1)) + 1) * p->step[p->at[i] / FL_UPDATE_BLOCK];
    return code & sign ? -v : v;
}

fl_status fl_sparse_check(fl_bytes in, const fl_update_info *info, size_t *ret_used, fl_err *err) {
    const uint32_t pages = pages_of(info->count);
    if (in.size < FL_SPARSE_HEAD + (size_t)2 * pages)
        return FL_FAIL(err, FL_EFORMAT, "%zu bytes for %u values", in.size, info->count);
    const uint32_t kept = fl_get_u32(in.data);
    const float scale = fl_get_f32(in.data + 4);
    if (!isfinite(scale) || signbit(scale) || (kept == 0) != (scale == 0.0f))
        return FL_FAIL(err, FL_EFORMAT, "the layer's scale does not fit");
    const uint8_t *sizes = in.data + FL_SPARSE_HEAD;
    size_t at = FL_SPARSE_HEAD + (size_t)2 * pages;
    uint32_t found = 0;
    for (uint32_t page = 0; page < pages; page++) {
        const size_t size = fl_get_u16(sizes + (size_t)2 * page);
        if (size == 0) continue;
        if (size > in.size - at) return FL_FAIL(err, FL_EFORMAT, "page %u is cut short", page);
        fl_sparse_page p;
        const char *why = parse_page((fl_bytes){in.data + at, size}, page_count(info->count, page),
                                     bits_of(info->encoding), scale, &p);
        if (why != NULL) return FL_FAIL(err, FL_EFORMAT, "page %u %s", page, why);
        for (uint32_t i = 0; i < p.kept; i++) {
            if (fabs(fl_sparse_value(&p, i)) > FL_UPDATE_ABS_MAX)
                return FL_FAIL(err, FL_ELIMIT, "page %u: a value is above %d", page,
                               FL_UPDATE_ABS_MAX);
        }
        found += p.kept;
        at += size;
    }
    if (found != kept) return FL_FAIL(err, FL_EFORMAT, "%u values instead of %u", found, kept);
    if (bucket(FL_UPDATE_HEAD + at) != FL_UPDATE_HEAD + in.size)
        return FL_FAIL(err, FL_EFORMAT, "%zu bytes after the last value", in.size - at);
    *ret_used = at;
    for (; at < in.size; at++) {
        if (in.data[at] != 0) return FL_FAIL(err, FL_EFORMAT, "the padding is not zeros");
    }
    return FL_OK;
}

void fl_sparse_page_read(const fl_update *u, uint32_t page, fl_sparse_page *ret) {
    const uint32_t pages = pages_of(u->info.count);
    const uint8_t *sizes = u->blocks.data + FL_SPARSE_HEAD, *p = sizes + (size_t)2 * pages;
    for (uint32_t i = 0; i < page; i++) p += fl_get_u16(sizes + (size_t)2 * i);
    const size_t size = fl_get_u16(sizes + (size_t)2 * page);
    ret->kept = 0;
    if (size == 0) return;
    const char *why =
        parse_page((fl_bytes){p, size}, page_count(u->info.count, page),
                   bits_of(u->info.encoding), fl_get_f32(u->blocks.data + 4), ret);
    FL_ASSERT(why == NULL); // it was checked when it was opened
}
