"""What the measuring scripts of this folder share: runs with their memory, turns, tables, plots.

Rates of a virtual machine drift within minutes, so arms take turns, and a probe of the machine
stands before and after each turn: a turn is thrown away and made again when the two differ by more
than a fifth, or when both threads seem to share one core. What is reported are medians over turns,
ranges, and the ratios of arms within each turn.
"""
import argparse
import dataclasses
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time

signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

HERE = pathlib.Path(__file__).resolve().parent
NODE = HERE.parent / "build/bin/fleetune-node"
STEADY = 0.2     # probes of one turn may differ by so much
SECOND = 1.4     # two threads must do so many times the work of one, or they share a core
TRIES = 3        # turns made for each that is wanted, before giving up


@dataclasses.dataclass
class Run:
    text: str
    errors: str
    seconds: float
    rss: int  # bytes, at the highest

    def last_json(self) -> dict:
        return json.loads(self.text.strip().splitlines()[-1])


def run(command: list, env: dict[str, str] | None = None) -> Run:
    """Runs a program to its end; a failure ends the script with what the program said."""
    command = [str(c) for c in command]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=errors,
                                 env={**os.environ, **(env or {})})
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:  # a stop of the script stops what it runs
            child.kill()
            child.wait()
            raise
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        errors.seek(0)
        said = errors.read().decode(errors="replace")
        if child.returncode != 0:
            sys.exit(f"{' '.join(command)}\nended with {child.returncode}: {said[-2000:]}")
        return Run(out.read().decode(errors="replace"), said, seconds, usage.ru_maxrss * 1024)


def options(description: str, **defaults) -> argparse.ArgumentParser:
    """A parser with the options that all scripts have."""
    p = argparse.ArgumentParser(description=description,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--node", default=str(NODE), help="fleetune-node (default: %(default)s)")
    p.add_argument("--turns", type=int, default=defaults.get("turns", 5),
                   help="turns that count (default: %(default)s)")
    p.add_argument("--threads", type=int, default=2, help="(default: %(default)s)")
    p.add_argument("--seconds", type=float, default=defaults.get("seconds", 540),
                   help="begin no turn after so long (default: %(default)s)")
    p.add_argument("--scratch", default="/dev/shm",
                   help="folder for files of the run (default: %(default)s)")
    p.add_argument("--json", default="", metavar="FILE",
                   help="keep every turn's numbers here; go on from those that it holds")
    return p


def probe(o: argparse.Namespace) -> list[dict]:
    """The machine's rates with 1, 2, ... threads, measured now."""
    state = pathlib.Path(o.scratch, f"probe-{os.getpid()}")
    rates = run([o.node, "doctor", "--again", "--state", state, "--json"]).last_json()["rates"]
    subprocess.run(["rm", "-rf", str(state)], check=True)
    return rates


def state_of(rates: list[dict], threads: int) -> str:
    r = rates[min(threads, len(rates)) - 1]
    return (f"{r['packed_operations_per_second'] / 1e9:.0f} GOP/s, "
            f"{r['read_bytes_per_second'] / 1e9:.1f} GB/s")


def steady(before: list[dict], after: list[dict], threads: int) -> bool:
    i = min(threads, len(before)) - 1
    a, b = (r[i]["packed_operations_per_second"] for r in (before, after))
    if abs(a - b) > STEADY * max(a, b):
        return False
    one = max(r[0]["packed_operations_per_second"] for r in (before, after))
    return i == 0 or max(a, b) >= SECOND * one


class Turns:
    """Turns of arms, each a name and a function that measures once and gives numbers by name."""

    def __init__(self, o: argparse.Namespace, arms: dict):
        self.o, self.arms, self.good, self.states = o, arms, [], []
        self.file = pathlib.Path(o.json) if o.json else None
        if self.file and self.file.exists():
            kept = json.loads(self.file.read_text())
            self.good, self.states = kept["turns"], kept["states"]
            if any(set(t) != set(arms) for t in self.good):
                sys.exit(f"{self.file} holds turns of other arms")

    def make(self) -> list[dict]:
        start = time.monotonic()
        for turn in range(TRIES * self.o.turns):
            spent = time.monotonic() - start
            if len(self.good) >= self.o.turns:
                break
            if turn > 0 and spent + spent / turn > self.o.seconds:
                break
            self.turn(turn)
            if self.file and self.good:
                self.file.write_text(json.dumps({"turns": self.good, "states": self.states},
                                                indent=1) + "\n")
        if not self.good:
            sys.exit("this machine is not steady enough to measure on")
        if len(self.good) < self.o.turns:
            print(f"only {len(self.good)} of {self.o.turns} turns were made")
        return self.good

    def turn(self, turn: int) -> None:
        order = list(self.arms)
        order = order[turn % len(order):] + order[:turn % len(order)]  # nobody is always first
        before = probe(self.o)
        got = {name: self.arms[name]() for name in order}
        after = probe(self.o)
        good = steady(before, after, self.o.threads)
        print(f"turn {turn + 1}: probe {state_of(before, self.o.threads)}; then "
              f"{state_of(after, self.o.threads)}{'' if good else ' (thrown away)'}", flush=True)
        for name in self.arms:
            numbers = ", ".join(f"{k} {v:.4g}" for k, v in got[name].items())
            print(f"  {name}: {numbers}", flush=True)
        if good:
            self.good.append(got)
            self.states.append(state_of(after, self.o.threads))


def spread(values: list[float], digits: int = 0) -> str:
    m = statistics.median(values)
    return f"{m:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(turns: list[dict], key: str, unit: str, base: str | None = None, digits: int = 0) -> None:
    """Prints medians and ranges of one number of all arms that have it, and ratios to a base."""
    arms = [name for name in turns[0] if key in turns[0][name]]
    print(f"\n| {key}, median of {len(turns)} (range) | {unit} |" +
          (f" ratio to {base} (range) |" if base else ""))
    print("| --- | --- |" + (" --- |" if base else ""))
    for name in arms:
        line = f"| {name} | {spread([t[name][key] for t in turns], digits)} |"
        if base:
            line += f" {spread([t[name][key] / t[base][key] for t in turns], 2)} |"
        print(line)


def best(turns: list[dict], key: str, names: list[str]) -> str:
    return max(names, key=lambda n: statistics.median(t[n][key] for t in turns))


def tune(o: argparse.Namespace, model: str, data: str, *more, skip: int = 0) -> dict:
    """One run of tuning: rate of its steps alone, peak memory, and what was planned.

    With skip the rate is that of the steps after so many, or a little later: a line a second is
    all that tune prints.
    """
    out = pathlib.Path(o.scratch, f"tune-{os.getpid()}.adapter")
    got = run([o.node, "tune", model, "--data", data, "--out", out, "--threads", o.threads,
               "--json", *more])
    out.unlink()
    lines = [json.loads(line) for line in got.text.strip().splitlines()]
    done, steps = lines[-1], [line for line in lines if "done" not in line]
    times = [(s["step"], s["step"] * s["tokens"] / s["tokens_per_second"]) for s in steps]
    first = next((t for t in times[:-1] if t[0] >= skip > 0), (0, 0.0))
    if skip > 0 and first[0] == 0:
        sys.exit(f"too few steps to leave out {skip}")
    rate = (times[-1][0] - first[0]) * steps[-1]["tokens"] / (times[-1][1] - first[1])
    return {"tokens/s": rate, "MB": done["peak_rss_bytes"] / 1e6,
            "planned MB": done["planned_peak_bytes"] / 1e6, "loss": steps[-1]["loss"]}


def bench(o: argparse.Namespace, model: str, threads: int, runs: int = 3) -> dict:
    got = run([o.node, "bench", model, "--threads", threads, "--runs", runs, "--json"]).last_json()
    return {k: got[f"{k}_tokens_per_second"] for k in ("prefill", "decode", "tune")}
