"""The table and the picture of `bench_evaluations`."""

import numpy as np
from matplotlib.figure import Figure

from genrep_fast.reporting.figures import BLUE, GREEN, GREY, ORANGE, VERMILION, illustration

_COLORS = {"race": VERMILION, "stratified": BLUE, "staged": ORANGE, "t-test": GREEN}


def line(results: dict, name: str) -> str:
    """A rule's line of the table."""
    rule = results["rules"][name]
    ece = f"{rule['ece']:.3f}" if "ece" in rule else ""
    return (
        f"| {name} | {rule['evaluations']:.1f} ± {rule['evaluations_error']:.1f} "
        f"| {_interval(rule['agreement'])} | {_interval(rule['accuracy'])} "
        f"| {100 * rule['decided']:.1f} | {ece} | {rule['ms']:.1f} "
        f"| {gflops(results, rule):.2f} | {rule['images']} |"
    )


def gflops(results: dict, rule: dict) -> float:
    """Of a rule, for an image; what precedes a race included."""
    return rule.get("gflops", rule["evaluations"] * results["gflops"])


def table(results: dict) -> str:
    """In Markdown."""
    lines = [
        f"{results['data']}, K = {results['classes']}: {results['images']} test images, "
        f"{results['calibration_images']} calibration images; {results['calibration']}. "
        f"{results['environment']['device']}, {results['environment']['threads']} threads, batches "
        f"of {results['batch_size']}, {results['gflops']:.4f} GFLOPs an evaluation. "
        "Intervals are of 95%.",
        "",
        "| rule | evaluations an image | agrees with full, % | accuracy, % | decided, % | ECE "
        "| ms an image | GFLOPs an image | images |",
        "| --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for full in results["full"]:
        accuracies = ", ".join(f"{accuracy[0]:.1f}" for accuracy in full["accuracy"])
        lines.append(
            f"| full, {full['steps']} steps, {full['weights']} weights | {full['evaluations']} "
            f"| {_interval(full['ceiling'])} | {accuracies} | 100.0 | | "
            f"| {full['evaluations'] * results['gflops']:.2f} | {full['images']} |"
        )
    lines += [line(results, name) for name in results["rules"]]
    if results["stated_error"]:
        lines += [
            "",
            f"| races at confidence {results['confidence']} | full budget's winner dropped, % "
            "| races | evaluations an image |",
            "| --- | --- | ---: | ---: |",
        ]
    for name, found in results["stated_error"].items():
        lines.append(
            f"| {name} | {_interval(found['dropped'], 2)} | {found['races']} "
            f"| {found['evaluations']:.1f} |"
        )
    race = results["rules"].get("race")
    if race is not None:
        lines += [
            "",
            f"In the race, batches are {100 * race['batch_fill']:.0f}% full, and "
            f"{100 * race['outside_network']:.1f}% of the time is spent outside the network.",
        ]
    return "\n".join(lines) + "\n"


@illustration("evaluations", "Agreement with the full budget and accuracy, by what they cost.")
def draw(results: dict) -> Figure:
    """Two rows, agreement and accuracy, against evaluations, wall time and FLOPs of an image."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    axes = figure.subplots(2, 3, sharex="col", sharey="row")
    costs = {
        "evaluations an image": lambda rule: rule["evaluations"],
        "milliseconds an image": lambda rule: rule["ms"],
        "GFLOPs an image": lambda rule: gflops(results, rule),
    }
    for row, value in zip(axes, ("agreement", "accuracy"), strict=True):
        for panel, (title, cost) in zip(row, costs.items(), strict=True):
            for kind, color in _COLORS.items():
                rules = [r for name, r in results["rules"].items() if name.startswith(kind)]
                means, lows, highs = np.array([rule[value] for rule in rules]).reshape(-1, 3).T
                panel.errorbar(
                    [cost(rule) for rule in rules],
                    means,
                    [means - lows, highs - means],
                    fmt="o-" if kind == "stratified" else "o",
                    color=color,
                    label=kind,
                    capsize=2,
                )
            full = results["full"][0]
            level = full["ceiling"] if value == "agreement" else full["accuracy"][0]
            panel.axhline(level[0], color=GREY, linestyle="--", label="full budget")
            panel.set_xscale("log")
            if value == "accuracy":
                panel.set_xlabel(title)
        row[0].set_ylabel(f"{'agrees with full' if value == 'agreement' else value}, %")
    axes[0, 0].legend()
    figure.suptitle(f"{results['data']}, K = {results['classes']}")
    return figure


def _interval(values: list[float], digits: int = 1) -> str:
    mean, low, high = (f"{value:.{digits}f}" for value in values)
    return f"{mean} ({low} to {high})"
