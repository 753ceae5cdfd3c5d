// Time is a heap of events; the network is what becomes of a frame on its way into it.
#include "sim/state.h"

#include <stdlib.h>
#include <string.h>

static bool before(const sim_event *a, const sim_event *b) {
    return a->at_ms != b->at_ms ? a->at_ms < b->at_ms : a->order < b->order;
}

void sim_push(sim_queue *q, sim_event ev) {
    if (q->count == q->room) {
        q->room = q->room == 0 ? 256 : 2 * q->room;
        q->heap = realloc(q->heap, q->room * sizeof(*q->heap));
        FL_ASSERT(q->heap != NULL);
    }
    ev.order = q->made++;
    size_t at = q->count++;
    for (; at > 0 && before(&ev, &q->heap[(at - 1) / 2]); at = (at - 1) / 2)
        q->heap[at] = q->heap[(at - 1) / 2];
    q->heap[at] = ev;
}

bool sim_pop(sim_queue *q, sim_event *ret) {
    if (q->count == 0) return false;
    *ret = q->heap[0];
    const sim_event last = q->heap[--q->count];
    size_t at = 0;
    for (;;) {
        size_t child = 2 * at + 1;
        if (child >= q->count) break;
        if (child + 1 < q->count && before(&q->heap[child + 1], &q->heap[child])) child++;
        if (!before(&q->heap[child], &last)) break;
        q->heap[at] = q->heap[child];
        at = child;
    }
    q->heap[at] = last;
    return true;
}

void sim_queue_done(sim_queue *q) {
    for (size_t i = 0; i < q->count; i++) free(q->heap[i].frame);
    free(q->heap);
    *q = (sim_queue){0};
}

static void deliver(sim *s, sim_node *n, sim_event_kind kind, fl_bytes frame, uint64_t at_ms) {
    uint8_t *copy = malloc(frame.size);
    FL_ASSERT(copy != NULL);
    memcpy(copy, frame.data, frame.size);
    sim_push(&s->queue, (sim_event){.at_ms = at_ms,
                                    .kind = kind,
                                    .node = n->index,
                                    .frame = copy,
                                    .size = (uint32_t)frame.size});
}

static void travel(sim *s, uint32_t node, sim_event_kind kind, fl_bytes frame) {
    sim_node *n = &s->nodes[node];
    const sim_path *p = &n->path;
    const bool calm = s->now_ms >= s->calm_ms;
    s->result.frames++;
    if (!calm && s->now_ms < p->cut_until_ms) return;
    if (!calm && sim_chance(&n->rng, p->loss)) return;
    const int copies = !calm && sim_chance(&n->rng, p->twice) ? 2 : 1;
    for (int i = 0; i < copies; i++) {
        uint64_t delay = p->delay_ms + sim_between(&n->rng, 0, p->jitter_ms);
        if (!calm && sim_chance(&n->rng, p->late)) delay += sim_between(&n->rng, 1000, 20000);
        deliver(s, n, kind, frame, s->now_ms + delay);
    }
}

void sim_send_to_node(sim *s, uint32_t node, fl_bytes frame) {
    travel(s, node, SIM_EV_TO_NODE, frame);
}

void sim_send_to_coordinator(sim *s, uint32_t node, fl_bytes frame) {
    travel(s, node, SIM_EV_TO_COORDINATOR, frame);
}
