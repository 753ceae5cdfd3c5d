"""Goal: whatever is wrong with what a command is given, it ends with status 1 or 2, says so in
exactly one line that names the trouble, prints nothing else, and leaves no partial output behind.

Method: a table of command lines with what their line must say, for every command of both programs.
Before and after each, the folder is listed: nothing may have come.
"""
import pathlib
import re
import struct

import fleet

GGML_IQ2_XXS = 16  # published by others, not read here


def spoil_type(source, target, name, number):
    """The same model with another type for one tensor: what the file says is the trouble."""
    data = bytearray(source.read_bytes())
    at = data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)
    dims, = struct.unpack_from("<I", data, at)
    struct.pack_into("<I", data, at + 4 + 8 * dims, number)
    target.write_bytes(data)


class Files:
    """Good and bad files of every sort, made once."""

    def __init__(self, f):
        d = f.dir
        self.model = f.tiny_model("--layers", 4)
        self.plain = d / "plain.gguf"
        self.text = d / "good.txt"
        self.text.write_text(fleet.text_of("good", 6000))
        self.adapter = d / "good.adapter"
        f.ok(f.node_bin, "tune", self.model, "--data", self.text, "--out", self.adapter,
             "--steps", 2, "--sequence", 16, "--threads", 1)
        self.other = d / "other.gguf"
        f.ok(f.bin / "make_tiny_model", self.other, "--layers", 4, "--seed", 5)
        self.no_words = d / "no-words.gguf"
        f.ok(f.bin / "make_tiny_model", self.no_words, "--layers", 4, "--no-tokenizer")
        self.falcon = d / "falcon.gguf"
        f.ok(f.bin / "make_tiny_model", self.falcon, "--layers", 4, "--architecture", "falcon")
        self.magic = self._write(d / "magic.gguf", b"NOPE" + self.model.read_bytes()[4:])
        self.cut = self._write(d / "cut.gguf", self.model.read_bytes()[:3000])
        self.empty = self._write(d / "empty.txt", b"")
        self.latin = self._write(d / "latin.txt", "caf\u00e9 ".encode("latin-1") * 200)
        self.blank = self._write(d / "blank.txt", b" \n\n\n")
        self.nowhere = d / "nowhere" / "file"
        self.missing = d / "missing"
        self.folder = d / "folder"
        self.folder.mkdir()
        self.typed = d / "typed.gguf"
        spoil_type(self.plain, self.typed, b"blk.1.ffn_up.weight", GGML_IQ2_XXS)

    @staticmethod
    def _write(path, data):
        path.write_bytes(data)
        return path


def listing(f):
    return sorted(str(p.relative_to(f.dir)) for p in f.dir.rglob("*") if p.name != "lock")


def check_refused(f, program, args, says):
    name = program.name
    before = listing(f)
    done = f.run(program, *args, timeout=60)
    line = " ".join(map(str, args))[:200]
    lines = [x for x in done.err.split("\n") if x]
    fleet.check(done.returncode in (1, 2), f"{name} {line}: status {done.returncode}: {done.err}")
    fleet.check(len(lines) == 1, f"{name} {line}: {len(lines)} lines: {done.err!r}")
    fleet.check(lines[0].startswith(f"{name}: {args[0]}: ") or args[0] not in COMMANDS[name],
                f"{name} {line}: does not say who speaks: {lines[0]}")
    fleet.check(re.search(says, lines[0]), f"{name} {line}: does not say \"{says}\": {lines[0]}")
    fleet.check(done.out == "", f"{name} {line}: prints {done.out!r}")
    came = set(listing(f)) - set(before)
    fleet.check(not came, f"{name} {line}: left {came}")


def model_cases(x):
    """What can be wrong with a model, for every command that reads one."""
    return [(x.missing, "No such file"), (x.folder, "regular file|directory"),
            (x.magic, "GGUF"), (x.empty, "GGUF|empty"), (x.cut, "cut|end|past|outside|short"),
            (x.falcon, "falcon"), (x.typed, "IQ2_XXS|type 16")]


def node_cases(x, f):
    out = x.folder / "out"
    rest = {
        "inspect": [],
        "compress": ["--out", out, "--calibration-tokens", 64],
        "plan": ["--data", x.text],
        "tune": ["--data", x.text, "--out", out, "--steps", 1],
        "eval": ["--text", x.text],
        "generate": ["--prompt", "hello", "--tokens", 1],
        "bench": [],
    }
    for command, more in rest.items():
        for path, says in model_cases(x):
            yield [command, path, *more], says
    for command in ("compress", "plan", "tune", "eval", "generate"):
        yield [command, x.no_words, *rest[command]], "tokenizer"
    for command, option in (("compress", "--calibration"), ("plan", "--data"), ("tune", "--data"),
                            ("eval", "--text")):
        more = [a for a in rest[command] if a not in ("--data", "--text", x.text)]
        model = x.plain if command == "compress" else x.model
        for path, says in ((x.missing, "No such file|no text|there is no"), (x.empty, "empty|no text"),
                           (x.latin, "UTF-8"), (x.blank, "too little|empty|no text|too short|tokens")):
            yield [command, model, *more, option, path], says
    yield ["tune", x.model, "--data", x.folder, "--out", out], "no text|empty|nothing"
    yield from compress_cases(x, out)
    yield from tune_cases(x, out)
    yield from adapter_cases(x)
    yield ["generate", x.model, "--prompt", "x" * 4000], "context|512|long"
    yield ["generate", x.model, "--prompt", b"\xff\xfe".decode("latin-1").encode("latin-1")
           .decode("utf-8", "surrogateescape")], "UTF-8"
    yield from agent_cases(x, f)


def compress_cases(x, out):
    base = ["compress", x.plain]
    yield [*base], "--out"
    yield [*base, "--out", x.nowhere], "No such file"
    yield [*base, "--out", x.folder], "directory|folder"
    for option, value in (("--bits", "1"), ("--bits", "17"), ("--bits", "many"), ("--sparsity", "1.5"),
                          ("--policy", "best"), ("--prune", "all"), ("--threads", "-1")):
        yield [*base, "--out", out, option, value], option.strip("-") + "|" + re.escape(value)
    yield ["compress", x.model, "--out", out], "compressed already|is compressed"
    yield [*base, "--out", out, "--colour", "red"], "unknown option --colour"


def tune_cases(x, out):
    for base in (["plan", x.model, "--data", x.text],
                 ["tune", x.model, "--data", x.text, "--out", out]):
        yield [*base, "--window", "99"], "window"
        yield [*base, "--memory", "1M"], r"at least|smallest|needs|with --memory"
        yield [*base, "--memory", "lots"], "memory"
        yield [*base, "--exits", "99"], "exits"
        yield [*base, "--sequence", "1"], "sequence"
        yield [*base, "--rank", "0"], "rank"
    base = ["tune", x.model, "--data", x.text]
    yield [*base], "--out"
    yield [*base, "--out", x.nowhere, "--steps", "1", "--sequence", "16"], "No such file"
    yield [*base, "--out", out, "--steps", "0"], "steps"


def adapter_cases(x):
    for command in (["eval", x.model, "--text", x.text],
                    ["generate", x.model, "--prompt", "a", "--tokens", 1],
                    ["tune", x.model, "--data", x.text, "--out", x.folder / "out"]):
        yield [*command, "--adapter", x.missing], "No such file"
        yield [*command, "--adapter", x.text], "adapter"
        yield [*command, "--adapter", x.empty], "adapter"
    yield ["eval", x.other, "--text", x.text, "--adapter", x.adapter], "other weights|another model"


def agent_cases(x, f):
    state = x.folder  # there, and empty of keys: nothing may be made in it by what fails early
    yield ["status", "--state", state], "no agent"
    yield ["run", "--state", x.nowhere, "--data", x.text], "no fleet"
    yield ["run", "--state", state], "--data|no text"
    yield ["join"], "URL"
    yield ["join", "http://example", "--state", state], "join URL|fleetune://"
    yield ["join", "fleetune://127.0.0.1:1/aaaa", "--state", state], "join URL|fleetune://|damaged"
    yield ["doctor", "more"], "too many"
    yield ["tunne"], "did you mean 'tune'"
    yield ["tune", x.model, "--dta", x.text], "did you mean --data"


def coordinator_cases(x, f):
    home = f.home
    new = f.dir / "new"
    for path, says in model_cases(x):
        if path not in (x.falcon, x.typed):  # it hands the model out, and does not read its layers
            yield ["init", new, "--model", path], says
    yield ["init", new], "--model"
    yield ["init", home, "--model", x.model], "already"
    yield ["init", x.nowhere, "--model", x.model], "No such file"
    yield ["init", new, "--model", x.model, "--exits", "5"], "exits"
    yield ["init", new, "--model", x.model, "--lr", "-1"], "lr"
    yield ["init", new, "--model", x.model, "--windows", "some"], "windows"
    yield ["init", new, "--model", x.model, "--server-optimiser", "sgd"], "fedavg"
    yield ["init", new, "--model", x.model, "--clip-factor", "50"], "refuse-factor"
    for command in ("run", "token", "nodes", "status", "rounds", "verify"):
        yield [command], "DIR"
        yield [command, x.missing], "init"
        yield [command, x.folder], "init"
    yield ["export", x.missing, "--out", new], "init"
    yield ["export", home], "--out"
    for command in ("approve", "revoke"):
        yield [command, home], "NODE"
        yield [command, home, "nobody"], "nobody"
        yield [command, x.missing, "nobody"], "init"
    yield ["token", home, "--uses", "0"], "uses"
    yield ["aprove", home, "x"], "did you mean 'approve'"


def settings_cases(f):
    """The settings file: the line is named."""
    ini = f.home / "coordinator.ini"
    good = ini.read_text()
    for spoiled, says in ((good + "\ncolour = red\n", "coordinator.ini.*colour"),
                          (good.replace("steps = ", "stepps = "), "did you mean.*steps|steps"),
                          (re.sub(r"(?m)^rank = .*", "rank = 900", good), "rank"),
                          (re.sub(r"(?m)^exits = .*", "exits = 2", good), "exits")):
        ini.write_text(spoiled)
        check_refused(f, f.coordinator_bin, ["run", f.home], says)
    ini.write_text(good)
    database = f.home / "state.db"
    whole = database.read_bytes()
    database.write_bytes(b"SQLite format 3\0" + bytes(4080))
    for command in ("run", "status", "verify"):
        check_refused(f, f.coordinator_bin, [command, f.home], "state|database|damaged|state.db")
    database.write_bytes(whole)


COMMANDS = {"fleetune-node": "inspect compress plan tune eval generate bench doctor join run status",
            "fleetune-coordinator": "init run token nodes approve revoke status rounds verify export"}


def test(f):
    x = Files(f)
    count = 0
    for args, says in node_cases(x, f):
        check_refused(f, f.node_bin, args, says)
        count += 1
    f.init(x.model, "--exits", 4)
    for args, says in coordinator_cases(x, f):
        check_refused(f, f.coordinator_bin, args, says)
        count += 1
    settings_cases(f)
    print(f"{count} wrong command lines refused, each in one line")


if __name__ == "__main__":
    fleet.main(test)
