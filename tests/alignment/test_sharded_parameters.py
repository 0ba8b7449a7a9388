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
def started(tmp_path_factory):
    """For each number of processes what they wrote if one failed, and the folder of all."""
    folder = tmp_path_factory.mktemp("sharded")
    # Two processes save the checkpoint that three and four load.
    return {world: start(world, folder) for world in sorted(sharded_ranks.SETTINGS)}, folder


@pytest.mark.parametrize(
    ("world", "name"),
    [(world, name) for world in sorted(sharded_ranks.SETTINGS) for name in names(world)],
)
def test_sharded(world, name, started):
    failures, folder = started
    for rank in range(world):
        # It is the rank that is killed.
        if name.startswith("a_rank_is_killed") and rank == world - 1:
            continue
        passed = folder / f"passed-{world}-{rank}"
        lines = passed.read_text().splitlines() if passed.exists() else []
        assert name in lines, f"not passed by rank {rank}: {failures[world]}"
