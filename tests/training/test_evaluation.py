"""Evaluation: every metric against an independent computation, and whole evaluations of a model
whose right answers are known.
"""

import dataclasses
import json
import math
import re
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import torch
from diffusers import DDPMScheduler
from diffusers.configuration_utils import FrozenDict

from genrep_fast.data import DataSplits, ImageDataset, as_tensors, load_data
from genrep_fast.evaluation import (
    EvaluationSettings,
    evaluate,
    evaluator,
    network_evaluations,
    settings_for,
)
from genrep_fast.evaluation import judge as classifier
from genrep_fast.evaluation.judge import NUM_FEATURES, ImageClassifier, fit_classifier
from genrep_fast.evaluation.metrics import (
    CALIBRATION_BINS,
    auroc,
    classification_metrics,
    frechet_distance,
    nearest_distances,
    reliability_bins,
    shuffle_pixels,
)
from genrep_fast.reporting import figures, terminal
from genrep_fast.reporting.classes import shown_classes
from genrep_fast.reporting.html import SUMMARY, render_report, write_report
from genrep_fast.scoring.estimators import ElboEstimator

SHAPE, NUM_CLASSES = (1, 8, 8), 3
SETTINGS = EvaluationSettings(
    elbo_steps=4, num_inference_steps=10, samples_per_class=4, batch_size=7, seed=3
)
FIGURES = {"reliability", "samples", "nearest_training_images", "evidence"}
HISTORY = [
    {
        "stage": stage,
        "step": step,
        "generation": 2.0 / step,
        "perception": 1.0 / step,
        **({"cosine": -0.1, "alpha": 0.2} if stage == 2 else {}),
    }
    for stage in (0, 1, 2)
    for step in range(1, 40, 3)
]


def random_predictions(count, num_classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    log_probabilities = (torch.randn(count, num_classes, generator=generator) * 2).log_softmax(1)
    # Labels drawn from the predictions: some bins are overconfident and others not, so that the
    # binning matters.
    return log_probabilities, log_probabilities.exp().multinomial(1, generator=generator).squeeze(1)


@pytest.mark.parametrize("count", [1, 63, 127, 1000])
def test_classification_metrics_equal_explicit_loops(count):
    log_probabilities, labels = random_predictions(count)
    correct, nll, bins = 0, 0.0, {}
    for row, label in zip(log_probabilities.double().tolist(), labels.tolist(), strict=True):
        confidence = math.exp(max(row))
        right = row.index(max(row)) == label
        correct += right
        nll -= row[label]
        members = bins.setdefault(min(int(confidence * CALIBRATION_BINS), CALIBRATION_BINS - 1), [])
        members.append((confidence, right))
    ece = (
        sum(
            abs(sum(c for c, _ in members) - sum(r for _, r in members))
            for members in bins.values()
        )
        / count
    )
    expected = {"top1": correct / count, "nll": nll / count, "ece": ece}
    assert classification_metrics(log_probabilities, labels) == pytest.approx(expected, abs=2e-6)


def test_reliability_bins_hold_every_image_once_and_give_the_calibration_error():
    log_probabilities, labels = random_predictions(333)
    confidence, accuracy, count = reliability_bins(log_probabilities, labels)
    assert count.sum() == 333 and confidence.shape == accuracy.shape == (CALIBRATION_BINS,)
    filled = count > 0
    assert (
        np.abs(confidence[filled] - (np.flatnonzero(filled) + 0.5) / CALIBRATION_BINS)
        <= 0.5 / CALIBRATION_BINS + 1e-9
    ).all()
    ece = np.nansum(count * np.abs(confidence - accuracy)) / 333
    assert ece == pytest.approx(classification_metrics(log_probabilities, labels)["ece"], abs=1e-6)


def test_certain_predictions_fall_into_the_last_bin():
    certain = torch.tensor([[50.0, 0.0], [0.0, 50.0]]).log_softmax(1)
    _, accuracy, count = reliability_bins(certain, torch.tensor([0, 0]))
    assert count[-1] == 2 and accuracy[-1] == 0.5


@pytest.mark.parametrize("spoiled", [torch.full((4, 3), math.nan), torch.zeros(0, 3)])
def test_classification_metrics_are_nan_where_undefined(spoiled):
    assert all(
        math.isnan(value)
        for value in classification_metrics(
            spoiled, torch.zeros(len(spoiled), dtype=torch.int64)
        ).values()
    )


@pytest.mark.parametrize(("count", "reference_count"), [(63, 127), (200, 50)])
def test_frechet_distance_equals_the_matrix_square_root(count, reference_count):
    generator = np.random.default_rng(0)
    mixing = generator.normal(size=(7, 7))
    features, reference = (
        generator.normal(size=(count, 7)) @ mixing + 1,
        generator.normal(size=(reference_count, 7)),
    )
    covariances = np.cov(features.T), np.cov(reference.T)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    expected = np.square(features.mean(0) - reference.mean(0)).sum() + np.trace(
        covariances[0] + covariances[1] - 2 * root.real
    )
    assert frechet_distance(
        torch.from_numpy(features), torch.from_numpy(reference)
    ) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_bears_constant_features_and_is_nan_where_undefined():
    features = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    features[:, 2:] = 0
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(features, features + torch.tensor([0, 0, 3.0, 4, 0])) == pytest.approx(
        25, rel=1e-6
    )
    assert math.isnan(frechet_distance(features[:1], features))
    assert math.isnan(frechet_distance(features, features.log()))


def test_nearest_distances_equal_scipy():
    generator = torch.Generator().manual_seed(0)
    images, reference = (
        torch.rand(11, 3, 4, 5, generator=generator),
        torch.rand(29, 3, 4, 5, generator=generator),
    )
    expected = scipy.spatial.distance.cdist(images.flatten(1), reference.flatten(1)).min(1)
    np.testing.assert_allclose(
        nearest_distances(images, reference.split(7), batch_size=4), expected, rtol=1e-5
    )


def test_auroc_is_the_share_of_rightly_ordered_pairs():
    generator = torch.Generator().manual_seed(0)
    inside, outside = (
        torch.randn(31, generator=generator) + 0.5,
        torch.randn(17, generator=generator),
    )
    outside[0] = inside[0]
    pairs = [
        1.0 if a > b else 0.5 if a == b else 0.0 for a in inside.tolist() for b in outside.tolist()
    ]
    assert auroc(inside, outside) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    assert math.isnan(auroc(inside, outside / 0)) and math.isnan(auroc(inside, outside[:0]))


def test_shuffle_pixels_moves_whole_locations_differently_in_each_image():
    image = torch.arange(35.0).view(1, 5, 7)
    images = torch.cat([image, image + 100]).expand(3, 2, 5, 7)
    shuffled = shuffle_pixels(images, torch.Generator().manual_seed(0))
    assert torch.equal(shuffled[:, 1], shuffled[:, 0] + 100)
    assert torch.equal(shuffled[:, 0].flatten(1).sort().values, images[:, 0].flatten(1))
    assert not torch.equal(shuffled[0], shuffled[1])


@pytest.mark.slow
def test_classifier_is_accurate_on_digits_and_leaves_the_global_random_state():
    splits = load_data("digits")
    state = torch.random.get_rng_state()
    judge = fit_classifier(splits.train, 10, seed=0)
    assert torch.equal(state, torch.random.get_rng_state())
    images, labels = as_tensors(splits.test)
    features, predicted = judge.judge(images.split(99))
    assert features.shape == (500, NUM_FEATURES)
    assert (predicted == labels).float().mean() >= 0.98  # 99.0 to 99.8% over seeds
    assert torch.equal(predicted, judge(images).argmax(1))


@pytest.mark.parametrize("image_shape", [(1, 1, 1), (3, 63, 17), (4, 32, 32), (3, 127, 129)])
def test_classifier_takes_images_of_any_size(image_shape):
    logits = ImageClassifier(image_shape, 7)(torch.zeros(2, *image_shape))
    assert logits.shape == (2, 7) and logits.isfinite().all()


@pytest.fixture(scope="module")
def templates():
    return torch.rand(NUM_CLASSES, *SHAPE, generator=torch.Generator().manual_seed(0)) * 1.2 - 0.6


@pytest.fixture(scope="module")
def splits(templates):
    generator = torch.Generator().manual_seed(1)

    def split(count):
        labels = torch.arange(count) % NUM_CLASSES
        return ImageDataset(
            templates[labels] + 0.05 * torch.randn(count, *SHAPE, generator=generator), labels
        )

    return DataSplits(split(90), split(17), split(31), ("a", "b", "<c>"), SHAPE)


class TemplateModel(torch.nn.Module):
    """A denoiser that knows the classes: x̂0 is the class's template, and a head that compares an
    image with the templates.
    """

    def __init__(self, templates, scheduler, scale=1.0):
        super().__init__()
        self.templates = torch.nn.Parameter(templates * scale)
        self.alphas_cumprod = scheduler.alphas_cumprod
        self.sample_shape = self.image_shape = tuple(templates.shape[1:])
        self.config = SimpleNamespace(num_classes=len(templates), class_names=None)
        self.vae = None
        self.most_at_once = 0
        channels = {"in_channels": SHAPE[0], "out_channels": SHAPE[0]}
        self.backbone = SimpleNamespace(config=FrozenDict(channels))

    @property
    def dtype(self):
        return self.templates.dtype

    @property
    def device(self):
        return self.templates.device

    def encode(self, images):
        return images

    def decode(self, latents):
        return latents

    def perceive(self, images):
        return -10 * (images[:, None] - self.templates).flatten(2).square().sum(2)

    def denoise(self, x_t, timestep, labels):
        self.most_at_once = max(self.most_at_once, len(x_t))
        alpha = self.alphas_cumprod[timestep].expand(len(x_t))[:, None, None, None]
        return (x_t - alpha.sqrt() * self.templates[labels]) / (1 - alpha).sqrt()

    def forward(self, x_t, timestep, labels):
        return SimpleNamespace(
            sample=self.denoise(x_t, timestep, labels), log_std_shift=torch.zeros(len(x_t))
        )


@pytest.fixture(scope="module")
def scheduler():
    return DDPMScheduler(clip_sample=False)


def evaluate_quickly(*args, **kwargs):
    """`evaluate` with a classifier that is fitted just long enough for well separated classes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "STEPS", 50)
        return evaluate(*args, **kwargs)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, templates, splits, scheduler):
    """A whole evaluation of the model that knows the answers, run once, with a temperature that
    only our stand-in for its fit gives.
    """
    output_dir, progress, fits = tmp_path_factory.mktemp("evaluation"), [], []
    model = TemplateModel(templates, scheduler).train()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            evaluator, "fit_temperature", lambda *arguments: fits.append(arguments) or 50.0
        )
        metrics = evaluate_quickly(
            model,
            scheduler,
            splits,
            output_dir,
            settings=SETTINGS,
            history=HISTORY,
            timings={"stage_0": 1.5},
            teacher={"percent_of_a_training_step": 3.14159, "seconds_in_steps": 2.0},
            progress=lambda what, fraction: progress.append(fraction),
        )
    return SimpleNamespace(
        metrics=metrics, output_dir=output_dir, progress=progress, fits=fits, model=model
    )


def test_a_model_that_knows_the_classes_is_measured_as_such(evaluated):
    metrics = evaluated.metrics
    assert (
        metrics["head"]["top1"]
        == metrics["posterior"]["top1"]
        == metrics["classifier"]["test_top1"]
        == 1
    )
    assert metrics["head"]["ece"] < 0.01 and metrics["posterior"]["uncalibrated_ece"] < 0.01
    assert metrics["generation"]["recognition_rate"] == 1
    assert metrics["generation"]["recognition_rate_per_class"] == {"a": 1, "b": 1, "<c>": 1}
    assert metrics["out_of_distribution"] == {"uniform_auroc": 1, "shuffled_auroc": 1}
    assert metrics["undefined"] == []


def test_samples_are_compared_with_training_images(evaluated, templates, splits):
    # The last reverse step lands on the template itself, whose nearest training image is known.
    generation, (train_images, _), (test_images, _) = (
        evaluated.metrics["generation"],
        as_tensors(splits.train),
        as_tensors(splits.test),
    )
    nearest, nearest_test = (
        scipy.spatial.distance.cdist(images.flatten(1), train_images.flatten(1)).min(1)
        for images in (templates, test_images)
    )
    assert generation["nearest_training_distance"] == pytest.approx(
        np.median(np.repeat(nearest, 4)[:-1]), rel=1e-3
    )
    assert generation["nearest_training_distance_of_test"] == pytest.approx(
        np.median(nearest_test), rel=1e-3
    )
    assert generation["nearest_training_ratio"] == pytest.approx(
        np.median(np.repeat(nearest, 4)[:-1]) / np.median(nearest_test), rel=1e-3
    )
    assert (
        generation["frechet_ratio"]
        == generation["frechet_distance"] / generation["frechet_distance_of_training_subset"]
        > 0
    )


class CountedImages:
    """A data set that knows how many of its images were in memory at once, at most."""

    def __init__(self, dataset):
        self.dataset = dataset
        self.labels = dataset.labels
        self.alive = weakref.WeakSet()
        self.most = 0

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        image, label = self.dataset[index]
        image = image.clone()
        self.alive.add(image)
        self.most = max(self.most, len(self.alive))
        return image, label


def test_training_images_are_read_a_batch_at_a_time(tmp_path, templates, splits, scheduler):
    counted = CountedImages(splits.train)
    counting = dataclasses.replace(splits, train=counted)
    settings = dataclasses.replace(SETTINGS, batch_size=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "BATCH_SIZE", 4)
        metrics = evaluate_quickly(
            TemplateModel(templates, scheduler), scheduler, counting, tmp_path, settings=settings
        )
    assert metrics["sizes"]["train_images"] == len(counted) == 90
    assert 4 <= counted.most <= 8


def test_metrics_state_their_sizes_evaluations_and_times(evaluated):
    metrics = evaluated.metrics
    assert metrics["sizes"] == {
        "data": "",
        "train_images": 90,
        "calibration_images": 17,
        "test_images": 31,
        "scored_calibration_images": 17,
        "scored_test_images": 31,
        "classes": 3,
        "image_shape": [1, 8, 8],
        "elbo_steps": 4,
        "num_inference_steps": 10,
        "samples": 12,
        "samples_per_class": 4,
        "frechet_floor_images": 12,
        "frechet_floor_subsets": 10,
        "random_images": 31,
        "batch_size": 7,
        "seed": 3,
    }
    assert (
        metrics["posterior"]["network_evaluations"] == 31 * 3 * 4
        and metrics["posterior"]["network_evaluations_per_image"] == 12
    )
    assert metrics["seconds"].pop("training") == {"stage_0": 1.5}
    assert set(metrics["seconds"]) == {
        "head",
        "posterior",
        "classifier",
        "generation",
        "out_of_distribution",
    }
    assert metrics["training"]["stage_2"] == HISTORY[-1]
    assert metrics["teacher"] == {"percent_of_a_training_step": 3.14159, "seconds_in_steps": 2.0}


def test_posterior_is_calibrated_on_the_calibration_split(evaluated, templates, splits, scheduler):
    estimator = ElboEstimator(evaluated.model.denoise, scheduler, NUM_CLASSES, num_steps=4, seed=3)
    ((likelihood, labels),) = evaluated.fits
    calibration_images, calibration_labels = as_tensors(splits.calibration)
    assert torch.equal(labels, calibration_labels)
    torch.testing.assert_close(
        likelihood, estimator.log_likelihood(calibration_images), rtol=1e-5, atol=1e-5
    )

    images, labels = as_tensors(splits.test)
    likelihood, metrics = estimator.log_likelihood(images).double(), evaluated.metrics["posterior"]
    assert metrics["temperature"] == 50
    assert metrics["uncalibrated_nll"] == pytest.approx(
        torch.nn.functional.cross_entropy(likelihood, labels).item(), abs=1e-6
    )
    assert metrics["nll"] > 0.1 and metrics["nll"] == pytest.approx(
        torch.nn.functional.cross_entropy(likelihood / 50, labels).item(), rel=1e-4
    )


def test_files_are_complete_and_the_report_is_self_contained(evaluated):
    output_dir = evaluated.output_dir
    names = {*FIGURES, "training", "alignment"}
    assert {
        path.relative_to(output_dir).as_posix() for path in output_dir.rglob("*") if path.is_file()
    } == {
        "metrics.json",
        "report.html",
        *(f"figures/{name}.png" for name in names),
    }
    report = (output_dir / "report.html").read_text()
    assert report.count('src="data:image/png;base64,') == len(names)
    assert not re.search(r'(src|href)="(?!data:)', report)
    for row in SUMMARY:
        assert row.name in report
    assert "<p>Teacher: 3.1% of a training step.</p>" in report
    assert "not measured" not in report and "&lt;c&gt;" in report and "<c>" not in report


def test_progress_rises_to_one_and_the_model_keeps_its_mode(evaluated):
    fractions = evaluated.progress
    assert fractions == sorted(fractions) and fractions[-1] == 1 and 0 < fractions[0] < 0.2
    assert evaluated.model.training


def strict_json(path):
    def refuse(constant):
        raise AssertionError(f"{constant} in {path}")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_returned_metrics_are_what_the_file_holds(evaluated):
    written = strict_json(evaluated.output_dir / "metrics.json")
    written["seconds"].pop("training", None)
    evaluated.metrics["seconds"].pop("training", None)
    assert written == evaluated.metrics


@pytest.mark.slow
def test_what_is_not_finite_is_null_and_named(tmp_path, templates, splits, scheduler):
    model = TemplateModel(templates, scheduler, scale=math.nan)
    evaluate_quickly(
        model,
        scheduler,
        splits,
        tmp_path,
        settings=SETTINGS,
        history=[{"stage": 0, "step": 1, "generation": math.nan}],
    )
    metrics = strict_json(tmp_path / "metrics.json")
    assert metrics["head"] == {"top1": None, "nll": None, "ece": None}
    assert (
        metrics["generation"]["frechet_ratio"] is None
        and metrics["generation"]["recognition_rate_per_class"]["a"] is None
    )
    assert metrics["out_of_distribution"] == {"uniform_auroc": None, "shuffled_auroc": None}
    assert {
        "head.top1",
        "posterior.temperature",
        "generation.recognition_rate",
        "training.stage_0.generation",
    } <= set(metrics["undefined"])
    assert metrics["classifier"]["test_top1"] == 1
    report = (tmp_path / "report.html").read_text()
    assert "not measured" in report and "head.top1" in report


@pytest.mark.slow
def test_smallest_evaluation_runs(tmp_path, templates, splits, scheduler):
    settings = EvaluationSettings(
        elbo_steps=1, num_inference_steps=2, samples_per_class=1, test_images=1, batch_size=1
    )
    metrics = evaluate_quickly(
        TemplateModel(templates, scheduler), scheduler, splits, tmp_path, settings=settings
    )
    assert metrics["sizes"]["test_images"] == metrics["sizes"]["calibration_images"] == 1
    assert metrics["undefined"] == [
        "generation.frechet_distance",
        "generation.frechet_distance_of_training_subset",
        "generation.frechet_ratio",
    ]
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == FIGURES
    assert "Teacher:" not in (tmp_path / "report.html").read_text()


def test_interrupted_writing_leaves_the_former_file_whole(tmp_path, evaluated, monkeypatch):
    write_report(tmp_path, evaluated.metrics, [])
    before = (tmp_path / "metrics.json").read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path, {**evaluated.metrics, "more": 1}, [])
    assert (tmp_path / "metrics.json").read_bytes() == before


def test_bad_arguments_raise_before_anything_runs(tmp_path, templates, splits, scheduler):
    with pytest.raises(ValueError, match="elbo_steps must be positive, got 0"):
        EvaluationSettings(elbo_steps=0)
    model = TemplateModel(templates[:2], scheduler)
    with pytest.raises(ValueError, match="must have the model's 2 classes, got 3"):
        evaluate(model, scheduler, splits, tmp_path / "new")
    model = TemplateModel(templates, scheduler)
    model.config.class_names = ["a", "b", "d"]
    with pytest.raises(ValueError, match="splits .*'<c>'"):
        evaluate(model, scheduler, splits, tmp_path / "new")
    # A convolutional network would take them, and answer nonsense.
    model = TemplateModel(templates[..., :6], scheduler)
    with pytest.raises(ValueError, match=r"images of the model's \[1, 8, 6\], got \[1, 8, 8\]"):
        evaluate(model, scheduler, splits, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def sized(num_classes, images):
    """Splits of that many classes and images, of which only the numbers are read."""
    return SimpleNamespace(num_classes=num_classes, calibration=range(images), test=range(images))


@pytest.mark.parametrize(
    ("num_classes", "scale", "expected"),
    [
        (10, 1.0, EvaluationSettings()),
        (25, 1.0, EvaluationSettings()),
        (10, 0.1, EvaluationSettings(elbo_steps=4, samples_per_class=5, test_images=50)),
        (100, 1.0, EvaluationSettings(elbo_steps=8, scored_images=1000)),
        (
            1000,
            1.0,
            EvaluationSettings(
                elbo_steps=8, samples_per_class=5, scored_images=100, random_images=25
            ),
        ),
        (
            1000,
            0.01,
            EvaluationSettings(
                elbo_steps=4,
                samples_per_class=1,
                test_images=50,
                scored_images=20,
                random_images=5,
            ),
        ),
    ],
)
def test_sizes_follow_the_number_of_classes(num_classes, scale, expected):
    assert settings_for(num_classes, scale=scale) == expected


@pytest.mark.parametrize("num_classes", [26, 100, 1000, 5000])
def test_an_evaluation_of_many_classes_has_a_bounded_cost(num_classes):
    settings = settings_for(num_classes)
    samples = settings.samples_per_class * num_classes * settings.num_inference_steps
    assert samples <= 500_000
    cost = network_evaluations(settings, sized(num_classes, 50_000)) - samples
    assert 1_500_000 <= cost <= 2_100_000
    # More where it is asked for, and more steps on fewer images.
    longer = settings_for(num_classes, scored_images=2 * settings.scored_images)
    assert network_evaluations(longer, sized(num_classes, 50_000)) - samples > 1.8 * cost
    finer = settings_for(num_classes, elbo_steps=16)
    assert finer.scored_images < settings.scored_images or num_classes > 1000
    with pytest.raises(ValueError, match="scored_images must be positive, got 0"):
        settings_for(num_classes, scored_images=0)
    with pytest.raises(ValueError, match="elbo_steps must be positive, got 0"):
        settings_for(num_classes, elbo_steps=0)


@pytest.fixture(scope="module")
def many(tmp_path_factory, scheduler):
    """An evaluation of forty classes of wide images, some of whose posteriors are measured."""
    generator = torch.Generator().manual_seed(0)
    templates = torch.rand(40, 1, 4, 12, generator=generator) * 1.6 - 0.8

    def split(count):
        labels = torch.arange(count) % 40
        noise = 0.05 * torch.randn(count, 1, 4, 12, generator=generator)
        return ImageDataset(templates[labels] + noise, labels)

    names = tuple(f"{number:02d}" for number in range(40))
    splits = DataSplits(split(400), split(80), split(120), names, (1, 4, 12))
    settings = EvaluationSettings(
        elbo_steps=2,
        num_inference_steps=3,
        samples_per_class=1,
        scored_images=30,
        random_images=10,
        batch_size=16,
    )
    folder, progress = tmp_path_factory.mktemp("many"), []
    model = TemplateModel(templates, scheduler)

    def tell(what, fraction):
        progress.append((what, fraction))

    with pytest.MonkeyPatch.context() as patch:
        # What the judge says is compared with what is written alone.
        patch.setattr(classifier, "STEPS", 10)
        metrics = evaluate(model, scheduler, splits, folder, settings=settings, progress=tell)
    return SimpleNamespace(
        metrics=metrics, folder=folder, progress=progress, splits=splits, model=model
    )


def test_posteriors_of_some_images_and_everything_else_of_all(many):
    sizes = many.metrics["sizes"]
    assert sizes["test_images"] == 120 and sizes["scored_test_images"] == 30
    assert sizes["calibration_images"] == 80 and sizes["scored_calibration_images"] == 30
    assert sizes["random_images"] == 10
    posterior = many.metrics["posterior"]
    assert posterior["network_evaluations"] == 30 * 40 * 2
    assert posterior["network_evaluations_per_image"] == 80
    assert posterior["top1"] == many.metrics["head"]["top1"] == 1
    assert many.metrics["undefined"] == []
    # Not an image with all of its classes.
    assert many.model.most_at_once == 16
    # What was planned is what was done.
    assert many.progress[-1][1] == 1 and {fraction for _, fraction in many.progress[:-4]} != {1}


def test_classes_of_one_name_keep_rates_of_their_own():
    names = ["crane", "dog", "crane", "crane (class 1)"]
    assert evaluator._distinct(names) == [
        "crane (class 0)",
        "dog",
        "crane (class 2)",
        "crane (class 1)",
    ]


def test_a_report_of_many_classes_is_short(many):
    page = (many.folder / "report.html").read_text()
    assert "of 30 of the test images" in page
    assert "Classes that are recognised least" in page and "20 of 40" in page
    rates = many.metrics["generation"]["recognition_rate_per_class"]
    assert list(rates) == list(many.splits.class_names)
    table = page[page.index("recognised least") :]
    shown = re.findall(r'<td>(\d\d)</td><td class="number">([\d.]+)%', table)
    assert len(shown) == 20
    least = sorted(rates.values())[:20]
    assert [float(rate) / 100 for _, rate in shown] == pytest.approx(least, abs=1e-3)
    assert all(rates[name] == pytest.approx(float(rate) / 100, abs=1e-3) for name, rate in shown)


@pytest.mark.parametrize("data", ["digits", "mnist5k", "digit-strings:2", "folder:digits", ""])
def test_aims_are_those_of_the_digits_alone(evaluated, data):
    sizes = {**evaluated.metrics["sizes"], "data": data}
    page = render_report({**evaluated.metrics, "sizes": sizes}, [])
    assert ("Aim*" in page) == ("≥ 98.5%" in page) == (data == "digits")


def test_samples_of_many_classes_are_spread_over_all_of_them():
    assert shown_classes(3) == [0, 1, 2] and shown_classes(20) == list(range(20))
    for count in (21, 100, 1000):
        shown = shown_classes(count)
        assert len(set(shown)) == 20 and shown == sorted(shown)
        assert shown[0] == 0 and shown[-1] == count - 1
        assert np.ptp(np.diff(shown)) <= 1
    images = torch.linspace(-1, 1, 1000).view(1000, 1, 1, 1).expand(-1, 1, 8, 24)
    labels = torch.arange(1000)
    names = [f"{label:03d}" for label in range(1000)]
    draw = figures.draw_samples.__wrapped__
    figure = draw(images, labels, labels, images[::3], labels[::3], names)
    ticks = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert ticks == [names[label] for label in shown_classes(1000)]
    pixels = np.asarray(figure.axes[0].images[0].get_array())
    assert pixels.shape == (20 * 9 + 1, 25 + 1, 3)
    # Row by row, the classes that are named beside it.
    assert pixels[5::9, 5, 0] == pytest.approx([label / 999 for label in shown_classes(1000)])


@pytest.mark.parametrize("shape", [(8, 8), (8, 24), (24, 8), (4, 64)])
@pytest.mark.parametrize(("classes", "samples"), [(3, 10), (100, 1), (30, 10)])
def test_pictures_of_samples_are_filled_by_them(shape, classes, samples):
    labels = torch.arange(classes).repeat_interleave(samples)
    images = torch.zeros(len(labels), 1, *shape)
    names = [str(label) for label in range(classes)]
    figure = figures.draw_samples.__wrapped__(images, labels, labels, images, labels, names)
    width, height = figure.get_size_inches()
    assert 2 < width <= 14 and 1 < height <= 30
    figure.canvas.draw()
    used = sum(axes.get_window_extent().width for axes in figure.axes) / figure.bbox.width
    tall = figure.axes[0].get_window_extent().height / figure.bbox.height
    assert max(used, tall) > 0.5
    # Every row has room for the name of its class.
    assert tall * height / min(classes, 20) > 0.15


def test_a_line_tells_every_tenth_of_an_evaluation(capsys, monkeypatch):
    monkeypatch.setattr(terminal.console, "_force_terminal", False)
    with terminal.evaluation_progress() as update:
        for step in range(1001):
            update("posterior of the test images", step / 1000)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11 and "50%" in lines[5]


def test_the_judge_tells_strings_by_all_of_their_digits():
    narrow = ImageClassifier((1, 8, 8), 10)
    assert narrow.num_features == NUM_FEATURES
    wide, tall = (ImageClassifier((1, *size), 10) for size in ((8, 24), (24, 8)))
    large = ImageClassifier((3, 64, 200), 1000)
    assert large.num_features > NUM_FEATURES
    for judge, shape in ((wide, (1, 8, 24)), (tall, (1, 24, 8)), (large, (3, 64, 200))):
        images = torch.rand(2, *shape)
        features, predicted = judge.judge([images])
        assert features.shape == (2, judge.num_features) and predicted.shape == (2,)
    # Three times as many locations as of one digit.
    assert wide.body[-2].in_features == tall.body[-2].in_features == 3 * narrow.body[-2].in_features
