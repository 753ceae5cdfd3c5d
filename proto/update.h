// update.h: the payload formats of layers. A node sends a *delta* of one layer, quantised; the
// coordinator publishes the *state* of one layer, in float. Pure: bytes in, numbers out.
//
// Both are one vector of the layer's trained values in a fixed order: the B matrices of q, k, v, o,
// gate, up, down (row-major, [out][rank]), then the exit's norm gain when the layer has an exit.
//
// Delta, integers little-endian:
//   offset  size  field
//   0       4     magic         "FLU1"
//   4       1     encoding      1 = int16, 2 = int8, 3 = int4, 4 = sparse8, 5 = sparse4
//   5       3     zero
//   8       4     layer
//   12      4     count         values, 1..FL_UPDATE_VALUES_MAX
//   16      8     base_version  version of this layer that the delta starts from
//   24      8     tokens        trained on
//   32      ...   dense: blocks of 256 values (the last may be shorter): f32 scale, then the codes
// Nothing follows the last block. A block's scale is finite and >= 0; with scale 0 all codes are 0.
// Codes lie in -32767..32767, -127..127 or -7..7: the most negative code of the type is refused.
// int4 codes are two in a byte, the first in the low half; a half that is left over is 0.
//
// A sparse delta names only the values that are not 0 (k largest of a layer, error feedback at the
// node for the rest):
//   32      4     kept          values named, 0..count
//   36      4     f32 scale S   > 0 and finite; 0 when kept is 0
//   40      2*P   page sizes    of each page of 4096 values in bytes; 0: nothing of it is named
//   ...           pages         one after another, then zeros up to the padded size
// A page, in bits from the low end of each byte, each part begun at a byte and ended with zeros:
//   u16           kept here, 1..4096, and in the top 3 bits which Rice parameter r of {0..6, 8}
//   gaps          for each value in order, the values skipped since the last one: gap >> r zeros, a
//                 one, then the r low bits. r = 0 is a bitmap; the encoder takes the shortest.
//   scales        a byte b for each block of 256 that has one: s = S * (16 - b % 8) * 2^-(4 + b/8)
//   codes         of 8 or 4 bits: sign in the top bit, magnitude - 1 below: +-1..128 or +-1..8
// The size is padded to a bucket (Padme: Nikitin et al., PETS 2019), so that it does not tell how
// much was named: at most 12 % more, 2 % on average at 3 KB. A dense size tells nothing but the
// layer.
//
// The value of a code, to the same bits on every machine:
//   v     = (double)code * (double)scale          exact: at most 16 + 24 significant bits, or
//                                                 8 + 5 + 24, of 53
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
    FL_UPDATE_PAGE = 4096, // values of a page of a sparse delta
    FL_UPDATE_ENCODINGS = 5,
    FL_LAYER_HEAD = 24,
};

typedef enum fl_update_encoding {
    FL_UPDATE_INT16 = 1,
    FL_UPDATE_INT8 = 2,
    FL_UPDATE_INT4 = 3,
    FL_UPDATE_SPARSE8 = 4,
    FL_UPDATE_SPARSE4 = 5,
} fl_update_encoding;

typedef struct fl_update_info {
    fl_update_encoding encoding;
    uint32_t layer;
    uint32_t count;
    uint64_t base_version;
    uint64_t tokens;
} fl_update_info;

const char *fl_update_encoding_name(fl_update_encoding encoding); // "sparse4", "unknown"

// Bytes of an encoded dense delta; 0 when count or encoding is out of range, or it is sparse.
size_t fl_update_size(uint32_t count, fl_update_encoding encoding);
// The most bytes that `kept` values of a layer take; dense encodings always take them. 0: as above.
size_t fl_update_size_max(uint32_t count, fl_update_encoding encoding, uint32_t kept);
// About what they take, for planning; `kept` spread evenly is the worst case of a Rice code.
size_t fl_update_size_about(uint32_t count, fl_update_encoding encoding, uint32_t kept);
// Can a delta of that many values, in some encoding, have this size? For a first look.
bool fl_update_size_fits(uint32_t count, uint64_t size);

// Quantises values[info->count], dense, into out[fl_update_size()]. int16 rounds to nearest, ties
// to even; the others round stochastically and without bias: up with the probability of the
// fraction, drawn from a counter generator keyed by `key`, so the same key gives the same bytes
// everywhere. The scale of a block is its largest magnitude / 32767, / 127 or / 7. When `residual`
// is not NULL, residual[i] = values[i] - the value the coordinator will read; it may alias values.
//   FL_EARG    info is out of range or out_size differs from fl_update_size
//   FL_EFORMAT a value is not finite, or its magnitude is above FL_UPDATE_ABS_MAX
// On failure the content of out and residual is not specified.
fl_status fl_update_encode(const fl_update_info *info, const float *values, uint64_t key,
                           uint8_t *out, size_t out_size, float *residual,
                           fl_err *err) FL_NODISCARD;

// The same for every encoding, of values in units of 2^-FL_UPDATE_FIXED_BITS: what a node carries
// on (node/upload) is then exact, because the coordinator's reading is in these units too. A sparse
// delta takes the `keep` largest magnitudes, the first of equal ones; one that is rounded to 0 is
// not named. out_size >= fl_update_size_max(count, encoding, keep); *ret_size are used.
fl_status fl_update_encode_fixed(const fl_update_info *info, uint32_t keep, const int64_t *values,
                                 uint64_t key, uint8_t *out, size_t out_size, size_t *ret_size,
                                 fl_err *err) FL_NODISCARD;

// A validated delta: borrows the bytes it was opened from.
typedef struct fl_update {
    fl_update_info info;
    fl_bytes blocks; // what follows the head, without the padding
} fl_update;

// Checks every byte of a hostile payload once: head, exact length, every scale and code. After
// FL_OK no later call can fail. *ret is written only on FL_OK.
//   FL_EFORMAT  not a delta, wrong length, scale NaN, infinite or negative, forbidden code, a place
//               out of its page, bits or bytes set that are to be 0
//   FL_ELIMIT   count or layer out of range, |value| above FL_UPDATE_ABS_MAX
//   FL_EUNSUPPORTED  an encoding that this version does not know
fl_status fl_update_open(fl_bytes in, fl_update *ret, fl_err *err) FL_NODISCARD;

// Values first .. first + n - 1 as fixed-point numbers with FL_UPDATE_FIXED_BITS fraction bits.
// first + n <= info.count is the caller's contract (asserted). first may be any index; a sparse
// delta reads whole pages, so ranges that begin and end at pages are the cheap ones.
void fl_update_fixed(const fl_update *u, uint32_t first, uint32_t n, int64_t *out);

// The same values in double (code * scale, exact), for norms and for the node's own bookkeeping.
void fl_update_values(const fl_update *u, uint32_t first, uint32_t n, double *out);

// Sum of squares in order of index, in double: bit-identical everywhere.
double fl_update_norm2(const fl_update *u);

// Values that are not 0 in its codes: what was kept of a sparse delta, all of a dense one.
uint32_t fl_update_kept(const fl_update *u);

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
