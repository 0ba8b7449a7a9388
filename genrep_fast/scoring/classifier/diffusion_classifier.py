"""DiffusionClassifier: the posterior of any class-conditional denoiser, for few evaluations."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from ...checks import check_at_least, check_in_range, check_integer, check_number, check_positive
from .calibration import Calibration, of_contests
from .collector import Collector
from .contest import Contest
from .engine import Arrival, Engines
from .file import SavedClassifier, read_classifier, write_classifier
from .funnel import Funnel
from .images import ImageStream
from .network import Network
from .noise import ForwardNoise
from .plans import Planner, Prepared
from .progress import CostEstimate, Progress
from .result import ClassifierResult
from .strategies import Race, Strategy, require_strategy

# Images on which a race that has no calibration calibrates itself.
SELF_CALIBRATION = 32
# Images that go through a VAE together.
_ENCODED = 8


class DiffusionClassifier:
    """Classifies images by the errors of a denoiser under every class (Diffusion Classifier).

    Every class sees the same noise: class y's error at a timestep is e_y = ‖target − o_y‖², and
    its log-likelihood −E[w·e_y] up to a constant (Li et al., ICCV 2023). What that costs depends
    on the strategy of the call; the default drops classes as soon as their errors allow it.

    Args:
        denoiser: ``denoiser(x_t, t, labels) -> model output``: [N, C, H, W], [N], int64 [N] ->
            [N, C', H, W] with C' ≥ C, a tensor, an object with ``sample``, or a tuple. A function,
            a module, or a method of one: diffusers' UNet2DModel and DiTTransformer2DModel, GenRep.
            Without guidance. Modules are put into eval mode during a call; functions around one
            have to do that themselves.
        scheduler: of diffusers, whose noise levels the denoiser was trained with; it is only read.
        num_classes: K ≥ 2; labels are 0 … K − 1.
        vae: of a latent denoiser: diffusers' autoencoder, or a function of images that returns
            latents. None: images are the denoiser's own.
        null_class: a label beyond the classes that stands for no class; it adds an evaluation to
            each step of an image, and the result gets its `lift`.
        batch_size: rows that go through the denoiser together, of any images and classes.
        parameterization: what the denoiser predicts; None reads the scheduler's prediction type.
        device, dtype: of what the denoiser gets; None takes those of its parameters, and for a
            function those of the images.
        pad_to: rows to which every batch is filled up, at least `batch_size`. Networks are not
            invariant to the size of the batch; batches of one size give the same decisions however
            images are batched.

    Raises:
        TypeError, ValueError: for arguments that do not fit.
    """

    def __init__(
        self,
        denoiser: Callable[..., Any],
        scheduler: Any,
        num_classes: int,
        *,
        vae: Any = None,
        null_class: int | None = None,
        batch_size: int = 64,
        parameterization: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        pad_to: int | None = None,
    ) -> None:
        check_at_least(2, num_classes=num_classes)
        check_at_least(1, batch_size=batch_size)
        if null_class is not None:
            check_integer(null_class, "null_class")
            if null_class < num_classes:
                raise ValueError(
                    f"null_class must lie beyond the {num_classes} classes, got {null_class}"
                )
        if pad_to is not None:
            check_integer(pad_to, "pad_to")
            if pad_to < batch_size:
                raise ValueError(f"pad_to must be at least batch_size {batch_size}, got {pad_to}")
        labels = num_classes if null_class is None else null_class + 1
        self._network = Network(denoiser, vae, labels, device, dtype)
        # Refuses a scheduler without noise levels now.
        ForwardNoise(scheduler, 1, parameterization)
        self.scheduler = scheduler
        self.num_classes = int(num_classes)
        self.null_class = None if null_class is None else int(null_class)
        self.batch_size = int(batch_size)
        self.parameterization = parameterization
        self.pad_to = pad_to
        self._calibration: Calibration | None = None
        self._prepared: dict[tuple, Prepared] = {}
        self._evaluations_a_second: float | None = None

    @property
    def calibration(self) -> Calibration | None:
        """What `calibrate` measured; may be set to another classifier's of the same model."""
        return self._calibration

    @calibration.setter
    def calibration(self, calibration: Calibration | None) -> None:
        if calibration is not None:
            classes = calibration.errors.shape[2]
            if classes != self.num_classes:
                raise ValueError(
                    f"calibration must be of {self.num_classes} classes, got {classes}"
                )
            # Raises where nothing can be learnt from it.
            _ = calibration.variance
        self._calibration = calibration
        self._prepared.clear()

    def calibrate(
        self,
        images: Any,
        labels: Sequence[int] | Tensor | None = None,
        *,
        candidates: Any = None,
        coarse: Any = None,
        offsets: bool | str = False,
        steps: int | None = None,
        seed: int = 1,
        progress: bool = True,
    ) -> Calibration:
        """Measure what the race needs to know: steps·K evaluations an image, once for a model.

        Args:
            images: as of a call; some 50 to 200 that the denoiser was not trained on.
            labels: one an image, for temperatures and the weights of timesteps; without them the
                full budget's winners serve, and weights stay uniform. A stream may hold them.
            candidates, coarse: of the calls that will have them, see `gf.Candidates` and
                `gf.Coarse`. A tree needs nothing here.
            offsets: fit an offset of L to each class, by the labels: True, or "auto" where
                held-out images gain by them. Every strategy applies them.
            steps: timesteps of the full budget; None: 24.
            seed: of the noise; another one than that of calls.
            progress: show a bar, where tqdm is installed.

        Returns:
            What was measured, which `calibration` holds as well.

        Raises:
            TypeError, ValueError: as a call; also for fewer than two images, and a denoiser whose
                output does not depend on the label.
        """
        planner = self._planner(None)
        steps = planner.default_steps if steps is None else steps
        check_at_least(1, steps=steps)
        check_in_range(seed, "seed", 2**64, "2**64")
        if offsets not in (True, False, "auto"):
            raise ValueError(f"offsets must be True, False or 'auto', got {offsets!r}")
        funnel = Funnel.of(self.num_classes, candidates, coarse=coarse)
        prepared = planner.prepare_calibration(steps)
        plan = prepared.plan
        stream = self._stream(images, None, labels)
        collector = Collector(self.num_classes, self.null_class is not None)
        arrivals = self._arrivals(stream, collector, funnel)
        bar = Progress(progress, "calibrate", self._cost(prepared, stream.total))
        with self._network.evaluating(funnel.scorer), bar:
            first = list(islice(arrivals, 1))
            if offsets and first and collector.labels() is None:
                raise ValueError("offsets need labels, got none")
            arrivals = chain(first, arrivals)
            contests = list(self._run(prepared, arrivals, collector, bar, seed, None))
            if len(contests) < 2:
                raise ValueError(f"images must be at least two to calibrate, got {len(contests)}")
            found = of_contests(plan.noise, contests, plan.steps, collector.labels())
            seen = [Arrival(part.index, part.image_id, part.image) for part in contests]
            found = funnel.measured(found, plan.noise, seen, self._engines(seed))
        if offsets:
            found = found.with_offsets(offsets is True)
        self.calibration = found
        return found

    def __call__(
        self,
        images: Any,
        *,
        strategy: str | Strategy = "race",
        candidates: Any = None,
        tree: Any = None,
        coarse: Any = None,
        confidence: float = 0.99,
        budget: int | None = None,
        deadline: float | None = None,
        seed: int = 0,
        image_ids: Sequence[int] | Tensor | None = None,
        labels: Sequence[int] | Tensor | None = None,
        progress: bool = True,
    ) -> ClassifierResult:
        """Classify images.

        A race that was not calibrated calibrates itself: the first 32 images take the full budget
        and serve as calibration images, which a warning says. Fewer than 32 images all take the
        full budget, and no calibration is kept.

        Args:
            images: a batch, or an iterable of batches, which is read as it is needed. A batch is a
                floating-point tensor [B, C, H, W] in −1…1 (uint8: 0…255), a uint8 array
                [B, H, W, C], a PIL image, a list of images, or a pair (batch, labels). All have
                one size; nothing is resized.
            strategy: "race", "full", "stratified" or "staged", or one of gf.Race, gf.Full,
                gf.Stratified and gf.Staged with settings.
            candidates: a scorer, ``images -> scores [B, K]``, a GenRep, or `gf.Candidates`: its
                best classes alone go on.
            tree: nested dictionaries or lists whose leaves are all the classes: whole branches
                leave. Branches had better have the same order of classes, where there is one.
            coarse: True or `gf.Coarse`: the best classes at lower resolution go on.
            confidence: of a race and of what precedes the strategy, that the full budget's winner
                is not dropped.
            budget: evaluations an image, at least one a class that is compared; an image that it
                ends before its time is not `decided`.
            deadline: seconds for the call; no batch begins afterwards.
            seed: of the noise, which follows from it, the image's id and the timestep.
            image_ids: distinct integers in [0, 2³²), one an image; None: 0, 1, 2, …
            labels: one an image, for the bar's accuracy and `ClassifierResult.class_bias`.
            progress: show a bar, where tqdm is installed.

        Raises:
            TypeError, ValueError: for arguments and images that do not fit, and outputs of the
                denoiser that are not finite; the message names them.
        """
        strategy = require_strategy(strategy)
        _check_confidence(confidence)
        check_in_range(seed, "seed", 2**64, "2**64")
        funnel = Funnel.of(self.num_classes, candidates, tree, coarse)
        self._check_budget(budget, funnel)
        if deadline is not None:
            check_positive(deadline, "deadline")
        end = None if deadline is None else time.monotonic() + deadline
        stream = self._stream(images, image_ids, labels)
        collector = Collector(self.num_classes, self.null_class is not None)
        arrivals = self._arrivals(stream, collector, funnel)
        calibrates = False
        if isinstance(strategy, Race) and self.calibration is None:
            calibrates = True
            prepared = self._own_calibration(strategy, budget, funnel)
        else:
            prepared = self._prepare(strategy, confidence, budget, funnel)
        bar = Progress(progress, "classify", self._cost(prepared, stream.total))
        with self._network.evaluating(funnel.scorer), bar:
            if calibrates:
                first = islice(arrivals, SELF_CALIBRATION)
                contests = list(self._run(prepared, first, collector, bar, seed, end))
                if len(contests) == SELF_CALIBRATION and all(map(len, contests)):
                    plan = prepared.plan
                    found = of_contests(plan.noise, contests, plan.steps, collector.labels())
                    self.calibration = found
                    prepared = self._prepare(strategy, confidence, budget, funnel)
            # Exhausts the arrivals.
            for _ in self._run(prepared, arrivals, collector, bar, seed, end):
                pass
        total = self._unread(stream, collector)
        return collector.result(prepared.temperature, total, prepared.screens.coarse_share)

    def estimate(
        self,
        num_images: int | None = None,
        *,
        strategy: str | Strategy = "race",
        candidates: Any = None,
        tree: Any = None,
        coarse: Any = None,
        confidence: float = 0.99,
        budget: int | None = None,
    ) -> CostEstimate:
        """What a call would cost in evaluations, without one.

        Args:
            num_images: of the call, or None.
            strategy, candidates, tree, coarse, confidence, budget: of the call.

        Raises:
            TypeError, ValueError: as a call; for a race without a calibration.
        """
        strategy = require_strategy(strategy)
        _check_confidence(confidence)
        funnel = Funnel.of(self.num_classes, candidates, tree, coarse)
        self._check_budget(budget, funnel)
        if num_images is not None:
            check_at_least(0, num_images=num_images)
        return self._cost(self._prepare(strategy, confidence, budget, funnel), num_images)

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write the settings, the scheduler's configuration and the calibration into a folder.

        Not the denoiser, the VAE, and where they run.

        Args:
            path: a folder, which is made where it is missing; what it holds of another classifier
                is replaced as a whole or not at all.

        Raises:
            OSError: where it cannot be written.
        """
        settings = {
            "num_classes": self.num_classes,
            "null_class": self.null_class,
            "parameterization": self.parameterization,
        }
        write_classifier(path, SavedClassifier(settings, self.scheduler, self.calibration))

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        denoiser: Callable[..., Any],
        *,
        scheduler: Any = None,
        **options: Any,
    ) -> DiffusionClassifier:
        """Read what `save_pretrained` wrote. Nothing in the folder is run or trusted.

        Args:
            path: the folder.
            denoiser: that was calibrated.
            scheduler: None: one of diffusers, by the configuration that was saved.
            options: vae, batch_size, device, dtype, pad_to of the class.

        Raises:
            FileNotFoundError: where there is no saved classifier.
            ValueError: where its files are damaged; the message names the file.
        """
        saved = read_classifier(path, scheduler)
        classifier = cls(denoiser, saved.scheduler, **saved.settings, **options)
        if saved.calibration is not None:
            classifier.calibration = saved.calibration
        return classifier

    def _planner(self, calibration: Calibration | None) -> Planner:
        return Planner(
            self.scheduler, self.parameterization, self.num_classes, self.null_class, calibration
        )

    def _stream(self, images: Any, image_ids: Any, labels: Any) -> ImageStream:
        pixels = self._network.vae is not None
        return ImageStream(
            images,
            image_ids=image_ids,
            labels=labels,
            shape=None if pixels else self._network.sample_shape(),
            pixels=pixels,
            num_classes=self.num_classes,
        )

    def _arrivals(
        self, stream: ImageStream, collector: Collector, funnel: Funnel
    ) -> Iterator[Arrival]:
        """Images, or their latents, one by one, with the scores of their candidates."""
        index = 0
        together = self.batch_size if self._network.vae is None else _ENCODED
        for batch in stream:
            collector.see(batch)
            device = self._network.device(batch.images)
            for start in range(0, len(batch.images), together):
                images = batch.images[start : start + together]
                ids = batch.ids[start : start + together]
                latents = self._network.encode(images.to(device)).to(device)
                self._check_latents(latents, len(images))
                scores = funnel.scores(latents.to(self._network.dtype(latents)))
                for latent, image_id, of_image in zip(latents, ids, scores, strict=True):
                    yield Arrival(index, image_id, latent, of_image)
                    index += 1

    def _check_latents(self, latents: Tensor, count: int) -> None:
        shape = self._network.sample_shape()
        fits = len(latents) == count and (shape is None or latents.shape[1:] == shape)
        if not fits:
            wanted = "one an image" if shape is None else f"{[count, *shape]}"
            raise ValueError(
                f"images must give latents {wanted}, got {list(latents.shape)}: "
                "another size of images, or another VAE, than the denoiser's"
            )
        # Images that go through no VAE were checked when they were read.
        if self._network.vae is not None and not latents.isfinite().all():
            raise ValueError("vae must return finite latents, got NaN or infinity")

    def _run(
        self,
        prepared: Prepared,
        arrivals: Iterator[Arrival],
        collector: Collector,
        bar: Progress,
        seed: int,
        end: float | None,
    ) -> Iterator[Contest]:
        """Images as they finish, which the collector has noted."""
        plan, engines = prepared.plan, self._engines(seed)
        arrivals = prepared.screens.run(arrivals, engines, end)
        start, evaluations = time.monotonic(), 0
        for contest in engines(plan, null_class=self.null_class).run(arrivals, end):
            prediction = collector.add(contest, plan)
            label = collector.label_of(contest.index)
            bar.add(contest.evaluations, None if label is None else prediction == label)
            evaluations += contest.evaluations
            yield contest
        if evaluations:
            self._evaluations_a_second = evaluations / (time.monotonic() - start)

    def _engines(self, seed: int) -> Engines:
        return Engines(self._network, self.num_classes, self.batch_size, self.pad_to, int(seed))

    def _own_calibration(self, strategy: Race, budget: int | None, funnel: Funnel) -> Prepared:
        if funnel.coarse is not None:
            raise ValueError("coarse needs a calibration; call calibrate with coarse first")
        planner = self._planner(None)
        steps = planner.default_steps
        if strategy.max_steps is not None:
            steps = max(steps, strategy.max_steps)
        needed = steps * planner.columns
        if budget is not None and budget < needed:
            raise ValueError(
                "strategy: this race is not calibrated, and to calibrate itself takes "
                f"{needed} evaluations an image, more than the budget of {budget}: "
                "call calibrate first"
            )
        warnings.warn(
            "the race is not calibrated: the first "
            f"{SELF_CALIBRATION} images take the full budget of {needed} evaluations and calibrate "
            "it; call calibrate with images of their own instead",
            stacklevel=3,
        )
        return planner.prepare_calibration(steps)

    def _check_budget(self, budget: int | None, funnel: Funnel) -> None:
        if budget is None:
            return
        check_integer(budget, "budget")
        # What a calibration lets through is known later.
        columns = self._planner(None).null_classes + funnel.least
        if budget < columns:
            raise ValueError(
                f"budget must be at least {columns} evaluations an image, one a class, got {budget}"
            )

    def _prepare(
        self, strategy: Strategy, confidence: float, budget: int | None, funnel: Funnel
    ) -> Prepared:
        key = (strategy, confidence, budget, funnel.key)
        if key not in self._prepared:
            planner = self._planner(self.calibration)
            self._prepared[key] = planner.prepare(strategy, confidence, budget, funnel)
        return self._prepared[key]

    def _cost(self, prepared: Prepared, images: int | None) -> CostEstimate:
        mean, most = prepared.mean_evaluations, prepared.most_evaluations
        seconds = None
        if self._evaluations_a_second is not None and images is not None:
            seconds = images * mean / self._evaluations_a_second
        return CostEstimate(mean, most, images, seconds)

    def _unread(self, stream: ImageStream, collector: Collector) -> int | None:
        """Images of the call, where the deadline left some unread and their number is known."""
        if stream.exhausted:
            return None
        if stream.total is None:
            warnings.warn(
                f"deadline: the stream was left after {collector.images} images, of which alone "
                "the result tells",
                stacklevel=3,
            )
        return stream.total


def _check_confidence(confidence: float) -> None:
    check_number(confidence, "confidence")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
