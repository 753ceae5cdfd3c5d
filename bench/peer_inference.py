#!/usr/bin/env python3
"""Prefill, decode, memory and load of fleetune beside llama.cpp and ik_llama.cpp.

peer_inference.py --model OURS [--model OURS ...] --gguf Q4_0.gguf [--gguf Q4_1.gguf ...]
                  [--llama-bench PATH] [--ik-bench PATH] [--llama-cli PATH] [--ik-cli PATH]

OURS are models for fleetune-node (compressed, or plain GGUF), the --gguf files are those of the
other engines; all of one model. Prefill of 512 tokens, decode of 128 (with nothing before them, and
after 512 tokens), tokens a second, with --threads threads. For each engine and file the best
options are looked for first: flash attention on or off, and for ik_llama.cpp repacking at load
(-rtr). The peers' command line programs are for
the time from start to the first token with a warm page cache; memory is the resident set at its
highest while 512 tokens are read and 128 written.
"""
import argparse
import itertools
import json
import pathlib
import re
import statistics
import sys

import measure

PREFILL, DECODE = 512, 128
WORDS = "The old man walked to the sea and looked at the ships for a long time. "
OPENING = "Once upon a time"  # of a text that does not end at once
WORD_TOKENS = 17  # of WORDS
KEYS = ("prefill", "decode", "decode after 512")
ENGINES = (  # name, option with its llama-bench, options to be tried, decode after 512 tokens
    ("llama.cpp", "llama_bench", [()], ("-p", 0, "-n", DECODE, "-d", PREFILL)),
    ("ik_llama.cpp", "ik_bench", [(), ("-rtr", "1")],
     ("-p", 0, "-n", 0, "-gp", f"{PREFILL},{DECODE}")))


def engine_rows(path: str, model: str, o: argparse.Namespace, more: tuple, repeat: int) -> tuple:
    got = measure.run([path, "-m", model, "-t", o.threads, "-r", repeat, "-o", "json", *more])
    at = got.text.index("[")  # some versions say something before it
    return json.JSONDecoder().raw_decode(got.text[at:])[0], got.rss


def engine_bench(path: str, model: str, o: argparse.Namespace, setting: tuple,
                 repeat: int) -> tuple:
    rows, rss = engine_rows(path, model, o, ("-p", PREFILL, "-n", DECODE, *setting), repeat)
    return {"prefill" if row["n_prompt"] else "decode": row["avg_ts"] for row in rows}, rss


def best_options(path: str, model: str, o: argparse.Namespace, extra: list[tuple]) -> tuple:
    """The options with the fastest prefill, and those with the fastest decode."""
    rates = {}
    for more in itertools.product(("0", "1"), extra):
        setting = ("-fa", more[0], *more[1])
        rates[setting], _ = engine_bench(path, model, o, setting, 2)
        print(f"  {pathlib.Path(model).stem} {' '.join(setting)}: prefill "
              f"{rates[setting]['prefill']:.0f}, decode {rates[setting]['decode']:.0f}", flush=True)
    return tuple(max(rates, key=lambda s: rates[s][k]) for k in ("prefill", "decode"))


def engine_arm(path: str, model: str, o: argparse.Namespace, settings: tuple, deep: tuple):
    """`deep` are the engine's options for a decode of 128 tokens after 512."""
    def once() -> dict:
        rates, rss = engine_bench(path, model, o, settings[0], o.repeat)
        if settings[1] != settings[0]:
            other, _ = engine_bench(path, model, o, settings[1], o.repeat)
            rates["decode"] = other["decode"]
        rows, _ = engine_rows(path, model, o, (*deep, *settings[1]), o.repeat)
        return {"prefill": rates["prefill"], "decode": rates["decode"],
                "decode after 512": rows[0]["avg_ts"], "MB": rss / 1e6}
    return once


def our_decode(o: argparse.Namespace, model: str) -> float:
    """Tokens a second of (at most) 128 written after a few words."""
    rates = []
    for _ in range(o.repeat):
        got = measure.run([o.node, "generate", model, "--prompt", OPENING, "--tokens", DECODE,
                           "--threads", o.threads, "--stats"])
        written, rate = re.search(r"written (\d+), ([0-9.]+)/s", got.errors).groups()
        if int(written) < DECODE // 2:
            sys.exit(f"{model} ends its text after {written} tokens: choose another OPENING")
        rates.append(float(rate))
    return statistics.median(rates)


def our_arm(model: str, o: argparse.Namespace):
    prompt = WORDS * (PREFILL // WORD_TOKENS)

    def once() -> dict:
        rates = measure.bench(o, model, o.threads, o.repeat)
        written = measure.run([o.node, "generate", model, "--prompt", prompt, "--tokens", DECODE,
                               "--threads", o.threads])
        return {"prefill": rates["prefill"], "decode": our_decode(o, model),
                "decode after 512": float("nan"),  # nothing of ours measures that
                "MB": written.rss / 1e6}
    return once


def first_token(name: str, command: list, o: argparse.Namespace) -> tuple:
    measure.run(command)  # pages are in memory from here on
    runs = [measure.run(command) for _ in range(2 * o.turns + 1)]
    return name, [r.seconds * 1000 for r in runs], max(r.rss for r in runs) / 1e6


def load(o: argparse.Namespace) -> None:
    rows = [first_token(f"fleetune {pathlib.Path(m).stem}",
                        [o.node, "generate", m, "--prompt", "The", "--tokens", 1, "--threads",
                         o.threads], o) for m in o.model]
    plain = ("-p", "The", "-n", 1, "-t", o.threads, "-c", PREFILL + DECODE, "--no-warmup")
    for engine, path, more in (("llama.cpp", o.llama_cli, ("-no-cnv",)),
                               ("ik_llama.cpp", o.ik_cli, ())):
        rows += [first_token(f"{engine} {pathlib.Path(m).stem}", [path, "-m", m, *plain, *more], o)
                 for m in o.gguf if path]
    print("\n| start to first token and end, warm page cache | ms, median (range) | peak MB |")
    print("| --- | --- | --- |")
    for name, times, rss in rows:
        print(f"| {name} | {measure.spread(times)} | {rss:.0f} |")


def main() -> None:
    p = measure.options(__doc__)
    p.add_argument("--model", action="append", required=True, help="ours; may be repeated")
    p.add_argument("--gguf", action="append", default=[], help="theirs; may be repeated")
    p.add_argument("--llama-bench", default="", help="llama-bench of llama.cpp")
    p.add_argument("--ik-bench", default="", help="llama-bench of ik_llama.cpp")
    p.add_argument("--llama-cli", default="", help="llama-completion (or an older llama-cli)")
    p.add_argument("--ik-cli", default="", help="llama-cli of ik_llama.cpp")
    p.add_argument("--repeat", type=int, default=3, help="runs in a turn (default: %(default)s)")
    p.add_argument("--options", default="", metavar="FILE",
                   help="keep the best options found here; take them from it when it exists")
    o = p.parse_args()
    kept = pathlib.Path(o.options) if o.options else None
    found = json.loads(kept.read_text()) if kept and kept.exists() else {}
    arms = {f"fleetune {pathlib.Path(m).stem}": our_arm(m, o) for m in o.model}
    for engine, option, extra, deep in ENGINES:
        path = getattr(o, option)
        for m in o.gguf if path else []:
            name = f"{engine} {pathlib.Path(m).stem}"
            key = f"{name} {o.threads}"
            if key not in found:
                found[key] = best_options(path, m, o, extra)
            arms[name] = engine_arm(path, m, o, tuple(tuple(s) for s in found[key]), deep)
    for key, (prefill, decode) in found.items():
        print(f"{key}: prefill with {' '.join(prefill)}, decode with {' '.join(decode)}")
    if kept:
        kept.write_text(json.dumps(found, indent=1) + "\n")
    turns = measure.Turns(o, arms).make()
    for engine in ("llama.cpp", "ik_llama.cpp"):
        theirs = [a for a in arms if a.startswith(engine)]
        for key in KEYS if theirs else ():
            fastest = measure.best(turns, key, theirs)
            measure.table(turns, key, f"tokens/s, {o.threads} threads", fastest)
    measure.table(turns, "MB", "peak resident")
    load(o)


if __name__ == "__main__":
    main()
