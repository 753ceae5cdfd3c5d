"""Goal: every kind of bad update and every wrong key is refused, the log of events says why, and
the model is the same to the bit; the coordinator lives on and honest nodes notice nothing.

Method: hostile_client is an enrolled node that does one wrong thing a run. Around each of them the
ledger, the versions of the layers and their digests are compared, and the new events are read. At
the end an honest node and the hostile one, behaving for once, close rounds, and every published
layer is recomputed: it holds the admitted updates and nothing else.
"""
import fleet
import judge

# Values of the first layer of a window of the tiny model: rank 2 times the rows of q, k, v, o,
# gate, up and down. Exits sit after the window's last layer, so none is in this one.
COUNT = 2 * (64 + 32 + 32 + 64 + 96 + 96 + 64)

# kind: (what the client must get, what the log of events must say, of which kind)
REFUSED = {
    "flipped": ("ack: refused DIGEST", "update.refused", "DIGEST"),
    "replayed_frame": ("silence", "frame.refused", "received before"),
    "other_session": ("error: SESSION", None, None),
    "truncated_sealed": ("ack: refused", "update.refused", ""),
    "truncated_payload": ("ack: refused", "update.refused", ""),
    "flipped_digest": ("ack: refused SIGNATURE", "update.refused", "SIGNATURE"),
    "flipped_frame": ("silence", "frame.refused", "altered"),
    "oversized": ("error: MALFORMED", "frame.refused", ""),
    "oversized_frame": ("silence", None, None),
    "wrong_count": ("ack: refused SHAPE", "update.refused", "SHAPE"),
    "nan": ("ack: refused", "update.refused", "scale"),
    "infinite": ("ack: refused", "update.refused", "scale"),
    "too_large": ("ack: refused NOT_FINITE", "update.refused", "NOT_FINITE"),
    "future_base": ("ack: refused BASE", "update.refused", "BASE"),
    "other_run": ("ack: refused RUN", "update.refused", "RUN"),
    "other_layer": ("ack: refused NOT_ASSIGNED", "update.refused", "NOT_ASSIGNED"),
    "other_task": ("ack: refused NOT_ASSIGNED", "update.refused", "NOT_ASSIGNED"),
    "other_tokens": ("ack: refused SHAPE", "update.refused", "SHAPE"),
    "other_sequence": ("ack: refused SIGNATURE", "update.refused", "SIGNATURE"),
    "other_signer": ("ack: refused SIGNATURE", "update.refused", "SIGNATURE"),
    "other_identity": ("no session", None, None),
    "garbage": ("silence", "frame.refused", ""),
    "flood": ("refused", "node.shut", "too many bad frames"),
}


def node_of(kind):
    """Each attack by a node of its own, so that none hides behind another's quota."""
    return "m-" + kind.replace("_", "-")


def attack(f, name, kind):
    return f.ok(f.bin / "hostile_client", f.state(name), COUNT, kind).out.strip()


def enrol(f):
    """All at once: when their token is used up, the door is closed to unknown keys."""
    names = [node_of(kind) for kind in REFUSED] + ["once-known", "key-thief", "twice", "giant", "ada"]
    url = f.token("--auto-approve", "--uses", len(names))
    for name in names:
        fleet.check(f.join(name, url).returncode == 0, f"{name} joins")


def check_refused(f, kind, expected):
    answer, event, reason = expected
    before, events = judge.Ledger(f.home).model(), len(f.events())
    got = attack(f, node_of(kind), kind)
    fleet.check(got.startswith(answer), f"{kind}: the client got \"{got}\", not \"{answer}\"")
    fleet.check(f.coordinator.alive(), f"{kind} ended the coordinator")
    fleet.check(judge.Ledger(f.home).model() == before, f"{kind} changed the model or the ledger")
    if event is not None:
        wait_for_event(f, event, reason, events)


def wait_for_event(f, kind, text, since):
    fleet.wait_for(f"an event {kind} with \"{text}\"; there are {f.events()[since:]}",
                   lambda: any(k == kind and text in t for k, _, t in f.events()[since:]), 8)


def check_keys(f):
    """A revoked key, an unknown one with the door closed and open, one that waits."""
    before = judge.Ledger(f.home).model()
    since = len(f.events())
    f.ok(f.coordinator_bin, "revoke", f.home, "once-known")
    got = attack(f, "once-known", "honest")  # "no session": it had connected before
    fleet.check(got in ("refused", "no session"), f"a revoked key is let in: {got}")
    wait_for_event(f, "key.refused", "revoked", since)
    for key in ("identity.key", "curve.key"):  # knows where and whom, with made up keys
        (f.state("key-thief") / key).unlink()
    since = len(f.events())
    fleet.check(attack(f, "key-thief", "honest") == "refused", "an unknown key is let in")
    wait_for_event(f, "key.refused", "unknown key", since)
    fleet.check(f.join("waits", f.token("--uses", 2)).returncode == 0, "a join without approval")
    fleet.check(attack(f, "waits", "honest") == "no session", "it has a session before approval")
    since = len(f.events())
    fleet.check(attack(f, "key-thief", "honest") == "no session", "an unknown key has a session")
    wait_for_event(f, "key.refused", "unknown key", since)
    fleet.check(judge.Ledger(f.home).model() == before, "a wrong key changed the model")


def check_replays(f):
    """One update twice, and in the next session the same key with other bytes: counts once."""
    got = attack(f, "twice", "honest_twice").split("\n")
    fleet.check(got == ["ack: accepted NONE", "ack: duplicate NONE"], f"replayed: {got}")
    fleet.check(len(judge.Ledger(f.home).updates) == 1, "a replayed update is in the ledger twice")
    got = attack(f, "twice", "honest_twice").split("\n")
    fleet.check(got[0].startswith("ack: refused"), f"a second update of one version: {got}")
    fleet.check(len(judge.Ledger(f.home).updates) == 1, "two updates of one node and version count")


def check_norm(f):
    """When the fleet's norms are known, one far above them is refused."""
    before, events = judge.Ledger(f.home).model(), len(f.events())
    got = attack(f, "giant", "far_norm")
    fleet.check(got == "ack: refused NORM", f"far_norm: {got}")
    fleet.check(judge.Ledger(f.home).model() == before, "far_norm changed the model")
    wait_for_event(f, "update.refused", "running median", events)


def check_honest_rounds(f):
    """An honest node works on, and the model is exactly the admitted updates' mean."""
    f.node("ada").start()
    fleet.wait_for("seven rounds of an honest node",
                   lambda: f.coordinator.text().count("round.closed") >= 7, 40)
    fleet.check(f.nodes["ada"].stop() == 0, "the honest node ends well")


def test(f):
    f.init(f.tiny_model("--layers", 4), "--steps", 2, "--sequence", 16, "--eval-tokens", 32,
           "--exits", 2, "--rank", 2, "--retry", 50, "--versions-kept", 1000,
           "--updates-per-round", 1)
    keeper = judge.Keeper(f)
    f.start_coordinator()
    keeper.start()
    enrol(f)
    for kind, expected in REFUSED.items():
        check_refused(f, kind, expected)
    check_keys(f)
    check_replays(f)
    check_honest_rounds(f)
    check_norm(f)
    fleet.check(f.coordinator.stop() == 0, "the coordinator ends well after all that")
    keeper.stop()
    ledger = judge.Ledger(f.home)
    rounds = judge.check_rounds(ledger)
    judge.check_layers(f.home, ledger, f.dir / "kept")
    fleet.check(f.coordinator_json("verify")["whole"], "verify")
    print(f"{len(REFUSED)} attacks, wrong keys, a replay, a giant; {rounds} rounds recomputed")


if __name__ == "__main__":
    fleet.main(test)
