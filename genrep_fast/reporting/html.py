"""metrics.json, the figures and a self-contained report.html, each written whole or not at all."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..files import write_atomically
from ..names import printable, shortened
from .classes import MAX_CLASSES
from .figures import Illustration

# Characters of a class's name.
LONGEST_NAME = 100
# Names of values that could not be measured; the others are counted.
_MAX_UNDEFINED = 40


class Row(NamedTuple):
    """A line of the report's summary.

    Attributes:
        section, key: where the value lies in the metrics.
        name: of the value, for people.
        format: as `str.format` takes it.
        meaning: in a few words.
        aim: what the value is held against.
    """

    section: str
    key: str
    name: str
    format: str
    meaning: str
    aim: str = ""


SUMMARY = (
    Row(
        "head",
        "top1",
        "Head: top-1 accuracy",
        "{:.2%}",
        "test images that the classification head gets right, in one pass",
        "≥ 98.5%",
    ),
    Row(
        "head",
        "nll",
        "Head: negative log-likelihood",
        "{:.4f}",
        "nats for each test image; 0 is certain and right",
    ),
    Row(
        "head",
        "ece",
        "Head: expected calibration error",
        "{:.4f}",
        "mean gap between confidence and accuracy; 0 is honest",
        "≤ 0.02",
    ),
    Row(
        "posterior",
        "top1",
        "Posterior: top-1 accuracy",
        "{:.2%}",
        "the same by the generative posterior p(y|x)",
        "≥ 98.5%",
    ),
    Row(
        "posterior",
        "nll",
        "Posterior: negative log-likelihood",
        "{:.4f}",
        "with the fitted temperature",
    ),
    Row(
        "posterior",
        "ece",
        "Posterior: expected calibration error",
        "{:.4f}",
        "with the fitted temperature",
        "≤ 0.02",
    ),
    Row(
        "posterior",
        "temperature",
        "Posterior: temperature",
        "{:.4g}",
        "fitted on the calibration split by negative log-likelihood",
    ),
    Row(
        "posterior",
        "uncalibrated_nll",
        "Posterior: uncalibrated negative log-likelihood",
        "{:.4f}",
        "at temperature 1",
    ),
    Row(
        "posterior",
        "uncalibrated_ece",
        "Posterior: uncalibrated calibration error",
        "{:.4f}",
        "at temperature 1",
    ),
    Row(
        "posterior",
        "network_evaluations_per_image",
        "Posterior: network evaluations an image",
        "{:.0f}",
        "classes × steps",
    ),
    Row(
        "generation",
        "recognition_rate",
        "Samples: recognition rate",
        "{:.2%}",
        "generated images that an independent classifier, fitted on real training images alone, "
        "takes for the class asked for",
        "≥ 98%",
    ),
    Row(
        "classifier",
        "test_top1",
        "Independent classifier: top-1 accuracy",
        "{:.2%}",
        "on real test images, for comparison",
    ),
    Row(
        "generation",
        "frechet_distance",
        "Samples: Fréchet distance",
        "{:.4g}",
        "to the test images, in the classifier's feature space",
    ),
    Row(
        "generation",
        "frechet_distance_of_training_subset",
        "Floor: Fréchet distance of real images",
        "{:.4g}",
        "of equally many training images to the test images, mean over random subsets",
    ),
    Row(
        "generation",
        "frechet_ratio",
        "Samples: Fréchet distance over the floor",
        "{:.2f}",
        "1 is as close as real images",
        "≤ 2",
    ),
    Row(
        "generation",
        "nearest_training_distance",
        "Samples: distance to the nearest training image",
        "{:.4g}",
        "median, in pixel space",
    ),
    Row(
        "generation",
        "nearest_training_distance_of_test",
        "The same of test images",
        "{:.4g}",
        "median, in pixel space",
    ),
    Row(
        "generation",
        "nearest_training_ratio",
        "Samples: nearest distance over that of test images",
        "{:.2f}",
        "0 is memorised",
        "≥ 0.8",
    ),
    Row(
        "out_of_distribution",
        "uniform_auroc",
        "Evidence: AUROC against random images",
        "{:.4f}",
        "pixels uniform in [-1, 1]",
        "≥ 0.99",
    ),
    Row(
        "out_of_distribution",
        "shuffled_auroc",
        "Evidence: AUROC against shuffled images",
        "{:.4f}",
        "pixels permuted",
        "≥ 0.99",
    ),
)


def write_report(
    output_dir: Path, metrics: dict[str, Any], illustrations: Sequence[Illustration]
) -> None:
    """Write ``figures/*.png``, ``report.html`` and, last, ``metrics.json`` to `output_dir`.

    The folder is created where missing.
    """
    (output_dir / "figures").mkdir(parents=True, exist_ok=True)
    for illustration in illustrations:
        write_atomically(output_dir / "figures" / f"{illustration.name}.png", illustration.png)
    write_atomically(output_dir / "report.html", render_report(metrics, illustrations))
    text = json.dumps(metrics, indent=2, allow_nan=False)
    write_atomically(output_dir / "metrics.json", f"{text}\n")


def render_report(metrics: dict[str, Any], illustrations: Sequence[Illustration]) -> str:
    """The report as one HTML page without links to other files."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined
    )
    titles = {
        "sizes": "Sizes",
        "seconds": "Wall time in seconds",
        "teacher": "Distillation teacher",
    }
    rates = metrics["generation"]["recognition_rate_per_class"].items()
    if len(rates) > MAX_CLASSES:
        # What was not measured comes last.
        rates = sorted(rates, key=lambda item: math.inf if item[1] is None else item[1])
        rates = rates[:MAX_CLASSES]
    undefined = [shortened(name, LONGEST_NAME) for name in metrics["undefined"][:_MAX_UNDEFINED]]
    if len(metrics["undefined"]) > _MAX_UNDEFINED:
        undefined.append(f"and {len(metrics['undefined']) - _MAX_UNDEFINED} more")
    return environment.get_template("report.html.jinja").render(
        summary=[(row, _formatted(metrics[row.section][row.key], row.format)) for row in SUMMARY],
        metrics=metrics,
        aims=metrics["sizes"]["data"] == "digits",
        tables={title: _flat(metrics[key]) for key, title in titles.items() if metrics[key]},
        recognition=[
            (shortened(name, LONGEST_NAME), _formatted(rate, "{:.1%}")) for name, rate in rates
        ],
        undefined=undefined,
        illustrations=[(item, base64.b64encode(item.png).decode()) for item in illustrations],
    )


def _formatted(value: float | None, template: str) -> str:
    return "not measured" if value is None else template.format(value)


def _number(value: float) -> str:
    """With one decimal, and with three digits below 10."""
    return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat = {}
    for key, value in values.items():
        name = f"{prefix}{key.replace('_', ' ')}"
        if isinstance(value, dict):
            flat.update(_flat(value, f"{name}: "))
        else:
            flat[name] = _number(value) if isinstance(value, float) else printable(value)
    return flat
