#include "coordinator/round_weight.h"

// floor(sqrt(n)) by the digit method: no floating point, so nothing to round.
static uint64_t isqrt(uint64_t n) {
    uint64_t root = 0;
    for (uint64_t bit = (uint64_t)1 << 31; bit != 0; bit >>= 1) {
        const uint64_t trial = root | bit;
        if (trial * trial <= n) root = trial;
    }
    return root;
}

uint32_t coord_staleness(uint64_t tau) {
    if (tau >= (uint64_t)1 << 34) return 0;
    // floor(2^17 / sqrt(n)) = isqrt(floor(2^34 / n)); half of it, rounded, is what we want.
    const uint64_t doubled = isqrt(((uint64_t)1 << 34) / (1 + tau));
    return (uint32_t)((doubled + 1) / 2);
}

uint64_t coord_weight(uint64_t tokens, uint64_t tau) {
    if (tokens > COORD_TOKENS_MAX) tokens = COORD_TOKENS_MAX;
    return tokens * coord_staleness(tau);
}
