"""Names of classes and files are arbitrary text: in terminals, file names, figures and reports."""

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from tiny_runs import failure, half_metrics

import genrep_fast as gf
from genrep_fast import cli
from genrep_fast.names import printable, shortened, slug
from genrep_fast.pictures import class_indices, file_name, grid_of
from genrep_fast.reporting import figures, html, terminal

ODD = (
    "$5_$10",
    "a\\$b$c",
    "<b>&\"'",
    "[bold]x[/]",
    "\x1b[31mred\x07",
    "line\nbreak\ttab",
    "\u202egnp.exe",
    "猫 \U0001f431",
    "x" * 5000,
    "\udcff.png",
    ":smile:",
    "..",
    "a/b",
    "",
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cat", "cat"),
        ("\x1b[31mred\n", "\\x1b[31mred\\n"),
        ("\u202egnp", "\\u202egnp"),
        ("\udcff", "\\udcff"),
        ("\u2028", "\\u2028"),
        ("a\u3000猫", "a\u3000猫"),
        ("\U0001f468\u200d\U0001f469", "\U0001f468\u200d\U0001f469"),
    ],
)
def test_what_moves_a_cursor_is_escaped(text, shown):
    assert printable(text) == shown


def test_long_names_lose_their_middle():
    assert shortened("abcdefghij", 10) == "abcdefghij"
    assert shortened("abcdefghijk", 10) == "abcde…hijk"
    assert len(shortened("x" * 5000, 24)) == 24


@pytest.mark.parametrize("name", ODD)
def test_a_part_of_a_file_name_is_safe(name, tmp_path):
    found = slug(name)
    assert not set(found) & set("/\\\0\n\x1b\u202e ") and not found.startswith(".")
    (tmp_path / file_name(7, 2, name)).touch()
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_name_tells_a_name_that_is_not_the_number():
    assert file_name(0, 2, "2") == "0000-class-2.png"
    assert file_name(12, 2, "black cat") == "0012-class-2-black_cat.png"
    assert file_name(0, 2, "猫") == "0000-class-2-猫.png"
    assert file_name(0, 2, "..") == "0000-class-2.png"


def test_labels_are_indices_or_names():
    names = ("0", "1", "10", "2", "e\u0301", "cat", "cat")
    indices, remarks = class_indices(["0", "e\u0301", "\xe9", "3", "6"], names)
    assert indices == [0, 4, 4, 3, 6] and remarks == []
    indices, remarks = class_indices(["2", "10", "2"][:1] * 2, names)
    assert indices == [2, 2]
    assert remarks == [
        'label 2 is the index of the class "10", which is drawn; '
        'the class named "2" has the index 3'
    ]
    # No index, but a name.
    assert class_indices(["10"], names) == ([2], [])
    for label, message in (
        ("dog", '"dog" is no class index and no name of a class; the classes are 0, 1, 10'),
        ("cat", r'2 classes are named "cat", tell which by an index: \[5, 6\]'),
        ("11", r"labels must be in \[0, 7\), got \[11\]"),
        ("-1", r"labels must be in \[0, 7\), got \[-1\]"),
        ("1_0", "no class index"),
        ("9" * 30, "no class index"),
    ):
        with pytest.raises(ValueError, match=message):
            class_indices([label], names)


def test_numbers_with_leading_zeros_are_names_where_a_class_has_them():
    strings = [f"{number:02d}" for number in range(100)]
    longer = [f"{number:03d}" for number in range(1000)]
    for names, labels, expected in (
        # A number and the name of the same class.
        (strings, ["07", "7", "10", "99", "0", "00"], [7, 7, 10, 99, 0, 0]),
        (longer, ["010", "10", "07", "7", "100", "+5"], [10, 10, 7, 7, 100, 5]),
        # Folders that do not count from zero: names first, but plain numbers are indices.
        (["00", "02", "05"], ["02", "2", "05", "00", "0"], [1, 2, 2, 0, 0]),
        (["1", "01", "-1"], ["01", "-1", "1"], [1, 2, 1]),
    ):
        assert class_indices(labels, names)[0] == expected
    # Only a plain number may be a name that stands for another class.
    assert class_indices(["02", "05"], ["00", "02", "05"])[1] == []
    assert "index of the class" in class_indices(["1"], ["1", "01", "-1"])[1][0]
    with pytest.raises(ValueError, match=r"labels must be in \[0, 100\), got \[100\]"):
        class_indices(["0100"], strings)


def test_a_grid_of_many_classes_stands_in_blocks():
    labels = [label for label in range(1000) for _ in range(2)]
    pictures = [Image.new("L", (12, 4), 1 + label % 200) for label in labels]
    grid = np.asarray(grid_of(pictures, labels))
    height, width = grid.shape
    assert height * width < 1.5 * 2000 * 12 * 4
    assert 1 / 2 < height / width < 2
    rows = height // 4
    blocks = -(-1000 // rows)
    block_width = (width + 3) // blocks
    for label in (0, 1, rows - 1, rows, 999):
        block, row = divmod(label, rows)
        left = block * block_width
        cell = grid[4 * row : 4 * row + 4, left : left + 24]
        assert (cell == 1 + label % 200).all()
    # Twenty classes are twenty rows.
    few = grid_of(pictures[:40], labels[:40])
    assert few.size == (2 * 12, 20 * 4)


def test_a_grid_has_a_class_a_row():
    pictures = [Image.new("L", (2, 3), shade) for shade in (10, 20, 30, 40)]
    grid = np.asarray(grid_of(pictures, [5, 1, 5, 5]))
    assert grid.shape == (2 * 3, 3 * 2)
    assert grid[::3, ::2].tolist() == [[10, 30, 40], [20, 0, 0]]


@pytest.fixture(scope="module")
def oddly_named(tiny_backbone, tmp_path_factory):
    """A pipeline whose classes have odd names."""
    from diffusers import DDPMScheduler

    folder = tmp_path_factory.mktemp("oddly-named")
    names = [name for name in ODD if "\udcff" not in name]
    model = gf.GenRep.from_backbone(tiny_backbone("dit", len(names)), len(names), class_names=names)
    scheduler = DDPMScheduler(clip_sample=False)
    gf.GenRepPipeline(model=model, scheduler=scheduler).save_pretrained(folder)
    return folder, names


def test_classify_prints_names_without_control_characters(oddly_named, tmp_path, capsys):
    folder, names = oddly_named
    paths = [tmp_path / name for name in ("plain.png", "a\x1b[31m\n\tb.png", "\udcff.png")]
    for path in paths:
        Image.new("L", (8, 8)).save(tmp_path / "x.png")
        (tmp_path / "x.png").rename(path)
    # More than a batch.
    cli.main(["classify", "--checkpoint", str(folder), "--images", *map(str, paths * 30)])
    lines = capsys.readouterr().out.split("\n")
    assert len(lines) == 91 and all(line.count("\t") == 2 for line in lines[:-1])
    assert not set("".join(lines)) & set("\x1b\x07\u202e\udcff")
    assert lines[1].startswith(f"{tmp_path}/a\\x1b[31m\\n\\tb.png\t")
    assert lines[:3] * 30 == lines[:-1]
    assert lines[0].split("\t")[1] in [shortened(name, 255) for name in names]


def test_generate_takes_names_and_writes_a_grid(oddly_named, tmp_path, capsys):
    folder, names = oddly_named
    arguments = ["generate", "--checkpoint", str(folder), "--num_inference_steps", "2"]
    labels = ["$5_$10", "7", "0", "$5_$10"]
    cli.main([*arguments, "--labels", *labels, "--output", str(tmp_path / "a"), "--grid"])
    written = [line.rsplit("/", 1)[1] for line in capsys.readouterr().out.splitlines()]
    stems = ["0000-class-0-5__10", "0001-class-7-猫", "0002-class-0-5__10", "0003-class-0-5__10"]
    assert [name.removesuffix(".png") for name in written] == [*stems, "grid"]
    assert sorted(written) == sorted(path.name for path in (tmp_path / "a").iterdir())
    grid = np.asarray(Image.open(tmp_path / "a" / "grid.png"))
    assert grid.shape == (2 * 8, 3 * 8)
    first = np.asarray(Image.open(tmp_path / "a" / written[0]))
    assert np.array_equal(grid[:8, :8], first)
    # One at a time: no image depends on the others.
    options = ["--labels", *labels, "--output", str(tmp_path / "b"), "--batch_size", "1"]
    cli.main([*arguments, *options])
    for name in written[:4]:
        alone, together = (np.asarray(Image.open(tmp_path / run / name)) for run in "ab")
        assert np.abs(alone.astype(int) - together).max() <= 1
    capsys.readouterr()
    line = failure(capsys, *arguments, "--labels", "dog", "--output", tmp_path / "c")
    assert '"dog" is no class index' in line and not (tmp_path / "c").exists()


def test_generate_says_which_class_a_number_is(tiny_backbone, tmp_path, capsys):
    from diffusers import DDPMScheduler

    model = gf.GenRep.from_backbone(tiny_backbone("dit"), 3, class_names=["1", "0", "2"])
    scheduler = DDPMScheduler(clip_sample=False)
    gf.GenRepPipeline(model=model, scheduler=scheduler).save_pretrained(tmp_path / "p")
    arguments = ["--checkpoint", str(tmp_path / "p"), "--num_inference_steps", "1"]
    cli.main(["generate", *arguments, "--labels", "0", "2", "--output", str(tmp_path / "out")])
    output, said = capsys.readouterr()
    assert said == (
        'genrep generate: label 0 is the index of the class "1", which is drawn; '
        'the class named "0" has the index 1\n'
    )
    names = [line.rsplit("/", 1)[1] for line in output.splitlines()]
    assert names == ["0000-class-0-1.png", "0001-class-2.png"]


def test_figures_take_any_name_as_it_is():
    images = torch.zeros(len(ODD), 1, 8, 8)
    labels = torch.arange(len(ODD))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = figures.draw_samples(images, labels, labels, images, labels, ODD)
    assert drawn.png.startswith(b"\x89PNG")
    figure = figures.draw_samples.__wrapped__(images, labels, labels, images, labels, ODD)
    axes = figure.axes[0]
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert shown == [shortened(name, figures.LONGEST_NAME) for name in ODD]
    assert not any(label.get_parse_math() for label in axes.get_yticklabels())


def test_a_report_escapes_names():
    metrics = half_metrics({})
    metrics["undefined"] = ["rate.\x1b[31m<b>"]
    metrics["sizes"]["data"] = "folder:\udcff\x1b<i>"
    metrics["generation"]["recognition_rate_per_class"] = dict.fromkeys(ODD, 0.5)
    page = html.render_report(metrics, [])
    page.encode()
    assert not set(page) & set("\x1b\x07\u202e\udcff")
    for text in ("<b>&", "<i>", "x" * 200):
        assert text not in page
    assert "&lt;b&gt;" in page and "[bold]x[/]" in page and "\\x1b[31mred" in page
    assert json.dumps(metrics)


def test_a_terminal_takes_names_for_no_markup(capsys):
    assert isinstance(terminal.console, Console)
    terminal.console.print("wrote runs/[bold]x[/]:smile:")
    assert "runs/[bold]x[/]:smile:" in capsys.readouterr().out
