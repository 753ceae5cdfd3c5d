#!/usr/bin/env python3
"""Held-out loss after the same number of tokens: fleetune beside PyTorch with PEFT LoRA.

peer_loss.py --model COMPRESSED --gguf PLAIN.gguf --text TEXT [--text TEXT ...] --results FILE
             [--python PYTHON] [--side ours|torch|both] [--lr ...] [--torch-lr ...]

Each text is cut in two by document: every tenth is held out until there are --held-tokens or so,
the rest is trained on. Both sides train on --steps steps of 4 x 256 tokens of the same documents
and are scored on the same windows of the same held-out documents. On each side the learning rate
that is best with seed 0 on the first text is taken, then seeds 1, 2, ... are run with it on every
text. Results are kept in --results, run by run; the script can be stopped and started again, begins
nothing new after --seconds, and a run of torch that is not finished goes on the next time.
"""
import argparse
import json
import pathlib
import statistics
import sys
import time

import measure

LENGTH, BATCH = 256, 4
MARK = "<|endoftext|>"
BYTES_A_TOKEN = 4  # about; only to size the held-out part


def cut(o: argparse.Namespace, text: str) -> tuple[pathlib.Path, pathlib.Path]:
    docs = [d for d in pathlib.Path(text).read_text().split(MARK) if d.strip()]
    held, train, size = [], [], 0
    for i, d in enumerate(docs):
        if i % 10 == 0 and size < o.held_tokens * BYTES_A_TOKEN:
            held.append(d.strip())
            size += len(d.encode())
        else:
            train.append(d.strip())
    folder = pathlib.Path(o.scratch, "peer_loss")
    folder.mkdir(exist_ok=True)
    stem = pathlib.Path(text).stem
    paths = folder / f"{stem}.train.txt", folder / f"{stem}.held.txt"
    for path, part in zip(paths, (train, held)):
        path.write_text(f"\n{MARK}\n".join(part) + f"\n{MARK}\n")
    return paths


class Results:
    def __init__(self, o: argparse.Namespace):
        self.file, self.end = pathlib.Path(o.results), time.monotonic() + o.seconds
        self.known = json.loads(self.file.read_text()) if self.file.exists() else {}

    def get(self, key: str, make) -> float | None:
        """The number of a run: known, made now, or None when there is no time for it."""
        if key not in self.known:
            if time.monotonic() > self.end:
                return None
            value = make(self.end - time.monotonic())
            if value is None:
                return None
            self.known[key] = value
            self.file.write_text(json.dumps(self.known, indent=1) + "\n")
            print(f"{key}: {value:.4f}", flush=True)
        return self.known[key]


def score(o: argparse.Namespace, model: str, held: pathlib.Path,
          adapter: pathlib.Path | None) -> float:
    more = ["--adapter", adapter] if adapter else []
    return measure.run([o.node, "eval", model, "--text", held, "--window", LENGTH, "--threads",
                        o.threads, "--json", *more]).last_json()["nll"]


def ours(o: argparse.Namespace, model: str, recipe: list[str], text: str, seed: int):
    def make(_: float) -> float:
        train, held = cut(o, text)
        if not recipe:
            return score(o, model, held, None)
        adapter = pathlib.Path(o.scratch, "peer_loss", "ours.adapter")
        measure.run([o.node, "tune", model, "--data", train, "--out", adapter, "--seed", seed,
                     "--threads", o.threads, "--json", *recipe])
        return score(o, model, held, adapter)
    return make


def torch(o: argparse.Namespace, lr: float, text: str, seed: int, steps: int):
    def make(seconds: float) -> float | None:
        train, held = cut(o, text)
        state = pathlib.Path(o.scratch, "peer_loss",
                             f"{pathlib.Path(text).stem}-{o.dtype}-{lr}-{seed}-{steps}.state")
        got = measure.run([o.python, measure.HERE / "peer_torch_loss.py", "--gguf", o.gguf,
                           "--train", train, "--held", held, "--state", state, "--lr", lr,
                           "--seed", seed,
                           "--steps", steps, "--dtype", o.dtype, "--threads", o.threads,
                           "--seconds", max(1, min(seconds, o.chunk))])
        return got.last_json().get("nll")
    return make


def recipes(o: argparse.Namespace) -> dict[str, list[str]]:
    """Ways of ours over the same tokens: schedules, windows, and steps of another size."""
    same = ["--steps", str(o.steps), "--sequence", str(LENGTH), "--micro-batches", str(BATCH)]
    small = ["--steps", str(o.steps * BATCH * 2), "--sequence", "128", "--micro-batches", "1"]
    all_ways = {"all layers": same, "window 15": [*same, "--window", "15"],
                "window 7": [*same, "--window", "7"],
                "cyclic": [*same, "--schedule", "cyclic"], "all layers, 1 x 128": small}
    return {k: v for k, v in all_ways.items() if not o.way or k in o.way}


def best_rate(r: Results, side: str, rates: list[float], make) -> float | None:
    """The rate with the lowest held-out loss with seed 0 on the first text."""
    got = {lr: r.get(f"{side} lr {lr:g} seed 0 search", make(lr)) for lr in rates}
    if any(v is None for v in got.values()):
        return None
    return min(got, key=got.get)


def main() -> None:
    p = measure.options(__doc__)
    p.add_argument("--model", action="append", required=True, help="ours; may be repeated")
    p.add_argument("--gguf", required=True, help="the plain model, for torch")
    p.add_argument("--text", action="append", required=True, help="may be repeated")
    p.add_argument("--results", required=True)
    p.add_argument("--python", default=sys.executable)
    p.add_argument("--side", choices=["ours", "torch", "both"], default="both")
    p.add_argument("--way", action="append", default=[], help="only these ways of ours")
    p.add_argument("--lr", type=float, nargs="+", default=[2.5e-3, 5e-3, 1e-2, 2e-2])
    p.add_argument("--torch-lr", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3, 8e-3])
    p.add_argument("--dtype", choices=["f32", "bf16"], default="bf16", help="torch trains in this")
    p.add_argument("--steps", type=int, default=40)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--held-tokens", type=int, default=6000)
    p.add_argument("--chunk", type=float, default=1e9,
                   help="seconds after which a run of torch is put aside until the next start")
    o = p.parse_args()
    r, table = Results(o), {}
    stems = {t: pathlib.Path(t).stem for t in o.text}

    def row(name: str, base: str, lr: float | None, make) -> None:
        if lr is None:
            return
        table[name] = {t: (base, lr, []) for t in o.text}
        for s in range(1, o.seeds + 1):  # a stop in the middle leaves all texts as far
            for t in o.text:
                key = f"{name} lr {lr:g} {stems[t]} seed {s}"
                table[name][t][2].append(r.get(key, make(lr, t, s)))

    if o.side != "ours":
        for t in o.text:
            r.get(f"torch base {stems[t]}", torch(o, 0, t, 0, 0))
        lr = best_rate(r, f"torch {o.dtype}", o.torch_lr,
                       lambda lr: torch(o, lr, o.text[0], 0, o.steps))
        row(f"torch {o.dtype}", "torch", lr, lambda lr, t, s: torch(o, lr, t, s, o.steps))
    for m in o.model if o.side != "torch" else ():
        stem = pathlib.Path(m).stem
        for t in o.text:
            r.get(f"{stem} base {stems[t]}", ours(o, m, [], t, 0))
        for way, recipe in recipes(o).items():
            lr = best_rate(r, f"{stem} {way}", o.lr, lambda lr: ours(
                o, m, [*recipe, "--lr", str(lr)], o.text[0], 0))
            row(f"{stem} {way}", stem, lr, lambda lr, t, s: ours(
                o, m, [*recipe, "--lr", str(lr)], t, s))

    print(f"\n| way, {o.steps * BATCH * LENGTH} tokens | text | learning rate | before | after, "
          f"mean of {o.seeds} seeds (range) | gain |\n| --- | --- | --- | --- | --- | --- |")
    for name, texts in table.items():
        for t, (base, lr, runs) in texts.items():
            before = r.known.get(f"{base} base {stems[t]}")
            runs = [v for v in runs if v is not None]
            if before is None or not runs:
                continue
            mean = statistics.mean(runs)
            lacking = "" if len(runs) == o.seeds else f", {len(runs)} of {o.seeds} seeds so far"
            print(f"| {name} | {stems[t]} | {lr:g} | {before:.4f} | {mean:.4f} ({min(runs):.4f} to "
                  f"{max(runs):.4f}{lacking}) | {before - mean:.4f} |")


if __name__ == "__main__":
    main()
