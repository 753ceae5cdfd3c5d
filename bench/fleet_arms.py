#!/usr/bin/env python3
"""Held-out loss, bytes and time of whole fleets that differ in some options.

fleet_arms.py --model COMPRESSED --text TEXT [--text TEXT ...] --arm "NAME: OPTIONS" [--arm ...]

Every arm is a fleet of real processes on this machine: a coordinator, and for each TEXT a node that
learns from it. OPTIONS go to `fleetune-coordinator init`; what follows `--node` there goes to
`fleetune-node run` of every node, what follows `--node N` to that of the N-th (from 0). Arms run
with the same texts and seeds; the first is the base of the ratios. What is scored is the adapter
that a node ends with, on the documents of its own text that no node trained on. --json keeps the
runs; a later start goes on from them.

  fleet_arms.py --model luc4.gguf --text legal.txt --text recipes.txt \\
      --arm "dense: --encoding int16" --arm "thrifty: --encoding int8" --seeds 3
"""
import argparse
import json
import math
import pathlib
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}


class Arm:
    def __init__(self, text: str):
        name, _, options = text.partition(":")
        self.name, self.init, self.every, self.one = name.strip(), [], [], {}
        to = self.init
        words = shlex.split(options)
        while words:
            word = words.pop(0)
            if word != "--node":
                to.append(word)
            elif words and words[0].isdigit():
                to = self.one.setdefault(int(words.pop(0)), [])
            else:
                to = self.every


class Fleet:
    """The processes of one arm; they end with it."""

    def __init__(self, o: argparse.Namespace, arm: Arm, seed: int, folder: pathlib.Path):
        self.o, self.arm, self.seed, self.folder = o, arm, seed, folder
        self.coordinator, self.nodes = None, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for child in [*self.nodes, self.coordinator]:
            if child is not None and child.poll() is None:
                child.send_signal(signal.SIGTERM)
                child.wait()

    def tell(self, program: str, *words) -> str:
        done = subprocess.run([str(pathlib.Path(self.o.bin, program)), *map(str, words)],
                              capture_output=True, text=True, check=False)
        if done.returncode != 0:
            sys.exit(f"{program} {words[0]} ended with {done.returncode}: {done.stderr[-2000:]}")
        return done.stdout

    def start(self, program: str, log: str, *words) -> subprocess.Popen:
        with open(self.folder / log, "wb") as out:
            return subprocess.Popen([str(pathlib.Path(self.o.bin, program)), *map(str, words)],
                                    stdin=subprocess.DEVNULL, stdout=out, stderr=out)

    def state(self, node: int) -> pathlib.Path:
        return self.folder / f"node{node}"

    def run(self) -> float:
        """Seconds from the first node's start to the last round's end."""
        server, texts = self.folder / "coordinator", self.o.text
        self.tell("fleetune-coordinator", "init", server, "--model", self.o.model, "--listen",
                  "tcp://127.0.0.1:*", "--rounds", self.o.rounds, "--steps", self.o.steps, "--seed",
                  self.seed, "--min-updates", max(1, len(texts) // 2), *self.arm.init)
        self.coordinator = self.start("fleetune-coordinator", "coordinator.log", "run", server)
        while "listening" not in (self.folder / "coordinator.log").read_text():
            if self.coordinator.poll() is not None:
                sys.exit((self.folder / "coordinator.log").read_text())
            time.sleep(0.05)
        said = self.tell("fleetune-coordinator", "token", server, "--uses", len(texts),
                         "--auto-approve")
        url = next(w for w in said.split() if w.startswith("fleetune://"))
        for i, text in enumerate(texts):
            self.tell("fleetune-node", "join", url, "--name", f"{i}-{pathlib.Path(text).stem}",
                      "--state", self.state(i))
        begun = time.monotonic()
        for i, text in enumerate(texts):
            self.nodes.append(self.start(
                "fleetune-node", f"node{i}.log", "run", "--state", self.state(i), "--data", text,
                "--threads", 1, *self.arm.every, *self.arm.one.get(i, [])))
        while any(child.poll() is None for child in self.nodes):
            if time.monotonic() - begun > self.o.seconds:
                sys.exit(f"{self.arm.name} took more than {self.o.seconds:.0f} s: {self.folder}")
            time.sleep(0.1)
        return time.monotonic() - begun

    def loss(self, node: int, adapter: pathlib.Path | None) -> float:
        more = ["--adapter", adapter] if adapter else []
        said = self.tell("fleetune-node", "eval", self.o.model, "--text", self.o.text[node],
                         "--part", "held", "--tokens", self.o.tokens, "--json", *more)
        return json.loads(said.strip().splitlines()[-1])["nll"]

    def result(self, seconds: float) -> dict:
        nodes = range(len(self.o.text))
        status = [json.loads((self.state(i) / "status.json").read_text()) for i in nodes]
        verify = self.tell("fleetune-coordinator", "verify", self.folder / "coordinator")
        if "0 problems" not in verify:
            sys.exit(verify)
        return {"loss": [self.loss(i, self.state(i) / "adapter") for i in nodes],
                "up": sum(s["bytes_up"] for s in status),
                "down": sum(s["bytes_down"] for s in status),
                "MB": max(s["peak_rss_bytes"] for s in status) / 1e6, "seconds": seconds}


def run(o: argparse.Namespace, arm: Arm, seed: int) -> dict:
    folder = pathlib.Path(o.scratch, f"fleet-{arm.name.replace(' ', '-')}-{seed}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with Fleet(o, arm, seed, folder) as fleet:
        got = fleet.result(fleet.run())
    shutil.rmtree(folder)
    return got


def interval(values: list[float]) -> float:
    if len(values) < 2:
        return math.nan
    return T95.get(len(values), 2.0) * statistics.stdev(values) / math.sqrt(len(values))


def show(o: argparse.Namespace, runs: dict, base: list[float]) -> None:
    def mean(key: str, name: str) -> list[float]:
        return [statistics.mean(r["loss"]) if key == "loss" else r[key] for r in runs[name]]

    first = o.arm[0].name
    print(f"\n{len(o.text)} nodes, {o.rounds} rounds of {o.steps} steps; base "
          f"{statistics.mean(base):.4f} nats a token\n")
    print("| arm | seeds | held-out loss, mean of the nodes | difference in %, 95 % interval | "
          "sent, MB a node | times less | seconds | peak, MB |\n" + "| --- " * 8 + "|")
    for arm in o.arm:
        if arm.name not in runs:
            continue
        loss, up = mean("loss", arm.name), mean("up", arm.name)
        pairs = list(zip(loss, mean("loss", first)))
        worse = [100 * (a / b - 1) for a, b in pairs]
        print(f"| {arm.name} | {len(loss)} | {statistics.mean(loss):.4f} | "
              f"{statistics.mean(worse):+.2f} ± {interval(worse):.2f} | "
              f"{statistics.mean(up) / len(o.text) / 1e6:.3f} | "
              f"{statistics.mean(mean('up', first)) / statistics.mean(up):.1f} | "
              f"{statistics.mean(mean('seconds', arm.name)):.0f} | "
              f"{max(mean('MB', arm.name)):.0f} |")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--bin", default=str(HERE.parent / "build/bin"))
    p.add_argument("--model", required=True)
    p.add_argument("--text", action="append", required=True, help="of one node; may be repeated")
    p.add_argument("--arm", action="append", type=Arm, required=True, help="may be repeated")
    p.add_argument("--rounds", type=int, default=4)
    p.add_argument("--steps", type=int, default=24)
    p.add_argument("--tokens", type=int, default=2000, help="held-out tokens scored of each text")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--seconds", type=float, default=1800, help="most for one fleet")
    p.add_argument("--scratch", default="/dev/shm")
    p.add_argument("--json", default="", metavar="FILE")
    o = p.parse_args()
    kept = pathlib.Path(o.json) if o.json else None
    known = json.loads(kept.read_text()) if kept and kept.exists() else {}
    with Fleet(o, o.arm[0], 0, pathlib.Path(o.scratch)) as idle:
        base = known.setdefault("base", [idle.loss(i, None) for i in range(len(o.text))])
    for seed in range(1, o.seeds + 1):
        for arm in o.arm:
            runs = known.setdefault(arm.name, [])
            if len(runs) >= seed:
                continue
            runs.append(run(o, arm, seed))
            print(f"{arm.name}, seed {seed}: {statistics.mean(runs[-1]['loss']):.4f} nats, "
                  f"{runs[-1]['up'] / 1e6:.2f} MB up, {runs[-1]['seconds']:.0f} s", flush=True)
            if kept:
                kept.write_text(json.dumps(known) + "\n")
    show(o, {k: v for k, v in known.items() if k != "base"}, base)


if __name__ == "__main__":
    main()
