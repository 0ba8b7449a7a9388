"""Checkpoints of AlignedAdamW by `torch.distributed.checkpoint`, Accelerate and Lightning."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import genrep_fast as gf


class Run:
    """A model, its aligner and its optimizer, as a script makes them."""

    def __init__(self, kind="plain", seed=0):
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.aligner = gf.GradientAligner(self.model)
        params, options = self.model.parameters(), {}
        if kind == "groups":
            params = [
                {"params": list(self.model[0].parameters()), "lr": 0.05},
                {
                    "params": [*self.model[2].parameters(), *self.model[3].parameters()],
                    "weight_decay": 0.0,
                },
            ]
        if kind == "named":
            params = self.model.named_parameters()
        if kind == "average":
            options = {"ema": copy.deepcopy(self.model), "ema_decay": 0.5}
        if kind == "tensor":
            options = {"lr": torch.tensor(0.02)}
        if kind == "one-element tensor":
            options = {"lr": torch.tensor([0.02])}
        if kind == "frozen":
            self.model[0].weight.requires_grad_(False)
        self.optimizer = gf.AlignedAdamW(params, aligner=self.aligner, **{"lr": 0.02, **options})

    def backward(self, seed):
        output = self.model(torch.randn(6, 3, generator=torch.Generator().manual_seed(seed)))
        return self.aligner.backward(output.mean(), output.square().mean())

    def step(self, seed):
        self.backward(seed)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def values(self):
        state = self.optimizer.state_dict()["state"]
        return [
            *self.model.state_dict().values(),
            *(value for values in state.values() for value in values.values()),
        ]


def assert_same(one, other):
    torch.testing.assert_close(one.values(), other.values(), rtol=0, atol=0)


KINDS = ["plain", "groups", "named", "average", "tensor", "one-element tensor", "frozen"]
OPTIONS = {
    "default": {},
    "flat": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True},
    "offloaded": {"full_state_dict": True, "cpu_offload": True},
}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, "default") for kind in KINDS),
        ("groups", "flat"),
        ("groups", "full"),
        ("groups", "offloaded"),
        ("average", "full"),
        ("one-element tensor", "flat"),
        ("frozen", "offloaded"),
    ],
)
@pytest.mark.parametrize("steps", [0, 2])
def test_state_of_a_fresh_optimizer_and_of_one_that_has_stepped(kind, options, steps):
    options = StateDictOptions(**OPTIONS[options])
    source, target = Run(kind), Run(kind, seed=1)
    for seed in range(steps):
        source.step(seed)
    before = [value.clone() for value in source.model.state_dict().values()]
    model, optimizer = get_state_dict(source.model, source.optimizer, options=options)
    torch.testing.assert_close(list(source.model.state_dict().values()), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in source.model.parameters())
    model, optimizer = copy.deepcopy(model), copy.deepcopy(optimizer)
    set_state_dict(
        target.model,
        target.optimizer,
        model_state_dict=model,
        optim_state_dict=optimizer,
        options=options,
    )
    assert [float(group["lr"]) for group in target.optimizer.param_groups] == [
        float(group["lr"]) for group in source.optimizer.param_groups
    ]
    for seed in range(steps, steps + 2):
        source.step(seed)
        target.step(seed)
    assert_same(target, source)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flat", [True, False])
def test_through_a_folder_in_one_process(tmp_path, kind, flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    source, target = Run(kind), Run(kind, seed=1)
    source.step(0)
    model, optimizer = get_state_dict(source.model, source.optimizer, options=options)
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=tmp_path, no_dist=True)
    model, optimizer = get_state_dict(target.model, target.optimizer, options=options)
    state_dict = {"model": model, "optimizer": optimizer}
    dcp.load(state_dict, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(
        target.model,
        target.optimizer,
        model_state_dict=state_dict["model"],
        optim_state_dict=state_dict["optimizer"],
        options=options,
    )
    for seed in (1, 2):
        source.step(seed)
        target.step(seed)
    assert_same(target, source)


@pytest.fixture
def process_group(tmp_path):
    method = f"file://{tmp_path}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=method, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "compiled": compiled,
    "data parallel": nn.parallel.DistributedDataParallel,
    "data parallel of compiled": lambda model: nn.parallel.DistributedDataParallel(compiled(model)),
    "compiled data parallel": lambda model: compiled(nn.parallel.DistributedDataParallel(model)),
}


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_models(process_group, wrapper, steps):
    def make():
        torch.manual_seed(0)
        model = WRAPPERS[wrapper](nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
        aligner = gf.GradientAligner(model)
        return model, aligner, gf.AlignedAdamW(model.parameters(), lr=0.1, aligner=aligner)

    def step(model, aligner, optimizer):
        for name, loss in zip(aligner.names, (torch.Tensor.mean, torch.std), strict=True):
            with aligner.collect(name):
                loss(model(torch.eye(3))).backward()
        optimizer.step()
        optimizer.zero_grad()

    source, target = make(), make()
    for _ in range(steps):
        step(*source)
    model, optimizer = copy.deepcopy(get_state_dict(source[0], source[2]))
    assert optimizer["state"].keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}
    set_state_dict(target[0], target[2], model_state_dict=model, optim_state_dict=optimizer)
    for run in (source, target):
        step(*run)
    parameters = [list(run[0].parameters()) for run in (source, target)]
    torch.testing.assert_close(*parameters, rtol=0, atol=0)


def test_from_and_to_torchs_adamw():
    source, target = Run(), Run(seed=1)
    source.step(0)
    theirs = torch.optim.AdamW(source.model.parameters())
    ours = get_optimizer_state_dict(source.model, source.optimizer)
    set_optimizer_state_dict(source.model, theirs, ours)
    back = get_optimizer_state_dict(source.model, theirs)
    target.model.load_state_dict(source.model.state_dict())
    set_optimizer_state_dict(target.model, target.optimizer, copy.deepcopy(back))
    source.step(1)
    target.step(1)
    assert_same(target, source)


def test_averages_are_left_alone_where_state_is_only_allocated():
    run = Run("average")
    with torch.no_grad():
        for average in run.optimizer.ema.parameters():
            average += 1
    before = copy.deepcopy(run.optimizer.ema.state_dict())
    get_state_dict(run.model, run.optimizer)
    torch.testing.assert_close(run.optimizer.ema.state_dict(), before, rtol=0, atol=0)
    assert all(state["step"].item() == 0 for state in run.optimizer.state.values())


def zero_gradients(run):
    for parameter in run.model.parameters():
        parameter.grad = torch.zeros_like(parameter)


def test_a_step_with_nothing_collected_only_allocates_at_a_learning_rate_of_zero():
    run = Run("groups")
    zero_gradients(run)
    rates = [group["lr"] for group in run.optimizer.param_groups]
    with pytest.raises(RuntimeError, match="no gradients of perception, generation"):
        run.optimizer.step()
    run.optimizer.param_groups[0]["lr"] = 0.0
    with pytest.raises(RuntimeError, match="no gradients of perception, generation"):
        run.optimizer.step()
    run.optimizer.param_groups[1]["lr"] = torch.tensor(0.0)
    run.model[0].weight.grad[0, 0] = 1
    with pytest.raises(RuntimeError, match="no gradients of perception, generation"):
        run.optimizer.step()
    assert not run.optimizer.state
    zero_gradients(run)
    run.optimizer.step()
    assert {state["step"].item() for state in run.optimizer.state.values()} == {0.0}
    assert len(run.optimizer.state) == len(list(run.model.parameters()))
    run.optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="no gradients of perception, generation"):
        run.optimizer.step()
    for group, rate in zip(run.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    expected = Run("groups")
    expected.step(0)
    run.step(0)
    assert_same(run, expected)


def test_a_learning_rate_of_zero_with_gradients_is_a_step():
    run = Run()
    run.optimizer.param_groups[0]["lr"] = 0.0
    run.step(0)
    assert {state["step"].item() for state in run.optimizer.state.values()} == {1.0}
    assert all(state["exp_avg"].any() for state in run.optimizer.state.values())


def test_part_of_what_is_needed_is_not_nothing():
    run = Run()
    run.optimizer.param_groups[0]["lr"] = 0.0
    with run.aligner.collect("perception"):
        run.model(torch.zeros(6, 3)).mean().mul(0).backward()
    with pytest.raises(RuntimeError, match="no gradients of generation"):
        run.optimizer.step()


# Accelerate and Lightning


def test_accelerate_saves_and_loads(tmp_path, accelerate):
    accelerator = accelerate.Accelerator(cpu=True)
    source = Run("average")
    model, optimizer, schedule = accelerator.prepare(
        source.model,
        source.optimizer,
        torch.optim.lr_scheduler.ExponentialLR(source.optimizer, 0.5),
    )
    accelerator.register_for_checkpointing(source.optimizer.ema)

    def step(seed):
        output = model(torch.randn(6, 3, generator=torch.Generator().manual_seed(seed)))
        source.aligner.backward(
            output.mean(), output.square().mean(), backward=accelerator.backward
        )
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    def values():
        return copy.deepcopy([*source.values(), *source.optimizer.ema.state_dict().values()])

    step(0)
    accelerator.save_state(tmp_path)
    step(1)
    step(2)
    expected = values()
    accelerator.load_state(tmp_path)
    assert source.optimizer.param_groups[0]["lr"] == 0.01
    step(1)
    step(2)
    torch.testing.assert_close(values(), expected, rtol=0, atol=0)


@pytest.mark.slow
def test_lightning_resumes(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.automatic_optimization = False
            self.network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
            self.average = copy.deepcopy(self.network)

        def training_step(self, batch, batch_idx):
            output = self.network(batch[0])
            self.aligner.backward(
                output.mean(), output.square().mean(), backward=self.manual_backward
            )
            optimizer = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()

        def configure_optimizers(self):
            self.aligner = gf.GradientAligner(self.network)
            return gf.AlignedAdamW(
                self.network.parameters(),
                lr=0.1,
                aligner=self.aligner,
                ema=self.average,
                ema_decay=0.5,
            )

    data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(
            torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
        ),
        batch_size=4,
    )

    def trainer(epochs):
        return lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )

    straight, first, resumed = Module(), Module(), Module()
    trainer(3).fit(straight, data)
    interrupted = trainer(1)
    interrupted.fit(first, data)
    interrupted.save_checkpoint(tmp_path / "last.ckpt")
    with torch.no_grad():
        resumed.network[0].weight.zero_()
    trainer(3).fit(resumed, data, ckpt_path=tmp_path / "last.ckpt", weights_only=False)
    torch.testing.assert_close(resumed.state_dict(), straight.state_dict(), rtol=0, atol=0)
    assert not torch.equal(first.network[0].weight, straight.network[0].weight)
