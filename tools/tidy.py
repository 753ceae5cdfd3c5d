"""Checks what the compiler does not: module layering, third-party headers, lengths, banned calls."""
import pathlib
import re
import subprocess
import sys

# module -> (its files, the modules it may include). Only modules named earlier: no cycles.
MODULES = {
    "base": (["common/base", "common/status", "common/checked", "common/arena", "common/fault",
              "common/plant"], ""),
    "sys": (["common/clock", "common/rng", "common/log", "common/file", "common/pool",
             "common/conf", "common/json", "common/cli", "common/progress"], "base"),
    "crypto": (["common/crypto"], "base"),
    "kernels": (["kernels/*"], "base"),
    "wire": (["proto/frame", "proto/codec*", "proto/update"], "base"),
    "channel": (["proto/channel", "proto/seal", "proto/invite"], "base crypto wire"),
    "link": (["proto/link*"], "base sys"),
    "model": (["node/model/*"], "base sys kernels"),
    "luc": (["node/luc/*"], "base sys kernels model"),
    "exits": (["node/exits/*"], "base kernels model"),
    "tune": (["node/tune/*"], "base sys kernels model exits"),
    "schedule": (["node/schedule/*"], "base sys kernels"),
    "client": (["node/client/*"], "base wire channel"),
    "serve": (["node/serve/*"], "base sys model exits"),
    "round": (["coordinator/round*", "coordinator/registry"], "base wire"),
    "aggregate": (["coordinator/aggregate*"], "base kernels wire round"),
    "store": (["coordinator/store*"], "base sys crypto"),
    "web": (["coordinator/web*"], "base sys"),
    "node program": (["node/main", "node/loop", "node/worker", "node/state", "node/prefix_disk",
                      "node/commands/*"],
                     "base sys crypto kernels wire channel link model luc exits tune schedule "
                     "client serve"),
    "coordinator": (["coordinator/main", "coordinator/loop*", "coordinator/commands/*",
                             "coordinator/settings", "coordinator/shape", "coordinator/keys"],
                            "base sys crypto kernels wire channel link round aggregate store web"),
    # The whole federation in one process: both pure cores, the loop and the store.
    "simulator": (["sim/*"],
                  "base sys crypto wire channel link client round aggregate store "
                  "coordinator"),
}
FREE = ("tests/", "bench/")  # may include any module
ONLY_IN = {  # third-party header -> the only files that may include it
    r"sodium\.h": ["common/crypto*.c"],
    r"zmq\.h": ["proto/link.c"],
    r".*\.pb-c\.h": ["proto/codec*.c"],
    r"cblas\.h": ["kernels/blas.c"],
    r"immintrin\.h": ["kernels/x86/*"],
    r"arm_neon\.h": ["kernels/arm/*"],
    r"sqlite3\.h": ["coordinator/store*.c"],
    r"ini\.h": ["common/conf.c"],
    r"jansson\.h": ["common/json.c"],
    r"qrencode\.h": ["coordinator/commands/token.c"],
    r"microhttpd\.h": ["coordinator/web*.c", "node/serve/*.c"],
    r"getopt\.h": ["common/cli.c"],
    r"cmocka\.h": ["tests/check.h"],
}
BANNED = r"\b(strcpy|strcat|sprintf|atoi|atol|gets|strtok|rand|alloca|system)\s*\("
PURE = ("kernels/", "node/client/", "proto/frame", "proto/codec", "proto/update", "proto/channel",
        "proto/seal", "proto/invite",
        "coordinator/round", "coordinator/registry")
IMPURE = r"\b(malloc|calloc|realloc|fopen|open|socket|time|clock_gettime|pthread_\w+|printf)\s*\("
LINE_MAX, FUNC_MAX, FILE_MAX = 100, 70, 700


def stem_matches(stem, pattern):
    return stem.startswith(pattern[:-1]) if pattern.endswith("*") else stem == pattern


def module_of(path):
    stem = re.sub(r"\.[ch]$", "", path)
    for name, (files, _) in MODULES.items():
        if any(stem_matches(stem, f) for f in files):
            return name
    return None


def check_include(rel, target):
    name = target.split("/")[-1]
    for pattern, where in ONLY_IN.items():
        if re.fullmatch(pattern, name):
            ok = any(pathlib.PurePosixPath(rel).match(w) for w in where)
            return None if ok else f"{target} belongs only in {', '.join(where)}"
    if rel.startswith(FREE) or "/" not in target:
        return None
    source, dest = module_of(rel), module_of(target)
    if source is None or dest is None:
        return f"{rel if source is None else target} is in no module"
    if dest != source and dest not in MODULES[source][1].split():
        return f"module {source} may not include {dest} ({target})"
    return None


def check_lengths(rel, lines):
    bad, opened = [], None
    if len(lines) > FILE_MAX:
        bad.append(f"{rel}: {len(lines)} lines")
    for n, line in enumerate(lines, 1):
        if len(line) > LINE_MAX:
            bad.append(f"{rel}:{n}: {len(line)} columns")
        if re.match(r"[A-Za-z_].*\)\s*\{$", line) or re.match(r" +.*\)\s*\{$", line) and opened is None:
            opened = n
        if line == "}" and opened:
            if n - opened + 1 > FUNC_MAX:
                bad.append(f"{rel}:{opened}: function of {n - opened + 1} lines")
            opened = None
    return bad


def check_file(rel, lines):
    bad = check_lengths(rel, lines)
    for n, line in enumerate(lines, 1):
        m = re.match(r'\s*#\s*include\s+([<"])([^>"]+)', line)
        if m and (m[1] == '"' or "/" not in m[2]):
            problem = check_include(rel, m[2])
            if problem:
                bad.append(f"{rel}:{n}: {problem}")
        code = re.sub(r'"(\\.|[^"\\])*"', '""', line.split("//")[0])
        if re.search(BANNED, code):
            bad.append(f"{rel}:{n}: banned call: {line.strip()}")
        if rel.startswith(PURE) and re.search(IMPURE, code):
            bad.append(f"{rel}:{n}: a pure module may not do that: {line.strip()}")
    return bad


def sources(root):
    """Tracked and new files; a build folder anywhere in the tree is none of our business."""
    git = subprocess.run(["git", "-C", str(root), "ls-files", "-co", "--exclude-standard", "*.[ch]"],
                         capture_output=True, text=True, check=False)
    if git.returncode == 0 and git.stdout:
        return [p for p in sorted(git.stdout.split()) if (root / p).exists()]
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*.[ch]")
                  if not p.relative_to(root).as_posix().startswith("build/"))


def main(root):
    seen = set()
    for name, (_, may) in MODULES.items():
        assert set(may.split()) <= seen, f"{name} names a later module"
        seen.add(name)
    bad = []
    for rel in sources(root):
        bad += check_file(rel, (root / rel).read_text().splitlines())
    print("\n".join(bad) or "tidy: clean")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1])))
