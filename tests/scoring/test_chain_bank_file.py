"""Files of ChainBank: what is saved loads bit by bit, and what does not fit is refused."""

import json
import math
import os
import random
import re
from pathlib import Path

import numpy
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from safetensors import safe_open
from safetensors.torch import save_file

from genrep_fast import ChainBank
from genrep_fast.scoring import chain_bank_file

SHAPE, CLASSES, CHAINS, STEPS = (2, 3, 5), 3, 4, 10


def denoiser(x, timesteps, labels):
    """Depends on every argument; has channels for a learned variance."""
    y, t = (values.to(x.dtype).reshape(-1, 1, 1, 1) for values in (labels, timesteps))
    return torch.cat([torch.sin(x + y) + 0.2 * x * (1 + t / 1000), torch.tanh(x - 0.3 * y)], 1)


def ddpm(**config):
    return DDPMScheduler(**{"clip_sample": False, "variance_type": "fixed_large", **config})


def ddim(**config):
    return DDIMScheduler(clip_sample=False, **config)


def build(scheduler=None, **options):
    sizes = {"num_inference_steps": STEPS, "chains": CHAINS, "burn_in": 3, "thin": 2}
    given = {**sizes, "seed": 5, "dtype": torch.float64, **options}
    return ChainBank.build(denoiser, scheduler or ddpm(), CLASSES, SHAPE, **given)


def images(batch, dtype=torch.float64):
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, *SHAPE, dtype=torch.float64, generator=generator).to(dtype)


# What loads


def test_integers_of_numpy_are_saved(tmp_path):
    given = {"chains": numpy.int64(CHAINS), "seed": numpy.uint64(2**63 + 5), "thin": numpy.int32(2)}
    bank = build(sigma_floor=numpy.float32(0.25), **given)
    bank.refresh(denoiser, chains=numpy.int64(1))
    bank.save(tmp_path / "bank.safetensors")
    loaded = ChainBank.load(tmp_path / "bank.safetensors")
    assert loaded.settings == bank.settings and torch.equal(loaded.centers, bank.centers)
    expected = build(sigma_floor=0.25, seed=2**63 + 5)
    expected.refresh(denoiser)
    assert torch.equal(loaded.centers, expected.centers)


@pytest.mark.parametrize(
    "scheduler, options",
    [
        (ddpm(), {}),
        (ddpm(variance_type="learned_range"), {"variance": "fixed_large"}),
        (ddim(), {"eta": 1.0, "sigma_floor": 0.1}),
        (FlowMatchEulerDiscreteScheduler(), {"sigma_floor": 0.1}),
    ],
    ids=["ddpm", "learned_range", "ddim", "flow"],
)
def test_a_loaded_bank_continues_bit_by_bit(tmp_path, scheduler, options):
    bank = build(scheduler, dtype=torch.bfloat16, center="sample", **options)
    bank.refresh(denoiser, chains=3)
    bank.save(tmp_path / "bank.safetensors")
    loaded = ChainBank.load(tmp_path / "bank.safetensors")
    assert loaded.settings == bank.settings and loaded.evaluations == bank.evaluations
    for _ in range(2):
        assert torch.equal(loaded.centers, bank.centers) and torch.equal(loaded.std, bank.std)
        assert torch.equal(loaded.log_likelihood(images(3)), bank.log_likelihood(images(3)))
        for each in (loaded, bank):
            each.refresh(denoiser, chains=2)
    assert [file.name for file in tmp_path.iterdir()] == ["bank.safetensors"]


def half_written(tensors, file, metadata):
    file.write_bytes(b"half")
    raise OSError("disk full")


def not_replaced(file, path):
    raise OSError("disk full")


@pytest.mark.parametrize(
    "module, name, failing",
    [(chain_bank_file, "save_file", half_written), (os, "replace", not_replaced)],
)
def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch, module, name, failing):
    path = tmp_path / "bank.safetensors"
    bank = build()
    bank.save(path)
    before = path.read_bytes()
    bank.refresh(denoiser)
    monkeypatch.setattr(module, name, failing)
    with pytest.raises(OSError, match="disk full"):
        bank.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", ["truncated", "empty", "another safetensors", "text"])
def test_a_file_that_is_no_bank_gets_one_clear_error(tmp_path, content):
    path = tmp_path / "bank.safetensors"
    build().save(path)
    if content == "another safetensors":
        save_file({"weight": torch.ones(3)}, path)
    else:
        path.write_bytes(
            {"truncated": path.read_bytes()[:-100], "empty": b"", "text": b"not a bank at all"}[
                content
            ]
        )
    with pytest.raises(ValueError, match="bank.safetensors is truncated or not a chain bank"):
        ChainBank.load(path)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_refused_at_once(tmp_path, make):
    make(tmp_path / "bank.safetensors")
    with pytest.raises(
        ValueError, match="bank.safetensors is .*not a chain bank: it is not a file"
    ):
        ChainBank.load(tmp_path / "bank.safetensors")


FAMILIES = {
    "ddpm": (ddpm(), {}),
    "ddpm, trailing, fixed_large": (ddpm(timestep_spacing="trailing"), {}),
    "ddpm, linspace, clipped": (ddpm(timestep_spacing="linspace", clip_sample=True), {}),
    "ddpm, fixed_small, steps_offset": (
        ddpm(variance_type="fixed_small", steps_offset=1),
        {"sigma_floor": 0.1},
    ),
    "ddpm, zero terminal SNR": (
        ddpm(
            rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"
        ),
        {},
    ),
    "learned_range scored large": (
        ddpm(variance_type="learned_range"),
        {"variance": "fixed_large"},
    ),
    "learned_range scored small": (
        ddpm(variance_type="learned_range"),
        {"variance": "fixed_small", "sigma_floor": 1},
    ),
    "learned_range, trailing": (
        ddpm(variance_type="learned_range", timestep_spacing="trailing"),
        {"variance": "fixed_large"},
    ),
    "ddim": (ddim(), {"eta": 0.5, "sigma_floor": 0.1}),
    "ddim, eta 0, no alpha one": (ddim(set_alpha_to_one=False), {"sigma_floor": 0.1}),
    "flow": (FlowMatchEulerDiscreteScheduler(shift=3.0), {"sigma_floor": 0.2}),
}


def parts(path):
    """The state and the tensors of a bank's file."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        return json.loads(file.metadata()["chain_bank"]), tensors


def refused(path, message=""):
    """Loading ends with one line that names the file and holds `message`."""
    with pytest.raises(ValueError) as error:
        ChainBank.load(path)
    line = str(error.value)
    assert re.search(message, line), line
    assert (
        line.startswith(f"{path} is truncated or not a chain bank: ")
        and "\n" not in line
        and len(line) < 500 + len(str(path))
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """State and tensors of a bank that learns its variance, the kind with most to check."""
    path = tmp_path_factory.mktemp("saved") / "bank"
    scheduler, options = FAMILIES["learned_range scored small"]
    build(scheduler, dtype=torch.float32, **{**options, "sigma_floor": 0.1}).save(path)
    return parts(path)


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Every family with two dtypes and both centres, the one with most to check with all.
LOADED = [
    *((name, DTYPES[i % 4], "mean") for i, name in enumerate(FAMILIES)),
    *((name, DTYPES[(i + 1) % 4], "sample") for i, name in enumerate(FAMILIES)),
    *(("learned_range scored small", dtype, "sample") for dtype in DTYPES),
]


@pytest.mark.parametrize(("family", "dtype", "center"), LOADED)
def test_every_bank_that_can_be_built_loads(tmp_path, family, dtype, center):
    scheduler, options = FAMILIES[family]
    for burn_in, thin in ((0, 1), (STEPS - 1, 1), (1, 10**30)):
        bank = build(
            scheduler,
            dtype=dtype,
            center=center,
            burn_in=burn_in,
            thin=thin,
            **{"sigma_floor": 0.1, **options},
        )
        bank.refresh(denoiser, chains=3)
        bank.save(tmp_path / "bank")
        loaded = ChainBank.load(tmp_path / "bank")
        assert loaded.settings == bank.settings and loaded.evaluations == bank.evaluations
        assert torch.equal(loaded.centers, bank.centers) and torch.equal(loaded.std, bank.std)
        loaded.save(tmp_path / "again")
        state, tensors = parts(tmp_path / "bank")
        again_state, again_tensors = parts(tmp_path / "again")
        assert state == again_state
        assert all(
            torch.equal(tensors[name].view(torch.uint8), table.view(torch.uint8))
            for name, table in again_tensors.items()
        )


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_bank_with_a_chain_that_diverged_loads(tmp_path, value):
    bank = build(dtype=torch.float32)
    bank.centers[1, 2, 0, 0, 0] = value
    bank.save(tmp_path / "bank")
    scores = ChainBank.load(tmp_path / "bank").log_likelihood(images(3, torch.float32))
    assert (
        torch.equal(
            scores,
            bank.log_likelihood(images(3, torch.float32)),
        )
        or scores[:, 1].isnan().all()
    )
    assert scores[:, ::2].isfinite().all()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("chains", 10**9, "centers must hold 1000000000 chains"),
        ("chains", 3, "centers must hold 3 chains of 4 kept steps a class"),
        ("chains", -2, "chains must be at least 1, got -2"),
        ("chains", 4.0, "chains must be an integer, got 4.0"),
        ("chains", True, "chains must be an integer, got True"),
        ("chains", None, "chains must be an integer, got None"),
        ("burn_in", -3, "burn_in must be at least 0"),
        ("burn_in", 1, "centers must hold"),
        ("burn_in", STEPS, "burn_in must be less than num_inference_steps, 10, got 10"),
        ("burn_in", 10**40, "burn_in must be less than"),
        ("thin", 0, "thin must be at least 1"),
        ("thin", 1, "centers must hold"),
        ("thin", [2], r"thin must be an integer, got \[2\]"),
        ("center", "evil", 'center must be "mean" or "sample", got \'evil\''),
        ("center", ["mean"], "center must be"),
        ("sigma_floor", -1.0, "sigma_floor must be 0 or a number above"),
        ("sigma_floor", 1e-9, "sigma_floor must be 0 or a number above"),
        ("sigma_floor", 5.0, "coefficients.inv_var must follow from score_std and sigma_floor"),
        ("sigma_floor", "0.1", "sigma_floor must be a number, got '0.1'"),
        ("sigma_floor", True, "sigma_floor must be a number, got True"),
        ("sigma_floor", None, "sigma_floor must be a number, got None"),
        ("sigma_floor", 10**400, "sigma_floor must be 0 or a number above"),
        ("sigma_floor", math.nan, "chain_bank must hold finite numbers, got NaN"),
        ("sigma_floor", math.inf, "chain_bank must hold finite numbers, got Infinity"),
        ("seed", "x", "seed must be an integer, got 'x'"),
        ("seed", -1, "seed must be at least 0"),
        ("seed", 2**64, "seed must be less than"),
        ("seed", 1.0, "seed must be an integer"),
        ("clip_range", -5.0, "clip_range must be finite and positive"),
        ("clip_range", 0, "clip_range must be finite and positive"),
        ("clip_range", False, "clip_range must be a number or None"),
        ("clip_range", "1", "clip_range must be a number or None"),
        ("temperature", 1.0, "settings must hold nothing but a bank's, got 'temperature'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, saved, field, value, message):
    state, tensors = saved
    state = {**state, "settings": {**state["settings"], field: value}}
    save_file(tensors, tmp_path / "bank", metadata={"chain_bank": json.dumps(state)})
    refused(tmp_path / "bank", message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drawn": 0}, "drawn must be at least the number of chains, 4, got 0"),
        ({"drawn": -1}, "drawn must be at least 0"),
        ({"drawn": 5}, "evaluations must be 150, of 5 chains"),
        ({"drawn": 2**40, "evaluations": 2**40 * 30}, "need more than"),
        ({"drawn": 4.0}, "drawn must be an integer"),
        ({"evaluations": 119}, "evaluations must be 120"),
        ({"evaluations": "120"}, "evaluations must be an integer"),
        ({"settings": None}, "settings must be a dictionary, got NoneType"),
        (
            {"settings": {}},
            "settings must hold chains, burn_in, thin, center, sigma_floor, seed, clip_range, "
            "got none",
        ),
        ({"version": 2}, "chain_bank must hold nothing but a bank's, got 'version'"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(tmp_path, saved, change, message):
    state, tensors = saved
    save_file(tensors, tmp_path / "bank", metadata={"chain_bank": json.dumps({**state, **change})})
    refused(tmp_path / "bank", message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "chain_bank must be JSON"),
        ("[]", "chain_bank must be a dictionary, got list"),
        ("null", "chain_bank must be a dictionary, got NoneType"),
        ("[" * 50_000, "must be JSON|recursion"),
        ("9" * 5000, "integer string conversion"),
        (" " * 10**6, "chain_bank must have at most 65536 characters of metadata, got 1000000"),
        ("\x00", "chain_bank must be JSON"),
        (None, "the metadata must hold chain_bank, got none"),
    ],
    ids=["cut", "list", "null", "deep", "long number", "huge", "control character", "none"],
)
def test_metadata_that_is_no_state_is_refused(tmp_path, saved, text, message):
    save_file(saved[1], tmp_path / "bank", metadata=None if text is None else {"chain_bank": text})
    refused(tmp_path / "bank", message)


def replaced(name, change):
    return lambda tensors: {**tensors, name: change(tensors[name])}


def without(name):
    return lambda tensors: {key: table for key, table in tensors.items() if key != name}


def with_value(row, value):
    def change(table):
        table = table.clone()
        table[row] = value
        return table

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced("centers", torch.Tensor.int), "centers torch.int32 .*dtype must be float32"),
        (replaced("centers", lambda table: table.to(torch.float8_e4m3fn)), "dtype must be float32"),
        (replaced("centers", torch.Tensor.double), "coefficients.data must be torch.float64"),
        (
            replaced("centers", lambda table: table[:, :, 0, 0, 0].clone()),
            r"centers must be \[K, S, \*sample_shape\]",
        ),
        (replaced("centers", lambda table: table[:0]), "num_classes must be at least 1, got 0"),
        (
            replaced("centers", lambda table: table[:, :-1].clone()),
            "centers must hold 4 chains of 4 kept steps a class",
        ),
        (
            replaced("centers", lambda table: table[..., :0]),
            "sample_shape must hold positive integers",
        ),
        (
            replaced("centers", lambda table: torch.empty(3, 2**40, 0)),
            "sample_shape must hold positive integers",
        ),
        (replaced("timesteps", torch.Tensor.bool), "timesteps must be numbers"),
        (replaced("timesteps", lambda table: -table), "timesteps must be finite and not negative"),
        (replaced("timesteps", lambda table: table.flip(0)), "timesteps must not increase"),
        (
            replaced("timesteps", lambda table: table[:-1].clone()),
            "must be torch.float64 .9.|centers must hold",
        ),
        (replaced("timesteps", lambda table: table[:0]), "burn_in must be less than"),
        (replaced("timesteps", lambda table: table[:, None].clone()), "timesteps must be numbers"),
        (
            replaced("score_std", lambda table: table[:2].clone()),
            r"score_std must be torch.float64 \[10\]",
        ),
        (replaced("score_std", torch.Tensor.float), "score_std must be torch.float64"),
        (replaced("score_std", torch.Tensor.neg), "score_std must not be negative"),
        (replaced("score_std", with_value(3, math.nan)), "score_std must be finite, got nan"),
        (replaced("score_std", with_value(3, 0.5)), "std must be 0 or score_std"),
        (replaced("std", with_value(3, 0.5)), "std must be 0 or score_std"),
        (replaced("std", with_value(3, 0.0)), "coefficients.std must be the kernel's std"),
        (replaced("mean_noisy", with_value(0, math.inf)), "mean_noisy must be finite, got inf"),
        (replaced("coefficients.data", with_value(0, 2.0)), "coefficients.data must be 1"),
        (
            replaced("coefficients.mean_output", with_value(0, math.nan)),
            "coefficients.mean_output must be finite",
        ),
        (
            replaced("coefficients.std", with_value(3, 0.5)),
            "coefficients.std must be the kernel's std",
        ),
        (replaced("coefficients.inv_var", torch.Tensor.neg), "coefficients.inv_var must follow"),
        (
            replaced("coefficients.log_norm", with_value(3, 7.0)),
            "coefficients.log_norm must follow",
        ),
        (
            replaced("coefficients.std", torch.Tensor.double),
            "coefficients.std must be torch.float32",
        ),
        (
            replaced("log_variance_ratio", with_value(2, 50.0)),
            "log_variance_ratio must not be positive, got 50.0",
        ),
        (
            replaced("log_variance_ratio", with_value(2, math.nan)),
            "log_variance_ratio must be finite",
        ),
        (
            replaced("log_variance_ratio", lambda table: table[:3].clone()),
            "log_variance_ratio must be torch.float64",
        ),
        (without("log_variance_ratio"), "coefficients.std must be the kernel's std"),
        (without("mean_sample"), "tensors must hold mean_sample, got none"),
        (without("coefficients.std"), "tensors must hold coefficients.std, got none"),
        (
            lambda tensors: {**tensors, "payload": torch.ones(1)},
            "tensors must hold nothing but a bank's, got 'payload'",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, saved, change, message):
    state, tensors = saved
    save_file(change(tensors), tmp_path / "bank", metadata={"chain_bank": json.dumps(state)})
    refused(tmp_path / "bank", message)


VALUES = [
    0,
    1,
    -1,
    2,
    3,
    7,
    10,
    10**9,
    2**64,
    0.5,
    -0.5,
    1e-9,
    1e300,
    math.nan,
    math.inf,
    True,
    None,
    "",
    "mean",
    [],
    {},
    [1],
    {"a": 1},
]


def mutated_state(state, generator):
    state = {**state, "settings": dict(state["settings"])}
    fields = [
        *(("settings", name) for name in state["settings"]),
        (None, "drawn"),
        (None, "evaluations"),
        ("settings", "extra"),
    ]
    owner, name = generator.choice(fields)
    owner = state if owner is None else state[owner]
    if generator.random() < 0.1:
        owner.pop(name, None)
    else:
        owner[name] = generator.choice(VALUES)
    return state


def mutated_tensors(tensors, generator):
    name = generator.choice(list(tensors))
    table = tensors[name]
    flat = table.clone().flatten()
    place = generator.randrange(len(flat))
    kind = generator.choice(["value", "shape", "dtype", "gone", "swapped"])
    if kind == "gone":
        return without(name)(tensors)
    if kind == "swapped":
        return {**tensors, name: tensors[generator.choice(list(tensors))].clone()}
    if kind == "dtype":
        return {
            **tensors,
            name: table.to(
                generator.choice(
                    [torch.int64, torch.float16, torch.float32, torch.float64, torch.bool]
                )
            ),
        }
    if kind == "shape":
        shapes = [
            table[:-1],
            table[:0],
            torch.cat([table, table]),
            table[None],
            table[..., None],
            table.new_empty(0),
            table.flip(0),
        ]
        return {**tensors, name: generator.choice(shapes).clone()}
    values = [0, 1, -1, 1e30, 0.5] if table.dtype.is_floating_point else [0, 1, -1, 10**12]
    flat[place] = generator.choice(values + [math.nan, math.inf] * table.dtype.is_floating_point)
    return {**tensors, name: flat.reshape(table.shape)}


@pytest.mark.parametrize(
    "family",
    [
        "ddpm, linspace, clipped",
        "learned_range scored small",
        "learned_range, trailing",
        "ddim",
        "flow",
    ],
)
def test_what_loads_after_a_random_change_works(tmp_path, family):
    """Either one line of ValueError, or a bank that scores and refreshes."""
    scheduler, options = FAMILIES[family]
    generator, path, loaded_count = random.Random(family), tmp_path / "bank", 0
    build(scheduler, dtype=torch.float32, **options).save(path)
    state, tensors = parts(path)
    for _ in range(40):
        changed_state, changed_tensors = state, tensors
        for _ in range(generator.choice([1, 1, 2])):
            if generator.random() < 0.5:
                changed_state = mutated_state(changed_state, generator)
            else:
                changed_tensors = mutated_tensors(changed_tensors, generator)
        changed_tensors = {name: table.contiguous() for name, table in changed_tensors.items()}
        save_file(changed_tensors, path, metadata={"chain_bank": json.dumps(changed_state)})
        try:
            loaded = ChainBank.load(path)
        except ValueError:
            refused(path)
            continue
        loaded_count += 1
        shape = loaded.centers.shape[2:]
        assert loaded.log_likelihood(torch.zeros(2, *shape)).shape == (2, len(loaded.centers))
        loaded.refresh(lambda x, timesteps, labels: torch.cat([0.1 * x, x.tanh()], 1))
    print(f"{family}: {loaded_count} of 40 load")


@pytest.mark.parametrize("family", ["ddpm", "flow"])
def test_a_file_with_changed_bytes_is_refused_or_works(tmp_path, family):
    scheduler, options = FAMILIES[family]
    generator, path = random.Random(family), tmp_path / "bank"
    build(scheduler, dtype=torch.float32, **options).save(path)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(80):
        changed = bytearray(content)
        for _ in range(generator.choice([1, 3])):
            changed[generator.randrange(header)] = generator.randrange(256)
        path.write_bytes(changed)
        try:
            loaded = ChainBank.load(path)
        except ValueError:
            refused(path)
            continue
        loaded.log_likelihood(torch.zeros(1, *loaded.centers.shape[2:]))
        loaded.refresh(lambda x, timesteps, labels: torch.cat([0.1 * x, x.tanh()], 1))


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "meta", 3.5])
def test_a_device_that_is_not_there_is_refused(tmp_path, device):
    build().save(tmp_path / "bank")
    with pytest.raises(ValueError, match="device must"):
        ChainBank.load(tmp_path / "bank", device=device)


def test_a_folder_is_no_bank(tmp_path):
    refused(tmp_path)


def test_a_bank_whose_chain_ids_are_used_up_is_not_refreshed(tmp_path, saved):
    state, tensors = saved
    drawn = 2**32 // (CLASSES * CHAINS) * CHAINS
    state = {**state, "drawn": drawn, "evaluations": drawn * CLASSES * STEPS}
    save_file(tensors, tmp_path / "bank", metadata={"chain_bank": json.dumps(state)})
    bank = ChainBank.load(tmp_path / "bank")
    with pytest.raises(ValueError, match="chain ids: build a new bank"):
        bank.refresh(denoiser)


def test_a_loaded_bank_is_mapped_into_memory_and_leaves_its_file_alone(tmp_path):
    path = tmp_path / "bank.safetensors"
    build().save(path)
    before, loaded = path.read_bytes(), ChainBank.load(path)
    assert "bank.safetensors" in Path("/proc/self/maps").read_text()
    loaded.refresh(denoiser, chains=CHAINS)
    assert path.read_bytes() == before and not torch.equal(
        loaded.centers, ChainBank.load(path).centers
    )


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        ChainBank.load(tmp_path / "bank.safetensors")
