"""The aggregation rule once more, from docs/PROTOCOL.md and proto/update.h, in exact arithmetic.

Reads the deltas as nodes sent them and says which bits every published layer must have. Shares no
code with the coordinator: integers here have no width, so nothing can overflow or be rounded by
accident.
"""
import hashlib
import math
import struct
from fractions import Fraction

BLOCK = 256
ONE = 1 << 16


def digest(data):
    return hashlib.blake2b(data, digest_size=32).digest()


def read_delta(data):
    """(layer, base version, tokens, values as exact fractions of 2^-32, values in double)."""
    assert data[:4] == b"FLU1" and data[5:8] == b"\0\0\0", "not a delta"
    encoding = data[4]
    layer, count = struct.unpack_from("<II", data, 8)
    base, tokens = struct.unpack_from("<QQ", data, 16)
    width, letter = {1: (2, "h"), 2: (1, "b")}[encoding]
    fixed, real, at = [], [], 32
    for first in range(0, count, BLOCK):
        n = min(BLOCK, count - first)
        scale, = struct.unpack_from("<f", data, at)
        codes = struct.unpack_from(f"<{n}{letter}", data, at + 4)
        at += 4 + n * width
        step = Fraction(scale) * (1 << 32)
        for code in codes:
            fixed.append(round(step * code))  # round() of a fraction: half to even
            real.append(code * scale)         # 16 + 24 bits: exact in double
    assert at == len(data), "bytes left over"
    return layer, base, tokens, fixed, real


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
