#!/usr/bin/env python3
"""Rewrites a GGUF file with fewer layers, or with every tensor in float32.

cut_gguf.py IN OUT [--layers N] [--f32]

Needs gguf from PyPI. For bench/growth.py (models of different depth) and bench/bits.py.
"""
import argparse

import gguf
import numpy as np

SKIPPED = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")


def copy_fields(reader: gguf.GGUFReader, writer: gguf.GGUFWriter, layers: int) -> None:
    for name, f in reader.fields.items():
        if name.startswith(SKIPPED):
            continue
        value = f.contents()
        if name.endswith(".block_count"):
            value = layers
        kind = f.types[0]
        writer.add_key_value(name, value, kind, f.types[-1] if kind == gguf.GGUFValueType.ARRAY
                             else None)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("source")
    p.add_argument("target")
    p.add_argument("--layers", type=int, default=0, help="keep the first N layers; 0: all")
    p.add_argument("--f32", action="store_true")
    o = p.parse_args()
    reader = gguf.GGUFReader(o.source)
    architecture = reader.fields["general.architecture"].contents()
    have = int(reader.fields[f"{architecture}.block_count"].contents())
    layers = o.layers or have
    if layers > have:
        raise SystemExit(f"{o.source} has {have} layers only")
    writer = gguf.GGUFWriter(o.target, architecture)
    copy_fields(reader, writer, layers)
    for t in reader.tensors:
        part = t.name.split(".")
        if part[0] == "blk" and int(part[1]) >= layers:
            continue
        if o.f32:
            writer.add_tensor(t.name, gguf.dequantize(t.data, t.tensor_type).astype(np.float32))
        else:
            writer.add_tensor(t.name, t.data, raw_dtype=t.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
