"""The training loop of GenRep: three stages on Hugging Face Accelerate, resumable to the bit."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator

from ..alignment.aligned_adamw import AlignedAdamW
from ..alignment.aligner import AlignerStats, GradientAligner
from ..data import DataRecord, DataSplits, batches, check_class_names
from ..data.datasets import checked
from ..endings import interrupts_after
from ..files import only_writer, remove_unfinished, replacing, write_atomically
from ..models import GenRep, GenRepPipeline
from ..models.weights import check_weights
from ..reporting.terminal import StageProgress
from .batches import Batch, seed_of, seeded_loader
from .checkpoints import (
    Checkpoint,
    drop_old_checkpoints,
    newest_checkpoint,
    optimizer_state_dict,
    optimizer_tensors,
    read_checkpoint,
    save_checkpoint,
)
from .config import STAGES, TrainingConfig
from .losses import GenerationLoss, perception_loss
from .networks import build_model, build_scheduler
from .race import calibration_images
from .state import TrainingState, check_numbers, copy_
from .teacher import BATCH, Teacher, check_teacher
from .tracking import SAMPLES, Tracking, check_tracker

_WARMUP_STEPS = 50
# As a fraction of the highest.
_FINAL_LEARNING_RATE = 0.01
# What a checkpoint keeps of PyTorch's LambdaLR; the rest follows from the options.
_OF_THE_SCHEDULE = ("last_epoch", "_step_count", "_last_lr")


class Trainer:
    """Trains one GenRep as `config` says and leaves the pipeline in ``<output>/model``.

    Args:
        config: TrainingConfig.
        splits: DataSplits with the images of `config.data`.
        accelerator: one is made from the config where not given; the trackers of one that is given
            are used as they are.

    Raises:
        ValueError: for data, backbone and VAE that do not fit together, for a folder that holds a
            run while `config.resume` is False, and for other classes or parts than those of the run
            that is resumed.
        ImportError: for a tracker that is not installed.
        RuntimeError: for more than one process.
    """

    def __init__(
        self, config: TrainingConfig, splits: DataSplits, accelerator: Accelerator | None = None
    ) -> None:
        self.config = config
        self.splits = splits
        self.output = Path(config.output)
        check_tracker(config.log_with)
        self.accelerator = accelerator or Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            log_with=config.log_with,
            project_dir=config.output if config.log_with else None,
        )
        self._check_run()
        torch.manual_seed(config.seed)
        self.scheduler = build_scheduler(config)
        check_teacher(config, self.scheduler, splits)
        model = build_model(config, splits).to(self.accelerator.device)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.names = list(named)
        self.parameters = list(named.values())
        self.averages = [parameter.detach().clone() for parameter in self.parameters]
        groups: dict[str, int | None] = {}
        if config.align:
            groups = dict(zip(self.names, model.alignment_groups(), strict=True))
        self.aligner = GradientAligner(
            named.items(),
            weights=config.gradient_weights,
            power=config.gradient_power,
            groups=groups.get,
        )
        optimizer = AlignedAdamW(
            self.parameters,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            aligner=self.aligner,
            ema=self.averages,
            max_norm=config.max_grad_norm or None,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._learning_rate_factor)
        self.wrapped, self.optimizer, self.schedule = self.accelerator.prepare(
            model, optimizer, schedule
        )
        self.model = self.accelerator.unwrap_model(self.wrapped)
        self.generation_loss = GenerationLoss(
            self.scheduler,
            alignment_weight=config.alignment_weight,
            variance_weight=config.variance_weight,
        ).to(self.accelerator.device)
        self.state = TrainingState(config, named, self.averages)
        self.tracking = Tracking(config, self.accelerator)

    def _check_run(self) -> None:
        """Check processes and output folder, and of a run that is resumed the splits so far."""
        if self.accelerator.num_processes > 1:
            raise RuntimeError(
                f"training runs in one process, got {self.accelerator.num_processes}: "
                "both gradients would have to be reduced"
            )
        if not self.config.resume and (self.output / "checkpoints").is_dir():
            raise ValueError(
                f"output: {self.output} holds a run already; "
                "pass --resume to go on with it, or choose another folder"
            )
        record = DataRecord.read(self.output) if self.config.resume else None
        if record is None:
            return
        check_class_names(self.splits.class_names, record.class_names, "data")
        if dict(self.splits.borrowed) != dict(record.borrowed):
            raise ValueError(
                f"splits must have the parts that {self.output} keeps in data.json; "
                "load them with record=DataRecord.read(output)"
            )

    def run(self) -> GenRepPipeline:
        """Train from the newest checkpoint, or from the start, to the end.

        Raises:
            BlockingIOError: where another run writes to the output folder.
            ValueError: for a damaged checkpoint and one of another run; nothing is changed then.
            OSError: where the output folder cannot be written to; the checkpoints in it are kept.
            FloatingPointError: for a loss or a parameter that is not finite.
            KeyboardInterrupt: after Ctrl-C or SIGTERM; a step that has begun ends first, and leaves
                a checkpoint.
        """
        with only_writer(self.output):
            self._resume()
            with self.tracking.started(self.state.step):
                return self._run()

    def _resume(self) -> None:
        """Go to the newest checkpoint, where there is one."""
        checkpoint = newest_checkpoint(self.output)
        if checkpoint is not None:
            self._restore(checkpoint)
            self._write_history()
            drop_old_checkpoints(self.output)
        for folder in (self.output, self.output / "checkpoints", self.output / SAMPLES):
            remove_unfinished(folder)
        self.config.save()
        DataRecord(self.splits.class_names, self.splits.borrowed).save(self.output)

    def _run(self) -> GenRepPipeline:
        ends = [sum(self.config.stage_steps[: i + 1]) for i in range(len(STAGES))]
        if self.state.step < ends[-1]:
            with contextlib.closing(self._loader()) as micro_batches:
                # The first one starts the workers, while no progress bar has a thread: a process
                # that is forked keeps the locks of threads that it does not have.
                started = itertools.chain([next(micro_batches)], micro_batches)
                for stage, end in enumerate(ends):
                    if self.state.step < end:
                        self._run_stage(stage, end, started)
        self._leave_stage()
        # Without Accelerate's autocast, as the pipeline will be when it is loaded again.
        self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        pipeline = GenRepPipeline(model=self.model, scheduler=self.scheduler)
        with replacing(self.output / "model") as unfinished:
            pipeline.save_pretrained(unfinished)
        return pipeline

    def _run_stage(self, stage: int, end: int, micro_batches: Iterator[Batch]) -> None:
        state = self.state
        length = self.config.stage_steps[stage]
        with StageProgress(STAGES[stage], state.step, end, length) as progress:
            if state.stage != stage:
                self._enter_stage(stage)
            # The only loss of an earlier stage counts whole.
            self.aligner.weights = self.config.gradient_weights if stage == 2 else (1, 1)
            self.wrapped.train()
            while state.step < end:
                with interrupts_after() as interrupts:
                    self._counted_step(stage, micro_batches, progress)
                    due = state.step % self.config.checkpoint_every == 0
                    if state.step == end or due or interrupts:
                        self._checkpoint()
                self._show_samples()

    def _counted_step(
        self, stage: int, micro_batches: Iterator[Batch], progress: StageProgress
    ) -> None:
        """One optimizer step, its row of the history and what it took of the stage's time."""
        state = self.state
        started = time.perf_counter()
        metrics = self._step(stage, micro_batches)
        state.step += 1
        refreshing = self._refresh_teacher()
        last = state.step == sum(self.config.stage_steps[: stage + 1])
        due = last or state.step % self.config.log_every == 0
        if due:
            # This waits for the device, so the sum of the times is right on a GPU too.
            state.log(stage, metrics, self.schedule.get_last_lr()[0])
            progress.update(state.step, state.history[-1])
        state.seconds[STAGES[stage]] += time.perf_counter() - started - refreshing
        if due:
            self.tracking.log(state.history[-1])

    def _show_samples(self) -> None:
        """Show what the averaged weights draw, where it is time to."""
        every = self.config.sample_every
        if every is None or self.state.step % every != 0:
            return
        model = self.model.frozen_copy()
        copy_([model.get_parameter(name) for name in self.names], self.averages)
        self.tracking.show_samples(model, self.scheduler, self.state.step)

    def _step(self, stage: int, micro_batches: Iterator[Batch]) -> dict[str, torch.Tensor]:
        """One optimizer step: its micro-batches, then alignment, clipping, update and averages."""
        self.optimizer.optimizer.ema_decay = self._ema_decay(stage)
        while True:
            batch = next(micro_batches)
            # Every random number of a micro-batch follows from its index alone, so that a resumed
            # run draws the same ones.
            torch.manual_seed(seed_of(self.config.seed, self.state.micro_batch))
            self.state.micro_batch += 1
            with self.accelerator.accumulate(self.wrapped):
                metrics = self._backward(stage, batch)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
            if self.accelerator.sync_gradients:
                break
        self.state.follow(self.config.momentum)
        if self.aligner.stats is not None:
            metrics |= self._alignment_metrics(stage, self.aligner.stats)
        return metrics

    def _alignment_metrics(self, stage: int, stats: AlignerStats) -> dict[str, torch.Tensor]:
        metrics = {}
        # Earlier stages have one loss, hence no conflict.
        if stage == 2 and self.aligner.group_keys and stats.alpha is not None:
            metrics = {"cosine": stats.cosine.mean(), "alpha": stats.alpha.mean()}
        if stats.total_norm is not None:
            metrics["gradient_norm"] = stats.total_norm
        return metrics

    def _backward(self, stage: int, batch: Batch) -> dict[str, torch.Tensor]:
        """Collect the gradients of both losses.

        A loss that the stage does not have reaches no parameter.
        """
        images, labels, labelled = batch
        x = self.model.encode(images)
        metrics: dict[str, torch.Tensor] = {}
        with self.aligner.collect("generation"):
            if stage != 1:
                metrics |= self._generation(x, labels)
        with self.aligner.collect("perception"):
            if stage != 0:
                metrics |= self._perception(x, labels, labelled)
        return {name: value.detach() for name, value in metrics.items()}

    def _generation(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        semantic = _Semantic()
        if self.state.momentum is not None:
            semantic = self._semantic(x, self.state.momentum)
        with self.accelerator.autocast():
            loss, parts = self.generation_loss(
                self.wrapped,
                x,
                labels,
                semantic=semantic.features,
                own=semantic.own,
                modulate=semantic.modulate,
            )
        self.accelerator.backward(loss)
        return {"generation": loss, **parts}

    def _semantic(self, x: torch.Tensor, momentum: GenRep) -> _Semantic:
        """What drives the generation in the joint stage, which alone has a momentum network."""
        # Drawn even where nothing is driven: a run without `semantic` has the same random numbers.
        own = torch.rand(()).item() >= self.config.semantic_rate
        features = None
        if self.config.semantic:
            with torch.no_grad(), self.accelerator.autocast():
                features = momentum.semantic_features(x)
        return _Semantic(features, own, modulate=self.config.semantic)

    def _perception(
        self, x: torch.Tensor, labels: torch.Tensor, labelled: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        teacher = self.state.teacher
        with self.accelerator.autocast():
            logits = self.model.perceive(x)
            distillation = None
            if teacher is not None:
                # The step counts a micro-batch before it is used.
                number = self.state.micro_batch - 1
                distillation = teacher.distillation_loss(logits, x, number)
            weight = self.config.distillation_weight
            loss, parts = perception_loss(
                logits, labels, labelled, distillation, distillation_weight=weight
            )
        self.accelerator.backward(loss)
        return {"perception": loss, **parts}

    def _refresh_teacher(self) -> float:
        """Renew a part of the teacher's bank where it is time to; the seconds that this took."""
        teacher = self.state.teacher
        every = self.config.teacher_refresh
        if teacher is None or not every or self.state.step % every != 0:
            return 0.0
        before = teacher.apart.seconds
        teacher.refresh()
        return teacher.apart.seconds - before

    def _ema_decay(self, stage: int) -> float:
        """After n steps of a stage (1 + n) / (10 + n), up to the configured one.

        0 for the first step, as in diffusers' EMAModel.
        """
        n = self.state.step - sum(self.config.stage_steps[:stage])
        return min(self.config.ema_decay, (1 + n) / (10 + n)) if n else 0.0

    def _enter_stage(self, stage: int) -> None:
        state = self.state
        self._leave_stage()
        self.optimizer.optimizer.state.clear()
        copy_(self.averages, self.parameters)
        if stage > 0 and state.teacher is None and self.config.teacher != "none":
            state.teacher = Teacher(self.config, self.model.frozen_copy(), self.scheduler)
            state.teacher.prepare(self._calibration())
        if stage == 2:
            state.momentum = self.model.frozen_copy()
        state.stage = stage

    def _leave_stage(self) -> None:
        """Take over the averaged weights of the stage that ends."""
        if self.state.stage >= 0:
            copy_(self.parameters, self.averages)
        # The null class of a pretrained backbone is initialised already.
        if self.state.stage == 0 and self.config.backbone is None:
            self.model.reset_null_class()

    def _checkpoint(self) -> None:
        # A loss that failed between two rows of the history shows here: no useless checkpoint may
        # take the place of a good one.
        named = zip(self.names, self.parameters, strict=True)
        broken = [name for name, parameter in named if not parameter.isfinite().all()]
        if broken:
            raise FloatingPointError(
                f"{len(broken)} parameters are not finite at step {self.state.step} "
                f"(the first is {broken[0]}); "
                f"checkpoints up to the last finite one are kept in {self.output}"
            )
        # The history first: a run that is killed in between writes it again, since it goes on from
        # the checkpoint before.
        self._write_history()
        save_checkpoint(self.output, self._content())

    def _write_history(self) -> None:
        lines = "".join(json.dumps(row) + "\n" for row in self.state.history)
        write_atomically(self.output / "history.jsonl", lines)

    def _content(self) -> Checkpoint:
        """What a checkpoint holds.

        No state of a random number generator: `_step` seeds each micro-batch by its index.
        """
        checkpoint = self.state.checkpoint()
        moments = optimizer_tensors(self.optimizer.optimizer, self.names)
        checkpoint.tensors |= {"model": self.model.state_dict(), "optimizer": moments}
        schedule = self.schedule.state_dict()
        scaler = self.accelerator.scaler
        checkpoint.state |= {
            "schedule": {name: schedule[name] for name in _OF_THE_SCHEDULE},
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        return checkpoint

    def _restore(self, folder: Path) -> None:
        """Take over a checkpoint's content, all of which is checked before anything is changed."""
        checkpoint = read_checkpoint(folder, self.accelerator.device)
        tensors = checkpoint.tensors
        optimizer = self.optimizer.optimizer
        scaler = self.accelerator.scaler
        try:
            self.state.check(checkpoint)
            current = self.model.state_dict()
            check_weights(tensors["model"], current, "the tensors of model.safetensors")
            schedule = checkpoint.state["schedule"]
            saved_scaler = checkpoint.state["scaler"]
            if schedule.keys() != set(_OF_THE_SCHEDULE):
                raise ValueError("the schedule in state.json is not that of this run")
            rates = schedule["_last_lr"]
            numbers = {**schedule, "_last_lr": 0.0, **dict(enumerate(rates))}
            check_numbers(numbers, "the schedule in state.json")
            parameters = self.state.parameters
            moments = optimizer_state_dict(optimizer, parameters, tensors["optimizer"], rates)
            scaler_keys = None if scaler is None else scaler.state_dict().keys()
            if scaler_keys != (saved_scaler and saved_scaler.keys()):
                raise ValueError("the scaler in state.json is not that of this mixed precision")
            check_numbers(saved_scaler or {}, "the scaler in state.json")
            self.state.restore(checkpoint, self.model, self.scheduler)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = error if isinstance(error, ValueError) else "state.json lacks something"
            raise ValueError(f"checkpoint {folder} is not one of this run: {reason}") from error
        self.model.load_state_dict(tensors["model"])
        optimizer.load_state_dict(moments)
        self.schedule.load_state_dict(self.schedule.state_dict() | schedule)
        if scaler is not None:
            scaler.load_state_dict(saved_scaler)

    def _calibration(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Latents and labels of the calibration split, in batches."""
        device = self.accelerator.device
        # Without workers: a progress bar has a thread by now.
        split = self.splits.calibration
        for images, labels in batches(split, BATCH, calibration_images(self.config, len(split))):
            yield self.model.encode(images.to(device)), labels.to(device)

    def _loader(self) -> Generator[Batch, None, None]:
        """The micro-batches from where the run is; their workers end when this is closed."""
        loader = seeded_loader(self.config, self.splits.train, start=self.state.micro_batch)
        return checked(self.accelerator.prepare(loader))

    def _learning_rate_factor(self, step: int) -> float:
        start = 0
        for stage, length in enumerate(self.config.stage_steps):
            if step < start + length or stage == len(STAGES) - 1:
                break
            start += length
        position = min((step - start) / max(length, 1), 1.0)
        warmup = min(1.0, (step - start + 1) / min(_WARMUP_STEPS, max(length // 5, 1)))
        falling = (1 - _FINAL_LEARNING_RATE) * (1 + math.cos(math.pi * position)) / 2
        cosine = _FINAL_LEARNING_RATE + falling
        highest = 1.0
        if stage > 0:
            highest = self.config.perception_learning_rate / self.config.learning_rate
        return warmup * cosine * highest


class _Semantic(NamedTuple):
    """What drives the generation (`GenerationLoss.forward`): nothing before the joint stage."""

    # [B, F, h, w]
    features: torch.Tensor | None = None
    own: bool = False
    modulate: bool = False
