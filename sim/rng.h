// rng.h: one stream of random numbers of a simulation: a key and a count (common/rng.h).
#ifndef SIM_RNG_H
#define SIM_RNG_H

#include "common/rng.h"

typedef struct sim_rng {
    uint64_t key, count;
} sim_rng;

static inline uint64_t sim_draw(sim_rng *r) {
    return fl_rng_u64(r->key, r->count++);
}
// Uniform in [lo, hi], lo <= hi.
static inline uint64_t sim_between(sim_rng *r, uint64_t lo, uint64_t hi) {
    return lo + fl_rng_below(r->key, r->count++, hi - lo + 1);
}
static inline bool sim_chance(sim_rng *r, double p) {
    return (double)(sim_draw(r) >> 11) * 0x1p-53 < p;
}
void sim_fill(sim_rng *r, void *out, size_t size);

#endif
