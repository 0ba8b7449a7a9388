"""What a run of the suite leaves: CSV and JSON, and a report of a table and two pictures.

CSV and JSON are keyed by device, versions and commit.

    python -m genrep_fast.benchmarks.report README.md

writes the tables of benchmarks/results/ anew, between their marks.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import sys
from pathlib import Path

from matplotlib.figure import Figure

import genrep_fast
from genrep_fast.files import write_atomically
from genrep_fast.reporting.figures import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    Illustration,
    illustration,
)

_KEYS = (
    "date",
    "commit",
    "device",
    "genrep_fast",
    "threads",
    "allocator",
)  # of the environment, in every line of the CSV
_ROLE_COLORS = {
    "eager": GREY,
    "compiled": ORANGE,
    "peer": SKY,
    "bound": PURPLE,
    "variant": GREEN,
    "ours": VERMILION,
}
_PARTS = {  # of a training step: case -> colour
    "denoiser": SKY,
    "scoring": GREEN,
    "alignment": ORANGE,
    "Gram pass": ORANGE,
    "optimizer": BLUE,
    "average": PURPLE,
    "combine, optimizer and average in one pass": BLUE,
}


def write(results: dict, folder: Path, complete: bool = True) -> list[Path]:
    """Write the results' files and return their paths.

    These are bench.json and bench.csv, and of `complete` results table.md, report.html and the
    pictures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {"bench.json": json.dumps(results, indent=1) + "\n", "bench.csv": as_csv(results)}
    if complete:
        drawn = pictures(results)
        content |= {"table.md": table(results), "report.html": page(results, drawn)}
        content |= {f"{picture.name}.png": picture.png for picture in drawn}
    for name, data in content.items():
        write_atomically(folder / name, data)
    return [folder / name for name in content]


def slug(device: str) -> str:
    """A device's name as a folder's."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def as_csv(results: dict) -> str:
    """A line a row, each with what keys it."""
    environment = results["environment"]
    keys = {key: environment[key] for key in _KEYS} | {
        name: environment["packages"][name] for name in ("torch", "triton")
    }
    rows = [keys | row for row in results["rows"]]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def table(results: dict) -> str:
    """Our providers' rows in Markdown, and sentences below: conditions, and what else there is."""
    heads, lines = cells(results)
    rule = "| --- | --- |" + " ---: |" * (len(heads) - 2)
    rows = ["| " + " | ".join(line) + " |" for line in (heads, *lines)]
    failed = [f"- {text}" for text in failures(results)]
    notes = ["", *remarks(results), *(["", "Not measured:", *failed] if failed else [])]
    return "\n".join([rows[0], rule, *rows[1:], *notes]) + "\n"


def cells(results: dict) -> tuple[list[str], list[list[str]]]:
    """The table's head and lines; columns in which nothing stands are left out."""
    rows = [row for row in results["rows"] if row["role"] == "ours" and "ms" in row]
    on_gpu = any("host_ms" in row for row in rows)
    columns = {
        "": lambda row: f"{row['suite'].replace('_', ' ')}: {row['case']}",
        "by": lambda row: row["provider"],
        "elements": lambda row: f"{row['elements']:.1e}".replace("e+0", "e"),
        **(
            {
                "ms": lambda row: f"{row['ms']:.3f}",
                "ms on the host": lambda row: f"{row['host_ms']:.2f}",
            }
            if on_gpu
            else {}
        ),
        "eager": lambda row: _times(row, "over_eager"),
        "compiled": lambda row: _times(row, "over_compiled"),
        "best peer": lambda row: (
            f"{_times(row, 'over_peer')} ({row['peer']})" if "over_peer" in row else ""
        ),
        "of bandwidth": lambda row: (
            f"{row['bandwidth_percent']:.0f}%" if "bandwidth_percent" in row else ""
        ),
        "extra MB": lambda row: f"{row['extra_bytes'] / 1e6:.1f}",
        "error": lambda row: f"{row['error']:.0e}" if row["error"] else "",
    }
    columns = {
        head: column for head, column in columns.items() if not head or any(map(column, rows))
    }
    return list(columns), [[column(row) for column in columns.values()] for row in rows]


def remarks(results: dict) -> list[str]:
    """The conditions, what the columns mean, and what the method takes of a whole training step."""
    environment = results["environment"]
    packages, commit = (
        environment["packages"],
        environment["commit"].replace("-dirty", " with changes"),
    )
    where = (
        f"{environment['device']}, {environment['threads']} threads, "
        f"{environment['allocator']} allocator"
    )
    versions = (
        f"torch {packages['torch']}, Triton {packages['triton']}, commit {commit[:10]}{commit[40:]}"
    )
    conditions = (
        f"`{environment['command']}` on {environment['date'][:10]}: {where}; {versions}. "
        "Eager, compiled and best peer: their time as a multiple of ours. Of bandwidth: the time "
        "in which a copy of the same run moves what must be moved, as a share of ours."
    )
    return [conditions, *_share_of_step(results["rows"])]


def failures(results: dict) -> list[str]:
    """What was not measured, and why."""
    return [
        f"{row['suite']}, {row['case']}, {row['provider']}: {row['failure']}"
        for row in results["rows"]
        if "failure" in row
    ]


def page(results: dict, illustrations: list[Illustration]) -> str:
    """The table and the pictures as one HTML page without links to other files."""
    import jinja2

    heads, lines = cells(results)
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("report.html.jinja").render(
        heads=heads,
        lines=lines,
        remarks=remarks(results),
        failures=failures(results),
        illustrations=[(item, base64.b64encode(item.png).decode()) for item in illustrations],
    )


def gpu_table(results: dict) -> str:
    """The operators' large cases of what benchmarks/on_device.sh found.

    Each by the backend that gpu_backends.json makes the default.
    """
    fastest = json.loads((Path(genrep_fast.__file__).parent / "gpu_backends.json").read_text())[
        results["environment"]["capability"]
    ]
    rows = []
    for row in results["rows"]:
        operator, _, size = row["case"].rpartition(" ")
        if (row["suite"], size) == ("operators", "large") and row["provider"] == fastest[
            operator.partition(",")[0]
        ][-1][1]:
            rows.append(row)
    return table({"environment": results["environment"], "rows": rows})


def written_tables(page: str, folder: Path) -> str:
    """The text `page` with the tables of `folder` (benchmarks/results) between its marks.

    A mark ``<!-- table: FILE SUITE... -->`` stands for the results of that name of every device
    there is, of these suites or of all.
    """

    def write(mark: re.Match) -> str:
        name, *suites = mark[2].split()
        texts = []
        for path in sorted(folder.glob(f"*/{name}")):
            results = json.loads(path.read_text())
            if name == "results.json":
                texts.append(gpu_table(results))
            else:
                rows = [row for row in results["rows"] if not suites or row["suite"] in suites]
                texts.append(table(results | {"rows": rows}))
        return mark[1] + "\n".join(texts) + mark[3]

    return re.sub(
        r"(<!-- table: ([\w. ]+) -->\n).*?(<!-- end of table -->)", write, page, flags=re.S
    )


def pictures(results: dict) -> list[Illustration]:
    """The roofline where a row has a place in it, and the training step where it was measured."""
    rows = [row for row in results["rows"] if "ms" in row]
    drawn = []
    if any(row["flops"] and row["moved_bytes"] for row in rows):
        drawn.append(draw_roofline(results["environment"], rows))
    if {row["case"] for row in rows if row["suite"] == "training_step"} >= {
        "denoiser",
        "scoring",
        "update",
    }:
        drawn.append(draw_training_step(rows))
    return drawn


@illustration(
    "roofline",
    "Roofline: operations a second against operations a byte, "
    "under the rates measured in the same run.",
)
def draw_roofline(environment: dict, rows: list[dict]) -> Figure:
    """A point a provider and case, coloured by role."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    bandwidth, peak = max(row["copy_gb_per_s"] for row in rows), environment["peak_gflops"]
    ours = [row for row in rows if row["flops"] and row["moved_bytes"]]
    for role, color in _ROLE_COLORS.items():
        points = [
            (row["flops"] / row["moved_bytes"], row["flops"] / row["ms"] / 1e6)
            for row in ours
            if row["role"] == role
        ]
        if points:
            axes.plot(
                *zip(*points, strict=True),
                "o",
                color=color,
                alpha=0.7,
                label=role,
                zorder=3 if role == "ours" else 2,
            )
    ridge = peak / bandwidth
    intensities = [row["flops"] / row["moved_bytes"] for row in ours]
    left, right = min(intensities) / 3, max(*intensities, ridge) * 3
    label = f"{bandwidth:.0f} GB/s (copy), {peak:.0f} GFLOP/s (mm)"
    axes.plot([left, ridge, right], [left * bandwidth, peak, peak], color=BLUE, label=label)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="FLOPs a byte that must be moved",
        ylabel="GFLOP/s",
        title=environment["device"],
    )
    axes.legend()
    return figure


@illustration(
    "training_step",
    "A joint training step of GenRep in its parts, in milliseconds; below, all but the denoiser.",
)
def draw_training_step(rows: list[dict]) -> Figure:
    """A bar for the reference and each backend of ours: all parts, and what the method adds."""
    ms = {
        (row["case"], row["provider"]): row["ms"] for row in rows if row["suite"] == "training_step"
    }
    ours = [provider for case, provider in ms if case == "update" and provider != "eager reference"]
    bars = {
        "eager reference": {
            name: ms[name, "eager reference"]
            for name in ("scoring", "alignment", "optimizer", "average")
        }
    }
    for provider in ours:
        gram = ms["Gram pass", provider]
        rest = max(0.0, ms["update", provider] - gram)
        bars[provider] = {
            "scoring": ms["scoring", provider],
            "Gram pass": gram,
            "combine, optimizer and average in one pass": rest,
        }
    figure = Figure(figsize=(8, 1.6 + 1.1 * len(bars)), layout="constrained")
    for axes, common in zip(
        figure.subplots(2, 1), ({"denoiser": ms["denoiser", "torch"]}, {}), strict=True
    ):
        for name, parts in bars.items():
            left = 0.0
            for part, value in (common | parts).items():
                axes.barh(name, value, left=left, color=_PARTS[part], label=part)
                left += value
            axes.annotate(
                f"{left:.4g}", (left, name), xytext=(4, 0), textcoords="offset points", va="center"
            )
        axes.margins(x=0.1)
        axes.invert_yaxis()
    axes.set_xlabel("ms")
    handles = {
        label: handle
        for part in figure.axes
        for handle, label in zip(*part.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _times(row: dict, key: str) -> str:
    return f"{row[key]:.3g} ×" if key in row else ""


def _share_of_step(rows: list[dict]) -> list[str]:
    """What the method takes of a whole step, where both were measured."""
    ms = {
        (row["case"], row["provider"]): row["ms"]
        for row in rows
        if row["suite"] == "training_step" and "ms" in row
    }
    lines = []
    for case, provider in ms:
        if case == "method" and ("step", provider) in ms:
            lines.append(f"{provider}: {100 * ms[case, provider] / ms['step', provider]:.1f}%")
    if not lines:
        return []
    shares = [
        "",
        f"Scoring, alignment, optimizer and average of a whole training step: {'; '.join(lines)}.",
    ]
    if ("teacher evaluations", "torch") in ms and ("step", "unaligned") in ms:
        teacher = 100 * ms["teacher evaluations", "torch"] / ms["step", "unaligned"]
        shares[1] += (
            f" The teacher's network evaluations, apart from it: {teacher:.1f}% of a step "
            "without the method."
        )
    return shares


if __name__ == "__main__":
    for page in map(Path, sys.argv[1:]):
        write_atomically(page, written_tables(page.read_text(), Path("benchmarks/results")))
