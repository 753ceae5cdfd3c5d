"""Drives the program swarm: many honest nodes in one process, and what it says of them."""
import threading

import fleet

GAIN = 64  # hidden size of the tiny model

def memory(process):
    """Resident bytes of a process now, and at most."""
    fields = {}
    with open(f"/proc/{process.child.pid}/status", encoding="ascii") as f:
        for line in f:
            key, _, value = line.partition(":")
            fields[key] = value.split()
    return int(fields["VmRSS"][0]) * 1024, int(fields["VmHWM"][0]) * 1024


class Swarm:
    def __init__(self, f, nodes, count, rounds, name="swarm", url=None, prefix=()):
        url = url or f.token("--auto-approve", "--uses", nodes)
        self.process = fleet.Process([*prefix, f.bin / "swarm", url, nodes, count, GAIN, rounds,
                                      name],
                                     f.dir / f"{name}.swarm")
        f.processes.append(self.process)
        self.now = {}
        self.history = []  # (seconds of the monotonic clock, counts)

    def start(self):
        self.process.start()
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self):
        with open(self.process.log, encoding="ascii") as f:
            line = ""
            while self.process.alive():
                line += f.readline()
                if not line.endswith("\n"):
                    threading.Event().wait(0.02)
                    continue
                words = line.split()
                line = ""
                if len(words) == 11 and words[0].isdigit():
                    now = {words[i]: int(words[i + 1]) for i in range(1, 11, 2)}
                    self.history.append((int(words[0]) / 1000, now))
                    self.now = now

    def wait(self, seconds, **least):
        """Until each of these counts is at least as large."""
        def there():
            fleet.check(self.process.alive(), f"the swarm ended: {self.process.text()[-300:]}")
            return all(self.now.get(k, 0) >= v for k, v in least.items())
        try:
            fleet.wait_for(f"{least}", there, seconds)
        except fleet.Failure as e:
            raise fleet.Failure(f"{e}; there are {self.now}") from None
