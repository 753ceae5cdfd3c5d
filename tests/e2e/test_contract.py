"""Goal: what other people's scripts lean on is there: every command's --json parses and has the
documented keys with values of the right kind, and join, approve, revoke, run, status, rounds,
verify and export do what they say, in the order in which an owner would use them.

Method: one tiny model, every command, one small fleet. A key that a command may leave out is not in
the tables below.
"""
import json
import math

import fleet

NUMBER = (int, float)
EVAL = {"tokens": int, "nll": NUMBER, "perplexity": NUMBER, "last_exit_nll": NUMBER, "exits": list,
        "seconds": NUMBER, "peak_rss_bytes": int}
TUNE = {"step": int, "tokens": int, "loss": NUMBER, "exit_layer": int, "window": list,
        "tokens_per_second": NUMBER, "rss_bytes": int}
TUNE_LAST = {"done": bool, "peak_rss_bytes": int, "planned_peak_bytes": int}
COMPRESS = {"policy": list, "mean_bits": NUMBER, "mean_sparsity": NUMBER, "bytes_in": int,
            "bytes_out": int, "nll_before": NUMBER, "nll_after": NUMBER}
COMPRESS_LAYER = {"bits": NUMBER, "sparsity": NUMBER, "sensitivity_quant": NUMBER,
                  "sensitivity_prune": NUMBER}
BENCH = {"prefill_tokens_per_second": NUMBER, "decode_tokens_per_second": NUMBER,
         "tune_tokens_per_second": NUMBER, "peak_rss_bytes": int}
INSPECT = {"architecture": str, "layers": int, "hidden": int, "ffn": int, "heads": int,
           "kv_heads": int, "vocabulary": int, "context": int, "tensors": int, "bytes": int,
           "exits": list}
PLAN = {"planned_peak_bytes": int}
NODE_STATUS = {"name": str, "phase": str, "online": bool, "running": bool, "round": int,
               "step": int, "steps": int, "loss": NUMBER, "bytes_up": int, "bytes_down": int,
               "updates_waiting": int}
STATUS = {"round": int, "rounds": int, "finished": bool, "nodes": dict, "layers": int,
          "layers_tuned": int, "model_digest": str, "endpoint": str, "vote": dict, "events": list}
NODE = {"id": int, "name": str, "state": str, "key": str, "joined": int, "seen": int,
        "bytes_up": int, "bytes_down": int}
ROUND = {"round": int, "open": bool, "opened": int, "closed": int, "contributions": int,
         "updates": int, "layers": int, "bytes_up": int, "reason": str}


def check_keys(what, value, keys):
    fleet.check(isinstance(value, dict), f"{what} is not an object: {value!r}")
    for key, kind in keys.items():
        fleet.check(key in value, f"{what} has no \"{key}\": {sorted(value)}")
        right = isinstance(value[key], kind) and (kind is bool or not isinstance(value[key], bool))
        fleet.check(right, f"{what}: \"{key}\" is {value[key]!r}")
        if isinstance(value[key], float):
            fleet.check(math.isfinite(value[key]), f"{what}: \"{key}\" is {value[key]!r}")


def check_engine(f):
    """compress, inspect, plan, tune, eval, bench, doctor."""
    plain, model, text = f.dir / "plain.gguf", f.dir / "model.gguf", f.dir / "text.txt"
    text.write_text(fleet.text_of("contract", 9000))
    f.ok(f.bin / "make_tiny_model", plain, "--layers", 4)
    made = f.node_json("compress", plain, "--out", model, "--bits", 4, "--sparsity", 0.1,
                       "--calibration", text, "--calibration-tokens", 512)
    check_keys("compress", made, COMPRESS)
    fleet.check(len(made["policy"]) == 4, f"compress: policy of {len(made['policy'])} layers")
    for layer in made["policy"]:
        check_keys("compress.policy", layer, COMPRESS_LAYER)
    fleet.check(made["bytes_out"] == model.stat().st_size, "compress: bytes_out")
    fleet.check(made["bytes_in"] == plain.stat().st_size, "compress: bytes_in")
    for path in (plain, model):
        seen = f.node_json("inspect", path)
        check_keys("inspect", seen, INSPECT)
        fleet.check(("policy" in seen) == (path == model), "inspect: policy is of compressed models")
        fleet.check(seen["bytes"] == path.stat().st_size and seen["layers"] == 4, "inspect: facts")
    plan = f.node_json("plan", model, "--data", text)
    check_keys("plan", plan, PLAN)
    check_tune(f, model, text)
    bench = f.node_json("bench", model, "--threads", 1)
    check_keys("bench", bench, BENCH)
    doctor = f.run(f.node_bin, "doctor", "--state", f.dir / "doctor", "--json")
    check_keys("doctor", json.loads(doctor.out), {})
    return model


def check_tune(f, model, text):
    adapter = f.dir / "adapter"
    done = f.ok(f.node_bin, "tune", model, "--data", text, "--out", adapter, "--steps", 6,
                "--sequence", 32, "--seed", 3, "--threads", 1, "--json")
    lines = [json.loads(x) for x in done.out.splitlines()]
    fleet.check(len(lines) >= 2, "tune: too few reports")
    for line in lines[:-1]:
        check_keys("tune", line, TUNE)
        fleet.check(len(line["window"]) == 2, "tune: window is (first, last)")
    check_keys("tune's last line", lines[-1], TUNE_LAST)
    fleet.check(lines[-1]["done"] is True and not any("done" in x for x in lines[:-1]), "tune: done")
    once = adapter.read_bytes()
    f.ok(f.node_bin, "tune", model, "--data", text, "--out", adapter, "--steps", 6, "--sequence", 32,
         "--seed", 3, "--threads", 1)
    fleet.check(adapter.read_bytes() == once, "tune: the same seed gives another adapter")
    for more in ([], ["--adapter", adapter]):
        scored = f.node_json("eval", model, "--text", text, "--threads", 1, *more)
        check_keys("eval", scored, EVAL)
        fleet.check(abs(scored["perplexity"] - math.exp(scored["nll"])) < 1e-4 * scored["perplexity"],
                    f"eval: perplexity is not exp(nll): {scored}")
        for e in scored["exits"]:
            check_keys("eval.exits", e, {"layer": int, "nll": NUMBER, "weight": NUMBER})
    word = f.ok(f.node_bin, "generate", model, "--prompt", "the kettle", "--tokens", 8, "--seed", 2,
                "--temperature", 0.8, "--adapter", adapter)
    again = f.ok(f.node_bin, "generate", model, "--prompt", "the kettle", "--tokens", 8, "--seed", 2,
                 "--temperature", 0.8, "--adapter", adapter)
    fleet.check(word.out == again.out and word.out, "generate: the same seed says something else")


def coordinator_states(f):
    return {n["name"]: n["state"] for n in f.coordinator_json("nodes")["nodes"]}


def check_pairing(f):
    """A node that has to be approved, one that need not be, one too many for the token."""
    made = json.loads(f.join("slow", f.token()).out)
    fleet.check(made["state"] == "pending" and made["name"] == "slow", f"join: {made}")
    fleet.check(coordinator_states(f) == {"slow": "pending"}, "nodes: pending")
    f.node("slow").start()
    fleet.wait_for("the node that waits says so",
                   lambda: "approval" in f.nodes["slow"].text(), 10)
    approved = f.coordinator_json("approve", "slow")
    fleet.check(approved["state"] == "active", f"approve: {approved}")
    url = f.token("--uses", 1, "--auto-approve")
    fleet.check(json.loads(f.join("quick", url).out)["state"] == "active", "join: auto-approve")
    late = f.join("late", url, wait=3)
    fleet.check(late.returncode == 1 and late.out == "", f"a token of one use let in two: {late.out}")
    fleet.check("token" in late.err or "used" in late.err, f"join: why not: {late.err}")
    fleet.check(coordinator_states(f) == {"slow": "active", "quick": "active"}, "nodes: active")


def check_running(f):
    f.node("quick").start()
    fleet.wait_for("two rounds", lambda: sum(
        not r["open"] for r in f.coordinator_json("rounds")["rounds"]) >= 2, 60, 0.2)
    mine = f.node_json("status", "--state", f.state("quick"))
    check_keys("node status", mine, NODE_STATUS)
    fleet.check(mine["running"] and mine["name"] == "quick", f"node status: {mine}")
    check_keys("status", f.coordinator_json("status"), STATUS)
    for node in f.coordinator_json("nodes")["nodes"]:
        check_keys("nodes", node, NODE)
    for r in f.coordinator_json("rounds")["rounds"]:
        check_keys("rounds", r, ROUND)
    for command in ("status", "nodes", "rounds", "verify"):
        fleet.check(f.ok(f.coordinator_bin, command, f.home).out.strip(), f"{command} says nothing")
    fleet.check(f.ok(f.node_bin, "status", "--state", f.state("quick")).out.strip(), "node status")


def least_memory(f, model, text, window):
    """The smallest --memory for which a plan with this window exists, by bisection."""
    def fits(size):
        done = f.run(f.node_bin, "plan", model, "--data", text, "--window", window, "--sequence", 16,
                     "--exits", 2, "--threads", 1, "--memory", size, "--json")
        return done.returncode == 0 and json.loads(done.out)["window"] == window
    low, high = 1 << 20, 1 << 26
    while high - low > 1000:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def check_small_node(f, model):
    """A device that cannot hold its task says so, is given a smaller one, and works when it can."""
    text = f.dir / "small.txt"
    text.write_text(fleet.text_of("small", 6000))
    one, two = (least_memory(f, model, text, w) for w in (1, 2))
    # What a process has resident before it plans differs by 0.2 MB from run to run; arenas do not.
    small_arena, large_arena = (f.node_json("plan", model, "--data", text, "--window", w, "--exits",
                                            2, "--threads", 1)["arena_bytes"] for w in (1, 2))
    fleet.check(small_arena < large_arena, f"plan: a window of 1 takes {small_arena} bytes of an "
                f"arena, of 2 {large_arena}")
    fleet.check(f.join("small", f.token("--auto-approve")).returncode == 0, "small joins")
    # What an agent has resident besides is more than a plan's command: this is too little for it.
    small = f.node("small", text.read_text(), "--memory", one)
    small.start()
    fleet.wait_for("the small node says what it lacks",
                   lambda: "task.failed: nothing fits" in small.text(), 40)
    fleet.wait_for("a task of one layer",
                   lambda: [t for _, _, t in f.events("task.given") if "layers 3 to 3" in t], 40)
    fleet.check(small.stop() == 0, "the small node ends well")
    small.args[small.args.index(str(one))] = str(two + (32 << 20))
    small.start()
    fleet.wait_for("an update of the small node", lambda: "update.acknowledged" in small.text(), 40)
    fleet.check(small.stop() == 0, "the small node ends well")
    f.ok(f.coordinator_bin, "revoke", f.home, "small")


def check_parting(f):
    """revoke ends the node at once, for good; the fleet goes on without it."""
    gone = f.coordinator_json("revoke", "quick")
    fleet.check(gone["state"] == "revoked", f"revoke: {gone}")
    fleet.check(f.nodes["quick"].wait(60) == 1, "a revoked agent ends with status 1")
    fleet.check("revoked" in f.nodes["quick"].text(), "and says why")
    again = f.run(f.coordinator_bin, "approve", f.home, "quick")
    fleet.check(again.returncode == 1 and "revoked" in again.err, f"approve: {again.err}")
    before = len(f.coordinator_json("rounds")["rounds"])
    fleet.wait_for("another round without it", lambda: len(
        f.coordinator_json("rounds")["rounds"]) > before, 30, 0.2)
    fleet.check(f.nodes["slow"].stop() == 0, "an agent that is told to stop ends with status 0")
    left = f.node_json("status", "--state", f.state("slow"))
    fleet.check(left["running"] is False, f"status of an agent that ended: {left}")
    fleet.check(f.coordinator.stop() == 0, "the coordinator ends with status 0")


def check_what_is_left(f):
    verified = f.coordinator_json("verify")
    check_keys("verify", verified, {"whole": bool, "objects": int, "updates": int, "problems": list})
    fleet.check(verified["whole"] and not verified["problems"], f"verify: {verified}")
    out = f.dir / "exported"
    f.ok(f.coordinator_bin, "export", f.home, "--out", out)
    fleet.check(any(out.iterdir()), "export wrote nothing")
    # One changed byte anywhere in an object is found.
    victim = max((f.home / "objects").iterdir(), key=lambda p: p.stat().st_mtime)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.chmod(0o600)
    victim.write_bytes(data)
    spoiled = f.run(f.coordinator_bin, "verify", f.home, "--json")
    fleet.check(spoiled.returncode == 1, f"verify: a changed byte gives status {spoiled.returncode}")
    fleet.check(json.loads(spoiled.out)["whole"] is False, "verify: whole")


def check_help(f):
    for program in (f.node_bin, f.coordinator_bin):
        fleet.check(program.name in f.ok(program, "--version").out, "--version")
        text = f.ok(program, "--help").out
        for line in text.splitlines():
            command = line.split()[0] if line.startswith("  ") else None
            if command:
                said = f.ok(program, command, "--help").out
                fleet.check("usage:" in said and "example:" in said, f"{command} --help")
        fleet.check(".SH" in f.ok(program, "--man").out, "--man")


def test(f):
    check_help(f)
    model = check_engine(f)
    f.init(model, "--steps", 2, "--sequence", 16, "--eval-tokens", 64, "--exits", 2, "--retry", 50)
    f.start_coordinator()
    check_pairing(f)
    check_running(f)
    check_small_node(f, model)
    check_parting(f)
    check_what_is_left(f)


if __name__ == "__main__":
    fleet.main(test)
