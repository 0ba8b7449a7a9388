"""Where kernels run, and tiny, randomly initialised models of diffusers' real classes.

Diffusers is imported where a model is built, so that the operators' tests need torch and pytest
alone.
"""

import os
import subprocess
import sys
import time

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
# Without a GPU Triton runs in its interpreter. It decides so when it is imported, by diffusers for
# example.
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

import genrep_fast as gf  # noqa: E402

# The CUDA kernels, compiled for the host by `make emulate`; see tests/device.
EMULATED = os.environ.get("GENREP_FAST_EMULATED")
BACKENDS = ["triton", "cuda"] if HAS_GPU else ["cpu", "triton"]
if EMULATED:
    import emulation

    emulation.load(EMULATED)
    BACKENDS = ["cuda"]

# What tests/kernels share asserts as a test does.
pytest.register_assert_rewrite("kernel_cases", "tensor_list_cases")

# Files that take longest, which several processes (`make test`) take up first, so that none of them
# works alone at the end.
LONGEST = (
    "test_wheel.py",
    "test_data_parallel.py",
    "test_data_parallel_steps.py",
    "test_sharded_parameters.py",
    "test_scoring_kernels.py",
    "test_on_device.py",
    "test_triton.py",
    "test_alignment_kernels.py",
    "test_shared_centers_kernels.py",
    "test_package.py",
    "test_training.py",
    "test_scorer.py",
    "test_build.py",
    "test_examples.py",
    "test_pipelines.py",
    "test_classify_command.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))
    for item in items:
        if "recorded_launches" in getattr(item, "fixturenames", ()):
            # For -k: of the emulator alone.
            item.extra_keyword_matches.add("recorded_launches")


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Insists on one compiled backend after the other, those that can run here."""
    if request.param == "triton" and not HAS_GPU:
        convert_bfloat16_as_a_gpu(monkeypatch)
    with gf.use_backend(request.param):
        yield request.param


@pytest.fixture
def interpreted(backend):
    """Whether kernels run in Triton's interpreter, a thousand times slower than compiled."""
    return backend == "triton" and not HAS_GPU


@pytest.fixture
def compiled(interpreted):
    """Leaves a test to the backends that are compiled."""
    if interpreted:
        pytest.skip("too slow in the interpreter")


def convert_bfloat16_as_a_gpu(monkeypatch):
    """Triton's interpreter cuts float32 off to bfloat16, where a GPU rounds, and takes bfloat16's
    subnormal numbers for zeros.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def exact(values, source, target, mode):
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view("uint16")
        if (source, target) == (tl.bfloat16, tl.float32):
            return values.view("uint16").astype("uint32") << 16
        return convert(values, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", exact)


@pytest.fixture
def two_processes(run_ranks):
    """A function that runs a test file as ranks 0 and 1, with the arguments rank and store."""
    return lambda file: run_ranks(file, 2)


@pytest.fixture
def run_ranks(tmp_path):
    """A function that runs a test file as so many ranks, with the arguments rank and store, and
    those that are given besides.

    A rank that takes 300 seconds prints where all its threads are and ends.
    """
    hang = "import faulthandler; faulthandler.dump_traceback_later(300, exit=True); "
    program = hang + "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"

    def run(file, size, *arguments):
        outputs = [tmp_path / f"rank{rank}.log" for rank in range(size)]
        processes = []
        for rank, output in enumerate(outputs):
            # runpy leaves its own arguments alone: the file reads sys.argv[2:].
            command = [sys.executable, "-c", program, file, str(rank), str(tmp_path / "store")]
            command += map(str, arguments)
            with output.open("w") as log:
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        try:
            # Where one rank fails the other would wait for it.
            while all(process.poll() in (None, 0) for process in processes):
                if all(process.poll() == 0 for process in processes):
                    return
                time.sleep(0.05)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        codes = [process.returncode for process in processes]
        pytest.fail(f"ranks ended with {codes}\n" + "\n".join(o.read_text() for o in outputs))

    return run


def build_backbone(kind, num_classes=3, *, channels=1, **options):
    """A "unet" or "dit" for 8 × 8 latents, the same weights every time."""
    from diffusers import DiTTransformer2DModel, UNet2DModel

    torch.manual_seed(0)
    if kind == "dit":
        return DiTTransformer2DModel(
            **{
                "num_attention_heads": 2,
                "attention_head_dim": 8,
                "in_channels": channels,
                "out_channels": channels,
                "num_layers": 2,
                "sample_size": 8,
                "patch_size": 2,
                "norm_num_groups": 4,
                "num_embeds_ada_norm": num_classes,
                **options,
            }
        )
    return UNet2DModel(
        **{
            "sample_size": 8,
            "in_channels": channels,
            "out_channels": channels,
            "layers_per_block": 1,
            "block_out_channels": (8, 16),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "norm_num_groups": 4,
            "attention_head_dim": 8,
            "num_class_embeds": num_classes,
            **options,
        }
    )


@pytest.fixture(scope="session")
def tiny_backbone():
    """The function `build_backbone`."""
    return build_backbone


@pytest.fixture(scope="session")
def tiny_vae():
    """A function that builds an AutoencoderKL from 3 × 16 × 16 images to 4 × 8 × 8 latents."""

    def build():
        from diffusers import AutoencoderKL

        torch.manual_seed(1)
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 8),
            norm_num_groups=4,
            latent_channels=4,
            sample_size=16,
        )

    return build


@pytest.fixture(scope="session")
def tiny_model():
    """A function that builds a GenRep of three classes; `active` gives its zero-initialised
    modulations random weights.
    """

    def build(kind, *, active=False, vae=None, num_classes=3, **options):
        from genrep_fast.models import GenRep

        model = GenRep.from_backbone(
            build_backbone(kind, num_classes, channels=1 if vae is None else 4, **options),
            num_classes,
            vae=vae,
        )
        if active:
            for layer in (model.mean_modulation, model.log_std_modulation[-1]):
                torch.nn.init.normal_(layer.weight, std=0.05)
        return model.eval()

    return build


@pytest.fixture
def recorded_launches(backend):
    """Records the launches of CUDA kernels, which the emulator alone can tell."""
    if backend != "cuda" or not EMULATED:
        pytest.skip("of the emulator (make emulate)")
    return lambda: emulation.recorded_launches(EMULATED)
