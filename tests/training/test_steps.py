"""A step of training: gradients that are accumulated, clipped, aligned and scaled, averages, and a
loss that is not a number.
"""

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from tiny_runs import make_splits, resume, train, without_times

from genrep_fast import GenRepPipeline
from genrep_fast.training import Trainer


def applied_gradients(trainer):
    """Gradients that the optimizer applied, one list a step: its first moment is the gradient
    itself where beta1 is 0.
    """
    optimizer, seen = trainer.optimizer.optimizer, []
    for group in optimizer.param_groups:
        group["betas"] = (0.0, 0.999)

    def record(*_):
        seen.append(
            [
                optimizer.state[p]["exp_avg"].clone() if p in optimizer.state else None
                for p in trainer.parameters
            ]
        )

    optimizer.register_step_post_hook(record)
    return seen


def total_norm(gradients):
    return (
        torch.cat([gradient.double().flatten() for gradient in gradients if gradient is not None])
        .norm()
        .item()
    )


def test_accumulated_micro_batches_equal_one_batch(make_config, tmp_path):
    """With a loss that draws nothing: the real one stratifies its timesteps over a micro-batch, so
    its numbers differ by chance.
    """

    def fixed_loss(model, x, labels, **_):
        loss = F.mse_loss(model(x, 100, labels, modulate=False).sample, x)
        return loss, {"diffusion": loss}

    found = {}
    for accumulation in (1, 4):
        options = {
            "batch_size": 8 // accumulation,
            "gradient_accumulation_steps": accumulation,
            "output": str(tmp_path / str(accumulation)),
        }
        trainer = Trainer(
            make_config(
                diffusion_steps=2, perception_steps=0, joint_steps=0, max_grad_norm=0, **options
            ),
            make_splits(),
        )
        trainer.generation_loss = fixed_loss
        found[accumulation] = applied_gradients(trainer)
        trainer.run()
        assert len(found[accumulation]) == 2 and trainer.state.micro_batch == 2 * accumulation
    for whole, parts in zip(found[1][0], found[4][0], strict=True):
        assert (whole is None) == (parts is None)
        if whole is not None:
            torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped(make_config, tmp_path):
    for limit in (1e-3, 0.0):
        trainer = Trainer(
            make_config(max_grad_norm=limit, output=str(tmp_path / str(limit))), make_splits()
        )
        seen = applied_gradients(trainer)
        trainer.run()
        norms = [total_norm(gradients) for gradients in seen]
        assert len(norms) == 9
        if limit:
            assert norms == pytest.approx([limit] * 9, rel=2e-3)  # the divisor is the norm + 1e-6
            assert min(row["gradient_norm"] for row in trainer.state.history) > 10 * limit
        else:
            assert min(norms) > 1e-2 and not any(
                "gradient_norm" in row for row in trainer.state.history
            )


@pytest.mark.parametrize("align", [True, False])
def test_joint_gradients_are_aligned_on_the_attention_blocks(make_config, backbones, align):
    """Against the decomposition into a parallel and an orthogonal part, by block, in float64."""
    options = {"backbone": str(backbones / "unet"), "diffusion_steps": 0, "joint_steps": 2}
    trainer, seen = Trainer(make_config(**options, max_grad_norm=0, align=align), make_splits()), []
    applied = applied_gradients(trainer)

    def record(*_):
        collected = [
            [None if g is None else g.double() for g in gradients]
            for gradients in trainer.aligner._collected.gradients
        ]
        seen.append(dict(zip(trainer.aligner.names, collected, strict=True)))

    trainer.optimizer.optimizer.register_step_pre_hook(record)
    trainer.run()
    parts, written = (
        seen[-1],
        [None if gradient is None else gradient.double() for gradient in applied[-1]],
    )
    blocks, shared = {}, 0
    for index, name in enumerate(trainer.names):
        p, g = parts["perception"][index], parts["generation"][index]
        if align and ".attentions." in name and p is not None and g is not None:
            blocks.setdefault(
                name.split(".attentions.")[0] + name.split(".attentions.")[1][0], []
            ).append((p, g, written[index]))
        elif p is None and g is None:
            assert written[index] is None
        else:
            expected = (0.7 * p if p is not None else 0) + (0.3 * g if g is not None else 0)
            torch.testing.assert_close(written[index], expected, rtol=1e-5, atol=1e-8)
            shared += p is not None and g is not None
    assert shared > 10
    cosines = []
    for tensors in blocks.values():
        p, g, actual = (
            torch.cat([t[position].flatten() for t in tensors]) for position in range(3)
        )
        cosines.append(p @ g / (p.norm() * g.norm()))
        damping = ((cosines[-1] + 1) / 2) ** 2
        p_parallel, g_parallel = (p @ g) / (g @ g) * g, (p @ g) / (p @ p) * p
        expected = 0.7 * (p - p_parallel + damping * p_parallel) + 0.3 * (
            g - g_parallel + damping * g_parallel
        )
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-7)
    row = trainer.state.history[-1]
    assert len(cosines) == (4 if align else 0) and {"cosine", "alpha"} & set(row) == (
        {"cosine", "alpha"} if align else set()
    )
    if align:
        cosines = torch.stack(cosines)
        assert row["cosine"] == pytest.approx(cosines.mean().item(), abs=1e-5)
        assert row["alpha"] == pytest.approx((((cosines + 1) / 2) ** 2).mean().item(), abs=1e-5)


def test_the_only_loss_of_an_early_stage_counts_whole(make_config):
    trainer, seen = Trainer(make_config(joint_steps=0, max_grad_norm=0), make_splits()), []
    applied = applied_gradients(trainer)

    def record(*_):
        (gradients,) = [
            gradients
            for gradients in trainer.aligner._collected.gradients
            if any(gradient is not None for gradient in gradients)
        ]
        seen.append([None if gradient is None else gradient.clone() for gradient in gradients])

    trainer.optimizer.optimizer.register_step_pre_hook(record)
    trainer.run()
    assert len(applied) == len(seen) == 5
    for written, collected in zip(applied, seen, strict=True):
        assert [gradient is None for gradient in written] == [
            gradient is None for gradient in collected
        ]
        pairs = [(w, c) for w, c in zip(written, collected, strict=True) if w is not None]
        assert len(pairs) > 5
        for w, c in pairs:
            torch.testing.assert_close(w, c, rtol=1e-6, atol=0)


def change_loss(trainer, monkeypatch, factor, after=0):
    """Multiply the generation loss by `factor` after so many calls."""
    original, calls = trainer.generation_loss, []

    def generation_loss(*arguments, **options):
        calls.append(1)
        loss, parts = original(*arguments, **options)
        return (loss * factor, parts) if len(calls) > after else (loss, parts)

    monkeypatch.setattr(trainer, "generation_loss", generation_loss)


def scaled(scale):
    """An accelerator with the GradScaler of fp16, which needs a GPU; the scaler does not."""
    accelerator = Accelerator()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return accelerator


def test_scaled_losses_train_like_unscaled_ones(make_config, tmp_path):
    runs = []
    for name, accelerator in (("plain", None), ("scaled", scaled(2.0**16))):
        runs.append(Trainer(make_config(output=str(tmp_path / name)), make_splits(), accelerator))
        runs[-1].run()
    for plain, row in zip(*(without_times(run.state.history) for run in runs), strict=True):
        assert row == pytest.approx(plain, rel=1e-5)


def test_a_step_whose_gradients_overflow_is_skipped(make_config, monkeypatch):
    """A thousand times the loss, scaled by 2^127, overflows until the scaler has halved its scale
    often enough.
    """
    trainer, seen = (
        Trainer(
            make_config(diffusion_steps=20, perception_steps=0, joint_steps=0),
            make_splits(),
            scaled(2.0**127),
        ),
        [],
    )
    change_loss(trainer, monkeypatch, 1e3)
    optimizer = trainer.optimizer.optimizer
    kept = [parameter.detach().clone() for parameter in trainer.parameters]

    def record(*_):
        moved = [
            not torch.equal(p, k)
            for values in (trainer.parameters, trainer.averages)
            for p, k in zip(values, kept, strict=True)
        ]
        seen.append((any(moved), max(state["step"].item() for state in optimizer.state.values())))

    optimizer.register_step_post_hook(record)
    trainer.run()
    skipped = [moved for moved, _ in seen].index(True)
    assert 5 < skipped < 15 and all(steps == 0 for _, steps in seen[:skipped])
    assert [steps for _, steps in seen[skipped:]] == list(range(1, 21 - skipped))
    assert all(parameter.isfinite().all() for parameter in (*trainer.parameters, *trainer.averages))


def test_averages_are_saved_and_start_anew_in_every_stage(make_config, tmp_path, monkeypatch):
    """The average's decay is diffusers': min(decay, (1 + n) / (10 + n)) after n steps, 0 for the
    first.
    """
    followed, momentum = {}, 0.9
    original = Trainer._step

    def step(self, stage, batches):
        if stage not in followed:
            followed[stage] = {
                "semantic": [p.detach().double() for p in self.parameters],
                "count": 0,
            }
            if stage > 0:  # a stage starts from the averages of the one before
                for p, average in zip(self.parameters, followed[stage - 1]["average"], strict=True):
                    torch.testing.assert_close(p.double(), average, rtol=1e-5, atol=1e-6)
        metrics = original(self, stage, batches)
        found, now = followed[stage], [p.detach().double() for p in self.parameters]
        n = found["count"]
        decay = 0.0 if n == 0 else min(0.995, (1 + n) / (10 + n))
        found["average"] = (
            now
            if n == 0
            else [decay * a + (1 - decay) * p for a, p in zip(found["average"], now, strict=True)]
        )
        found["semantic"] = [
            momentum * s + (1 - momentum) * p for s, p in zip(found["semantic"], now, strict=True)
        ]
        found["count"], found["now"] = n + 1, now
        return metrics

    monkeypatch.setattr(Trainer, "_step", step)
    trainer = train(
        make_config(momentum=momentum, learning_rate=0.01, perception_learning_rate=0.01)
    )
    saved = GenRepPipeline.from_pretrained(tmp_path / "run" / "model").model
    expected = {"average": saved, "semantic": trainer.state.momentum}
    for name, network in expected.items():
        for parameter, value in zip(trainer.names, followed[2][name], strict=True):
            torch.testing.assert_close(
                network.get_parameter(parameter).double(), value, rtol=1e-5, atol=1e-6
            )
    differences = [
        (saved.get_parameter(name).double() - value).abs().max()
        for name, value in zip(trainer.names, followed[2]["now"], strict=True)
    ]
    assert max(differences) > 1e-4, "the last weights themselves would pass too"


def test_the_null_class_of_a_new_backbone_is_the_mean_of_the_others(make_config):
    trainer = train(
        make_config(
            backbone=None, diffusion_steps=2, perception_steps=0, joint_steps=0, teacher="none"
        )
    )
    table = trainer.model.backbone.class_embedding.weight
    assert table[:-1].abs().max() > 0
    torch.testing.assert_close(table[-1], table[:-1].mean(0))
    trainer._enter_stage(1)
    assert all(
        torch.equal(a, p) for a, p in zip(trainer.averages, trainer.parameters, strict=True)
    ), "an average without the new class"


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_loss_that_is_not_a_number_ends_the_run_and_keeps_its_checkpoints(
    make_config, tmp_path, monkeypatch, log_every
):
    options = {
        "log_every": log_every,
        "diffusion_steps": 9,
        "perception_steps": 0,
        "joint_steps": 0,
    }
    whole = train(make_config(**options, output=str(tmp_path / "whole")))
    trainer = Trainer(make_config(**options), make_splits())
    change_loss(trainer, monkeypatch, torch.nan, after=4)
    with pytest.raises(FloatingPointError, match=rf"step [56].* kept in {tmp_path / 'run'}"):
        trainer.run()
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step-0000002",
        "step-0000004",
    ]
    resumed = resume(tmp_path / "run", whole.config)
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters, whole.parameters, strict=True))
    assert resumed.state.history == whole.state.history
