"""DiffusionClassifier: the posterior of any class-conditional denoiser, for few evaluations."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, overload

import torch
from torch import Tensor

from ...checks import check_at_least, check_in_range, check_integer, check_positive
from .arrivals import arrivals_of, with_labels
from .calibration import Calibration, of_contests
from .collector import Collector, Recorder, collecting, unread
from .contest import Contest
from .engine import Arrival, Engines
from .file import SavedClassifier, SavedPipeline, read_classifier, write_classifier
from .footprint import least_memory
from .funnel import Funnel
from .images import ImageStream
from .members import Members
from .network import Network
from .noise import ForwardNoise
from .pipelines.denoiser import PipelineDenoiser, denoiser_of_pipeline
from .plans import SELF_CALIBRATION, Planner, Prepared
from .progress import CostEstimate, Progress
from .result import ClassifierResult
from .saved_results import SavedResults
from .strategies import Race, Strategy, check_confidence, require_strategy


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
        self._members = Members((1,) * self.num_classes, self.null_class)
        if isinstance(denoiser, PipelineDenoiser):
            self._members = denoiser.members
        self.batch_size = int(batch_size)
        self.parameterization = parameterization
        self.pad_to = pad_to
        self._calibration: Calibration | None = None
        self._prepared: dict[tuple, Prepared] = {}
        self._evaluations_a_second: float | None = None

    @classmethod
    def from_pipeline(
        cls,
        pipe: Any,
        prompts: Sequence[str | Sequence[str]],
        *,
        null_prompt: str | None = "",
        batch_size: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        pad_to: int | None = None,
    ) -> DiffusionClassifier:
        """A zero-shot classifier of one of diffusers' pipelines; text encoders are needed no more.

        Args:
            pipe: StableDiffusion-, StableDiffusionXL-, StableDiffusion3-, Flux-, PixArtAlpha-,
                PixArtSigma-, Sana- or DiTPipeline.
            prompts: a string for each class, or a list of strings, whose errors are averaged; each
                costs an evaluation. For DiTPipeline names among `pipe.labels`, or class numbers.
            null_prompt: stands for no class, at one more evaluation a step of an image, for the
                result's `lift`; "" is the pipeline's own. None: there is none.
            batch_size, device, dtype, pad_to: as of the class.

        Raises:
            TypeError, ValueError: for other pipelines, consistency models, and prompts that are
                none, or that the pipeline would cut or read as the same.
        """
        denoiser = denoiser_of_pipeline(pipe, prompts, null_prompt)
        return cls(
            denoiser,
            denoiser.adapter.scheduler(pipe.scheduler),
            len(prompts),
            vae=pipe.vae,
            null_class=None if null_prompt is None else len(prompts),
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            pad_to=pad_to,
        )

    @property
    def prompts(self) -> tuple[tuple[str, ...], ...] | None:
        """Of each class, where the classifier was made from a pipeline."""
        denoiser = self._network.denoiser
        return denoiser.prompts.classes if isinstance(denoiser, PipelineDenoiser) else None

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(height, width) of the images that its pipeline makes by default, in pixels, if any."""
        denoiser = self._network.denoiser
        return denoiser.adapter.image_size if isinstance(denoiser, PipelineDenoiser) else None

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
        stream = self._stream(images, None, labels)
        collector = Collector(self.num_classes, self.null_class is not None)
        bar = Progress(progress, "calibrate", self._cost(prepared, stream.total, progress))
        arrivals = arrivals_of(stream, collector, self._network, funnel, self.batch_size, bar)
        with self._network.evaluating(funnel.scorer), bar:
            if offsets:
                arrivals = with_labels(arrivals, collector, "offsets")
            contests = list(self._run(prepared, arrivals, collector, bar, seed, None))
            if len(contests) < 2:
                raise ValueError(f"images must be at least two to calibrate, got {len(contests)}")
            engines = self._engines(int(seed))
            found = funnel.calibration(prepared.plan, contests, collector.labels(), engines)
        if offsets:
            found = found.with_offsets(offsets is True)
        self.calibration = found
        return found

    @overload
    def __call__(self, images: Any, *, output: None = None, **call: Any) -> ClassifierResult: ...

    @overload
    def __call__(
        self, images: Any, *, output: str | os.PathLike[str], **call: Any
    ) -> SavedResults: ...

    def __call__(  # type: ignore[misc]
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
        output: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> ClassifierResult | SavedResults:
        """Classify images.

        With `output`, images are written into a folder as they finish, and memory holds those under
        way. The same call goes on where it ended: what has finished is read, but not evaluated.

        A race that was not calibrated calibrates itself: the first 32 images take the full budget
        and serve as calibration images, which a warning says. Fewer than 32 images all take the
        full budget, and no calibration is kept.

        Args:
            images: a batch, or an iterable of batches, which is read as it is needed. A batch is a
                floating-point tensor [B, C, H, W] in −1…1 (uint8: 0…255), a uint8 array
                [B, H, W, C], a PIL image, a list of images, a pair (batch, labels), or a dictionary
                with pixel_values, images or image, and maybe labels, image_ids and names. All have
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
            image_ids: distinct integers in [0, 2³²), one an image; None: those of the batches, else
                0, 1, 2, …
            labels: one an image, for the bar's accuracy and `ClassifierResult.class_bias`.
            output: a folder for ``classification.json``, which says what the results depend on, and
                for ``parts/``: Parquet where pyarrow is installed, else CSV. Images that the
                deadline leaves under way are not written.
            progress: show a bar, where tqdm is installed.

        Returns:
            The result of all images; with `output`, all images of the folder, read as needed.

        Raises:
            TypeError, ValueError: for arguments and images that do not fit, and outputs of the
                denoiser that are not finite; the message names them. Also for an `output` of other
                settings, with damaged files, or with other images or labels under the same ids.
            OSError: where `output` cannot be written, has another writer, or holds something else.
        """
        strategy = require_strategy(strategy)
        check_confidence(confidence)
        check_in_range(seed, "seed", 2**64, "2**64")
        funnel = Funnel.of(self.num_classes, candidates, tree, coarse)
        self._members.check_budget(budget, funnel.least)
        if deadline is not None:
            check_positive(deadline, "deadline")
        end = None if deadline is None else time.monotonic() + deadline
        stream = self._stream(images, image_ids, labels)
        calibrates = False
        if isinstance(strategy, Race) and self.calibration is None:
            if output is not None:
                raise ValueError(
                    "output: a race goes on with the calibration that it began with, and has none: "
                    "call calibrate first"
                )
            calibrates = True
            prepared = self._planner(None).own_calibration(strategy, budget, funnel)
        else:
            prepared = self._prepare(strategy, confidence, budget, funnel)
        settings: dict[str, Any] = {**vars(funnel), **self._settings(), **prepared.settings}
        settings |= {"strategy": strategy, "confidence": confidence, "budget": budget, "seed": seed}
        settings |= {"batch_size": self.batch_size, "pad_to": self.pad_to}
        sources = self._network, self.scheduler, self.calibration
        with (
            collecting(output, settings, *sources) as collector,
            self._network.evaluating(funnel.scorer),
            Progress(progress, "classify", self._cost(prepared, stream.total, progress)) as bar,
        ):
            arrivals = arrivals_of(stream, collector, self._network, funnel, self.batch_size, bar)
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
            total = unread(stream, collector)
            return collector.result(total, **prepared.settings)

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
        check_confidence(confidence)
        funnel = Funnel.of(self.num_classes, candidates, tree, coarse)
        self._members.check_budget(budget, funnel.least)
        if num_images is not None:
            check_at_least(0, num_images=num_images)
        return self._cost(self._prepare(strategy, confidence, budget, funnel), num_images, True)

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write settings, prompts, the scheduler's configuration and calibration into a folder.

        Not the denoiser or pipeline, the VAE, and where they run.

        Args:
            path: a folder, which is made where it is missing; what it holds of another classifier
                is replaced as a whole or not at all.

        Raises:
            OSError: where it cannot be written.
        """
        pipeline = SavedPipeline.of(self._network.denoiser)
        saved = SavedClassifier(self._settings(), self.scheduler, self.calibration, pipeline)
        write_classifier(path, saved)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        denoiser: Callable[..., Any] | None = None,
        *,
        pipe: Any = None,
        prompts: Sequence[str | Sequence[str]] | None = None,
        scheduler: Any = None,
        **options: Any,
    ) -> DiffusionClassifier:
        """Read what `save_pretrained` wrote. Nothing in the folder is run or trusted.

        Args:
            path: the folder.
            denoiser: that was calibrated.
            pipe: in its place, the pipeline of a classifier that `from_pipeline` made.
            prompts: of the pipeline, which have to be the saved ones; None: those.
            scheduler: None: one of diffusers, by the configuration that was saved, or the
                pipeline's.
            options: batch_size, device, dtype, pad_to of the class, and vae beside a denoiser.

        Raises:
            FileNotFoundError: where there is no saved classifier.
            TypeError, ValueError: for damaged files, which the message names, and where denoiser or
                pipeline, its family, prompts or noise levels are not those that were saved.
        """
        saved = read_classifier(path, scheduler)
        saved.check_source(denoiser, pipe, prompts)
        if saved.pipeline is None:
            assert denoiser is not None
            classifier = cls(denoiser, saved.scheduler, **saved.settings, **options)
        else:
            classes, null_prompt = saved.pipeline.prompts
            classifier = cls.from_pipeline(pipe, classes, null_prompt=null_prompt, **options)
            saved.check_scheduler(classifier.scheduler)
        classifier.calibration = saved.calibration
        return classifier

    def _settings(self) -> dict[str, Any]:
        return {
            "num_classes": self.num_classes,
            "null_class": self.null_class,
            "parameterization": self.parameterization,
        }

    def _planner(self, calibration: Calibration | None) -> Planner:
        return Planner(self.scheduler, self.parameterization, self._members, calibration)

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

    def _run(
        self,
        prepared: Prepared,
        arrivals: Iterator[Arrival],
        collector: Collector | Recorder,
        bar: Progress,
        seed: int,
        end: float | None,
    ) -> Iterator[Contest]:
        """Images as they finish, which the collector has noted."""

        def after_batch(evaluations: float) -> None:
            bar.after_batch(evaluations)
            collector.write_if_due()

        plan = prepared.plan
        engines = self._engines(int(seed), budget=plan.budget, after_batch=after_batch)
        engine = engines(plan, with_null=True)
        arrivals = prepared.screens.run(arrivals, engines, end)
        start, before = time.monotonic(), bar.taken
        for contest in engine.run(arrivals, end):
            correct = collector.add(contest, plan, engine.late)
            bar.add(contest.evaluations, correct)
            yield contest
        if taken := bar.taken - before:
            self._evaluations_a_second = taken / max(time.monotonic() - start, 1e-6)

    def _engines(self, seed: int, **call: Any) -> Engines:
        return Engines(self._network, self._members, self.batch_size, self.pad_to, seed, **call)

    def _prepare(
        self, strategy: Strategy, confidence: float, budget: int | None, funnel: Funnel
    ) -> Prepared:
        key = (strategy, confidence, budget, funnel.key)
        if key not in self._prepared:
            planner = self._planner(self.calibration)
            self._prepared[key] = planner.prepare(strategy, confidence, budget, funnel)
        return self._prepared[key]

    def _cost(self, prepared: Prepared, images: int | None, shown: bool) -> CostEstimate:
        mean, most = prepared.mean_evaluations, prepared.most_evaluations
        seconds = None
        if self._evaluations_a_second is not None and images is not None:
            seconds = images * mean / self._evaluations_a_second
        memory = least_memory(self._network, self.pad_to or self.batch_size) if shown else None
        return CostEstimate(mean, most, images, seconds, memory)
