#!/usr/bin/env python3
"""How the cost of a tuning step grows: with the window, the tokens, the exit, the layers below.

growth.py --model MODEL --data TEXT --out FOLDER [--gguf PLAIN.gguf] [--python PYTHON]

MODEL is tuned with windows of different depth below the last exit, and with steps of different
length. For exits and memory the plain GGUF is cut to its first layers (bench/cut_gguf.py, with
PYTHON, which has gguf from PyPI): a step whose exit is after layer L does the same work and takes
the same memory as one at the last exit of the model cut to L layers. Writes window.svg, tokens.svg,
exit.svg and memory.svg to FOLDER, and prints tables with straight lines fitted: intercept, slope
and R^2. Settings take turns; a point is the median of --turns, its bar the range.
"""
import pathlib
import statistics
import sys

import measure
import svg

WINDOWS = (1, 2, 4, 6, 8, 10, 12, 15)
TOKENS = (32, 64, 128, 256, 512, 768, 1024)
DEPTHS = (10, 14, 18, 22, 26, 30)  # of cut models
WINDOW, SEQUENCE = 7, 256          # where they are not what varies


def step(o, model: str, window: int, sequence: int, steps: int):
    def once() -> dict:
        got = measure.tune(o, model, o.data, "--window", window, "--sequence", sequence,
                           "--micro-batches", 1, "--steps", steps, "--prefix-cache", 0)
        return {"ms": 1000 * sequence / got["tokens/s"], "MB": got["MB"],
                "planned": got["planned MB"]}
    return once


def steps_for(tokens: int) -> int:
    return max(4, 3072 // tokens)


def cut_models(o) -> dict[int, str]:
    models = {}
    for depth in DEPTHS if o.gguf else ():
        path = pathlib.Path(o.scratch, f"growth-{depth}.gguf")
        if not path.exists():
            measure.run([o.python, measure.HERE / "cut_gguf.py", o.gguf, path, "--layers", depth])
        models[depth] = str(path)
    return models


def series_of(name: str, turns: list[dict], kind: str, xs, key: str) -> svg.Series:
    values = {x: [t[f"{kind} {x}"][key] for t in turns] for x in xs}
    medians = [statistics.median(values[x]) for x in xs]
    intercept, slope, r2 = svg.fit(list(xs), medians)
    print(f"{name}: {intercept:.4g} + {slope:.4g} x, R^2 {r2:.4f}")
    return svg.Series(name, list(xs), medians, [min(values[x]) for x in xs],
                      [max(values[x]) for x in xs], (intercept, slope))


def show(o, file: str, title: str, x_label: str, y_label: str, series: list[svg.Series]) -> None:
    pathlib.Path(o.out, file).write_text(svg.plot(title, x_label, y_label, series))
    print(f"\n| {x_label} | " + " | ".join(s.name for s in series) + " |")
    print("| --- |" + " --- |" * len(series))
    for i, x in enumerate(series[0].x):
        print(f"| {x} | " + " | ".join(f"{s.y[i]:.1f} ({s.low[i]:.1f} to {s.high[i]:.1f})"
                                      for s in series) + " |")
    print()


def main() -> None:
    p = measure.options(__doc__, turns=5)
    p.add_argument("--model", required=True)
    p.add_argument("--data", required=True)
    p.add_argument("--out", required=True, help="folder for the plots")
    p.add_argument("--gguf", default="", help="plain model to cut; without it no exits, no memory")
    p.add_argument("--python", default=sys.executable, help="has gguf (default: this one)")
    o = p.parse_args()
    pathlib.Path(o.out).mkdir(parents=True, exist_ok=True)
    arms = {f"window {w}": step(o, o.model, w, SEQUENCE, steps_for(SEQUENCE)) for w in WINDOWS}
    arms |= {f"tokens {t}": step(o, o.model, WINDOW, t, steps_for(t)) for t in TOKENS}
    arms |= {f"depth {d}": step(o, m, WINDOW, SEQUENCE, steps_for(SEQUENCE))
             for d, m in cut_models(o).items()}
    turns = measure.Turns(o, arms).make()
    here = f"{o.threads} threads, median of {len(turns)}"
    show(o, "window.svg", f"Step of {SEQUENCE} tokens by window, {here}", "layers in the window",
         "ms",
         [series_of("ms a step", turns, "window", WINDOWS, "ms")])
    show(o, "tokens.svg", f"Step by tokens, window of {WINDOW}, {here}", "tokens of a step", "ms",
         [series_of("ms a step", turns, "tokens", TOKENS, "ms")])
    if o.gguf:
        show(o, "exit.svg", f"Step of {SEQUENCE} tokens by exit, window of {WINDOW}, {here}",
             "layer of the exit", "ms", [series_of("ms a step", turns, "depth", DEPTHS, "ms")])
        weights = {d: pathlib.Path(m).stat().st_size / 1e6 for d, m in cut_models(o).items()}
        for t in turns:
            for d in DEPTHS:
                t[f"below {d - WINDOW}"] = {"MB": t[f"depth {d}"]["MB"],
                                            "rest": t[f"depth {d}"]["MB"] - weights[d]}
        below = [d - WINDOW for d in DEPTHS]
        show(o, "memory.svg", f"Peak memory by layers below a window of {WINDOW}",
             "layers below", "MB",
             [series_of("peak resident", turns, "below", below, "MB"),
              series_of("the same without the model's file", turns, "below", below, "rest")])


if __name__ == "__main__":
    main()
