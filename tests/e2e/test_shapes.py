"""Goal: models with the shapes of TinyLlama-1.1B (its own head, SentencePiece) and Qwen2.5-0.5B
(biases, a tied embedding of 151,936 rows) go through every command that reads a model: inspect,
compress, plan, tune, eval and generate, whole and under a limit where weights pass through, to the
same numbers, with the memory that was planned.

Method: random weights (make_model), two layers of each unless FL_TEST_LARGE is set; every other
dimension is the published one. The planned peak against the kernel's count of the resident set.
"""
import json
import math

import fleet
from test_memory import LARGE, check_limit, check_peak, tune

LAYERS = 2
TUNING = ["--sequence", 32] + ([] if LARGE else ["--exits", LAYERS])


def check_compress(f, plain, model):
    made = json.loads(f.ok(f.node_bin, "compress", plain, "--out", model, "--bits", 4, "--policy",
                           "uniform", "--calibration", f.dir / "text.txt", "--calibration-tokens",
                           64, "--json", timeout=1800 if LARGE else 240).out)
    fleet.check(made["bytes_out"] == model.stat().st_size, "compress: bytes_out")
    fleet.check(made["mean_bits"] == 4, f"compress: {made['mean_bits']} bits")
    gap = made["nll_after"] - made["nll_before"]
    fleet.check(abs(gap) < 0.2, f"compress: the loss changed by {gap} nats")


def check_shape(f, shape, kind, hidden, vocabulary):
    plain, model = f.dir / "plain.gguf", f.dir / "model.gguf"
    f.ok(f.bin / "make_model", plain, "--shape", shape, "--type", kind,
         *([] if LARGE else ["--layers", LAYERS]), timeout=240)
    check_compress(f, plain, model)
    for path in (plain, model):
        seen = f.node_json("inspect", path)
        fleet.check(seen["bytes"] == path.stat().st_size, "inspect: bytes")
        fleet.check((seen["hidden"], seen["vocabulary"]) == (hidden, vocabulary), f"{seen}")
    plain.unlink()
    planned = f.node_json("plan", model, "--data", f.dir / "text.txt", *TUNING)
    done = tune(f, model, *TUNING)
    check_peak(f"{shape} tune", done)
    fleet.check(math.isfinite(done["loss"]), f"tune: loss {done['loss']}")
    off = planned["planned_peak_bytes"] / done["planned_peak_bytes"] - 1
    fleet.check(abs(off) < 0.01, f"plan and tune differ by {off:.1%}")
    args = ["eval", model, "--text", f.dir / "text.txt", "--tokens", 100, "--window", 64]
    whole = f.node_json(*args)
    check_peak(f"{shape} eval", whole)
    written = ["generate", model, "--prompt", "the kettle hums", "--tokens", 3]
    words = f.ok(f.node_bin, *written).out
    check_limited(f, model, planned, args, whole, written, words)
    model.unlink()


def check_limited(f, model, planned, args, whole, written, words):
    """Three fifths of the weights' bytes: the same loss, the same words."""
    limit = planned["weight_bytes"] * 3 // 5 + planned["resident_bytes"]
    said = f"--memory {limit / 1e6:.0f} MB"
    less = f.node_json(*args, "--memory", limit)
    check_limit(f"eval {said}", less, limit)
    fleet.check(less["streamed_bytes"] > 0 and less["nll"] == whole["nll"], "eval: streamed")
    fleet.check(f.ok(f.node_bin, *written, "--memory", limit).out == words, "generate: streamed")
    done = tune(f, model, *TUNING, "--memory", limit)
    check_limit(f"tune {said}", done, limit)
    fleet.check(done["streamed_bytes"] > 0, f"gave up {done['gave_up']}")


def test(f):
    (f.dir / "text.txt").write_text(fleet.text_of("shapes", 12000))
    check_shape(f, "tinyllama", "q4_0", 2048, 32000)
    check_shape(f, "qwen2.5-0.5b", "q8_0", 896, 151936)


if __name__ == "__main__":
    fleet.main(test)
