// round_weight.h: what an update weighs, in integers. Pure.
#ifndef COORD_ROUND_WEIGHT_H
#define COORD_ROUND_WEIGHT_H

#include "common/base.h"

#define COORD_TOKENS_MAX ((uint64_t)1 << 24) // an update counts for no more tokens than this
#define COORD_ONE        (1u << 16)          // 1.0 as a weight's or a clip's fixed point

// round(2^16 / sqrt(1 + tau)), exactly: what an update tau layer versions behind still weighs.
// Source: Nguyen et al., Federated Learning with Buffered Asynchronous Aggregation, section 5.
uint32_t coord_staleness(uint64_t tau);

// tokens (clipped to COORD_TOKENS_MAX) * staleness: the weight of one update.
uint64_t coord_weight(uint64_t tokens, uint64_t tau);

#endif
