"""Reads the seed of a round before the tests, whose settings depend on it, are imported."""

import soak_share


def pytest_configure(config):
    soak_share.seed = config.getoption("--hypothesis-seed")
