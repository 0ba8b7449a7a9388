"""What a diffusion classifier costs: accuracy, and agreement with the full budget, by evaluations.

    python -m genrep_fast.benchmarks.bench_evaluations RUN [--images 500] [--steps 24]

RUN is the folder of a `genrep train` run; its denoiser is calibrated on calibration images of its
data and classifies test images by every strategy, and by two published rivals:

- staged: 50/500, 25/250 and 5/20 steps of all classes and of the best five (Li et al., ICCV 2023),
- t-test: classes leave after 20 steps or more by a paired t-test at p = 2e-3 (Clark & Jaini,
  NeurIPS 2023).

Each rule has another seed than the full budgets with which it is compared; two full budgets of
different seeds agree with each other as far as any rule can be expected to, which is the ceiling.
Wall time is that of batches, FLOPs those of PyTorch's counter. A rule that costs much sees as many
images as --rival_evaluations allow. The race is also run with the full budgets' own noise, which
counts how often it drops their winner: the stated error.

Rows that begin with "race after" have something before the race: --head the best classes of the
head of a run's model (of RUN, or of another run of the same data), --tree a tree of the digits of
`digit-strings`, --coarse a pass at half of the resolution. Their evaluations are evaluations'
worth: a coarse one counts by its share of the FLOPs, and the head is in the FLOPs alone.

Writes evaluations.json, evaluations.md and evaluations.png; a run that was interrupted goes on.
"""

import argparse
import fnmatch
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy import stats

import genrep_fast as gf
from genrep_fast.evaluation.metrics import classification_metrics
from genrep_fast.files import write_atomically
from genrep_fast.scoring.classifier.calibration import Calibration
from genrep_fast.scoring.classifier.contest import Contest, Steps
from genrep_fast.scoring.classifier.engine import Arrival, Engine, Plan
from genrep_fast.scoring.classifier.members import Members
from genrep_fast.scoring.classifier.network import Network
from genrep_fast.scoring.classifier.noise import ForwardNoise
from genrep_fast.scoring.classifier.strategies import low_discrepancy_order

from .evaluations_report import draw, line, table
from .evaluations_setting import AFTER, CALIBRATION_SEED, Setting
from .suite import environment

RULE_SEED = 2
FULL_SEEDS = (11, 12)
FEW_CALIBRATION_IMAGES = 32
T_TEST = "t-test, from 20 steps"
T_TEST_STEPS, T_TEST_LEVEL, T_TEST_MOST = 20, 2e-3, 100
RULES = {  # name -> strategy
    "race": gf.Race(),
    "race, correlation full": gf.Race(correlation="full"),
    "race, correlation none": gf.Race(correlation="none"),
    "race, low-discrepancy order": gf.Race(order="low_discrepancy"),
    "race, uniform weights": gf.Race(weights="uniform"),
    **{f"stratified, {n} steps": gf.Stratified(steps=n) for n in (1, 2, 4, 8, 12, 16)},
    "staged 5/20": gf.Staged(keep=(5, 1), steps=(5, 20)),
    "staged 25/250": gf.Staged(keep=(5, 1), steps=(25, 250)),
    "staged 50/500": gf.Staged(keep=(5, 1), steps=(50, 500)),
    T_TEST: None,
}


class TTest:
    """A class leaves by a paired t-test against the best one, as if each look were the only one."""

    def leaving(self, contests: Sequence[Contest], steps: Steps) -> list[np.ndarray]:
        """Of each contest the live classes that leave at this look, a mask [R]."""
        return [self._of_contest(contest) for contest in contests]

    def _of_contest(self, contest: Contest) -> np.ndarray:
        gaps = contest.errors - contest.errors[:, [contest.leader]]
        spread = gaps.std(0, ddof=1) / np.sqrt(len(contest))
        known = spread > 0
        t = np.where(known, gaps.mean(0) / np.where(known, spread, 1), 0)
        return stats.t.sf(t, len(contest) - 1) < T_TEST_LEVEL

    def ended(self, contest: Contest, steps: Steps) -> bool:
        """Whether the image is decided."""
        return len(contest.live) == 1


def winners(full: Calibration, weights: np.ndarray) -> torch.Tensor:
    """Of a full budget with the weights of its steps, int64 [N]."""
    weighted = np.einsum("nsk,s->nk", full.errors.astype(np.float64), weights)
    return torch.from_numpy(weighted.argmin(1))


def share(hits: torch.Tensor) -> list[float]:
    """A share in per cent and its 95% interval (Wilson's)."""
    count, total = int(hits.sum()), len(hits)
    interval = stats.binomtest(count, total).proportion_ci(0.95, "wilson")
    return [100 * part for part in (count / total, interval.low, interval.high)]


def measured_rule(setting: Setting, name: str, count: int, before: dict) -> dict:
    """What a rule makes of the first `count` images, after what its call asks for besides."""
    images, labels = setting.images[:count], setting.labels[:count]
    counted = setting.denoiser
    counted.rows, counted.seconds = 0, 0.0
    start = time.perf_counter()
    if name == T_TEST:
        found = t_test(setting, images)
    else:
        result = setting.classifier(
            images,
            strategy=RULES.get(name, gf.Race()),
            confidence=setting.confidence,
            seed=RULE_SEED,
            progress=False,
            **before,
        )
        found = {
            "prediction": result.prediction.tolist(),
            "evaluations": result.cost.tolist(),
            "rows": (result.evaluations + result.coarse_evaluations).sum().item(),
            "compared": (result.steps > 0).sum(1).double().mean().item(),
            "decided": result.decided.double().mean().item(),
            "ece": classification_metrics(result.posterior.cpu(), labels)["ece"],
        }
    seconds = time.perf_counter() - start
    evaluations = np.array(found["evaluations"])
    head = setting.head_flops() if "candidates" in before else 0.0
    return found | {
        "evaluations": evaluations.mean().item(),
        "gflops": (evaluations.mean().item() * setting.flops() + head) / 1e9,
        "evaluations_error": (evaluations.std() / np.sqrt(count)).item(),
        "ms": 1e3 * seconds / count,
        "images": count,
        "batch_fill": found.get("rows", evaluations.sum().item()) / counted.rows,
        "outside_network": 1 - counted.seconds / seconds,
    }


def t_test(setting: Setting, images: torch.Tensor) -> dict:
    """The t-test, which the package does not offer, in the package's engine."""
    noise = ForwardNoise(setting.scheduler, T_TEST_MOST)
    looks = tuple(range(T_TEST_STEPS, T_TEST_MOST + 1))
    steps = Steps(low_discrepancy_order(T_TEST_MOST), np.ones(T_TEST_MOST), looks)
    engine = Engine(
        Network(setting.denoiser, None, setting.classes, None, None),
        Plan(noise, steps, TTest()),
        Members((1,) * setting.classes),
        batch_size=setting.batch_size,
        pad_to=setting.batch_size,
        seed=RULE_SEED,
    )
    arrivals = (Arrival(place, place, image) for place, image in enumerate(images))
    with torch.no_grad():
        contests = sorted(engine.run(arrivals), key=lambda contest: contest.index)
    return {
        "prediction": [int(contest.live[contest.leader]) for contest in contests],
        "evaluations": [contest.evaluations for contest in contests],
        "decided": sum(len(contest.live) == 1 for contest in contests) / len(contests),
    }


def affordable(setting: Setting, name: str, allowed: int) -> int:
    """Images of a rule, as many as so many evaluations are enough for; all for the race."""
    if name == "race" or name.startswith(AFTER):
        return len(setting.images)
    strategy = RULES[name]
    if strategy is None:
        evaluations = T_TEST_STEPS * setting.classes
    else:
        evaluations = setting.classifier.estimate(strategy=strategy).evaluations
    return min(len(setting.images), max(8, int(allowed / evaluations)))


def compared(setting: Setting, rule: dict, fulls: list[Calibration]) -> dict:
    """Accuracy of a rule and its agreement with the full budgets, with the weights of its race."""
    predicted = torch.tensor(rule["prediction"])
    labels = setting.labels[: len(predicted)]
    weights = setting.classifier.calibration.weights("calibrated", fulls[0].timesteps)
    agrees = torch.cat([predicted == winners(full, weights)[: len(predicted)] for full in fulls])
    # Agreements with several full budgets are of the same images.
    mean, low, high = share(agrees[: len(predicted)])
    shift = 100 * agrees.double().mean().item() - mean
    return {"agreement": [mean + shift, low + shift, high + shift]} | {
        "accuracy": share(predicted == labels)
    }


def full_budgets(setting: Setting, fulls: list[Calibration]) -> list[dict]:
    """Of the calibrated and of uniform weights: accuracies, and the seeds' agreement."""
    found = []
    for kind in ("calibrated", "uniform"):
        weights = setting.classifier.calibration.weights(kind, fulls[0].timesteps)
        all_winners = [winners(full, weights) for full in fulls]
        pairs = [share(one == other) for one, other in itertools.combinations(all_winners, 2)]
        found.append(
            {
                "weights": kind,
                "steps": len(weights),
                "evaluations": len(weights) * setting.classes,
                "images": len(setting.labels),
                "ceiling": pairs[0],
                "ceilings": [pair[0] for pair in pairs],
                "accuracy": [share(one == setting.labels) for one in all_winners],
            }
        )
    return found


def first_images(calibration: Calibration, count: int) -> Calibration:
    parts = (calibration.errors, calibration.roots, calibration.labels)
    return Calibration(calibration.timesteps, *(part[:count] for part in parts))


def at_steps(calibration: Calibration, rows: np.ndarray) -> Calibration:
    parts = (part[:, rows] for part in (calibration.errors, calibration.roots))
    return Calibration(calibration.timesteps[rows], *parts, calibration.labels)


def races(
    setting: Setting,
    calibration: Calibration,
    fulls: dict[int, Calibration],
    before: dict | None = None,
) -> dict:
    """How often a race, and what precedes it, drops the winner of a full budget of its noise."""
    classifier = setting.new_classifier()
    classifier.calibration = calibration
    weights = calibration.weights("calibrated", calibration.timesteps)
    dropped, evaluations = [], []
    for seed, full in fulls.items():
        result = classifier(
            setting.images,
            confidence=setting.confidence,
            seed=seed,
            progress=False,
            **(before or {}),
        )
        winner = winners(full, weights)
        left = result.steps[torch.arange(len(winner)), winner] < result.steps.max(1).values
        dropped.append(torch.where(result.decided, result.prediction != winner, left))
        evaluations.append(result.cost.mean().item())
    return {"dropped": share(torch.cat(dropped)), "races": len(torch.cat(dropped))} | {
        "evaluations": float(np.mean(evaluations))
    }


def races_at_level(
    calibration: Calibration,
    fulls: dict[int, Calibration],
    rows: np.ndarray,
    confidence: float,
) -> dict:
    """The same, replayed, for races that have a few timesteps alone."""
    known = at_steps(calibration, rows)
    weights = known.weights("calibrated", known.timesteps)
    steps = Steps(known.order("signal"), weights, tuple(range(1, len(rows) + 1)))
    rule = known.rule("measured", steps, confidence)
    dropped, evaluations, decided = [], [], []
    for full in fulls.values():
        seen = at_steps(full, rows)
        for contest, winner in zip(seen.replay(steps, rule), winners(seen, weights), strict=True):
            dropped.append(int(winner) not in contest.live)
            decided.append(len(contest.live) == 1)
            evaluations.append(contest.evaluations)
    return {
        "dropped": share(torch.tensor(dropped)),
        "races": len(dropped),
        "evaluations": float(np.mean(evaluations)),
        "decided": float(np.mean(decided)),
    }


def stated_error(
    setting: Setting, fulls: dict[int, Calibration], before: dict[str, dict]
) -> dict[str, dict]:
    """Dropped winners after all, and after few calibration images, and at three noise levels.

    Also of races that have something before them.
    """
    calibration = setting.classifier.calibration
    few = first_images(calibration, FEW_CALIBRATION_IMAGES)
    found = {
        f"calibrated on {len(known.errors)} images": races(setting, known, fulls)
        for known in (calibration, few)
    }
    for name, call in before.items():
        found[name] = races(setting, calibration, fulls, call)
    thirds = np.array_split(np.argsort(calibration.timesteps), 3)
    for name, rows in zip(("low", "middle", "high"), thirds, strict=True):
        first, last = calibration.timesteps[rows[[0, -1]]]
        title = f"{name} noise alone, t = {first:.0f} to {last:.0f}"
        found[title] = races_at_level(calibration, fulls, rows, setting.confidence)
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run of genrep train")
    parser.add_argument("--output", type=Path, help="folder; RUN/evaluations where not given")
    parser.add_argument("--steps", type=int, default=24, help="of the full budget")
    parser.add_argument("--images", type=int, default=500, help="of the test split")
    parser.add_argument("--calibration", type=int, default=200, help="calibration images")
    parser.add_argument("--rival_evaluations", type=int, default=150_000)
    parser.add_argument("--rules", nargs="*", default=["*"], help="patterns of those wanted")
    parser.add_argument("--full_seeds", type=int, nargs="+", default=FULL_SEEDS)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--confidence", type=float, default=0.99, help="of races")
    parser.add_argument(
        "--head",
        type=Path,
        nargs="?",
        const=Path(),
        help="candidates: the head of RUN's model, or of that of another run",
    )
    parser.add_argument("--tree", action="store_true", help="a tree of the digits")
    parser.add_argument("--coarse", action="store_true", help="half of the resolution first")
    parser.add_argument(
        "--stated_error",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="count the winners that every kind of race drops",
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the denoiser")
    return parser.parse_args()


def main() -> None:
    options = parse()
    output = options.output or options.run / "evaluations"
    torch.set_num_threads(options.threads)
    setting = Setting(options.run, options)
    images, labels = setting.calibration_images
    classifier = setting.classifier
    cache = output / "full"
    classifier.calibration = setting.full(
        images, labels, CALIBRATION_SEED, cache / "calibration.npz"
    )
    fulls = {
        seed: setting.full(setting.images, setting.labels, seed, cache / f"seed-{seed}.npz")
        for seed in options.full_seeds
    }
    path = output / "evaluations.json"
    results = {
        "environment": environment(),
        "data": setting.data.name,
        "classes": setting.classes,
        "images": len(setting.labels),
        "calibration_images": len(labels),
        "calibration": str(classifier.calibration),
        "batch_size": setting.batch_size,
        "confidence": setting.confidence,
        "gflops": setting.flops() / 1e9,
        "full": full_budgets(setting, list(fulls.values())),
        "rules": json.loads(path.read_text())["rules"] if path.exists() else {},
        "stated_error": {},
    }
    before = setting.calibrate_before(options)
    for name in (*RULES, *before):
        wanted = any(fnmatch.fnmatch(name, pattern) for pattern in options.rules)
        if wanted and name not in results["rules"]:
            count = affordable(setting, name, options.rival_evaluations)
            rule = measured_rule(setting, name, count, before.get(name, {}))
            results["rules"][name] = rule | compared(setting, rule, list(fulls.values()))
            write_atomically(path, json.dumps(results))
            print(line(results, name), flush=True)
    if options.stated_error:
        results["stated_error"] = stated_error(setting, fulls, before)
    write_atomically(path, json.dumps(results))
    write_atomically(output / "evaluations.md", table(results))
    if results["rules"]:
        write_atomically(output / "evaluations.png", draw(results).png)
    print(table(results))


if __name__ == "__main__":
    main()
