#!/usr/bin/env python3
"""Perplexity of fleetune's models beside the 4-bit files of other engines, on the same windows.

peer_perplexity.py --text TEXT --model OURS [--model ...] --gguf Q4_0.gguf [--gguf ...]
                   [--python PYTHON] [--llama-perplexity PATH]

The first --bytes of TEXT become one document, scored in windows of 512 tokens that do not overlap:
ours by `fleetune-node eval`, the GGUF files by the same command and, dequantised to float32, by
transformers (bench/gguf_torch.py), so that no engine's own way of counting comes in between.
With --llama-perplexity its own number is printed too; it scores the second half of each window
only, so it is comparable between the GGUF files alone.
"""
import pathlib
import re
import sys

import measure

WINDOW = 512


def first_part(o) -> pathlib.Path:
    whole = pathlib.Path(o.text).read_bytes()[:o.bytes].decode(errors="ignore")
    end = whole.rfind("\n") if len(whole.encode()) == o.bytes else len(whole)
    part = pathlib.Path(o.scratch, "peer_perplexity.txt")
    part.write_text(whole[:end].replace("<|endoftext|>", "").strip() + "\n<|endoftext|>\n")
    return part


def own_number(o, model: str, text: pathlib.Path) -> str:
    plain = text.with_suffix(".plain.txt")
    plain.write_text(text.read_text().replace("\n<|endoftext|>\n", ""))
    got = measure.run([o.llama_perplexity, "-m", model, "-f", plain, "-c", WINDOW, "-t", o.threads])
    found = re.search(r"Final estimate: PPL(?: over \S+ chunks[^=]*)? = ([0-9.]+)",
                      got.text + got.errors)
    return found.group(1) if found else "?"


def main() -> None:
    p = measure.options(__doc__)
    p.add_argument("--text", required=True)
    p.add_argument("--bytes", type=int, default=80000, help="of it (default: %(default)s)")
    p.add_argument("--model", action="append", required=True, help="ours; may be repeated")
    p.add_argument("--gguf", action="append", default=[], help="theirs; may be repeated")
    p.add_argument("--python", default=sys.executable, help="has torch, transformers and gguf")
    p.add_argument("--llama-perplexity", default="")
    o = p.parse_args()
    text = first_part(o)
    print("| file | MB | eval: nats a token | perplexity | transformers, float32 | own number |")
    print("| --- | --- | --- | --- | --- | --- |")
    for m in o.model + o.gguf:
        got = measure.run([o.node, "eval", m, "--text", text, "--window", WINDOW, "--threads",
                           o.threads, "--json"]).last_json()
        other = own = ""
        if m in o.gguf:
            theirs = measure.run([o.python, measure.HERE / "gguf_torch.py", m, "--text", text,
                                  "--window", WINDOW, "--threads", o.threads]).last_json()
            if theirs["tokens"] != got["tokens"]:
                sys.exit(f"{m}: {got['tokens']} tokens scored here, {theirs['tokens']} there")
            other = f"{theirs['perplexity']:.3f}"
            own = own_number(o, m, text) if o.llama_perplexity else ""
        print(f"| {pathlib.Path(m).stem} | {pathlib.Path(m).stat().st_size / 1e6:.1f} | "
              f"{got['nll']:.4f} | {got['perplexity']:.3f} | {other} | {own} |", flush=True)
    print(f"\n{got['tokens']} tokens scored, windows of {WINDOW}")


if __name__ == "__main__":
    main()
