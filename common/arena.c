#include "common/arena.h"

#include <string.h>

void fl_arena_init(fl_arena *a, void *block, size_t size) {
    FL_ASSERT(block != NULL || size == 0);
    *a = (fl_arena){.base = block, .size = size};
}

void fl_arena_init_counting(fl_arena *a) {
    *a = (fl_arena){.size = SIZE_MAX};
}

bool fl_arena_counting(const fl_arena *a) {
    return a->base == NULL && a->size == SIZE_MAX;
}

void *fl_arena_alloc(fl_arena *a, size_t count, size_t size, size_t align) {
    FL_ASSERT(align != 0 && (align & (align - 1)) == 0);
    FL_ASSERT(a->used <= a->size);
    size_t bytes;
    if (__builtin_mul_overflow(count, size, &bytes)) return NULL;
    const size_t pad = (size_t)(-((uintptr_t)a->base + a->used) & (align - 1));
    const size_t left = a->size - a->used;
    if (pad > left || bytes > left - pad) return NULL;
    a->used += pad + bytes;
    if (a->used > a->peak) a->peak = a->used;
    if (a->base == NULL) return NULL; // counting, or an empty block asked for nothing
    void *p = a->base + (a->used - bytes);
    memset(p, 0, bytes);
    return p;
}

void fl_arena_rewind(fl_arena *a, size_t mark) {
    FL_ASSERT(mark <= a->used);
    a->used = mark;
}
