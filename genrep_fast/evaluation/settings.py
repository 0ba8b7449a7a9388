"""Sizes of an evaluation, and what it costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ..data import DataSplits

# With more classes than these an evaluation of everything takes hours: a posterior costs a network
# evaluation a class and step.
FEW_CLASSES = 25
# Of the posteriors and of the evidence, where there are more classes.
_SCORING_EVALUATIONS = 2_000_000
_ELBO_STEPS = 8
_SAMPLES = 5_000
# Of the images whose posterior is measured, so many are scored with random pixels, and as many with
# shuffled ones.
_RANDOM = 1 / 4


@dataclass(frozen=True)
class EvaluationSettings:
    """Sizes of an evaluation.

    Attributes:
        elbo_steps: timesteps of the generative posterior.
        num_inference_steps: length of the reverse chain that draws samples.
        samples_per_class: generated images of every class.
        test_images: evaluate on that many test images (and at most as many calibration images),
            drawn at random; None: all.
        scored_images: of these, measure the generative posterior and the evidence on that many
            test and calibration images, drawn at random: they cost a network evaluation a class
            and step. None: all.
        random_images: at most as many images of uniform noise, and as many pixel-shuffled test
            images, for the evidence.
        batch_size: images that pass through a network at once.
        num_workers: processes that read images ahead; 0 reads them in this one.
        seed: of the noise, the samples, the classifier and the random choices.
    """

    elbo_steps: int = 32
    num_inference_steps: int = 50
    samples_per_class: int = 50
    test_images: int | None = None
    scored_images: int | None = None
    random_images: int = 200
    batch_size: int = 256
    num_workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and name not in ("num_workers", "seed") and value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.num_workers < 0:
            raise ValueError(f"num_workers must not be negative, got {self.num_workers}")


def settings_for(
    num_classes: int,
    *,
    scale: float = 1.0,
    elbo_steps: int | None = None,
    samples_per_class: int | None = None,
    scored_images: int | None = None,
    seed: int = 0,
) -> EvaluationSettings:
    """Sizes that suit a number of classes.

    With at most `FEW_CLASSES` classes they are the defaults of `EvaluationSettings`. With more the
    posterior has 8 timesteps and as many images as make two million network evaluations, and 5,000
    samples are drawn, one a class at least.

    Args:
        num_classes: K.
        scale: of a trial, below 1: everything shrinks with it.
        elbo_steps, samples_per_class, scored_images: take the place of the sizes found here; with
            other `elbo_steps` than those, the images are as many as make two million evaluations.
        seed: as of `EvaluationSettings`.
    """
    few = num_classes <= FEW_CLASSES
    default = EvaluationSettings()
    if elbo_steps is None:
        elbo_steps = max(4, round((default.elbo_steps if few else _ELBO_STEPS) * scale))
    if samples_per_class is None:
        most = default.samples_per_class
        full = most if few else min(most, _SAMPLES // num_classes)
        samples_per_class = max(4 if few else 1, round(full * scale))
    random = default.random_images
    if not few:
        if scored_images is None:
            an_image = 2 * (1 + _RANDOM) * num_classes * max(elbo_steps, 1)
            scored_images = max(20, round(_SCORING_EVALUATIONS * scale / an_image))
        random = max(1, min(random, round(scored_images * _RANDOM)))
    return EvaluationSettings(
        elbo_steps=elbo_steps,
        samples_per_class=samples_per_class,
        test_images=None if scale == 1 else max(50, round(500 * scale)),
        scored_images=scored_images,
        random_images=random,
        seed=seed,
    )


def scored_images(settings: EvaluationSettings, splits: DataSplits) -> tuple[int, int, int]:
    """Images of the calibration and of the test split whose posterior is measured.

    The third number is that of images for the evidence, of random pixels and of shuffled ones each.
    """
    limits = [n for n in (settings.test_images, settings.scored_images) if n is not None]
    calibration, test = (min([len(part), *limits]) for part in (splits.calibration, splits.test))
    return calibration, test, min(settings.random_images, test)


def network_evaluations(settings: EvaluationSettings, splits: DataSplits) -> int:
    """Network evaluations of an evaluation: of its posteriors, its evidence and its samples."""
    calibration, test, others = scored_images(settings, splits)
    scoring = (calibration + test + 2 * others) * splits.num_classes * settings.elbo_steps
    samples = settings.samples_per_class * splits.num_classes
    return scoring + samples * settings.num_inference_steps


def described(settings: EvaluationSettings, splits: DataSplits) -> str:
    """A sentence on what is measured, and what it costs."""
    _, test, _ = scored_images(settings, splits)
    images = f"{test:,} of {len(splits.test):,} test images"
    posterior = (
        f"posterior of {images} in {settings.elbo_steps} steps × {splits.num_classes} classes"
    )
    samples = f"{settings.samples_per_class} samples a class"
    evaluations = f"{network_evaluations(settings, splits):,} network evaluations"
    return f"{posterior}, {samples}: {evaluations}"
