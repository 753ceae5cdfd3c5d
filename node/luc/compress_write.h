// compress_write.h: the container of a compressed model, written front to back.
#ifndef NODE_LUC_COMPRESS_WRITE_H
#define NODE_LUC_COMPRESS_WRITE_H

#include "node/luc/compress.h"

typedef struct node_luc_writer node_luc_writer;

// Writes the metadata, the vectors as they are, and embedding and head packed; the layers follow in
// order. `result` has the layers' shapes and bits.
fl_status node_luc_writer_open(const char *path, const node_engine *engine, node_quantise *quantise,
                               const node_model *model, const node_compress_opts *opts,
                               const node_compress_result *result, node_luc_writer **ret,
                               fl_err *err) FL_NODISCARD;
fl_status node_luc_write_layer(node_luc_writer *writer, const node_layer *layer,
                               fl_err *err) FL_NODISCARD;
// Takes the writer, whatever happens. ret_bytes: size of the file.
fl_status node_luc_writer_commit(node_luc_writer **writer, uint64_t *ret_bytes,
                                 fl_err *err) FL_NODISCARD;
void node_luc_writer_discard(node_luc_writer *writer); // NULL is fine

#endif
