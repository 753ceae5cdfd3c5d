"""Writes node/model/unicode_tables.c: ranges of letters, numbers and white space, from Python's
unicodedata. Run it again when Python brings a newer Unicode, and run the tokenizer's tests."""
import pathlib
import sys
import unicodedata

HEAD = """\
// unicode_tables.c: made by tools/gen_unicode.py from Unicode {version}; do not edit.
#include "node/model/unicode.h"

"""
# White_Space of PropList.txt, which `\\s` means; unicodedata does not carry the property.
SPACE = [*range(9, 14), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F,
         0x205F, 0x3000]


def ranges(points):
    out = []
    for p in points:
        if out and out[-1][1] == p - 1:
            out[-1][1] = p
        else:
            out.append([p, p])
    return out


def table(name, points):
    cells = [f"{{0x{a:x}, 0x{b:x}}}" for a, b in ranges(points)]
    lines = [", ".join(cells[i:i + 4]) for i in range(0, len(cells), 4)]
    body = ",\n    ".join(lines)
    return (f"const node_unicode_range node_unicode_{name}[] = {{\n    {body}}};\n"
            f"const uint32_t node_unicode_{name}_count = {len(cells)};\n")


def main(path):
    every = range(sys.maxunicode + 1)
    category = {p: unicodedata.category(chr(p))[0] for p in every}
    text = HEAD.format(version=unicodedata.unidata_version) + "\n".join([
        table("letters", [p for p in every if category[p] == "L"]),
        table("numbers", [p for p in every if category[p] == "N"]),
        table("spaces", SPACE)])
    pathlib.Path(path).write_text(text)


if __name__ == "__main__":
    main(sys.argv[1])
