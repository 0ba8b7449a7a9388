"""What may import what: rooms import from the rooms below them, and the two wings stand side by
side.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "genrep_fast"
# From the ground up; a room imports from lower floors alone, and rooms of one floor not from each
# other.
FLOORS = (
    {"_moved", "_version", "extras", "files", "latents", "memory", "memory_overlap", "names"},
    {"checks", "endings"},
    {"dispatch", "reference", "coefficients"},
    {"ops"},
    {"alignment", "scoring", "data"},
    {"models", "reporting"},
    {"evaluation", "pictures"},
    {"training"},
    {"benchmarks"},
    {"commands"},
    {"cli"},
    {"__main__"},
)


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[1] not in ("kernels", "benchmarks"):
            yield path, parts


def imported_rooms(path, parts):
    """Rooms from which a module imports, wherever in it; what stands under TYPE_CHECKING does not
    count.
    """
    package = list(parts[:-1])
    tree = ast.parse(path.read_text())
    for_types = {id(child) for node in tree.body if isinstance(node, ast.If) for child in node.body}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in for_types:
            continue
        base = package[: len(package) - node.level + 1] if node.level else []
        target = [*base, *(node.module or "").split(".")] if node.module else base
        if target[:1] != ["genrep_fast"]:
            continue
        if len(target) > 1:
            yield target[1]
        else:
            yield from (alias.name for alias in node.names)


def test_rooms_import_from_lower_floors_alone():
    floor_of = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    upwards = []
    for path, parts in modules():
        if parts == ("genrep_fast", "__init__"):
            continue
        room = parts[1]
        for other in imported_rooms(path, parts):
            if other != room and floor_of[other] >= floor_of[room]:
                upwards.append(f"{path.relative_to(ROOT)} imports from {other}")
    assert upwards == []


def test_every_room_has_a_floor():
    rooms = {parts[1] for _, parts in modules()} - {"__init__"}
    assert rooms == set().union(*FLOORS) - {"benchmarks"}


def test_the_wings_have_empty_doors():
    for wing in ("alignment", "scoring"):
        assert (PACKAGE / wing / "__init__.py").read_text() == ""


def sources(*tops):
    for top in tops:
        for path in sorted((ROOT / top).rglob("*")):
            is_linked = any(parent.is_symlink() for parent in path.parents)
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh") and not is_linked:
                yield path


def test_no_file_and_no_function_is_too_long():
    longest = {"genrep_fast": 500, "kernels": 500, "csrc": 500, "benchmarks": 500, "tests": 800}
    too_long = []
    for top, limit in longest.items():
        for path in sources(top):
            lines = len(path.read_text().splitlines())
            if lines > limit:
                too_long.append(f"{path.relative_to(ROOT)} has {lines} lines")
    for path in sources("genrep_fast", "benchmarks"):
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and code_lines(node) > 60:
                too_long.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert too_long == []


def code_lines(function):
    """Lines of a function without its docstring."""
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is None:
        return lines
    docstring = function.body[0]
    return lines - (docstring.end_lineno - docstring.lineno + 1)


def test_lines_have_100_columns():
    """But for what cannot be broken, one line in a thousand at most."""
    lines = [
        line
        for path in sources("genrep_fast", "kernels", "csrc", "benchmarks", "tests")
        for line in path.read_text().splitlines()
    ]
    assert sum(len(line) > 100 for line in lines) <= len(lines) / 1000


def test_the_architecture_page_names_every_folder_and_nothing_else():
    text = (ROOT / "docs/architecture.md").read_text()
    named = set(
        re.findall(
            r"`((?:genrep_fast|kernels|csrc|benchmarks|tests|docs|examples)(?:/[\w.]+)*/?)`", text
        )
    )
    missing = [name for name in named if not (ROOT / name).exists()]
    assert missing == []
    tops = ("genrep_fast", "kernels", "csrc", "tests")
    ignored = {"__pycache__"}
    folders = set()
    for top in tops:
        for path in (ROOT / top).iterdir():
            if path.is_dir() and not path.is_symlink() and path.name not in ignored:
                folders.add(f"{top}/{path.name}/")
    assert folders - {name if name.endswith("/") else f"{name}/" for name in named} == set()
