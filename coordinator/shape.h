// shape.h: what the coordinator must know of a model file: how many layers it has, and how many
// values an update of each of them holds. It never computes with the model; but a node must not be
// the one that says how large a layer is.
#ifndef COORD_SHAPE_H
#define COORD_SHAPE_H

#include "common/status.h"

enum { COORD_SHAPE_LAYERS_MAX = 256 };

typedef struct coord_shape {
    uint32_t layers;
    uint32_t hidden, head_size; // 0: the file does not say
    uint32_t heads[COORD_SHAPE_LAYERS_MAX], kv_heads[COORD_SHAPE_LAYERS_MAX];
    uint32_t ffn[COORD_SHAPE_LAYERS_MAX];
} coord_shape;

// From the metadata of a GGUF file (version 2 or 3): the keys of its architecture, and those of
// node/model/container.h where structured pruning changed a layer. Reads hostile bytes.
//   FL_EFORMAT  not GGUF, cut off anywhere, also in the tensors' data, or no number of layers
//   FL_ELIMIT   too many keys, tensors or layers
fl_status coord_shape_read(fl_bytes file, coord_shape *ret, fl_err *err) FL_NODISCARD;

// Values of a layer's update (proto/update.h): the B matrices of seven linears at this rank, and
// the gain of an exit. 0: the file does not say enough, or the layer is absurdly large.
uint32_t coord_shape_values(const coord_shape *s, uint32_t layer, uint32_t rank, bool has_exit);

#endif
