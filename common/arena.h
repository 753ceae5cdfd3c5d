// arena.h: one block of memory, handed out front to back, given back all at once.
//
// The owner takes the block once (malloc, mmap or a static array) after a *_plan() call has said
// how large it must be. Nothing allocated from an arena is freed on its own. An arena is not
// thread-safe: one arena, one thread.
#ifndef FL_COMMON_ARENA_H
#define FL_COMMON_ARENA_H

#include "common/base.h"

typedef struct fl_arena {
    uint8_t *base;
    size_t size; // bytes in the block
    size_t used; // bytes handed out, padding included; also the mark to rewind to
    size_t peak; // the largest `used` ever was: what a plan must have predicted
} fl_arena;

void fl_arena_init(fl_arena *a, void *block, size_t size);

// Zeroed memory for count objects, or NULL when the block is spent or count * size overflows.
void *fl_arena_alloc(fl_arena *a, size_t count, size_t size, size_t align);
#define FL_ARENA_NEW(a, T, count) ((T *)fl_arena_alloc((a), (count), sizeof(T), _Alignof(T)))

// Gives back everything taken since `mark` (an earlier a->used).
void fl_arena_rewind(fl_arena *a, size_t mark);

// An arena without memory, to count with: run the same code that binds and read `peak`. Returned
// pointers are NULL, so the code may only store them. base is NULL and size SIZE_MAX.
void fl_arena_init_counting(fl_arena *a);
bool fl_arena_counting(const fl_arena *a);

#endif
