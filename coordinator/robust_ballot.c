#include "coordinator/aggregate.h"
#include "coordinator/robust.h"

#include <stdlib.h>
#include <string.h>

#define WEIGHT_MAX ((uint64_t)1 << 40)

static int by_node_and_base(const void *a, const void *b) {
    const coord_ballot_row *x = a, *y = b;
    if (x->node != y->node) return x->node < y->node ? -1 : 1;
    return (x->base > y->base) - (x->base < y->base);
}

void coord_ballot_sort(coord_ballot *b) {
    qsort(b->rows, b->row_count, sizeof(*b->rows), by_node_and_base);
    b->voice_count = 0;
    for (uint32_t r = 0; r < b->row_count; r++) {
        const bool is_new = r == 0 || b->rows[r].node != b->rows[r - 1].node;
        if (is_new) {
            b->first[b->voice_count] = r;
            b->voices[b->voice_count++] = (coord_voice){0};
        }
        // Sending more often must not make a node louder than one full update is.
        coord_voice *v = &b->voices[b->voice_count - 1];
        v->weight += b->rows[r].weight;
        if (v->weight > WEIGHT_MAX) v->weight = WEIGHT_MAX;
    }
    b->first[b->voice_count] = b->row_count;
}

uint32_t coord_ballot_voice(const coord_ballot *b, int64_t node) {
    for (uint32_t v = 0; v < b->voice_count; v++)
        if (b->rows[b->first[v]].node == node) return v;
    return COORD_NO_ROOT;
}

// Nearest, halves away from zero.
static int64_t divided(coord_wide a, coord_wide b) {
    return (int64_t)((a >= 0 ? a + b / 2 : a - b / 2) / b);
}

fl_status coord_ballot_read(void *ballot, uint32_t v, size_t first, size_t n, int64_t *out,
                            fl_err *err) {
    const coord_ballot *b = ballot;
    const uint32_t begin = b->first[v], end = b->first[v + 1];
    FL_ASSERT(v < b->voice_count && n <= COORD_TILE);
    if (end - begin == 1 && b->rows[begin].clip == COORD_ONE) // nearly always
        return b->read(b->ctx, b->rows[begin].source, first, n, out, err);
    coord_wide sum[COORD_TILE];
    int64_t values[COORD_TILE];
    coord_wide weight = 0;
    memset(sum, 0, n * sizeof(*sum));
    for (uint32_t r = begin; r < end; r++) {
        const coord_ballot_row *row = &b->rows[r];
        FL_TRY(b->read(b->ctx, row->source, first, n, values, err));
        const coord_wide factor = (coord_wide)row->weight * row->clip;
        for (size_t i = 0; i < n; i++) sum[i] += factor * values[i];
        weight += row->weight;
    }
    for (size_t i = 0; i < n; i++) out[i] = divided(sum[i], weight * COORD_ONE);
    return FL_OK;
}
