#include "common/rng.h"

static uint64_t mix(uint64_t z) {
    z += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

uint64_t fl_rng_u64(uint64_t key, uint64_t counter) {
    return mix(mix(key) ^ (counter * 0xd1b54a32d192ed03u));
}

uint64_t fl_rng_key(uint64_t seed, uint64_t a, uint64_t b) {
    return fl_rng_u64(fl_rng_u64(seed, a), b);
}

float fl_rng_unit(uint64_t key, uint64_t counter) {
    return (float)(fl_rng_u64(key, counter) >> 40) * 0x1p-24f;
}

uint64_t fl_rng_below(uint64_t key, uint64_t counter, uint64_t n) {
    FL_ASSERT(n > 0);
    // Multiply and keep the high half (Lemire 2019); the bias is below n / 2^64.
    return (uint64_t)(((unsigned __int128)fl_rng_u64(key, counter) * n) >> 64);
}
