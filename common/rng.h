// rng.h: random numbers that are a function of (key, counter): the same on every machine, in any
// order, with no state to save. Not for secrets (see crypto.h).
#ifndef FL_COMMON_RNG_H
#define FL_COMMON_RNG_H

#include "common/base.h"

// 64 well-mixed bits; key and counter may be any values. Source: the finaliser of SplitMix64
// (Steele, Lea, Flood 2014, section 4), applied twice over key and counter.
uint64_t fl_rng_u64(uint64_t key, uint64_t counter);
uint64_t fl_rng_key(uint64_t seed, uint64_t a, uint64_t b); // derives an independent key
float fl_rng_unit(uint64_t key, uint64_t counter);          // uniform in [0, 1), 24 bits, exact
uint64_t fl_rng_below(uint64_t key, uint64_t counter, uint64_t n); // uniform in [0, n), n > 0

#endif
