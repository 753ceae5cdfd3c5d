"""The aggregation rule once more, from docs/PROTOCOL.md and proto/update.h, in exact arithmetic.

Reads the deltas as nodes sent them and says which bits every published layer must have. Shares no
code with the coordinator: integers here have no width, so nothing can overflow or be rounded by
accident.
"""
import hashlib
import math
import struct
from fractions import Fraction

BLOCK, PAGE = 256, 4096
ONE = 1 << 16


def digest(data):
    return hashlib.blake2b(data, digest_size=32).digest()


def read_dense(data, encoding, count):
    """(code, scale) of every value."""
    out, at = [], 32
    for first in range(0, count, BLOCK):
        n = min(BLOCK, count - first)
        scale, = struct.unpack_from("<f", data, at)
        at += 4
        if encoding == 3:  # two codes in a byte
            codes = [(data[at + i // 2] >> (4 * (i % 2)) & 15) for i in range(n)]
            codes = [c - 16 if c >= 8 else c for c in codes]
            at += (n + 1) // 2
        else:
            width, letter = {1: (2, "h"), 2: (1, "b")}[encoding]
            codes = struct.unpack_from(f"<{n}{letter}", data, at)
            at += n * width
        out += [(code, scale) for code in codes]
    assert at == len(data), "bytes left over"
    return out


def read_sparse(data, encoding, count):
    """The same of a delta that names its values; what it does not name is 0."""
    kept, scale = struct.unpack_from("<If", data, 32)
    pages = -(-count // PAGE)
    sizes = struct.unpack_from(f"<{pages}H", data, 40)
    out, at, width = [(0, 0.0)] * count, 40 + 2 * pages, {4: 8, 5: 4}[encoding]
    found = 0
    for page, size in enumerate(sizes):
        if size == 0:
            continue
        head, = struct.unpack_from("<H", data, at)
        n, r = head & 8191, (0, 1, 2, 3, 4, 5, 6, 8)[head >> 13]
        bits = int.from_bytes(data[at + 2:at + size], "little")
        bit, place, places = 0, 0, []
        for _ in range(n):
            while not bits >> bit & 1:
                bit, place = bit + 1, place + (1 << r)
            place += bits >> (bit + 1) & ((1 << r) - 1)
            bit += 1 + r
            places.append(place)
            place += 1
        blocks = sorted({p // BLOCK for p in places})
        steps = at + 2 + (bit + 7) // 8
        codes = int.from_bytes(data[steps + len(blocks):at + size], "little")
        for i, p in enumerate(places):
            b = data[steps + blocks.index(p // BLOCK)]
            code = codes >> (i * width) & ((1 << width) - 1)
            sign, size_of = code >> (width - 1), (code & ((1 << (width - 1)) - 1)) + 1
            step = scale * ((16 - b % 8) / 2**(4 + b // 8))  # exact: 24 + 5 bits
            out[page * PAGE + p] = (-size_of if sign else size_of, step)
        found += n
        at += size
    assert found == kept and not any(data[at:]), "not what the head says"
    return out


def read_delta(data):
    """(layer, base version, tokens, values as exact fractions of 2^-32, values in double)."""
    assert data[:4] == b"FLU1" and data[5:8] == b"\0\0\0", "not a delta"
    layer, count = struct.unpack_from("<II", data, 8)
    base, tokens = struct.unpack_from("<QQ", data, 16)
    values = (read_dense if data[4] <= 3 else read_sparse)(data, data[4], count)
    # round() of a fraction: half to even. A product in double is exact: at most 40 bits.
    fixed = [round(Fraction(step) * (1 << 32) * code) if code else 0 for code, step in values]
    return layer, base, tokens, fixed, [code * step for code, step in values]


def staleness(tau):
    """round(2^16 / sqrt(1 + tau)) by integers alone, as the coordinator documents it."""
    return (math.isqrt((1 << 34) // (1 + tau)) + 1) // 2


def norm(real):
    total = 0.0
    for v in real:
        total += v * v
    return math.sqrt(total)


def clip_of(value, recent, clip_factor, norms_min):
    """The factor in units of 2^-16; `recent`: norms admitted before it, oldest first."""
    last = sorted(recent[-64:])
    median = last[(len(last) - 1) // 2] if last else 0.0
    if len(last) < norms_min or median <= 0.0 or value <= clip_factor * median:
        return ONE
    return math.floor(clip_factor * median / value * ONE)


def next_layer(theta, updates):
    """updates: (fixed values, weight, clip). FedAvg with server rate 1."""
    total = sum(weight for _, weight, _ in updates)
    out = []
    for i, old in enumerate(theta):
        s = sum(fixed[i] * weight * clip for fixed, weight, clip in updates)
        mean = float(s) / float(total) * (2.0**-32 / 65536.0)
        out.append(struct.unpack("<f", struct.pack("<f", old + 1.0 * mean))[0])
    return out


def encode_layer(layer, version, theta):
    return b"FLL1" + struct.pack("<IIIQ", layer, len(theta), 0, version) + struct.pack(
        f"<{len(theta)}f", *theta)
