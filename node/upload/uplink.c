#include "node/upload/uplink.h"

// The clock counts in milliseconds: nothing shorter is seen.
static const double tick_s = 0.001, weight = 0.25;

static double follow(double before, double now) {
    return before == 0.0 ? now : before + weight * (now - before);
}

void node_uplink_small(node_uplink *u, uint64_t ms) {
    const double s = (double)ms * 1e-3;
    u->rtt_s = follow(u->rtt_s, s > tick_s ? s : tick_s);
}

void node_uplink_chunk(node_uplink *u, uint32_t size, uint64_t ms) {
    const double shortest = u->rtt_s / 2 > tick_s ? u->rtt_s / 2 : tick_s;
    const double s = (double)ms * 1e-3 - u->rtt_s;
    if (s > shortest) {
        u->bytes_per_s = follow(u->bytes_per_s, size / s);
    } else if (size / shortest > u->bytes_per_s) {
        u->bytes_per_s = size / shortest;
    }
}
