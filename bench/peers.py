#!/usr/bin/env python3
"""Tuning speed of fleetune beside PyTorch + PEFT LoRA, in alternating runs on this machine.

peers.py --model MODEL [--model MODEL ...] --data TEXT [--python PYTHON] [--options FILE]

Each MODEL has SmolLM2-135M's shapes, TEXT is what to tune on, PYTHON an interpreter that has torch,
transformers and peft. Steps are 4 x 256 tokens. First the peer's best setting is looked for:
float32 or bfloat16, activations kept or checkpointed, an allocator that keeps its pages, float32
products rounded to bfloat16 inside, one thread fewer; then the arms take turns. Ours are the last
window, the four exits in turn and a window of all layers, without the prefix cache, and the last
window again from the second epoch of a short text on, with the cache.
"""
import json
import pathlib
import sys

import measure

SHAPE = ("--sequence", "256", "--micro-batches", "4")
WINDOW = ("--window", "7")
LAYERS = "30"
EPOCH_BYTES, EPOCH_STEPS, EPOCHS_STEPS = 24000, 10, 40  # text of an epoch of at most 10 steps

# glibc gives large blocks back to the system at once; for torch: page faults in every step.
KEEP_PAGES = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296",
              "MALLOC_TOP_PAD_": "268435456"}
SETTINGS = (("--dtype", "f32"), ("--dtype", "bf16"), ("--dtype", "f32", "keep-pages"),
            ("--dtype", "bf16", "keep-pages"), ("--dtype", "f32", "--fast-f32", "keep-pages"),
            ("--dtype", "bf16", "--checkpoint"), ("--dtype", "bf16", "--checkpoint", "keep-pages"),
            ("--dtype", "f32", "--checkpoint", "keep-pages"))


def torch(o, setting: tuple, steps: int, threads: int) -> dict:
    env = KEEP_PAGES if "keep-pages" in setting else {}
    options = [s for s in setting if s != "keep-pages"]
    got = measure.run([o.python, measure.HERE / "peer_torch.py", "--threads", threads, "--steps",
                       steps, *options], env).last_json()
    return {"tokens/s": got["tokens_per_second"], "MB": got["peak_rss_bytes"] / 1e6,
            "MB less libraries": (got["peak_rss_bytes"] - got["loaded_rss_bytes"]) / 1e6,
            "torch": got["torch"]}


def best_setting(o) -> dict:
    tried = []
    for setting in SETTINGS:
        tried.append((torch(o, setting, 2, o.threads), setting, o.threads))
        got = tried[-1][0]
        print(f"  torch {got['torch']} {' '.join(setting)}: {got['tokens/s']:.1f} tokens/s, "
              f"{got['MB']:.0f} MB", flush=True)
    best = max(tried, key=lambda t: t[0]["tokens/s"])
    if o.threads > 1:
        fewer = torch(o, best[1], 2, o.threads - 1), best[1], o.threads - 1
        print(f"  with {fewer[2]} threads {fewer[0]['tokens/s']:.1f} tokens/s", flush=True)
        best = max(best, fewer, key=lambda t: t[0]["tokens/s"])
    return {"setting": best[1], "threads": best[2]}


def main() -> None:
    p = measure.options(__doc__)
    p.add_argument("--model", action="append", required=True, help="may be repeated")
    p.add_argument("--data", required=True)
    p.add_argument("--python", default=sys.executable)
    p.add_argument("--steps", type=int, default=6, help="of a run (default: %(default)s)")
    p.add_argument("--options", default="", metavar="FILE",
                   help="keep the peer's best setting here; take it from it when it exists")
    o = p.parse_args()
    kept = pathlib.Path(o.options) if o.options else None
    best = json.loads(kept.read_text()) if kept and kept.exists() else best_setting(o)
    if kept:
        kept.write_text(json.dumps(best) + "\n")
    name = f"torch, PEFT, {' '.join(best['setting'])}"
    arms, part = {}, pathlib.Path(o.scratch, "peers-epoch.txt")
    text = pathlib.Path(o.data).read_bytes()[:EPOCH_BYTES]
    part.write_bytes(text.rpartition(b"<|endoftext|>")[0] or text)
    for m in o.model:
        stem = pathlib.Path(m).stem
        for way in ("last", "cyclic"):
            arms[f"{stem}, {way}, no cache"] = lambda m=m, way=way: measure.tune(
                o, m, o.data, *SHAPE, "--steps", o.steps, "--schedule", way, *WINDOW,
                "--prefix-cache", 0)
        arms[f"{stem}, all layers, no cache"] = lambda m=m: measure.tune(
            o, m, o.data, *SHAPE, "--steps", o.steps, "--window", LAYERS, "--prefix-cache", 0)
        arms[f"{stem}, last, cached epochs"] = lambda m=m: measure.tune(
            o, m, part, *SHAPE, *WINDOW, "--steps", EPOCHS_STEPS, skip=EPOCH_STEPS)

    def peer() -> dict:
        got = torch(o, tuple(best["setting"]), o.steps - 2, best["threads"])
        return {k: v for k, v in got.items() if k != "torch"}
    arms[name] = peer
    turns = measure.Turns(o, arms).make()
    measure.table(turns, "tokens/s", f"tokens/s, {o.threads} threads", name)
    measure.table(turns, "MB", "peak resident, MB", name)
    measure.table(turns, "MB less libraries", "peak resident less what the libraries took, MB")


if __name__ == "__main__":
    main()
