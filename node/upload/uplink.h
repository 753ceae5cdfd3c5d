// uplink.h: how fast updates leave this node, from the round trips of its own messages. Pure.
#ifndef NODE_UPLOAD_UPLINK_H
#define NODE_UPLOAD_UPLINK_H

#include "common/base.h"

typedef struct node_uplink {
    double rtt_s;       // of a small message and its answer; 0: not measured
    double bytes_per_s; // of chunks, without the round trip; 0: not measured
} node_uplink;

// A small request was answered after ms. Only of requests that were sent once: of one that was
// repeated nobody knows which one the answer is to (Karn, Partridge 1987).
void node_uplink_small(node_uplink *u, uint64_t ms);
// A chunk of so many bytes was. One that takes hardly longer than a small message only says that
// the link is at least so fast; it never lowers what slower chunks have shown.
void node_uplink_chunk(node_uplink *u, uint32_t size, uint64_t ms);

#endif
