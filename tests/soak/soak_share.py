"""How much of each soak test runs: a small fixed share among all tests, or a round with a seed.

``pytest tests/soak/FILE --hypothesis-seed=N`` runs the round of seed N, which draws the same
examples every time; `make soak` runs such rounds, one after the other, with seeds of their own.
Without a seed the few examples of the fixed share run, always the same ones.
"""

import getpass
import random
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings
from hypothesis.configuration import set_hypothesis_home_dir

# What hypothesis remembers of sources and of Unicode; examples are not kept.
set_hypothesis_home_dir(Path(tempfile.gettempdir(), f"hypothesis-{getpass.getuser()}"))

# Of the round, set by conftest.py; None for the fixed share.
seed = None


def examples(share, of_a_round, **options):
    """Settings of a hypothesis test: how many examples the fixed share and a round have."""
    return settings(
        max_examples=share if seed is None else of_a_round,
        derandomize=seed is None,
        database=None,
        deadline=None,
        print_blob=True,
        # One failure at a time, made small, but not explained, which takes as long again.
        report_multiple_bugs=False,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        **options,
    )


def seeds(share, of_a_round):
    """Seeds of as many cases of a test that draws by itself."""
    if seed is None:
        return list(range(share))
    generator = random.Random(str(seed))
    return [generator.getrandbits(32) for _ in range(of_a_round)]
