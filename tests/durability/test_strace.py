"""Goal: the kernel's own word for what disk.c does by a library: SIGKILL at, and errors of, the K-th
system call of every kind on the paths of init, token, backup and restore.

Method: each command runs under `strace -e inject`, for K = 1, 2, 3 ... until it gets through. After a
kill or an error it is run again without strace; then verify must find the folder whole. A status
other than the kill's or 1 with a reason is a failure. Skipped where strace is missing or forbidden.

FLEETUNE_STRACE_STEP: every so manieth K (4).
"""
import os
import pathlib
import shutil
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "e2e"))
import fleet  # noqa: E402

CALLS = ("openat", "pwrite64", "write", "fsync,fdatasync", "ftruncate", "rename,renameat,renameat2",
         "unlink,unlinkat", "mkdir,mkdirat", "link,linkat")
FATES = ("signal=KILL", "error=ENOSPC", "error=EIO")


def strace(calls, fate, k):
    return ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={calls}",
            "-e", f"inject={calls}:{fate}:when={k}"]


def run(args):
    return subprocess.run([str(a) for a in args], capture_output=True, timeout=60, check=False,
                          stdin=subprocess.DEVNULL)


class Path:
    """One command: what it needs before, what must be whole after it."""

    def __init__(self, f, name, prepare, command, whole):
        self.f, self.name, self.prepare, self.command, self.whole = f, name, prepare, command, whole
        self.points, self.ended = 0, 0

    def point(self, calls, fate, k):
        """False when the command made fewer calls than that."""
        self.prepare()
        done = run(strace(calls, fate, k) + self.command)
        self.points += 1
        if done.returncode == 0:
            return False
        self.ended += 1
        where = f"{self.name} {calls} {fate}:{k}"
        killed = fate == "signal=KILL"
        fleet.check(done.returncode in ((137, -9) if killed else (1,)),
                    f"{where}: status {done.returncode}: {done.stderr[-300:]}")
        said = b"fleetune-coordinator: " in done.stderr or calls == "write"  # so it is written too
        fleet.check(killed or said, f"{where}: without a reason: {done.stderr}")
        again = run(self.command)
        fleet.check(again.returncode in (0, 1), f"{where}: again: {again.stderr[-300:]}")
        verified = run([self.f.coordinator_bin, "verify", self.whole])
        fleet.check(verified.returncode == 0, f"{where}: {verified.stdout} {verified.stderr}")
        return True

    def all_points(self, step):
        for calls in CALLS:
            for fate in FATES:
                misses, k = 0, 1
                while misses < 3 and k < 400:  # an error that does no harm is no end
                    misses = 0 if self.point(calls, fate, k) else misses + 1
                    k += step


def test(f):
    may = shutil.which("strace") and run(strace("openat", "error=EIO", 65535) + ["true"])
    if not may or may.returncode != 0:
        fleet.skip("no strace that may trace")
    step = int(os.environ.get("FLEETUNE_STRACE_STEP", "4"))
    model = f.tiny_model("--layers", 2)
    base, home, copy, back = f.dir / "base", f.dir / "home", f.dir / "copy", f.dir / "back"
    c = f.coordinator_bin
    fleet.check(run([c, "init", base, "--model", model, "--exits", 2]).returncode == 0, "init")

    def clean(*folders):
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(f"{folder}.part", ignore_errors=True)

    def fresh():
        clean(home, copy, back)
        shutil.copytree(base, home)

    def with_copy():
        fresh()
        fleet.check(run([c, "backup", home, copy]).returncode == 0, "backup")

    paths = [Path(f, "init", lambda: clean(home), [c, "init", home, "--model", model, "--exits", 2],
                  home),
             Path(f, "token", fresh, [c, "token", home], home),
             Path(f, "backup", fresh, [c, "backup", home, copy], copy),
             Path(f, "restore", with_copy, [c, "restore", copy, back], back)]
    for p in paths:
        p.all_points(step)
        print(f"{p.name}: {p.points} points, {p.ended} ended it")
        fleet.check(p.ended > 10, f"{p.name}: only {p.ended} points ended it")


if __name__ == "__main__":
    fleet.main(test)
