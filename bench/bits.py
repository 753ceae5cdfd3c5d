#!/usr/bin/env python3
"""Rates by the bits and the sparsity of the weights: tuning, prefill and decode, in turns.

bits.py --data TEXT --model FILE [--model FILE ...] [--base FILE] [--ratio A:B ...]

Every model is tuned (4 x 256 tokens a step) and benched (prefill of 512, decode of 128 tokens) in
every turn. --ratio A:B prints how many times faster the file with stem A is than that with stem B,
turn by turn: 2 bits to 4, pruned to whole, 4 bits to float32. A float32 file is made with
bench/cut_gguf.py --f32.
"""
import pathlib

import measure

STEPS = 6


def arm(o, model: str):
    def once() -> dict:
        rates = measure.bench(o, model, o.threads)
        tuned = measure.tune(o, model, o.data, "--steps", STEPS, "--sequence", 256,
                             "--micro-batches", 4, "--window", 7, "--prefix-cache", 0)
        return {"tune": tuned["tokens/s"], "prefill": rates["prefill"], "decode": rates["decode"],
                "MB": tuned["MB"]}
    return once


def main() -> None:
    p = measure.options(__doc__)
    p.add_argument("--data", required=True)
    p.add_argument("--model", action="append", required=True, help="may be repeated")
    p.add_argument("--base", default="", help="stem that ratios are to (default: the first)")
    p.add_argument("--ratio", action="append", default=[], metavar="A:B", help="may be repeated")
    o = p.parse_args()
    arms = {pathlib.Path(m).stem: arm(o, m) for m in o.model}
    base = o.base or next(iter(arms))
    turns = measure.Turns(o, arms).make()
    for key in ("tune", "prefill", "decode"):
        measure.table(turns, key, f"tokens/s, {o.threads} threads", base)
    measure.table(turns, "MB", "peak resident while tuning")
    for pair in o.ratio:
        a, b = pair.split(":")
        print(f"\n{a} to {b}, median of {len(turns)} (range): " + ", ".join(
            f"{k} {measure.spread([t[a][k] / t[b][k] for t in turns], 2)}"
            for k in ("tune", "prefill", "decode")))


if __name__ == "__main__":
    main()
