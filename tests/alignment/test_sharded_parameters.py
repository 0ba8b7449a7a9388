"""Aligner and optimizer on DTensors (FSDP2, HSDP, tensor parallelism) on 2, 3 and 4 processes give
what one process gives on the joined batch.

What the processes do is in sharded_ranks.py: each number of them is started once, for all checks.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sharded_ranks

RANKS = Path(__file__).with_name("sharded_ranks.py")

pytestmark = pytest.mark.slow


def names(world):
    checks = [check.__name__ for check in sharded_ranks.CHECKS[world]]
    return [*sharded_ranks.SETTINGS[world], *checks]


def start(world, folder):
    """Run the ranks; what they wrote, where one of them failed or took longer than 600 seconds."""
    hang = "import faulthandler; faulthandler.dump_traceback_later(600, exit=True); "
    program = hang + "import runpy, sys; runpy.run_path(sys.argv[0], run_name='__main__')"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(RANKS.parent), *sys.path])}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    outputs = [folder / f"{world}-{rank}.log" for rank in range(world)]
    processes = []
    for rank, output in enumerate(outputs):
        arguments = [str(RANKS), str(rank), str(world), str(folder)]
        command = [sys.executable, "-c", f"import sys; del sys.argv[0]; {program}", *arguments]
        with output.open("w") as log:
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        # Where one rank fails the others would wait for it.
        while all(process.poll() in (None, 0) for process in processes):
            if all(process.poll() == 0 for process in processes):
                return ""
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    codes = [process.returncode for process in processes]
    return f"ranks ended with {codes}\n" + "\n".join(one.read_text() for one in outputs)


@pytest.fixture(scope="module")
def passed(tmp_path_factory):
    """A function that starts ranks once; which checks each has passed, and what failed ones wrote.

    Two processes, which come first, save the checkpoint that three and four load.
    """
    folder = tmp_path_factory.mktemp("sharded")
    failures = {}

    def run(world):
        for each in (2, world):
            if each not in failures:
                failures[each] = start(each, folder)
        files = [folder / f"passed-{world}-{rank}" for rank in range(world)]
        lines = [file.read_text().splitlines() if file.exists() else [] for file in files]
        return lines, failures[world]

    return run


@pytest.mark.parametrize(
    ("world", "name"),
    [(world, name) for world in sorted(sharded_ranks.SETTINGS) for name in names(world)],
)
def test_sharded(world, name, passed):
    of_ranks, failure = passed(world)
    # It is the last rank that is killed.
    checked = of_ranks[:-1] if name.startswith("a_rank_is_killed") else of_ranks
    for rank, names_of_rank in enumerate(checked):
        assert name in names_of_rank, f"not passed by rank {rank}: {failure}"
