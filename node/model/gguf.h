// gguf.h: GGUF version 2 and 3 files, read in place from bytes that may be hostile.
//
// Everything is a view into the mapping; nothing is copied but two tables of names. After opening,
// every view lies inside the bytes, every size has been computed without wrapping, and no accessor
// can fail in another way than "not there" or "of another type".
//   Source    the GGUF specification of ggml (docs/gguf.md): header, metadata, tensor table, data.
#ifndef NODE_MODEL_GGUF_H
#define NODE_MODEL_GGUF_H

#include "common/checked.h"
#include "common/status.h"

enum {
    NODE_GGUF_KEYS_MAX = 1 << 16,
    NODE_GGUF_TENSORS_MAX = 1 << 16,
    NODE_GGUF_KEY_MAX = 1024, // bytes of a metadata key
    NODE_GGUF_NAME_MAX = 64,  // bytes of a tensor's name: the specification's own limit
    NODE_GGUF_DIMS_MAX = 4,
    NODE_GGUF_ALIGNMENT_MIN = 8,
    NODE_GGUF_ALIGNMENT_MAX = 4096,
    NODE_GGUF_ALIGNMENT = 32, // when `general.alignment` is absent
};

typedef enum node_gguf_type {
    NODE_GGUF_U8,
    NODE_GGUF_I8,
    NODE_GGUF_U16,
    NODE_GGUF_I16,
    NODE_GGUF_U32,
    NODE_GGUF_I32,
    NODE_GGUF_F32,
    NODE_GGUF_BOOL,
    NODE_GGUF_STRING,
    NODE_GGUF_ARRAY,
    NODE_GGUF_U64,
    NODE_GGUF_I64,
    NODE_GGUF_F64,
    NODE_GGUF_TYPES
} node_gguf_type;

// One metadata value. bytes: the scalar (little-endian), the string's text without a terminator,
// or the array's elements; an array of strings keeps its encoding and is walked with
// node_gguf_next_string.
typedef struct node_gguf_value {
    node_gguf_type type;
    node_gguf_type item; // element type when `type` is NODE_GGUF_ARRAY
    uint64_t count;      // elements when `type` is NODE_GGUF_ARRAY
    fl_bytes bytes;
} node_gguf_value;

typedef struct node_gguf_key {
    fl_bytes name;
    node_gguf_value value;
} node_gguf_key;

typedef struct node_gguf_tensor {
    fl_bytes name;
    uint32_t type;                    // ggml type id, one that node_ggml_type knows
    uint32_t dims;                    // 1..4
    uint64_t dim[NODE_GGUF_DIMS_MAX]; // dim[0] is the row length; unused ones are 1
    uint64_t offset;                  // from the start of the data section
    fl_bytes data;
} node_gguf_tensor;

// ggml's types: how many elements a block has and how many bytes. NULL when the id is not known.
typedef struct node_ggml_info {
    const char *name;
    uint32_t block;
    uint32_t size;
} node_ggml_info;
const node_ggml_info *node_ggml_type(uint32_t id);

typedef struct node_gguf node_gguf;

// Maps the file. FL_ENOENT, FL_EIO; FL_EFORMAT or FL_ELIMIT names the key or tensor and what is
// wrong with it; FL_EUNSUPPORTED names the version or type that is not known.
fl_status node_gguf_open(const char *path, node_gguf **ret, fl_err *err) FL_NODISCARD;
// The same over bytes that the caller keeps alive, 8-byte aligned or better.
fl_status node_gguf_open_bytes(fl_bytes bytes, node_gguf **ret, fl_err *err) FL_NODISCARD;
void node_gguf_close(node_gguf *g); // NULL is fine

uint32_t node_gguf_version(const node_gguf *g);
uint32_t node_gguf_alignment(const node_gguf *g);
fl_bytes node_gguf_bytes(const node_gguf *g); // the whole file
int node_gguf_fd(const node_gguf *g);         // of the mapped file; -1 over bytes
size_t node_gguf_key_count(const node_gguf *g);
size_t node_gguf_tensor_count(const node_gguf *g);
const node_gguf_key *node_gguf_key_at(const node_gguf *g, size_t index); // in the file's order
const node_gguf_tensor *node_gguf_tensor_at(const node_gguf *g, size_t index);

// NULL when there is none of that name.
const node_gguf_value *node_gguf_find(const node_gguf *g, const char *key);
const node_gguf_tensor *node_gguf_find_tensor(const node_gguf *g, const char *name);

// True, and *ret written, when the key is there with a type whose value fits: any unsigned or
// non-negative signed integer for u32 and u64, F32 or F64 for f32.
bool node_gguf_get_u32(const node_gguf *g, const char *key, uint32_t *ret);
bool node_gguf_get_u64(const node_gguf *g, const char *key, uint64_t *ret);
bool node_gguf_get_f32(const node_gguf *g, const char *key, float *ret);
bool node_gguf_get_bool(const node_gguf *g, const char *key, bool *ret);
bool node_gguf_get_string(const node_gguf *g, const char *key, fl_bytes *ret);
// An array of exactly this element type.
bool node_gguf_get_array(const node_gguf *g, const char *key, node_gguf_type item,
                         node_gguf_value *ret);

// Walks an array of strings: fl_reader r = {.in = value.bytes}, then `count` calls.
fl_bytes node_gguf_next_string(fl_reader *r);

#endif
