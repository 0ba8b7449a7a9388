"""Aligner and optimizer in several processes give what one process gives on the joined batch, whose
losses are the means of the processes' mean losses.
"""

import sys

import pytest
import torch
import torch.distributed as dist
from parallel_models import Problem, distance

from genrep_fast.alignment.data_parallel import all_reduce

JOINT, SEQUENTIAL, ONE_FORWARD = "joint", "sequential", "sequential, one forward"
HOOK = ("hook", {"find_unused_parameters": True})
STRATEGIES = (("no_sync", {}), ("sharded", {}), HOOK)
EACH = [(mode, *strategy) for strategy in STRATEGIES for mode in (JOINT, SEQUENTIAL)]
# How DistributedDataParallel keeps its gradients, where both losses reach every parameter.
WRAPPERS = [
    (JOINT, "auto", {"static_graph": True}),
    (SEQUENTIAL, "no_sync", {"static_graph": True, "gradient_as_bucket_view": True}),
    (ONE_FORWARD, "sharded", {"gradient_as_bucket_view": True}),
    (JOINT, "sharded", {"find_unused_parameters": True}),
    # Small buckets, of which there are several, built again after the first step.
    (JOINT, "hook", {"bucket_cap_mb": 1e-4}),
    (SEQUENTIAL, "hook", {"bucket_cap_mb": 1e-4}),
    (SEQUENTIAL, "hook", {"bucket_cap_mb": 1e-4, "gradient_as_bucket_view": True}),
]
# Name -> problem, numbers of processes, and how it is run in them.
PROBLEMS = {
    "float64": (Problem(), (2, 3, 4), EACH),
    "float32": (Problem(torch.float32), (2, 4), EACH),
    "one forward pass": (
        Problem(steps=10),
        (2,),
        [(ONE_FORWARD, *each) for each in STRATEGIES[:2]],
    ),
    "clipping, averages": (Problem(max_norm=0.05, averages=True, steps=20), (2, 3), EACH),
    "blocks, accumulation": (Problem(groups="block", micro_batches=3, steps=10), (2, 3), EACH),
    "pcgrad": (Problem(rule="pcgrad", groups="tensor", steps=10), (2,), EACH),
    "align, clipping": (
        Problem(fused=False, max_norm=0.05, steps=10),
        (2, 3),
        [run for run in EACH if run[0] != JOINT],
    ),
    "align": (Problem(fused=False, groups="block", steps=10), (2,), EACH),
    "wrappers": (Problem(reached=True, micro_batches=2, steps=10), (2,), WRAPPERS),
}


def check_problems(rank, size):
    for number, (name, (problem, sizes, runs)) in enumerate(PROBLEMS.items()):
        if size not in sizes:
            continue
        # Matrices by themselves, and all gradients side by side.
        all_reduce.LARGE = 2**22 if number % 2 else 100
        parameters, averages, stats = problem.alone(size)
        bound = 1e-12 if problem.dtype == torch.float64 else 1e-6
        for mode, reduce, options in runs:
            found = problem.together(rank, size, mode, reduce, **options)
            error = distance(found[0], parameters)
            print(name, mode, reduce, options, error, flush=True)
            assert error < bound
            if averages:
                assert distance(found[1], averages) < bound
            torch.testing.assert_close(
                found[2].cosine.double(), stats.cosine.double(), rtol=1e3 * bound, atol=1e3 * bound
            )
            check_same_everywhere(found[0] + found[1])


def check_same_everywhere(tensors):
    """To the last bit."""
    vector = torch.cat([tensor.flatten() for tensor in tensors])
    first = vector.clone()
    dist.broadcast(first, 0)
    assert torch.equal(first, vector)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
def test_several_processes_are_one_process_on_the_joined_batch(size, run_ranks):
    run_ranks(__file__, size, size)


if __name__ == "__main__":
    rank, store, size = int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    check_problems(rank, size)
    dist.destroy_process_group()
