// update.h: the payload formats of layers. A node sends a *delta* of one layer, quantised; the
// coordinator publishes the *state* of one layer, in float. Pure: bytes in, numbers out.
//
// Both are one vector of the layer's trained values in a fixed order: the B matrices of q, k, v, o,
// gate, up, down (row-major, [out][rank]), then the exit's norm gain when the layer has an exit.
//
// Delta, integers little-endian:
//   offset  size  field
//   0       4     magic         "FLU1"
//   4       1     encoding      1 = int16, 2 = int8
//   5       3     zero
//   8       4     layer
//   12      4     count         values, 1..FL_UPDATE_VALUES_MAX
//   16      8     base_version  version of this layer that the delta starts from
//   24      8     tokens        trained on
//   32      ...   blocks        of 256 values (the last may be shorter): f32 scale, then the codes
// Nothing follows the last block. A block's scale is finite and >= 0; with scale 0 all codes are 0.
// Codes lie in -32767..32767 or -127..127: the most negative code of the type is refused.
//
// The value of a code, to the same bits on every machine:
//   v     = (double)code * (double)scale          exact: 16 + 24 significant bits fit in 53
//   fixed = round_half_even(v * 2^32)             exact product (power of two), one rounding
// and |v| <= 64, so |fixed| <= 2^38. The aggregator's 128-bit sums cannot overflow from that; 2^-32
// is finer than an int16 code's step as long as the block's scale is above 2^-32, a delta of 1e-5.
//
// Layer state: "FLL1", layer u32, count u32, zero u32, version u64, then count f32 values.
#ifndef FL_PROTO_UPDATE_H
#define FL_PROTO_UPDATE_H

#include "common/status.h"

enum {
    FL_UPDATE_HEAD = 32,
    FL_UPDATE_BLOCK = 256,
    FL_UPDATE_VALUES_MAX = 4 << 20,
    FL_UPDATE_FIXED_BITS = 32,
    FL_UPDATE_ABS_MAX = 64, // |value|
    FL_LAYER_HEAD = 24,
};

typedef enum fl_update_encoding { FL_UPDATE_INT16 = 1, FL_UPDATE_INT8 = 2 } fl_update_encoding;

typedef struct fl_update_info {
    fl_update_encoding encoding;
    uint32_t layer;
    uint32_t count;
    uint64_t base_version;
    uint64_t tokens;
} fl_update_info;

// Bytes of an encoded delta; 0 when count or encoding is out of range.
size_t fl_update_size(uint32_t count, fl_update_encoding encoding);

// Quantises values[info->count] into out[fl_update_size()]. int16 rounds to nearest, ties to even;
// int8 rounds stochastically and without bias: up with the probability of the fraction, drawn from
// a counter generator keyed by `key`, so the same key gives the same bytes everywhere. The scale of
// a block is its largest magnitude / 32767 or / 127. When `residual` is not NULL,
// residual[i] = values[i] - the value the coordinator will read (error feedback); it may alias
// values.
//   FL_EARG    info is out of range or out_size differs from fl_update_size
//   FL_EFORMAT a value is not finite, or its magnitude is above FL_UPDATE_ABS_MAX
// On failure the content of out and residual is not specified.
fl_status fl_update_encode(const fl_update_info *info, const float *values, uint64_t key,
                           uint8_t *out, size_t out_size, float *residual,
                           fl_err *err) FL_NODISCARD;

// A validated delta: borrows the bytes it was opened from.
typedef struct fl_update {
    fl_update_info info;
    fl_bytes blocks;
} fl_update;

// Checks every byte of a hostile payload once: head, exact length, every scale and code. After
// FL_OK no later call can fail. *ret is written only on FL_OK.
//   FL_EFORMAT  not a delta, wrong length, scale NaN, infinite or negative, forbidden code
//   FL_ELIMIT   count or layer out of range, |value| above FL_UPDATE_ABS_MAX
fl_status fl_update_open(fl_bytes in, fl_update *ret, fl_err *err) FL_NODISCARD;

// Values first .. first + n - 1 as fixed-point numbers with FL_UPDATE_FIXED_BITS fraction bits.
// first + n <= info.count is the caller's contract (asserted). first may be any index.
void fl_update_fixed(const fl_update *u, uint32_t first, uint32_t n, int64_t *out);

// The same values in double (code * scale, exact), for norms and for the node's own bookkeeping.
void fl_update_values(const fl_update *u, uint32_t first, uint32_t n, double *out);

// Sum of squares in order of index, in double: bit-identical everywhere.
double fl_update_norm2(const fl_update *u);

typedef struct fl_layer {
    uint32_t layer;
    uint32_t count;
    uint64_t version; // >= 1
    fl_bytes data;    // count f32, little-endian, every one finite; borrows
} fl_layer;

size_t fl_layer_size(uint32_t count); // bytes of the encoded state; 0 when count is out of range
fl_status fl_layer_encode(uint32_t layer, uint64_t version, const float *values, uint32_t count,
                          uint8_t *out, size_t out_size, fl_err *err) FL_NODISCARD;
fl_status fl_layer_open(fl_bytes in, fl_layer *ret, fl_err *err) FL_NODISCARD;
void fl_layer_values(const fl_layer *l, uint32_t first, uint32_t n, float *out);

#endif
