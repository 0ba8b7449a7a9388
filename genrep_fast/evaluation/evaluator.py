"""`evaluate`: everything that is measured of a trained model.

Images are read a batch at a time, as often as they are needed: a data set may be larger than
memory.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import DataSplits, LabelledImages, batches, check_class_names
from ..models import GenRep, GenRepPipeline
from ..models.pipeline import eval_mode
from ..ops.posterior import fit_temperature, log_evidence, posterior
from ..reporting.classes import shown_classes
from ..reporting.figures import (
    IMAGES_PER_CLASS,
    Illustration,
    draw_alignment,
    draw_evidence,
    draw_nearest_distances,
    draw_reliability,
    draw_samples,
    draw_training,
)
from ..reporting.html import write_report
from ..scoring.estimators import ElboEstimator
from .judge import ImageClassifier, fit_classifier
from .metrics import (
    accuracy,
    auroc,
    classification_metrics,
    frechet_distance,
    nearest_distances,
    reliability_bins,
    shuffle_pixels,
)
from .settings import EvaluationSettings, network_evaluations, settings_for

# One training subset as large as the samples is a noisy floor; the mean over a few is steady and
# costs nothing beside the samples.
FLOOR_SUBSETS = 10
# So many test images, or as many as samples where those are more, give the median of the distances
# to the nearest training image.
NEAREST_TEST_IMAGES = 500

Progress = Callable[[str, float], None]


def evaluate(
    model: GenRep,
    scheduler: Any,
    splits: DataSplits,
    output_dir: str | Path,
    *,
    settings: EvaluationSettings | None = None,
    history: Sequence[dict[str, Any]] | None = None,
    stages: Sequence[str] | None = None,
    timings: dict[str, float] | None = None,
    teacher: dict[str, float] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a GenRep model and write the results to `output_dir`.

    They are ``metrics.json``, ``figures/*.png`` and a self-contained ``report.html``.

    Args:
        model: GenRep; its modules are in eval mode meanwhile, and then in the modes that they were
            in.
        scheduler: the noise scheduler that it was trained with.
        splits: training images fit the independent classifier, and samples are compared with them;
            calibration images fit the posterior's temperature; test images give the numbers.
        output_dir: created where missing; files in it are replaced one by one, never left
            half-written.
        settings: sizes; None takes those that suit the number of classes (`settings_for`).
        history: logged steps of the training: dictionaries with ``stage``, ``step`` and any of the
            losses, ``cosine`` and ``alpha``.
        stages: names of the training's stages, by number; None for the numbers alone.
        timings: wall times of the training in seconds, by name; repeated in the metrics.
        teacher: what is known of the distillation teacher, by name; repeated in the metrics.
        progress: called as ``progress(what, fraction)`` while it runs, fraction in [0, 1].

    Returns:
        What metrics.json holds: nested dictionaries with the keys sizes, head, posterior,
        generation, classifier, out_of_distribution, training, seconds, teacher and undefined. A
        number that could not be measured is None, and its name is listed under undefined.

    Raises:
        ValueError: where the splits have other classes than the model: another number, or other
            names where the model has names; and where their images have another shape.
    """
    check_splits(model, splits)
    output_dir = Path(output_dir)
    # Before the work, not after it: a folder that cannot be made is told at once.
    output_dir.mkdir(parents=True, exist_ok=True)
    settings = settings or settings_for(splits.num_classes)
    evaluation = _Evaluation(model, scheduler, splits, settings, progress)
    with eval_mode(model):
        metrics, illustrations = evaluation.measure(history or [], stages)
    metrics["seconds"]["training"] = timings or {}
    metrics["teacher"] = teacher or {}
    undefined: list[str] = []
    metrics["undefined"] = undefined
    metrics = _without_nan(metrics, undefined)
    write_report(output_dir, metrics, illustrations)
    return metrics


def check_splits(model: GenRep, splits: DataSplits) -> None:
    """Raise ValueError for splits of other classes, or other shapes of images, than the model's."""
    if splits.num_classes != model.config.num_classes:
        wanted = f"the model's {model.config.num_classes} classes"
        raise ValueError(f"splits must have {wanted}, got {splits.num_classes}")
    if model.config.class_names is not None:
        check_class_names(splits.class_names, model.config.class_names, "splits")
    if tuple(splits.image_shape) != model.image_shape:
        wanted = f"the model's {list(model.image_shape)}"
        raise ValueError(f"splits must have images of {wanted}, got {list(splits.image_shape)}")


class _Images:
    """Some images of a data set: `indices` in their order, read a batch at a time."""

    def __init__(self, dataset: LabelledImages, indices: Tensor, num_workers: int) -> None:
        self.dataset = dataset
        self.indices = indices
        self.num_workers = num_workers
        self.labels = dataset.labels[indices]

    def __len__(self) -> int:
        return len(self.indices)

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Images [B, C, H, W], `batch_size` of them but in the last batch."""
        read = batches(self.dataset, batch_size, self.indices, num_workers=self.num_workers)
        return (images for images, _ in read)

    def at(self, places: Tensor) -> _Images:
        """Those at `places` [N] among these, in that order."""
        return _Images(self.dataset, self.indices[places], self.num_workers)

    def stacked(self) -> Tensor:
        """All of them at once, [N, C, H, W]."""
        return torch.stack([self.dataset[int(index)][0] for index in self.indices])


class _Evaluation:
    """The state that the measurements of one evaluation share."""

    def __init__(
        self,
        model: GenRep,
        scheduler: Any,
        splits: DataSplits,
        settings: EvaluationSettings,
        progress: Progress | None,
    ) -> None:
        self.model = model
        self.scheduler = scheduler
        self.splits = splits
        self.settings = settings
        self.progress = progress
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.train = self._images(splits.train)
        self.calibration = self._at_most(self._images(splits.calibration), settings.test_images)
        self.test = self._at_most(self._images(splits.test), settings.test_images)
        # Those that meet the network once a class and step.
        self.scored_calibration = self._at_most(self.calibration, settings.scored_images)
        self.scored_test = self._at_most(self.test, settings.scored_images)
        self.estimator = ElboEstimator(
            self._denoise,
            scheduler,
            splits.num_classes,
            num_steps=settings.elbo_steps,
            seed=settings.seed,
        )
        self.others = min(settings.random_images, len(self.scored_test))
        self.work = network_evaluations(settings, splits)
        self.work_done = 0
        self.seconds: dict[str, Any] = {}

    def measure(
        self, history: Sequence[dict[str, Any]], stages: Sequence[str] | None
    ) -> tuple[dict[str, Any], list[Illustration]]:
        with self._timed("head"):
            head = self._head_log_probabilities()
        with self._timed("posterior"):
            posterior_metrics, log_posteriors, test_evidence = self._posterior()
        self._advance("fitting the independent classifier", 0)
        with self._timed("classifier"):
            classifier = fit_classifier(
                self.splits.train,
                self.splits.num_classes,
                seed=self.settings.seed,
                num_workers=self.settings.num_workers,
            )
        with self._timed("generation"):
            test_features, test_predicted = self._judged(classifier, self.test)
            generation_metrics, generation_figures = self._generation(classifier, test_features)
        with self._timed("out_of_distribution"):
            ood_metrics, ood_figure = self._out_of_distribution(test_evidence)
        self._advance("figures", 0)
        metrics = {
            "sizes": self._sizes(),
            "head": classification_metrics(head, self.test.labels),
            "posterior": posterior_metrics,
            "generation": generation_metrics,
            "classifier": self._classifier_metrics(classifier, test_predicted),
            "out_of_distribution": ood_metrics,
            "training": {f"stage_{row['stage']}": row for row in history},
            "seconds": self.seconds,
        }
        bins = {"head": reliability_bins(head, self.test.labels)}
        labels = self.scored_test.labels
        bins |= {name: reliability_bins(log_p, labels) for name, log_p in log_posteriors.items()}
        illustrations = [draw_reliability(bins), *generation_figures, ood_figure]
        if history:
            illustrations.append(draw_training(history, stages))
        if any("cosine" in row for row in history):
            illustrations.append(draw_alignment(history))
        return metrics, illustrations

    @torch.no_grad()
    def _head_log_probabilities(self) -> Tensor:
        images = self.test.batches(self.settings.batch_size)
        logits = [self.model.perceive(self._encode(batch)).float().cpu() for batch in images]
        return torch.cat(logits).log_softmax(1)

    def _posterior(self) -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
        calibration = self._scores(self.scored_calibration, "calibrating the posterior")
        evaluations = self.estimator.evaluations
        test = self._scores(self.scored_test, "posterior of the test images")
        evaluations = self.estimator.evaluations - evaluations
        labels = self.scored_test.labels
        temperature = math.nan
        if calibration.isfinite().all():
            temperature = fit_temperature(calibration, self.scored_calibration.labels)
        uncalibrated = posterior(test)
        calibrated = torch.full_like(test, math.nan)
        if math.isfinite(temperature):
            calibrated = posterior(test, temperature=temperature)
        before = classification_metrics(uncalibrated, labels)
        metrics = {
            **classification_metrics(calibrated, labels),
            "temperature": temperature,
            "uncalibrated_nll": before["nll"],
            "uncalibrated_ece": before["ece"],
            "network_evaluations": evaluations,
            "network_evaluations_per_image": evaluations / len(test),
        }
        log_posteriors = {"posterior": calibrated, "posterior, uncalibrated": uncalibrated}
        return metrics, log_posteriors, log_evidence(test)

    def _generation(
        self, classifier: ImageClassifier, test_features: Tensor
    ) -> tuple[dict[str, Any], list[Illustration]]:
        samples, labels = self._samples()
        class_names = self.splits.class_names
        distinct = _distinct(class_names)
        features, predicted = classifier.judge(samples.split(self.settings.batch_size))
        train_features, _ = self._judged(classifier, self.train)
        distance = frechet_distance(features, test_features)
        subsets = [self._subset(train_features, len(samples)) for _ in range(FLOOR_SUBSETS)]
        floor = sum(frechet_distance(subset, test_features) for subset in subsets) / FLOOR_SUBSETS
        nearest, nearest_test = self._nearest_distances(samples)
        median = nearest.median().item()
        test_median = nearest_test.median().item()
        rate = math.nan
        rates = dict.fromkeys(distinct, math.nan)
        if samples.isfinite().all():
            rate = accuracy(predicted, labels)
            for label, name in enumerate(distinct):
                rates[name] = accuracy(predicted[labels == label], labels[labels == label])
        metrics = {
            "recognition_rate": rate,
            "recognition_rate_per_class": rates,
            "frechet_distance": distance,
            "frechet_distance_of_training_subset": floor,
            "frechet_ratio": _ratio(distance, floor),
            "nearest_training_distance": median,
            "nearest_training_distance_of_test": test_median,
            "nearest_training_ratio": _ratio(median, test_median),
        }
        test = self._images(self.splits.test)
        shown = test.at(_shown(test.labels, self.splits.num_classes))
        grid = draw_samples(samples, labels, predicted, shown.stacked(), shown.labels, class_names)
        return metrics, [grid, draw_nearest_distances(nearest, nearest_test)]

    def _nearest_distances(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Those of samples, and of test images, to their nearest training image."""
        test = self._at_most(self.test, max(len(samples), NEAREST_TEST_IMAGES)).stacked()
        train = self.train.batches(self.settings.batch_size)
        queries = torch.cat([samples, test])
        nearest = nearest_distances(queries, train, self.settings.batch_size)
        return nearest[: len(samples)], nearest[len(samples) :]

    def _out_of_distribution(self, test_evidence: Tensor) -> tuple[dict[str, Any], Illustration]:
        images = self.test.at(self._drawn(len(self.test), self.others)).stacked()
        uniform = torch.rand(images.shape, generator=self.generator) * 2 - 1
        shuffled = shuffle_pixels(images, self.generator)
        scores = self._log_likelihood(self._scored_batches(uniform), "evidence of random images")
        uniform_evidence = log_evidence(scores)
        scores = self._log_likelihood(self._scored_batches(shuffled), "evidence of shuffled images")
        shuffled_evidence = log_evidence(scores)
        metrics = {
            "uniform_auroc": auroc(test_evidence, uniform_evidence),
            "shuffled_auroc": auroc(test_evidence, shuffled_evidence),
        }
        return metrics, draw_evidence(test_evidence, shuffled_evidence, uniform_evidence)

    def _classifier_metrics(
        self, classifier: ImageClassifier, test_predicted: Tensor
    ) -> dict[str, Any]:
        _, predicted = self._judged(classifier, self.calibration)
        return {
            "test_top1": accuracy(test_predicted, self.test.labels),
            "calibration_top1": accuracy(predicted, self.calibration.labels),
            "features": classifier.num_features,
        }

    def _judged(self, classifier: ImageClassifier, images: _Images) -> tuple[Tensor, Tensor]:
        return classifier.judge(images.batches(self.settings.batch_size))

    def _sizes(self) -> dict[str, Any]:
        samples = self.settings.samples_per_class * self.splits.num_classes
        return {
            "data": self.splits.name,
            "train_images": len(self.train),
            "calibration_images": len(self.calibration),
            "test_images": len(self.test),
            "scored_calibration_images": len(self.scored_calibration),
            "scored_test_images": len(self.scored_test),
            "classes": self.splits.num_classes,
            "image_shape": list(self.splits.image_shape),
            "elbo_steps": self.settings.elbo_steps,
            "num_inference_steps": self.settings.num_inference_steps,
            "samples": samples,
            "samples_per_class": self.settings.samples_per_class,
            "frechet_floor_images": min(samples, len(self.train)),
            "frechet_floor_subsets": FLOOR_SUBSETS,
            "random_images": self.others,
            "batch_size": self.settings.batch_size,
            "seed": self.settings.seed,
        }

    def _scores(self, images: _Images, what: str) -> Tensor:
        return self._log_likelihood(images.batches(self._images_scored_at_once), what)

    @property
    def _images_scored_at_once(self) -> int:
        """Every image meets the network once a class."""
        return max(1, self.settings.batch_size // self.splits.num_classes)

    def _scored_batches(self, images: Tensor) -> Iterable[Tensor]:
        return images.split(self._images_scored_at_once)

    def _log_likelihood(self, images: Iterable[Tensor], what: str) -> Tensor:
        """[N, K] on the CPU of batches of images."""
        likelihoods = []
        for batch in images:
            before = self.estimator.evaluations
            likelihoods.append(self.estimator.log_likelihood(self._encode(batch)).cpu())
            self._advance(what, self.estimator.evaluations - before)
        return torch.cat(likelihoods)

    def _samples(self) -> tuple[Tensor, Tensor]:
        """Images [N, C, H, W] on the CPU and the classes [N] that they were drawn for."""
        pipeline = GenRepPipeline(model=self.model, scheduler=self.scheduler)
        pipeline.set_progress_bar_config(disable=True)
        steps = self.settings.num_inference_steps
        classes = torch.arange(self.splits.num_classes)
        labels = classes.repeat_interleave(self.settings.samples_per_class)
        images = []
        for chain_ids in torch.arange(len(labels)).split(self.settings.batch_size):
            try:
                drawn = pipeline.generate(
                    labels[chain_ids],
                    num_inference_steps=steps,
                    seed=self.settings.seed,
                    chain_ids=chain_ids,
                    output_type="pt",
                ).images
            except FloatingPointError:
                # Of a network that diverged: what follows from its samples is undefined.
                drawn = torch.full((len(chain_ids), *self.splits.image_shape), math.nan)
            images.append(drawn.float().cpu())
            self._advance("generating samples", len(chain_ids) * steps)
        return torch.cat(images), labels

    def _denoise(self, x_t: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        """`GenRep.denoise`: one image meets more classes than pass through the network at once."""
        size = self.settings.batch_size
        parts = zip(x_t.split(size), timesteps.split(size), labels.split(size), strict=True)
        return torch.cat([self.model.denoise(*part) for part in parts])

    def _encode(self, images: Tensor) -> Tensor:
        return self.model.encode(images.to(self.model.device, self.model.dtype))

    def _images(self, dataset: LabelledImages) -> _Images:
        return _Images(dataset, torch.arange(len(dataset)), self.settings.num_workers)

    def _at_most(self, images: _Images, number: int | None) -> _Images:
        if number is None or number >= len(images):
            return images
        return images.at(self._drawn(len(images), number))

    def _subset(self, rows: Tensor, number: int) -> Tensor:
        return rows[self._drawn(len(rows), number)]

    def _drawn(self, length: int, number: int) -> Tensor:
        """At most `number` of `length` places, at random."""
        return torch.randperm(length, generator=self.generator)[:number]

    def _advance(self, what: str, evaluations: int) -> None:
        self.work_done += evaluations
        if self.progress is not None:
            self.progress(what, min(1.0, self.work_done / self.work))

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def _shown(labels: Tensor, num_classes: int) -> Tensor:
    """Places of the images that `draw_samples` shows, of all with these labels [N]."""
    classes = shown_classes(num_classes)
    first = [(labels == label).nonzero()[:IMAGES_PER_CLASS, 0] for label in classes]
    return torch.cat(first)


def _distinct(names: Sequence[str]) -> list[str]:
    """Names of classes, those that several have with their labels."""
    counts = Counter(names)
    return [
        name if counts[name] == 1 else f"{name} (class {label})" for label, name in enumerate(names)
    ]


def _ratio(value: float, reference: float) -> float:
    return value / reference if reference > 0 else math.nan


def _without_nan(value: Any, undefined: list[str], name: str = "") -> Any:
    """`value` with None for non-finite numbers, whose dotted names are added to `undefined`."""
    if isinstance(value, dict):
        prefix = f"{name}." if name else ""
        return {key: _without_nan(item, undefined, f"{prefix}{key}") for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        undefined.append(name)
        return None
    return value
