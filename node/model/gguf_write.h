// gguf_write.h: writes a GGUF version 3 file front to back: metadata, tensor table, data.
//
// First every key and every tensor is declared, then the data is written in the order of the
// declarations, in pieces of any size; alignment is filled in. The first failure is remembered and
// makes every later call do nothing, so that callers may check once, at the commit. The file
// appears under its name only when it is complete.
#ifndef NODE_MODEL_GGUF_WRITE_H
#define NODE_MODEL_GGUF_WRITE_H

#include "node/model/gguf.h"

typedef struct node_gguf_writer node_gguf_writer;

// alignment: a power of two, 8..4096; written as `general.alignment`.
fl_status node_gguf_writer_open(const char *path, uint32_t alignment, node_gguf_writer **ret,
                                fl_err *err) FL_NODISCARD;

void node_gguf_write_u32(node_gguf_writer *w, const char *key, uint32_t value);
void node_gguf_write_f32(node_gguf_writer *w, const char *key, float value);
void node_gguf_write_bool(node_gguf_writer *w, const char *key, bool value);
void node_gguf_write_string(node_gguf_writer *w, const char *key, fl_bytes value);
void node_gguf_write_text(node_gguf_writer *w, const char *key, const char *value);
void node_gguf_write_u32s(node_gguf_writer *w, const char *key, const uint32_t *values,
                          size_t count);
void node_gguf_write_i32s(node_gguf_writer *w, const char *key, const int32_t *values,
                          size_t count);
void node_gguf_write_f32s(node_gguf_writer *w, const char *key, const float *values, size_t count);
void node_gguf_write_strings(node_gguf_writer *w, const char *key, const fl_bytes *values,
                             size_t count);
// A key of another file as it stands; `general.alignment` is left out, the writer has its own.
void node_gguf_write_key(node_gguf_writer *w, const node_gguf_key *key);

// Declares a tensor: dim[0] is the row length.
void node_gguf_write_tensor(node_gguf_writer *w, const char *name, uint32_t type, uint32_t dims,
                            const uint64_t *dim);
// The next bytes of data. Tensors follow each other in the order in which they were declared.
fl_status node_gguf_write_data(node_gguf_writer *w, fl_bytes bytes, fl_err *err) FL_NODISCARD;

// FL_ESTATE when data is missing. Takes the writer: *w is NULL afterwards, whatever happened.
fl_status node_gguf_writer_commit(node_gguf_writer **w, fl_err *err) FL_NODISCARD;
void node_gguf_writer_discard(node_gguf_writer *w); // NULL is fine

#endif
