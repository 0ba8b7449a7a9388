"""Runs the soak tests in rounds with seeds of their own for a given time: `make soak`.

    python tests/soak/soak.py [MINUTES]

A round is one file with one seed, which is printed before it: what a round finds, its command
finds again. Rounds run side by side, one a processor, and the file that has had the least time is
the next. The exit status is 1 where a round failed.
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

FOLDER = Path(__file__).parent
FILES = sorted(path.name for path in FOLDER.glob("test_*.py"))
# A round takes a minute or two; one that takes this long hangs.
LONGEST_ROUND = 1200


class Soak:
    """Time spent on each file, what runs now, and what failed."""

    def __init__(self, minutes):
        self.end = time.monotonic() + 60 * minutes
        self.spent = dict.fromkeys(FILES, 0.0)
        self.rounds = dict.fromkeys(FILES, 0)
        self.running = set()
        self.failed = []
        self.lock = threading.Lock()

    def work(self):
        """Run rounds until the time is over."""
        while time.monotonic() < self.end:
            with self.lock:
                free = [name for name in FILES if name not in self.running] or FILES
                name = min(free, key=self.spent.get)
                self.running.add(name)
            started = time.monotonic()
            self.round(name, random.SystemRandom().getrandbits(32))
            with self.lock:
                self.spent[name] += time.monotonic() - started
                self.running.discard(name)

    def round(self, name, seed):
        """One file with one seed; a round that is still running at the end is cut off."""
        path = os.path.relpath(FOLDER / name)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:benchmark", "--tb=short"]
        command += [path, f"--hypothesis-seed={seed}"]
        shown = f"pytest {path} --hypothesis-seed={seed}"
        print(f"{self.clock()} {shown}", flush=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        left = max(self.end - time.monotonic(), 1)
        try:
            output, _ = process.communicate(timeout=min(left, LONGEST_ROUND))
        except subprocess.TimeoutExpired:
            output = interrupted(process)
            if left < LONGEST_ROUND and not tells_of_failures(output):
                return
            output += f"\ninterrupted after {min(left, LONGEST_ROUND):.0f} seconds"
        with self.lock:
            self.rounds[name] += 1
            if process.returncode != 0:
                self.failed.append(shown)
                print(f"{output}\n{self.clock()} FAILED: {shown}", flush=True)

    def clock(self):
        return f"[{max(0, self.end - time.monotonic()) / 60:4.1f} minutes left]"


def interrupted(process):
    """What pytest says where it is interrupted, which tells of the failures so far."""
    process.send_signal(signal.SIGINT)
    try:
        return process.communicate(timeout=20)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()[0]


def tells_of_failures(output):
    """Whether a test has failed, by pytest's dots and letters."""
    lines = (line.partition(" [")[0] for line in output.splitlines())
    return any(set(line) <= set(".FEsx") and set(line) & set("FE") for line in lines)


def main(minutes):
    soak = Soak(minutes)
    workers = [threading.Thread(target=soak.work) for _ in range(os.cpu_count() or 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for name in FILES:
        print(f"{name}: {soak.rounds[name]} whole rounds, {soak.spent[name]:.0f} seconds")
    for command in soak.failed:
        print(f"FAILED: {command}")
    sys.exit(1 if soak.failed else 0)


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 15.0)
