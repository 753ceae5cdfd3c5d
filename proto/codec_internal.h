// codec_internal.h: what the files of the codec share. Nobody else includes it.
#ifndef FL_PROTO_CODEC_INTERNAL_H
#define FL_PROTO_CODEC_INTERNAL_H

#include "proto/codec.h"

struct ProtobufCMessage;

// The ranges of every field, for both directions; m->type is a known type.
fl_status fl_codec_check(const fl_msg *m, fl_err *err) FL_NODISCARD;

// From a parsed message of m->type to plain structs: presence, fixed sizes, texts, counts.
fl_status fl_codec_read(const struct ProtobufCMessage *pb, fl_arena *scratch, fl_msg *ret,
                        fl_err *err) FL_NODISCARD;

// From plain structs that passed the check to a message ready to pack, in `scratch`.
fl_status fl_codec_write(const fl_msg *m, fl_arena *scratch, struct ProtobufCMessage **ret,
                         fl_err *err) FL_NODISCARD;

#endif
