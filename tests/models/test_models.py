"""GenRep over diffusers' UNet and DiT: construction, the null class, what labels reach, modulation,
VAE, saving and loading.
"""

import copy
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from safetensors.torch import load_file, save_file

from genrep_fast.models import GenRep
from genrep_fast.models.backbones import class_embeddings, require_fitting
from genrep_fast.training.losses import GenerationLoss, perception_loss

KINDS = ("unet", "dit")
NUM_CLASSES, NULL = 3, 3
NEW_PARAMETERS = ("head.", "mean_modulation.", "log_std_modulation.")


def clean_images(count=5, channels=1):
    return torch.randn(count, channels, 8, 8, generator=torch.Generator().manual_seed(count)).clamp(
        -1, 1
    )


def class_tables(model):
    """The class embeddings, a row a class, the null class last; a DiT has one in every block."""
    return class_embeddings(model.backbone)


def assert_same_state(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("rows", [None, NUM_CLASSES, NUM_CLASSES + 1])
def test_unet_gets_a_null_class_where_it_has_none(tiny_backbone, rows):
    backbone = tiny_backbone("unet", rows)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    model = GenRep.from_backbone(backbone, NUM_CLASSES)
    (table,) = class_tables(model)
    assert table.shape == (NUM_CLASSES + 1, 32) and model.null_class == NULL
    if rows is None:
        assert not table.any()
    else:
        assert torch.equal(table[:rows], backbone.class_embedding.weight)
    if rows == NUM_CLASSES:
        expected = sum(backbone.class_embedding.weight[row].double() for row in range(rows)) / rows
        torch.testing.assert_close(table[NULL].double(), expected, rtol=0, atol=1e-6)
    assert_same_state(backbone.state_dict(), before)
    others = {
        name: value
        for name, value in model.backbone.state_dict().items()
        if name != "class_embedding.weight"
    }
    assert_same_state(
        others, {name: value for name, value in before.items() if name != "class_embedding.weight"}
    )


def test_dit_keeps_the_null_class_that_it_has(tiny_backbone):
    backbone = tiny_backbone("dit")
    model = GenRep.from_backbone(backbone, NUM_CLASSES)
    assert [len(table) for table in class_tables(model)] == [NUM_CLASSES + 1] * 2
    assert_same_state(model.backbone.state_dict(), backbone.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_a_backbone_directory_equals_the_backbone(tiny_backbone, tmp_path, kind):
    backbone = tiny_backbone(kind)
    backbone.save_pretrained(tmp_path)
    torch.manual_seed(5)
    loaded = GenRep.from_backbone(tmp_path, NUM_CLASSES)
    torch.manual_seed(5)
    assert_same_state(loaded.state_dict(), GenRep.from_backbone(backbone, NUM_CLASSES).state_dict())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_classes", [2, 7])
def test_another_number_of_classes_is_refused(tiny_backbone, kind, num_classes):
    with pytest.raises(
        ValueError,
        match=rf"num_classes must be .*= {4 if kind == 'unet' else 3}.* got {num_classes}",
    ):
        GenRep.from_backbone(tiny_backbone(kind, 4 if kind == "unet" else 3), num_classes)


def test_bad_backbones_are_refused(tiny_backbone, tiny_vae, tmp_path):
    with pytest.raises(
        ValueError,
        match="backbone must be one of UNet2DModel, DiTTransformer2DModel, got 'AutoencoderKL'",
    ):
        GenRep.from_backbone(tiny_vae(), NUM_CLASSES)
    with pytest.raises(FileNotFoundError, match="backbone: .*missing.config.json does not exist"):
        GenRep.from_backbone(tmp_path / "missing", NUM_CLASSES)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet3DModel"}))
    with pytest.raises(ValueError, match="backbone must be one of .* got 'UNet3DModel'"):
        GenRep.from_backbone(str(tmp_path), NUM_CLASSES)
    with pytest.raises(ValueError, match="class_embed_type must be None, got 'timestep'"):
        GenRep.from_backbone(tiny_backbone("unet", None, class_embed_type="timestep"), NUM_CLASSES)


def test_a_missing_vae_directory_is_named(tiny_backbone, tmp_path):
    with pytest.raises(FileNotFoundError, match="vae: .*missing.config.json does not exist"):
        GenRep.from_backbone(
            tiny_backbone("dit", channels=4), NUM_CLASSES, vae=tmp_path / "missing"
        )


@pytest.mark.parametrize(
    "argument",
    [{"semantic_block": "up_blocks.7"}, {"perception_blocks": ["mid_block", "up_blocks.7"]}],
)
def test_an_unknown_block_is_refused(tiny_backbone, argument):
    with pytest.raises(
        ValueError, match="must be among mid_block, up_blocks.0, up_blocks.1, got 'up_blocks.7'"
    ):
        GenRep.from_backbone(tiny_backbone("unet"), NUM_CLASSES, **argument)


@pytest.mark.parametrize("kind", KINDS)
def test_chosen_blocks_and_pooling_decide_what_the_head_reads(tiny_backbone, kind):
    block = "up_blocks.1" if kind == "unet" else "transformer_blocks.0"
    model = GenRep.from_backbone(
        tiny_backbone(kind),
        NUM_CLASSES,
        perception_blocks=[block],
        semantic_block=block,
        pool_size=1,
    )
    x = clean_images()
    features = model.semantic_features(x)
    pooled = features.double().mean((2, 3))  # pool_size 1 is the plain average
    normed = (pooled - pooled.mean(1, keepdim=True)) / (
        pooled.var(1, keepdim=True, correction=0) + 1e-5
    ).sqrt()
    expected = normed @ model.head[1].weight.double().T + model.head[1].bias.double()
    torch.testing.assert_close(model.perceive(x).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train", [False, True])
def test_class_rows_never_reach_the_perception_branch(tiny_model, kind, train):
    model = tiny_model(kind).train(train)
    x = clean_images(64)  # a DiT of its own accord drops one label in ten: 64 would not survive
    logits, semantic = model.perceive(x), model.semantic_features(x)
    with torch.no_grad():
        for table in class_tables(model):
            table[:NULL] += 1 + torch.rand_like(table[:NULL])
    torch.manual_seed(99)
    assert torch.equal(model.perceive(x), logits)
    assert torch.equal(model.semantic_features(x), semantic)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train", [False, True])
def test_perception_gradients_reach_the_null_row_alone(tiny_model, kind, train):
    model = tiny_model(kind).train(train)
    labels = torch.tensor([0, 1, 2, 1, 0])
    perception_loss(model.perceive(clean_images()), labels, torch.ones(5, dtype=torch.bool), None)[
        0
    ].backward()
    for table in class_tables(model):
        assert not table.grad[:NULL].any()
        assert table.grad[NULL].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train", [False, True])
def test_generation_follows_its_labels_and_no_chance(tiny_model, kind, train):
    model = tiny_model(kind).train(train)
    x = clean_images(1).expand(64, -1, -1, -1)
    labels = torch.arange(64) % (NULL + 1)
    output = model.denoise(x, 500, labels)
    torch.manual_seed(98)
    assert torch.equal(model.denoise(x, 500, labels), output)
    for label in range(1, NULL + 1):
        assert (output[label] - output[0]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("own", [False, True])
def test_every_new_parameter_receives_a_gradient(tiny_model, kind, own):
    model = tiny_model(kind).train()
    scheduler = DDPMScheduler(clip_sample=False)
    generation_loss = GenerationLoss(scheduler, alignment_weight=0.1, variance_weight=1e-3)
    x, labels = clean_images(16), torch.arange(16) % NUM_CLASSES
    semantic = model.frozen_copy().semantic_features(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        generation_loss(model, x, labels, semantic=semantic, own=own)[0].backward()
        perception_loss(model.perceive(x), labels, torch.ones(16, dtype=torch.bool), None)[
            0
        ].backward()
        behind_zero = (
            {"log_std_modulation.0.weight", "log_std_modulation.0.bias"} if step == 0 else set()
        )
        new = {
            name: parameter
            for name, parameter in model.named_parameters()
            if name.startswith(NEW_PARAMETERS)
        }
        assert {name for name, parameter in new.items() if not parameter.grad.any()} == behind_zero
        assert len(new) == 10
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_modulation_starts_as_the_plain_denoiser(tiny_model, kind):
    model = tiny_model(kind)
    x, labels = clean_images(), torch.tensor([0, 1, 2, 3, 0])
    timesteps = torch.tensor([0, 1, 500, 998, 999])
    modulated, plain = (
        model(x, timesteps, labels, modulate=modulate) for modulate in (True, False)
    )
    assert torch.equal(modulated.sample, plain.sample)
    assert torch.equal(plain.sample, model.backbone(x, timesteps, class_labels=labels).sample)
    assert not modulated.log_std_shift.any() and not plain.log_std_shift.any()
    assert torch.equal(modulated.features, plain.features)


@pytest.mark.parametrize("kind", KINDS)
def test_modulation_is_a_timestep_dependent_linear_map_of_input_and_semantics(tiny_model, kind):
    model = tiny_model(kind, active=True)
    x, labels = clean_images(), torch.tensor([0, 1, 2, 3, 0])
    timesteps = torch.tensor([0, 1, 500, 998, 999])
    semantic = model.semantic_features(clean_images(6)[:5])
    output = model(x, timesteps, labels, semantic=semantic)
    direction = (
        semantic.double() / semantic.double().norm(dim=1, keepdim=True) * semantic.shape[1] ** 0.5
    )
    frequencies = 10000 ** -(torch.arange(32).double() / 31)
    for row in range(5):
        angles = timesteps[row] * frequencies
        time = torch.cat([angles.sin(), angles.cos()])
        weight = (model.mean_modulation.weight.double() @ time).reshape(1, -1)  # [C', C + F]
        large = (
            direction[row]
            .repeat_interleave(8 // semantic.shape[-1], 1)
            .repeat_interleave(8 // semantic.shape[-1], 2)
        )
        inputs = torch.cat([x[row].double(), large])
        expected = model.backbone(x, timesteps, class_labels=labels).sample[row].double() + (
            weight @ inputs.flatten(1)
        ).view(1, 8, 8)
        torch.testing.assert_close(output.sample[row].double(), expected, rtol=0, atol=1e-4)
    assert (output.sample - model(x, timesteps, labels, modulate=False).sample).abs().max() > 0.05


def test_own_features_are_the_default_semantics(tiny_model):
    model = tiny_model("unet", active=True)
    x, labels = clean_images(), torch.zeros(5, dtype=torch.int64)
    own = model(x, 300, labels)
    given = model(x, 300, labels, semantic=own.features)
    assert torch.equal(own.sample, given.sample) and torch.equal(
        own.log_std_shift, given.log_std_shift
    )
    assert own.log_std_shift.shape == (5,) and own.log_std_shift.unique().numel() == 5
    # Lengths do not matter, directions do.
    scaled = model(x, 300, labels, semantic=own.features * 7)
    torch.testing.assert_close(scaled.sample, own.sample, rtol=0, atol=1e-5)
    other = model(x, 300, labels, semantic=-own.features)
    assert (other.sample - own.sample).abs().max() > 1e-2


@pytest.mark.parametrize("sign", [-1, 1])
def test_log_std_shift_is_clamped(tiny_model, sign):
    model = tiny_model("unet")
    torch.nn.init.constant_(model.log_std_modulation[-1].bias, 5.0 * sign)
    shift = model(clean_images(), 10, torch.zeros(5, dtype=torch.int64)).log_std_shift
    assert torch.equal(shift, torch.full((5,), float(sign)))


@pytest.mark.parametrize("kind", KINDS)
def test_learned_variance_channels_are_modulated_too(tiny_model, kind):
    model = tiny_model(kind, active=True, out_channels=2)
    x, labels = clean_images(), torch.zeros(5, dtype=torch.int64)
    output, plain = (model(x, 700, labels, modulate=modulate).sample for modulate in (True, False))
    assert output.shape == (5, 2, 8, 8)
    assert ((output - plain).abs().amax((0, 2, 3)) > 1e-2).all()


@pytest.mark.parametrize("kind", KINDS)
def test_alignment_groups_are_the_attention_blocks(tiny_model, kind):
    model = tiny_model(kind)
    prefix = "transformer_blocks." if kind == "dit" else ".attentions."
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = model.alignment_groups()
    assert len(groups) == len(names)
    blocks = {}
    for name, group in zip(names, groups, strict=True):
        assert (group is not None) == (prefix in name), name
        if group is not None:
            end = name.index(prefix) + len(prefix)
            blocks.setdefault(group, set()).add(name[: name.index(".", end)])
    # down, middle and up (two layers) of the UNet; two transformer blocks
    assert sorted(blocks) == list(range(4 if kind == "unet" else 2))
    assert all(len(members) == 1 for members in blocks.values())


def test_frozen_copy_is_independent_and_gradient_free(tiny_model):
    model = tiny_model("unet").train()
    copy = model.frozen_copy()
    assert not copy.training and model.training
    assert not any(parameter.requires_grad for parameter in copy.parameters()) and all(
        p.requires_grad for p in model.parameters()
    )
    before = {name: value.clone() for name, value in copy.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert_same_state(copy.state_dict(), before)


def test_latent_model_encodes_and_decodes_through_its_frozen_vae(tiny_model, tiny_vae):
    vae = tiny_vae()
    model = tiny_model("dit", vae=vae).train()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    latents = model.encode(images)
    assert latents.shape == (2, *model.sample_shape) == (2, 4, 8, 8)
    expected = vae.encode(images).latent_dist.mean * vae.config.scaling_factor
    torch.testing.assert_close(latents, expected.detach())
    decoded = model.decode(latents)
    assert decoded.shape == images.shape and decoded.abs().max() <= 1
    torch.testing.assert_close(
        decoded, vae.decode(expected / vae.config.scaling_factor).sample.clamp(-1, 1).detach()
    )
    assert model.perceive(latents).shape == (2, NUM_CLASSES)
    assert not any(parameter.requires_grad for parameter in model.vae.parameters())
    assert not latents.requires_grad
    copy = model.frozen_copy()
    assert copy.vae is model.vae and copy.backbone is not model.backbone
    assert all(
        parameter is not other
        for parameter, other in zip(copy.head.parameters(), model.head.parameters(), strict=True)
    )
    assert len(model.alignment_groups()) == sum(
        parameter.requires_grad for parameter in model.parameters()
    )


def test_images_are_their_own_latents_without_a_vae(tiny_model):
    model = tiny_model("unet")
    images = clean_images() * 2
    assert torch.equal(model.encode(images), images)
    assert torch.equal(model.decode(images), images.clamp(-1, 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("latent", [False, True])
def test_save_and_load_are_equal_to_the_bit(tiny_model, tiny_vae, tmp_path, kind, latent):
    model = tiny_model(kind, active=True, vae=tiny_vae() if latent else None)
    model.register_to_config(class_names=["ape", "bee", "cat"])
    model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    loaded = GenRep.from_pretrained(tmp_path)
    assert_same_state(loaded.state_dict(), model.state_dict())
    assert list(loaded.config.class_names) == ["ape", "bee", "cat"]
    assert isinstance(loaded.vae, AutoencoderKL) == latent
    x, labels = clean_images(channels=4 if latent else 1), torch.tensor([0, 1, 2, 3, 0])
    # Weights lie in a file as they come; where memory is aligned, a convolution may add in another
    # order.
    copied = copy.deepcopy(loaded)
    assert torch.equal(copied.perceive(x), model.perceive(x))
    assert torch.equal(copied.train().denoise(x, 20, labels), model.denoise(x, 20, labels))
    assert [p.requires_grad for p in loaded.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]


WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tiny_backbone, tiny_model, tiny_vae, tmp_path_factory):
    """Folders of a GenRep, of backbones and of a VAE; a function for each that loads a folder like
    it.
    """
    root = tmp_path_factory.mktemp("saved")
    tiny_model("unet").save_pretrained(root / "genrep")
    tiny_backbone("unet").save_pretrained(root / "unet")
    tiny_backbone("dit").save_pretrained(root / "dit")
    tiny_vae().save_pretrained(root / "vae")
    latent = tiny_backbone("dit", channels=4)
    return root, {
        "genrep": GenRep.from_pretrained,
        "unet": lambda folder: GenRep.from_backbone(folder, NUM_CLASSES),
        "dit": lambda folder: GenRep.from_backbone(folder, NUM_CLASSES),
        "vae": lambda folder: GenRep.from_backbone(latent, NUM_CLASSES, vae=folder),
    }


def change_weights(folder, change, file=WEIGHTS):
    tensors = load_file(folder / file)
    change(tensors, sorted(tensors))
    save_file(tensors, folder / file, metadata={"format": "pt"})


CHANGES = {
    "missing": (lambda t, names: t.pop(names[3]), r"1 missing \({3}\)"),
    "several missing": (
        lambda t, names: [t.pop(name) for name in names[:6]],
        r"6 missing \({0}, {1}, {2} and 3 more\)",
    ),
    "unexpected": (lambda t, names: t.update(extra=torch.zeros(1)), r"1 unexpected \(extra\)"),
    "renamed": (
        lambda t, names: t.update(extra=t.pop(names[3])),
        r"1 missing \({3}\), 1 unexpected \(extra\)",
    ),
    "another shape": (
        lambda t, names: t.update({names[3]: torch.zeros(2, 3, 5)}),
        r"{3} is \[2, 3, 5\], not \[\d+",
    ),
    "all of them": (
        lambda t, names: t.clear() or t.update(x=torch.zeros(1)),
        "missing .* more.*, 1 unexpected",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("what", ["genrep", "unet", "dit", "vae"])
def test_weights_of_something_else_are_refused(saved, tmp_path, caplog, what, change):
    root, load = saved
    folder = shutil.copytree(root / what, tmp_path / what)
    load[what](folder)
    names = [name.replace(".", r"\.") for name in sorted(load_file(folder / WEIGHTS))]
    alter, message = CHANGES[change]
    change_weights(folder, alter)
    with pytest.raises(ValueError, match=message.format(*names)) as error:
        load[what](folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    assert not caplog.records, "a warning says what the error says already"


@pytest.mark.parametrize("content", [b"", b"text", bytes(100)])
@pytest.mark.parametrize("what", ["genrep", "unet", "vae"])
def test_weights_that_cannot_be_read_are_refused(saved, tmp_path, what, content):
    root, load = saved
    folder = shutil.copytree(root / what, tmp_path / what)
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(OSError, match=f"{tmp_path}"):
        load[what](folder)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_incomplete_weights_in_several_files_are_refused(tiny_model, tmp_path, low_cpu_mem_usage):
    """Their index still promises the key: diffusers leaves the parameter without values, or with
    random ones.
    """
    model = tiny_model("unet", active=True)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert_same_state(GenRep.from_pretrained(tmp_path).state_dict(), model.state_dict())
    name = sorted(load_file(tmp_path / shards[1]))[0]
    change_weights(tmp_path, lambda tensors, names: tensors.pop(name), shards[1])
    with pytest.raises(ValueError, match=rf"1 missing \({name}\)"):
        GenRep.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    (tmp_path / shards[1]).unlink()
    with pytest.raises(OSError, match=shards[1]):
        GenRep.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"weight_map": []}', '{"weight_map": {"head.1.bias": "../x.safetensors"}}'],
)
def test_a_damaged_index_of_several_files_is_named(tiny_model, tmp_path, content):
    tiny_model("unet").save_pretrained(tmp_path, max_shard_size="40KB")
    index = tmp_path / f"{WEIGHTS}.index.json"
    index.write_text(content)
    with pytest.raises(ValueError, match=f"{index} is damaged"):
        GenRep.from_pretrained(tmp_path)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_every_way_of_loading_refuses_incomplete_weights(saved, tmp_path, low_cpu_mem_usage):
    folder = shutil.copytree(saved[0] / "genrep", tmp_path / "genrep")
    change_weights(folder, lambda tensors, names: tensors.pop("head.1.bias"))
    for options in (
        {},
        {"dtype": torch.float16},
        {"output_loading_info": True},
        {"use_safetensors": False},
    ):
        with pytest.raises(ValueError, match=r"1 missing \(head.1.bias\)"):
            GenRep.from_pretrained(folder, low_cpu_mem_usage=low_cpu_mem_usage, **options)
    change_weights(folder, lambda tensors, names: tensors.update({"head.1.bias": torch.zeros(5)}))
    with pytest.raises(ValueError, match=r"do not fit: head.1.bias is \[5\], not \[3\]"):
        GenRep.from_pretrained(folder, low_cpu_mem_usage=low_cpu_mem_usage)


def test_what_else_from_pretrained_takes_keeps_working(tiny_model, tmp_path):
    model = tiny_model("unet", active=True)
    model.save_pretrained(tmp_path / "one", variant="fp16")
    assert_same_state(
        GenRep.from_pretrained(tmp_path / "one", variant="fp16").state_dict(), model.state_dict()
    )
    model.save_pretrained(tmp_path / "many", variant="fp16", max_shard_size="40KB")
    assert_same_state(
        GenRep.from_pretrained(tmp_path, subfolder="many", variant="fp16").state_dict(),
        model.state_dict(),
    )
    loaded, info = GenRep.from_pretrained(
        tmp_path / "many", variant="fp16", output_loading_info=True
    )
    assert isinstance(loaded, GenRep) and not info["missing_keys"]


def test_a_network_without_values_is_refused(tiny_backbone):
    with torch.device("meta"):
        backbone = tiny_backbone("unet")
    with pytest.raises(
        ValueError,
        match="backbone must have values for all weights, got none for .* and [0-9]+ more",
    ):
        GenRep.from_backbone(backbone, NUM_CLASSES)


def test_a_vae_directory_equals_the_vae(tiny_backbone, tiny_vae, tmp_path):
    vae = tiny_vae()
    vae.save_pretrained(tmp_path)
    model = GenRep.from_backbone(tiny_backbone("unet", channels=4), NUM_CLASSES, vae=str(tmp_path))
    assert_same_state(model.vae.state_dict(), vae.state_dict())


def test_rectangular_samples_work(tiny_backbone):
    model = GenRep.from_backbone(tiny_backbone("unet", sample_size=(8, 4)), NUM_CLASSES)
    x = torch.randn(2, 1, 8, 4)
    assert model.sample_shape == (1, 8, 4)
    assert model.perceive(x).shape == (2, NUM_CLASSES)
    assert model.denoise(x, 3, torch.tensor([0, 1])).shape == x.shape


def test_alignment_loss_compares_directions_at_the_semantic_block(tiny_model):
    model = tiny_model("unet")
    x, labels = clean_images(16), torch.zeros(16, dtype=torch.int64)
    semantic = model.semantic_features(x).detach()
    loss = GenerationLoss(
        DDPMScheduler(clip_sample=False), alignment_weight=1.0, variance_weight=0.0
    )
    torch.manual_seed(3)
    total, parts = loss(model, x, labels, semantic=semantic)
    torch.manual_seed(3)
    timesteps = ((torch.arange(16) + torch.rand(16)) * (1000 / 16)).long()
    x_t = loss.scheduler.add_noise(x, torch.randn_like(x), timesteps)
    features = model(x_t, timesteps, labels).features
    cosines = [
        F.cosine_similarity(
            features[i, :, row, column].double(), semantic[i, :, row, column].double(), dim=0
        )
        for i in range(16)
        for row in range(features.shape[2])
        for column in range(features.shape[3])
    ]
    expected = 1 - torch.stack(cosines).mean()
    torch.testing.assert_close(
        parts["representation_alignment"].double(), expected, rtol=0, atol=1e-5
    )
    torch.testing.assert_close(total, parts["diffusion"] + parts["representation_alignment"])


def test_class_names_are_one_a_class_or_an_error(tiny_backbone):
    def named(names):
        return GenRep.from_backbone(tiny_backbone("dit"), NUM_CLASSES, class_names=names)

    assert named(["ape", "bee", "cat"]).class_names == ["ape", "bee", "cat"]
    assert named(None).class_names == ["0", "1", "2"]
    with pytest.raises(ValueError, match="class_names must be .*, got 2 for 3 classes"):
        named(["ape", "bee"]).class_names  # noqa: B018
    with pytest.raises(ValueError, match="class_names must be a list of strings, got 'abc'"):
        named("abc").class_names  # noqa: B018


def test_a_time_embedding_without_t_0_is_refused(tiny_backbone):
    backbone = tiny_backbone("unet", time_embedding_type="fourier")
    with pytest.raises(ValueError, match="time_embedding_type must be .* got 'fourier'"):
        GenRep.from_backbone(backbone, NUM_CLASSES)


def test_a_learned_time_embedding_has_the_schedulers_timesteps(tiny_backbone):
    options = {"time_embedding_type": "learned", "num_train_timesteps": 100}
    model = GenRep.from_backbone(tiny_backbone("unet", **options), NUM_CLASSES)
    assert model.perceive(clean_images()).isfinite().all()
    require_fitting(model.backbone, DDPMScheduler(num_train_timesteps=100))
    with pytest.raises(ValueError, match="has 100 timesteps, got 1000 of DDPMScheduler"):
        require_fitting(model.backbone, DDPMScheduler())
    with pytest.raises(ValueError, match="has 100 timesteps, got fractional ones of FlowMatch"):
        require_fitting(model.backbone, FlowMatchEulerDiscreteScheduler())


def test_a_learned_variance_needs_its_channels(tiny_model):
    scheduler = DDPMScheduler(variance_type="learned_range")
    require_fitting(tiny_model("dit", out_channels=2).backbone, scheduler)
    with pytest.raises(ValueError, match="must have 2 output channels, got 1"):
        require_fitting(tiny_model("dit").backbone, scheduler)


def test_a_backbone_without_a_size_is_named(tiny_backbone):
    model = GenRep.from_backbone(tiny_backbone("unet", sample_size=None), NUM_CLASSES)
    assert model.perceive(clean_images()).shape == (5, NUM_CLASSES)
    with pytest.raises(ValueError, match="sample_size must be the side of its inputs, got None"):
        model.image_shape  # noqa: B018


@pytest.mark.parametrize("scheduler", [DDIMScheduler, FlowMatchEulerDiscreteScheduler])
def test_the_generation_loss_is_that_of_ddpm(scheduler):
    with pytest.raises(TypeError, match=f"must be a DDPMScheduler, got {scheduler.__name__}"):
        GenerationLoss(scheduler(), alignment_weight=0.1, variance_weight=0.0)
