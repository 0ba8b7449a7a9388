"""Modules of 0.1.0 under their old names."""

import importlib
import pickle
import subprocess
import sys
import warnings

import pytest

import genrep_fast as gf
from genrep_fast._moved import MOVED

# A name of 0.1.0 for each module that has moved, or whose names have.
NAMES = {
    "backends": "use_backend",
    "chain_bank": "ChainBank",
    "estimators": "ElboEstimator",
    "evaluation.classifier": "fit_classifier",
    "evaluation.figures": "draw_samples",
    "evaluation.report": "write_report",
    "posterior_scorer": "PosteriorScorer",
    "training.progress": "StageProgress",
    "aligned_adamw": "AlignedAdamW",
    "genrep_weighting": "GenRepWeighting",
    "gradient_aligner": "GradientAligner",
    "rules": "resolve_rule",
}


@pytest.fixture
def forgotten():
    """Old modules are imported anew."""
    for old in MOVED:
        if sys.modules.pop(f"genrep_fast.{old}", None) is not None:
            package, _, name = f"genrep_fast.{old}".rpartition(".")
            delattr(sys.modules[package], name)


@pytest.mark.parametrize("old", sorted(MOVED))
def test_an_old_module_has_the_names_of_the_new_one_and_warns(forgotten, old):
    new = MOVED[old][0]
    with pytest.warns(DeprecationWarning, match=rf"genrep_fast\.{old} has moved to .*{new}"):
        module = importlib.import_module(f"genrep_fast.{old}")
    home = importlib.import_module(f"genrep_fast.{new}")
    assert getattr(module, NAMES[old]) is getattr(home, NAMES[old])


def test_the_warning_is_about_the_line_that_imports(forgotten):
    with pytest.warns(DeprecationWarning) as told:
        from genrep_fast.posterior_scorer import PosteriorScorer
    assert PosteriorScorer is gf.PosteriorScorer
    assert [warning.filename for warning in told] == [__file__]


def test_old_modules_are_attributes_as_they_were(forgotten):
    with pytest.warns(DeprecationWarning):
        assert gf.chain_bank.ChainBank is gf.ChainBank


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("coefficients", "StepCoefficients", "coefficients.tables.StepCoefficients"),
        ("coefficients", "ReverseKernel", "coefficients.transitions.ReverseTransition"),
        ("coefficients", "reverse_kernel", "coefficients.transitions.reverse_transition"),
        ("ops.scoring", "posterior", "ops.posterior.posterior"),
        ("ops.scoring", "fit_temperature", "ops.posterior.fit_temperature"),
        ("training.run", "run", "training.run.train_and_evaluate"),
    ],
)
def test_a_name_that_has_moved_is_found_and_warns(module, old, new):
    found = importlib.import_module(f"genrep_fast.{module}")
    with pytest.warns(DeprecationWarning, match=new):
        value = getattr(found, old)
    home, name = new.rsplit(".", 1)
    assert value is getattr(importlib.import_module(f"genrep_fast.{home}"), name)
    with pytest.raises(AttributeError, match="nothing"):
        found.nothing  # noqa: B018


def test_pickles_that_name_old_modules_are_read(forgotten):
    with pytest.warns(DeprecationWarning):
        found = pickle.loads(b"\x80\x02cgenrep_fast.chain_bank\nChainSettings\n.")
    from genrep_fast.scoring.chain_settings import ChainSettings

    assert found is ChainSettings


def test_what_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError, match=r"genrep_fast\.painter"):
        importlib.import_module("genrep_fast.painter")
    with pytest.raises(AttributeError):
        gf.painter  # noqa: B018


def test_the_package_itself_uses_no_old_name():
    program = "import genrep_fast, genrep_fast.training, genrep_fast.ops.scoring, genrep_fast.cli"
    flags = ["-W", "error::DeprecationWarning:genrep_fast"]
    subprocess.run([sys.executable, *flags, "-c", program], check=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.import_module("genrep_fast.scoring.chain_bank")
