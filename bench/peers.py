#!/usr/bin/env python3
"""Tuning speed of fleetune beside PyTorch + PEFT LoRA, in alternating runs on this machine.

bench/peers.py --model MODEL --data TEXT [--python PYTHON] [--runs N] [--threads N]

MODEL is a compressed model of SmolLM2-135M's shapes, TEXT what to tune on, PYTHON an interpreter that
has torch, transformers and peft. First the peer's best setting is looked for (float32 or bfloat16,
checkpointing or not, an allocator that keeps its pages or not); then the arms take turns, N times. A probe of this machine stands before and
after each turn: a turn whose probes differ by more than a fifth is thrown away and made again.
Medians, smallest and largest, and the ratio of each turn.
"""
import argparse
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
NODE = HERE.parent / "build/bin/fleetune-node"
STEPS = 6  # of 4 x 256 tokens

# glibc gives large blocks back to the system at once; for torch that means page faults in every step.
KEEP_PAGES = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296",
              "MALLOC_TOP_PAD_": "268435456"}


def run(command: list[str], env: dict[str, str] | None = None) -> dict:
    done = subprocess.run(command, check=True, capture_output=True, text=True,
                          env={**os.environ, **(env or {})})
    return json.loads(done.stdout.strip().splitlines()[-1])


def probe(threads: int) -> float:
    rates = run([str(NODE), "doctor", "--again", "--state", "/dev/shm/peers.state", "--json"])["rates"]
    return rates[min(threads, len(rates)) - 1]["packed_operations_per_second"]


def ours(o: argparse.Namespace, *more: str) -> dict:
    return run([str(NODE), "tune", o.model, "--data", o.data, "--out", "/dev/shm/peers.adapter",
                "--steps", str(STEPS), "--sequence", "256", "--micro-batches", "4", "--threads",
                str(o.threads), "--json", *more])


def torch(o: argparse.Namespace, setting: list[str]) -> dict:
    keep = KEEP_PAGES if "keep-pages" in setting else {}
    options = [s for s in setting if s != "keep-pages"]
    return run([o.python, str(HERE / "peer_torch.py"), "--threads", str(o.threads), *options], keep)


def best_setting(o: argparse.Namespace) -> list[str]:
    rates = {}
    for dtype, checkpoint, keep in itertools.product(
            ("f32", "bf16"), ([], ["--checkpoint"]), ([], ["keep-pages"])):
        setting = ["--dtype", dtype, *checkpoint, *keep]
        got = torch(o, setting + ["--steps", "2"])
        rates[tuple(setting)] = got["tokens_per_second"]
        print(f"  torch {got['torch']} {' '.join(setting)}: {got['tokens_per_second']:.1f} "
              f"tokens/s, {got['peak_rss_bytes'] / 1e6:.0f} MB")
    return list(max(rates, key=rates.get))


def turn(o: argparse.Namespace, setting: list[str]) -> dict | None:
    before = probe(o.threads)
    got = {"last": ours(o), "cyclic": ours(o, "--schedule", "cyclic"), "torch": torch(o, setting)}
    after = probe(o.threads)
    steady = abs(before - after) <= 0.2 * max(before, after)
    print(f"  probe {before / 1e9:.0f} and {after / 1e9:.0f} GOP/s: " + ", ".join(
        f"{name} {g['tokens_per_second']:.1f}" for name, g in got.items()) +
        ("" if steady else " (thrown away)"))
    return got if steady else None


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--model", required=True)
    p.add_argument("--data", required=True)
    p.add_argument("--python", default=sys.executable)
    p.add_argument("--runs", type=int, default=5)
    p.add_argument("--threads", type=int, default=2)
    o = p.parse_args()
    setting = best_setting(o)
    turns: list[dict] = []
    for _ in range(3 * o.runs):
        got = turn(o, setting)
        turns += [got] if got else []
        if len(turns) == o.runs:
            break
    if len(turns) < o.runs:
        sys.exit("this machine is not steady enough to measure on")
    print(f"| arm | tokens/s, median of {o.runs} (range) | ratio to torch (range) | peak RSS |")
    print("| --- | --- | --- | --- |")
    for name in ("last", "cyclic", "torch"):
        rates = [t[name]["tokens_per_second"] for t in turns]
        ratios = [t[name]["tokens_per_second"] / t["torch"]["tokens_per_second"] for t in turns]
        label = f"torch, PEFT, {' '.join(setting)}" if name == "torch" else f"fleetune, {name}"
        print(f"| {label} | {statistics.median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f}) | "
              f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | "
              f"{max(t[name]['peak_rss_bytes'] for t in turns) / 1e6:.0f} MB |")


if __name__ == "__main__":
    main()
