"""Ways in which files are damaged, drawn from a generator, and limits under which they are read."""

import contextlib
import faulthandler
import json
import os
import resource
import shutil
import signal
from pathlib import Path

GIGABYTE = 2**30
# What stands in JSON where something else should.
ODD_VALUES = (
    None,
    True,
    -1,
    0,
    10**30,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x" * 10_000,
    "../../etc/passwd",
    "\ud800",
    [],
    {},
    [[]],
    {"_class_name": "Nothing"},
)


def damage(path, generator, others=()):
    """Damage the file `path`; `others` are files whose content may take its place. Returns words
    that say what was done.
    """
    ways = [truncate, flip, zero, empty, garbage, missing, folder, dangling, loop, pipe]
    if path.suffix in (".json", ".jsonl"):
        ways += [odd_value] * 6 + [without_key, deep, digits] * 2
    if others:
        ways += [swapped, link]
    way = generator.choice(ways)
    return f"{path.name}: {way.__name__} {way(path, generator, others) or ''}"


def truncate(path, generator, others):
    content = path.read_bytes()
    kept = generator.randint(0, max(len(content) - 1, 0))
    path.write_bytes(content[:kept])
    return kept


def flip(path, generator, others):
    content = bytearray(path.read_bytes())
    # The first bytes are the headers.
    positions = [generator.randrange(min(len(content), generator.choice((16, 2000, 10**9))))]
    positions += [generator.randrange(len(content)) for _ in range(generator.choice((0, 0, 3)))]
    for position in positions:
        content[position] ^= 1 << generator.randrange(8)
    path.write_bytes(content)
    return positions


def zero(path, generator, others):
    content = bytearray(path.read_bytes())
    start = generator.randrange(len(content))
    end = min(len(content), start + generator.choice((1, 8, 512, 10**6)))
    content[start:end] = bytes(end - start)
    path.write_bytes(content)
    return start, end


def empty(path, generator, others):
    path.write_bytes(b"")


def garbage(path, generator, others):
    path.write_bytes(generator.randbytes(generator.choice((1, 8, 100, 5000))))


def missing(path, generator, others):
    path.unlink()


def folder(path, generator, others):
    path.unlink()
    path.mkdir()


def dangling(path, generator, others):
    path.unlink()
    path.symlink_to(path.with_name("nowhere"))


def loop(path, generator, others):
    path.unlink()
    path.symlink_to(path)


def pipe(path, generator, others):
    path.unlink()
    os.mkfifo(path)


def swapped(path, generator, others):
    other = generator.choice(others)
    shutil.copyfile(other, path)
    return other.name


def link(path, generator, others):
    other = generator.choice(others)
    path.unlink()
    path.symlink_to(other)
    return other.name


def odd_value(path, generator, others):
    lines = path.read_text().splitlines()
    number = generator.randrange(len(lines)) if path.suffix == ".jsonl" else None
    value = json.loads(path.read_text() if number is None else lines[number])
    places = list(places_of(value))
    holder, key = generator.choice(places)
    odd = generator.choice(ODD_VALUES)
    if holder is None:
        value = odd
    else:
        holder[key] = odd
    text = json.dumps(value)
    if number is not None:
        lines[number] = text
    path.write_text(text if number is None else "\n".join(lines) + "\n")
    return key, str(odd)[:30]


def places_of(value, holder=None, key=None):
    """Every value within a JSON value, with what holds it."""
    yield holder, key
    if isinstance(value, (dict, list)):
        for inner, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places_of(each, value, inner)


def without_key(path, generator, others):
    value = json.loads(
        path.read_text().splitlines()[0] if path.suffix == ".jsonl" else path.read_text()
    )
    holders = [(holder, key) for holder, key in places_of(value) if isinstance(holder, dict)]
    holder, key = generator.choice(holders)
    del holder[key]
    path.write_text(json.dumps(value))
    return key


def deep(path, generator, others):
    opening, closing = generator.choice((("[", "]"), ('{"a":', "}")))
    depth = generator.choice((500, 100_000))
    path.write_text(opening * depth + "1" + closing * depth)
    return depth


def digits(path, generator, others):
    text = path.read_text()
    places = [i for i, letter in enumerate(text) if letter.isdigit()]
    place = generator.choice(places)
    path.write_text(text[:place] + "9" * generator.choice((1, 20, 5000)) + text[place + 1 :])
    return place


@contextlib.contextmanager
def within_limits(seconds=20, memory=GIGABYTE):
    """A block that may take so long and allocate so much; else AssertionError or MemoryError."""

    late = []

    def give_up(number, frame):
        late.append(True)
        raise AssertionError(f"it takes over {seconds} seconds")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    # What waits outside of Python cannot be interrupted: it ends the process, with a traceback.
    faulthandler.dump_traceback_later(2 * seconds, exit=True)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, limits[1]))
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        # Whatever the block made of the error.
        assert not late, f"it takes over {seconds} seconds"
