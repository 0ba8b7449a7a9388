"""Every provider of every suite on its smallest case, by pytest-benchmark: `pytest benchmarks/`."""

import functools
from importlib import import_module

import pytest

from genrep_fast.benchmarks.suite import SUITES

MODULES = {suite: import_module(f"genrep_fast.benchmarks.bench_{suite}") for suite in SUITES}


@functools.cache
def smallest_case(suite):
    return MODULES[suite].CASES[MODULES[suite].SMALLEST]()


@pytest.mark.parametrize(
    ("suite", "provider"),
    [(suite, name) for suite in SUITES for name in smallest_case(suite).providers],
)
def test_provider(benchmark, suite, provider):
    provider = smallest_case(suite).providers[provider]
    provider.error()  # raises where it is too large
    benchmark(provider.run)
