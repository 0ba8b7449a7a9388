"""The figures of a report, each a function of plain tensors that returns an `Illustration`."""

from __future__ import annotations

import functools
import io
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ..names import shortened
from .classes import shown_classes

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

    from ..evaluation.metrics import ReliabilityBins

# Okabe and Ito's palette, told apart by colour-blind readers too.
BLUE = "#0072B2"
SKY = "#56B4E9"
ORANGE = "#E69F00"
GREEN = "#009E73"
VERMILION = "#D55E00"
PURPLE = "#CC79A7"
GREY = "#777777"

STYLE: dict[RcKeyType, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "savefig.dpi": 150,
    # Names of classes are no TeX, whatever the user's own style is.
    "text.usetex": False,
}
IMAGES_PER_CLASS = 10
# In inches, of the grids of samples.
_ROW_HEIGHT = 0.44
_NAME_HEIGHT = 0.2
_GRIDS_WIDTH = 11.0
_TITLE_WIDTH = 1.2
_CHARACTER = 0.1
# Characters of a class's name.
LONGEST_NAME = 24
LOSSES = {
    "perception": BLUE,
    "discrimination": SKY,
    "distillation": GREEN,
    "generation": VERMILION,
    "representation_alignment": PURPLE,
}


@dataclass(frozen=True)
class Illustration:
    """A figure of the report: file name without suffix, caption, and the PNG's bytes."""

    name: str
    caption: str
    png: bytes


def illustration(
    name: str, caption: str
) -> Callable[[Callable[..., Figure]], Callable[..., Illustration]]:
    """Make a function that draws a `Figure` return an `Illustration`, in the report's style."""

    def decorate(draw: Callable[..., Figure]) -> Callable[..., Illustration]:
        @functools.wraps(draw)
        def render(*args: Any, **kwargs: Any) -> Illustration:
            with (
                matplotlib.rc_context(STYLE),
                warnings.catch_warnings(),
                io.BytesIO() as png,
            ):
                # A box stands for what the font does not have.
                warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from")
                draw(*args, **kwargs).savefig(png, format="png")
                return Illustration(name, caption, png.getvalue())

        return render

    return decorate


@illustration(
    "reliability",
    "Reliability: accuracy in bins of the confidence, for the head and for the generative "
    "posterior with and without its temperature. On the diagonal, a confidence of 90% is right 90% "
    "of the time. Below: how many test images fall into each bin (logarithmic).",
)
def draw_reliability(bins: dict[str, ReliabilityBins]) -> Figure:
    """One panel for each named classifier: accuracy against confidence above, counts below."""
    figure = Figure(figsize=(3.2 * len(bins), 4.8), layout="constrained")
    axes = figure.subplots(
        2, len(bins), sharex=True, sharey="row", squeeze=False, height_ratios=(3, 1)
    )
    for (upper, lower), (title, panel) in zip(axes.T, bins.items(), strict=True):
        confidence, accuracy, count = panel
        width = 1 / len(count)
        centres = (np.arange(len(count)) + 0.5) * width
        bars = {"color": BLUE, "alpha": 0.35, "label": "accuracy of the bin"}
        upper.bar(centres, accuracy, width * 0.92, **bars)
        points = {"color": BLUE, "markersize": 4, "label": "at its mean confidence"}
        upper.plot(confidence, accuracy, "o", clip_on=False, **points)
        upper.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1, label="perfect calibration")
        upper.set(title=title, xlim=(0, 1), ylim=(0, 1))
        lower.bar(centres, count, width * 0.92, color=GREY)
        lower.set(xlabel="confidence", yscale="symlog", ylim=(0, 1.5 * count.sum() + 1))
    axes[0, 0].set_ylabel("accuracy")
    axes[1, 0].set_ylabel("images")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


@illustration(
    "samples",
    "Generated samples, a class a row, beside test images of the same classes. The first drawn, "
    "not the best; framed: those that the independent classifier takes for another class. Of many "
    "classes, some that are spread over all of them.",
)
def draw_samples(
    samples: Tensor,
    labels: Tensor,
    predicted: Tensor,
    test_images: Tensor,
    test_labels: Tensor,
    class_names: Sequence[str],
) -> Figure:
    """Grids of samples and of test images, both [N, C, H, W] in [-1, 1].

    The first `IMAGES_PER_CLASS` of the `shown_classes` are shown.
    """
    shown = shown_classes(len(class_names))
    # Of each grid, as many columns as it fills.
    columns = [_columns(labels, shown), _columns(test_labels, shown)]
    # In inches: rows are as high as their names, and columns as wide as the images' shape says, but
    # both grids have to fit side by side.
    height, width = samples.shape[-2:]
    cell = min(_ROW_HEIGHT * width / height, _GRIDS_WIDTH / sum(columns))
    row = max(cell * height / width, _NAME_HEIGHT)
    widths = [max(cell * count, _TITLE_WIDTH) for count in columns]
    names = {label: shortened(class_names[label], LONGEST_NAME) for label in shown}
    beside = 2 * _CHARACTER * max(map(len, names.values()))
    size = (1.0 + beside + sum(widths), 0.8 + row * len(shown))
    figure = Figure(figsize=size, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=widths)
    framed = predicted != labels
    _draw_grid(left, "generated", samples, labels, names, columns[0], framed=framed)
    _draw_grid(right, "test images", test_images, test_labels, names, columns[1])
    return figure


@illustration(
    "nearest_training_images",
    "Memorisation: distance of every generated sample and of every test image to its nearest "
    "training image. Copies would pile up at zero, left of the test images.",
)
def draw_nearest_distances(generated: Tensor, test: Tensor) -> Figure:
    """Histograms of two sets of distances, with their medians."""
    series = {"generated": (generated, VERMILION), "test images": (test, BLUE)}
    figure = _histograms(series, "Euclidean distance to the nearest training image")
    figure.axes[0].set_xlim(left=0)
    return figure


@illustration(
    "evidence",
    "Evidence: log p(x) by the generative estimator, up to a constant, for test images, for the "
    "same images with their pixels shuffled and for uniformly random images. The less they "
    "overlap, the better images from elsewhere are told apart.",
)
def draw_evidence(test: Tensor, shuffled: Tensor, uniform: Tensor) -> Figure:
    """Histograms of the log evidence of three sets of images."""
    series = {
        "test images": (test, BLUE),
        "shuffled pixels": (shuffled, ORANGE),
        "uniform noise": (uniform, GREY),
    }
    return _histograms(series, "log evidence, up to a constant")


@illustration(
    "training",
    "Training: losses of each stage over its optimizer steps; "
    "faint as logged, solid a running mean.",
)
def draw_training(history: Sequence[dict[str, Any]], stages: Sequence[str] | None = None) -> Figure:
    """One panel for each stage of the logged steps, with whichever of `LOSSES` were logged.

    `stages` are the names of all stages.
    """
    logged = sorted({row["stage"] for row in history})
    figure = Figure(figsize=(1.2 + 3.4 * len(logged), 4), layout="constrained")
    for axes, stage in zip(figure.subplots(1, len(logged), squeeze=False)[0], logged, strict=True):
        rows = [row for row in history if row["stage"] == stage]
        # A list: every series is plotted, whatever the first ones say.
        positive = all([_plot_series(axes, rows, key, color) for key, color in LOSSES.items()])
        title = f"stage {stage}" if stages is None else f"stage {stage}: {stages[stage]}"
        axes.set(title=title, xlabel="step", yscale="log" if positive else "linear")
    figure.axes[0].set_ylabel("loss")
    drawn: dict[str, Artist] = {}
    for axes in figure.axes:
        lines = {str(line.get_label()): line for line in axes.lines}
        drawn |= {label: line for label, line in lines.items() if not label.startswith("_")}
    if drawn:
        labels = list(drawn)
        handles = list(drawn.values())
        figure.legend(handles, labels, loc="outside lower center", ncols=len(drawn), fontsize=8)
    return figure


@illustration(
    "alignment",
    "Gradient alignment in the attention blocks: cosine between the perception and the generation "
    "gradient, and the share ρ of the common direction that is kept. Faint as logged, solid a "
    "running mean.",
)
def draw_alignment(history: Sequence[dict[str, Any]]) -> Figure:
    """Cosine and ρ (`alpha`) over the steps where they were logged."""
    figure = Figure(figsize=(6.6, 3.4), layout="constrained")
    axes = figure.subplots()
    rows = [row for row in history if "cosine" in row]
    _plot_series(axes, rows, "cosine", BLUE)
    _plot_series(axes, rows, "alpha", VERMILION, label="ρ")
    axes.axhline(0, color=GREY, linewidth=1)
    axes.set(xlabel="step", ylim=(-1.02, 1.02))
    axes.legend(fontsize=8)
    return figure


def _columns(labels: Tensor, classes: Sequence[int]) -> int:
    """Images of the class that has most of them, between one and `IMAGES_PER_CLASS`."""
    most = max(int((labels == label).sum()) for label in classes)
    return max(1, min(IMAGES_PER_CLASS, most))


def _draw_grid(
    axes: Axes,
    title: str,
    images: Tensor,
    labels: Tensor,
    names: dict[int, str],
    columns: int,
    framed: Tensor | None = None,
) -> None:
    """Draw the first `columns` images [N, C, H, W] of each class in a row, with frames by `framed`.

    `names` are those of the classes that are shown, by their labels.
    """
    classes = len(names)
    # Of a cell, with the line that parts it from the next.
    height = images.shape[-2] + 1
    width = images.shape[-1] + 1
    grid_shape = (classes * height + 1, columns * width + 1, 3)
    grid = np.full(grid_shape, 1.0, dtype=np.float32)
    for row, label in enumerate(names):
        indices = (labels == label).nonzero().flatten()[:columns]
        for column, index in enumerate(indices.tolist()):
            top = row * height + 1
            start = column * width + 1
            pixels = (images[index].clamp(-1, 1) + 1) / 2
            cell = grid[top : top + height - 1, start : start + width - 1]
            cell[:] = pixels.permute(1, 2, 0).numpy()
            if framed is not None and framed[index]:
                corner = (start - 1, top - 1)
                frame = Rectangle(corner, width, height, fill=False, color=VERMILION, linewidth=2)
                axes.add_patch(frame)
    axes.imshow(grid, interpolation="nearest")
    middles = np.arange(classes) * height + height / 2
    axes.set(title=title, xticks=[])
    # Dollars in a name begin no formula.
    axes.set_yticks(middles, list(names.values()), parse_math=False)
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _plot_series(
    axes: Axes, rows: Sequence[dict[str, Any]], key: str, color: str, label: str | None = None
) -> bool:
    """Plot what was logged under `key`; True where nothing of it forbids a logarithmic axis."""
    logged = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    logged = [(step, value) for step, value in logged if math.isfinite(value)]
    if not logged:
        return True
    steps, values = np.array(logged, dtype=float).T
    window = max(1, len(values) // 15)
    mean = np.convolve(values, np.ones(window) / window, mode="valid")
    # A line of one point is invisible without a marker.
    marker = "." if len(values) < 15 else None
    axes.plot(steps, values, color=color, alpha=0.25, linewidth=1)
    label = label or key.replace("_", " ")
    axes.plot(steps[window - 1 :], mean, color=color, linewidth=1.8, marker=marker, label=label)
    return bool((values > 0).all())


def _histograms(series: dict[str, tuple[Tensor, str]], xlabel: str) -> Figure:
    figure = Figure(figsize=(6.6, 3.4), layout="constrained")
    axes = figure.subplots()
    finite = {
        label: (values[values.isfinite()].numpy(), color)
        for label, (values, color) in series.items()
    }
    together = np.concatenate([values for values, _ in finite.values()])
    edges = np.histogram_bin_edges(together, bins=50).tolist()
    for label, (values, color) in finite.items():
        axes.hist(values, edges, color=color, alpha=0.5, label=label)
        if len(values):
            axes.axvline(float(np.median(values)), color=color, linewidth=1.8)
    axes.set(xlabel=f"{xlabel}; a line marks the median", ylabel="images")
    axes.legend()
    return figure
