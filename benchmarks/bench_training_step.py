"""A whole joint training step of GenRep, in its parts: what the method costs beside its network.

On scikit-learn's digits, a UNet of 11 million parameters, with batches, losses, groups and bank as
`genrep train` has them by default: 128 images, and 128 chains a class of 25 steps, every fourth
kept after a fifth, for which an analytic denoiser stands in (scoring costs the same whatever the
centres).

Cases:

- "denoiser": forward and backward passes of both losses and the momentum network's features, as
  they are without the method.
- "teacher evaluations": what the bank's refreshes add to a step, 16 images through the network.
- "scoring": images against the bank, posterior and distillation loss, and the gradient of the
  logits.
- "alignment", "optimizer", "average": `align_gradients` of the reference, `torch.optim.AdamW` as it
  comes, `torch._foreach_lerp_`; "Gram pass": what ours needs before it can combine, update and
  average in one more pass. Parts of the next one, for the picture.
- "update": alignment, optimizer and average together.
- "method": scoring and update, all but the denoiser.
- "step": the whole of it; also "unaligned": two backward passes into .grad, without distillation
  and alignment, AdamW(fused=True) and average.

Every provider must first agree with float64: the loss, parameters and averages after an update; for
the whole step, with the eager one.
"""

import functools

import torch
from diffusers import UNet2DModel

import genrep_fast as gf
from genrep_fast.benchmarks.measurement import DEVICE, Case, Provider, compiled_backends, copy_of
from genrep_fast.data import as_tensors, load_data
from genrep_fast.models import GenRep
from genrep_fast.training.config import TrainingConfig
from genrep_fast.training.losses import GenerationLoss, perception_loss
from genrep_fast.training.networks import build_scheduler

CLASSES, TEACHER_EVALUATIONS = 10, 16
CONFIG = TrainingConfig()
BATCH = CONFIG.batch_size
WEIGHTS, POWER, EMA_DECAY = CONFIG.gradient_weights, CONFIG.gradient_power, CONFIG.ema_decay
BACKENDS = compiled_backends("gram", "adamw_step", "log_likelihood", "distillation_loss")


class Update:
    """What one step changes: parameters, averages, states of both optimizers; and both gradients.

    A gradient is None where a loss does not reach the parameter.
    """

    def __init__(self, parameters, groups, gradients, fused=False):
        self.parameters, self.groups, self.gradients = parameters, groups, gradients
        self.averages = [parameter.detach().clone() for parameter in parameters]
        options = {"lr": CONFIG.learning_rate, "weight_decay": CONFIG.weight_decay}
        self.adamw = torch.optim.AdamW(parameters, **options, fused=fused)
        group_of = dict(zip(map(str, range(len(groups))), groups, strict=True)).get
        named = {str(i): parameter for i, parameter in enumerate(parameters)}
        self.aligner = gf.GradientAligner(
            named.items(), weights=WEIGHTS, power=POWER, groups=group_of
        )
        self.aligned_adamw = gf.AlignedAdamW(
            parameters, **options, aligner=self.aligner, ema=self.averages, ema_decay=EMA_DECAY
        )

    def align(self):
        with gf.use_backend("reference"):
            aligned, _ = gf.align_gradients(
                *self.gradients, weights=WEIGHTS, power=POWER, groups=self.groups
            )
        for parameter, gradient in zip(self.parameters, aligned, strict=True):
            parameter.grad = gradient

    @torch.no_grad()
    def average(self):
        torch._foreach_lerp_(self.averages, self.parameters, 1 - EMA_DECAY)

    def eager(self):
        self.align()
        self.adamw.step()
        self.average()

    def gram(self, backend):
        with gf.use_backend(backend):
            gf.gram(*self.gradients, groups=self.groups)

    def ours(self, backend):
        """The gradients are handed over as backward passes hand them over."""
        with gf.use_backend(backend):
            self.aligner.zero_grad()
            for name, gradients in zip(self.aligner.names, self.gradients, strict=True):
                with self.aligner.collect(name):
                    for parameter, gradient in zip(self.parameters, gradients, strict=True):
                        parameter.grad = gradient
            self.aligned_adamw.step()


class Setting:
    """Networks, bank, a batch of digits and what a step updates."""

    def __init__(self, batch):
        torch.manual_seed(0)
        options = {
            "sample_size": 8,
            "in_channels": 1,
            "out_channels": 1,
            "layers_per_block": 1,
            "block_out_channels": (128, 256),
        }
        blocks = {
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        }
        backbone = UNet2DModel(**options, **blocks, norm_num_groups=8, attention_head_dim=16)
        self.model = GenRep.from_backbone(backbone, CLASSES).to(DEVICE)
        for layer in (
            self.model.mean_modulation,
            self.model.log_std_modulation[-1],
        ):  # zero at first, which would stop gradients
            torch.nn.init.normal_(layer.weight, std=0.05)
        self.momentum = self.model.frozen_copy()
        self.scheduler = build_scheduler(CONFIG)
        options = {
            "alignment_weight": CONFIG.alignment_weight,
            "variance_weight": CONFIG.variance_weight,
        }
        self.generation_loss = GenerationLoss(self.scheduler, **options).to(DEVICE)
        images, labels = as_tensors(load_data("digits").train)
        self.class_means = torch.stack(
            [images[labels == label].mean(0) for label in range(CLASSES)]
        ).to(DEVICE)
        self.x, self.labels = images[:batch].to(DEVICE), labels[:batch].to(DEVICE)
        self.labelled = torch.ones(batch, dtype=torch.bool, device=DEVICE)
        self.logits = torch.randn(batch, CLASSES, device=DEVICE)
        self.parameters = [
            parameter for parameter in self.model.parameters() if parameter.requires_grad
        ]
        self.groups = self.model.alignment_groups()
        self.bank = self._bank()
        self.gradients = [
            torch.autograd.grad(loss(), self.parameters, allow_unused=True)
            for loss in (self.perception, self.generation)
        ]

    def update(self, dtype=torch.float32):
        """Of copies of the parameters."""
        parameters = [
            torch.nn.Parameter(parameter.detach().to(dtype, copy=True))
            for parameter in self.parameters
        ]
        gradients = [
            [None if grad is None else grad.to(dtype) for grad in of_loss]
            for of_loss in self.gradients
        ]
        return Update(parameters, self.groups, gradients)

    def _bank(self):
        steps = CONFIG.teacher_steps
        options = {
            "num_inference_steps": steps,
            "burn_in": steps // 5,
            "thin": 4,
            "center": "sample",
            "sigma_floor": 0.2,
            "seed": 0,
        }
        return gf.ChainBank.build(
            self._denoise_classes,
            self.scheduler,
            CLASSES,
            self.x.shape[1:],
            chains=CONFIG.teacher_chains,
            device=DEVICE,
            **options,
        )

    def _denoise_classes(self, x_t, timesteps, labels):
        """The exact noise prediction for classes N(mean of the class's digits, 0.25 I)."""
        level = self.scheduler.alphas_cumprod.to(x_t)[timesteps].view(-1, 1, 1, 1)
        return (
            (1 - level).sqrt()
            * (x_t - level.sqrt() * self.class_means[labels])
            / (0.25 * level + 1 - level)
        )

    def perception(self, distillation=None):
        logits = self.model.perceive(self.x)
        value = None if distillation is None else distillation(logits)
        return perception_loss(
            logits,
            self.labels,
            self.labelled,
            value,
            distillation_weight=CONFIG.distillation_weight,
        )[0]

    def generation(self):
        torch.manual_seed(1)
        with torch.no_grad():
            semantic = self.momentum.semantic_features(self.x)
        return self.generation_loss(self.model, self.x, self.labels, semantic=semantic)[0]

    def distillation(self, logits):
        return gf.distillation_loss(logits, self.bank.log_likelihood(self.x))

    def score(self, backend):
        """Loss and its gradient."""
        with gf.use_backend(backend):
            logits = self.logits.requires_grad_()
            loss = self.distillation(logits)
            return loss.detach(), torch.autograd.grad(loss, logits)[0]

    def denoise(self):
        for loss in (self.perception, self.generation):
            torch.autograd.grad(loss(), self.parameters, allow_unused=True)

    @torch.no_grad()
    def evaluate_teacher(self):
        self.momentum(
            self.x[:TEACHER_EVALUATIONS], 500, self.labels[:TEACHER_EVALUATIONS], modulate=False
        )


def unaligned_step(setting, update):
    update.adamw.zero_grad()
    setting.perception().backward()
    setting.generation().backward()
    update.adamw.step()
    update.average()


def eager_step(setting, update):
    with gf.use_backend("reference"):
        perception = setting.perception(setting.distillation)
    update.gradients = [
        torch.autograd.grad(loss, setting.parameters, allow_unused=True)
        for loss in (perception, setting.generation())
    ]
    update.eager()


def our_step(backend, setting, update):
    with gf.use_backend(backend):
        update.aligned_adamw.zero_grad()
        with update.aligner.collect("perception"):
            setting.perception(setting.distillation).backward()
        with update.aligner.collect("generation"):
            setting.generation().backward()
        update.aligned_adamw.step()


@functools.cache
def setting_of(batch):
    return Setting(batch)


def norm_error(results, expected):
    """Of lists of tensors, relative, in the norm."""
    difference = sum(
        (result.double() - value.double()).square().sum()
        for result, value in zip(results, expected, strict=True)
    )
    return (difference / sum(value.double().square().sum() for value in expected)).sqrt().item()


def require(error, bound):
    if not error < bound:
        raise RuntimeError(f"relative error {error:.1e}")
    return error


def scoring_error(backend):
    setting = setting_of(BATCH)
    logits, x = setting.logits.detach().double().requires_grad_(), setting.x.double()
    loss = gf.distillation_loss(logits, setting.bank.log_likelihood(x))
    expected = loss.detach(), torch.autograd.grad(loss, logits)[0]
    return require(
        max(
            norm_error([result], [value])
            for result, value in zip(setting.score(backend), expected, strict=True)
        ),
        1e-4,
    )


def update_error(step):
    """After one update, against that of the eager operations in float64."""
    update, exact = setting_of(BATCH).update(), setting_of(BATCH).update(torch.float64)
    step(update)
    exact.eager()
    pairs = ((update.parameters, exact.parameters), (update.averages, exact.averages))
    return require(max(norm_error(*pair) for pair in pairs), 1e-6)


def step_error(step):
    """Of what a whole step of a small batch adds to the parameters, against the eager one.

    With eps = 1: as it is, Adam's first step is the gradients' sign, which on a GPU follows the
    rounding of sums in any order.
    """
    added = []
    for take in (step, eager_step):
        setting = Setting(4)
        before = [parameter.detach().clone() for parameter in setting.parameters]
        update = Update(setting.parameters, setting.groups, setting.gradients)
        for optimizer in (update.adamw, update.aligned_adamw):
            optimizer.param_groups[0]["eps"] = 1.0
        take(setting, update)
        added.append(
            [
                parameter.detach() - start
                for parameter, start in zip(setting.parameters, before, strict=True)
            ]
        )
    return require(norm_error(*added), 1e-3)


def take_update(backend, update):
    if backend == "reference":
        update.eager()
    else:
        update.ours(backend)


def method(backend, setting, update):
    setting.score(backend)
    take_update(backend, update)


def whole_step(backend, setting, update):
    if backend == "reference":
        eager_step(setting, update)
    else:
        our_step(backend, setting, update)


METHODS = {"eager reference": ("eager", "reference")} | {
    f"genrep_fast, {name}": ("ours", name) for name in BACKENDS
}


def case(name):
    setting = setting_of(BATCH)
    update = setting.update()
    update.align()  # the optimizer alone finds its gradients in .grad
    moved = None
    if name in ("denoiser", "teacher evaluations", "alignment", "optimizer", "average"):
        run, provider, role = {
            "denoiser": (setting.denoise, "torch", "bound"),
            "teacher evaluations": (setting.evaluate_teacher, "torch", "bound"),
            "alignment": (update.align, "eager reference", "eager"),
            "optimizer": (update.adamw.step, "eager reference", "eager"),
            "average": (update.average, "eager reference", "eager"),
        }[name]
        providers = {
            provider: Provider(run, float, role)
        }  # torch's own operations, and parts of what "update" checks
    elif name == "Gram pass":
        providers = {
            f"genrep_fast, {backend}": Provider(
                functools.partial(update.gram, backend), float, "variant"
            )
            for backend in BACKENDS
        }
    elif name == "scoring":
        providers = {
            provider: Provider(
                functools.partial(setting.score, backend),
                functools.partial(scoring_error, backend),
                role,
            )
            for provider, (role, backend) in METHODS.items()
        }
    elif name == "step":
        whole = Update(setting.parameters, setting.groups, setting.gradients, fused=True)
        providers = {
            "unaligned": Provider(functools.partial(unaligned_step, setting, whole), float, "bound")
        }
        for provider, (role, backend) in METHODS.items():
            step = functools.partial(whole_step, backend)
            state = Update(setting.parameters, setting.groups, setting.gradients)
            providers[provider] = Provider(
                functools.partial(step, setting, state), functools.partial(step_error, step), role
            )
    else:
        providers = {}
        for provider, (role, backend) in METHODS.items():
            run = {
                "update": functools.partial(take_update, backend),
                "method": functools.partial(method, backend, setting),
            }[name]
            error = functools.partial(update_error, functools.partial(take_update, backend))
            providers[provider] = Provider(functools.partial(run, setting.update()), error, role)
        moved = moved_by_update(update) if name == "update" else None
    numel = sum(parameter.numel() for parameter in setting.parameters)
    return Case(providers, numel, moved, 0, **copy_of(torch.empty(numel, device=DEVICE)))


def moved_by_update(update):
    """Bytes: gradients once, aligned ones twice; parameters, moments, averages read and written."""
    elements = 0
    for parameter, group, *gradients in zip(
        update.parameters, update.groups, *update.gradients, strict=True
    ):
        present = sum(gradient is not None for gradient in gradients)
        elements += parameter.numel() * (8 + present * (1 if group is None else 2))
    return 4 * elements


NAMES = [
    "denoiser",
    "teacher evaluations",
    "scoring",
    "alignment",
    "optimizer",
    "average",
    "Gram pass",
    "update",
    "method",
    "step",
]
CASES = {name: functools.partial(case, name) for name in NAMES}
QUICK = list(CASES)
SMALLEST = "update"
