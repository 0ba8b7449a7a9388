"""Whether tensors share memory: what an operator writes is an input itself, or has its own memory.

A strided tensor of w-byte elements occupies the bytes start + sum_k i_k s_k, 0 <= i_k < n_k,
where the bytes of an element are one more axis of stride 1 and size w. Two tensors overlap where
two such sums are equal, a bounded linear Diophantine equation: in general NP-complete, but a few
steps for the views that programs make (slices, columns, channels, transposes). What a bounded
search does not decide counts as no overlap. So does what is too hard for torch
(ATen/MemoryOverlap), which tells dense tensors apart alone.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

Tensors = Tensor | Sequence[Tensor | None] | Mapping[str, Tensor | None]

# Tensors of other classes (fake, functional, distributed) have no memory, or none of their own.
_PLAIN_TENSORS = {Tensor, torch.nn.Parameter}

_STEPS_OF_A_PAIR = 1 << 12
# Some 0.1 s.
_STEPS_OF_A_CALL = 1 << 16


def overlaps(first: Tensor, second: Tensor) -> bool | None:
    """Whether two strided tensors share a byte; None where it takes too long, or of a subclass."""
    if type(first) not in _PLAIN_TENSORS or type(second) not in _PLAIN_TENSORS:
        return None
    if first.numel() == 0 or second.numel() == 0:
        return False
    one, other = _span(0, 0, first), _span(0, 1, second)
    if one.space != other.space:
        return False
    return _spans_overlap(one, other, _Work(_STEPS_OF_A_PAIR))


def overlaps_itself(tensor: Tensor) -> bool | None:
    """Whether two elements of a strided tensor share memory; None where that takes too long."""
    pairs = zip(tensor.stride(), tensor.shape, strict=True)
    axes = sorted((stride, size) for stride, size in pairs if size != 1)
    if tensor.numel() == 0 or not axes:
        return False
    if axes[0][0] == 0:
        return True
    work = _Work(_STEPS_OF_A_PAIR)
    answer: bool | None = False
    reach = 0
    # Two index vectors with the same sum differ by a vector d with sum_k d_k s_k = 0. Let d_k be
    # its last entry that is not zero, and positive. Then, in numbers without signs,
    # sum_{j<k} (d_j + n_j - 1) s_j + (d_k - 1) s_k = sum_{j<k} (n_j - 1) s_j - s_k.
    for position, (stride, size) in enumerate(axes):
        if stride <= reach:
            inner = [(step, 2 * (count - 1)) for step, count in axes[:position]]
            found = _has_solution([*inner, (stride, size - 2)], reach - stride, work)
            if found:
                return True
            answer = None if found is None else answer
        reach += (size - 1) * stride
    return answer


def in_same_place(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are one: the same address, shape, strides and dtype."""
    if first is second:
        return True
    # They have no address: torch gives 0 for that of every empty tensor.
    if first.numel() == 0:
        return False
    if type(first) not in _PLAIN_TENSORS or type(second) not in _PLAIN_TENSORS:
        return False
    if first.data_ptr() != second.data_ptr() or first.dtype != second.dtype:
        return False
    if first.shape != second.shape or _space(first) != _space(second):
        return False
    strides = zip(first.shape, first.stride(), second.stride(), strict=True)
    return all(a == b for size, a, b in strides if size > 1)


def _are_one(first: Tensor | None, second: Tensor | None) -> bool:
    return first is not None and second is not None and in_same_place(first, second)


def check_no_overlap(
    written: Mapping[str, Tensors],
    read: Mapping[str, Tensors] | None = None,
    *,
    in_place: Collection[str] = (),
) -> None:
    """Check that no tensor of `written` shares memory with another of `written` or one of `read`.

    Tensors of `read` may share memory with each other. Traced programs and tensor subclasses are
    not checked. Takes a sort where each tensor has a range of addresses of its own.

    Args:
        written: arguments that are written to, by name: a tensor, or a sequence or mapping of
            tensors and None, whose indices or keys are in messages.
        read: arguments that are read, in the same form.
        in_place: names in `read` of sequences as long as each of `written`, whose tensor t may also
            be tensor t of a written one (`in_same_place`).

    Raises:
        ValueError: for an overlap, naming both tensors.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return
    read = read or {}
    # Most calls end here, before anything is named.
    if _are_disjoint(_all_but_in_place(written, read, in_place)):
        return
    outputs = [_Argument.of(name, tensors, True, False) for name, tensors in written.items()]
    inputs = []
    for name, tensors in read.items():
        inputs.append(_Argument.of(name, tensors, False, name in in_place))
    for argument in inputs:
        if argument.in_place:
            argument.leave_out(outputs)
    arguments = outputs + inputs
    every = itertools.chain.from_iterable(argument.tensors for argument in arguments)
    if not _are_disjoint(list(every)):
        _check_pairs(arguments)


def _all_but_in_place(
    written: Mapping[str, Tensors], read: Mapping[str, Tensors], in_place: Collection[str]
) -> list[Tensor | None]:
    """All tensors but those in place that are the very object that is written at their index."""
    outputs = [_listed(tensors) for tensors in written.values()]
    every = list(itertools.chain.from_iterable(outputs))
    for name, tensors in read.items():
        listed = _listed(tensors)
        for output in outputs if name in in_place else ():
            if any(map(operator.is_, listed, output)):
                pairs = zip(listed, output, strict=True)
                listed = [None if one is other else one for one, other in pairs]
        every += listed
    return every


def _listed(tensors: Tensors) -> Sequence[Tensor | None]:
    if isinstance(tensors, Tensor):
        return [tensors]
    return list(tensors.values()) if isinstance(tensors, Mapping) else tensors


@dataclass
class _Argument:
    name: str
    tensors: Sequence[Tensor | None]
    keys: Sequence[int | str | None]
    written: bool
    in_place: bool

    @classmethod
    def of(cls, name: str, tensors: Tensors, written: bool, in_place: bool) -> _Argument:
        keys: Sequence[int | str | None] = [None]
        if isinstance(tensors, Mapping):
            keys = list(tensors)
        elif not isinstance(tensors, Tensor):
            keys = range(len(tensors))
        return cls(name, _listed(tensors), keys, written, in_place)

    def label(self, index: int) -> str:
        key = self.keys[index]
        return self.name if key is None else f"{self.name}[{key}]"

    def leave_out(self, outputs: list[_Argument]) -> None:
        """Forget tensors that are in the place of the output of their index, which stays."""
        for output in outputs:
            pairs = zip(self.tensors, output.tensors, strict=True)
            self.tensors = [None if _are_one(one, other) else one for one, other in pairs]


class _Span(NamedTuple):
    """The memory of a tensor."""

    argument: int
    # In the argument.
    position: int
    tensor: Tensor
    # What addresses count in.
    space: tuple
    # First byte.
    start: int
    end: int
    # As `_byte_axes` gives them.
    axes: list[tuple[int, int]]


@dataclass
class _Work:
    """Steps that are left to a search."""

    left: int


def _are_disjoint(tensors: list[Tensor | None]) -> bool:
    """Whether the tensors' ranges of addresses, from first byte to last, are disjoint."""
    plain = cast(list[Tensor], tensors)
    if not set(map(type, tensors)) <= _PLAIN_TENSORS:
        plain = [tensor for tensor in plain if type(tensor) in _PLAIN_TENSORS]
    starts = [tensor.data_ptr() for tensor in plain]
    if all([tensor.is_contiguous() for tensor in plain]):
        lengths = [tensor.nbytes for tensor in plain]
    else:
        lengths = list(map(_length, plain))
    ends = sorted(map(operator.add, starts, lengths))
    starts.sort()
    # At each start as many ranges must have ended as have started before, no matter which ones.
    return all(map(operator.le, ends, starts[1:]))


def _length(tensor: Tensor) -> int:
    """Bytes from the first to the last one of `tensor`."""
    if tensor.numel() == 0:
        return 0
    strides = tensor.stride()
    last = sum(map(operator.mul, tensor.shape, strides)) - sum(strides)
    return (last + 1) * tensor.element_size()


def _check_pairs(arguments: list[_Argument]) -> None:
    spaces: dict[tuple, list[_Span]] = {}
    for number, argument in enumerate(arguments):
        for index, tensor in enumerate(argument.tensors):
            if tensor is not None and type(tensor) in _PLAIN_TENSORS and tensor.numel() > 0:
                span = _span(number, index, tensor)
                spaces.setdefault(span.space, []).append(span)
    work = _Work(_STEPS_OF_A_CALL)
    for spans in spaces.values():
        for cluster in _clusters(spans, arguments):
            outputs = [span for span in cluster if arguments[span.argument].written]
            inputs = [span for span in cluster if not arguments[span.argument].written]
            for output, other in itertools.combinations(outputs, 2):
                _check_pair(output, other, arguments, work)
            for output, other in itertools.product(outputs, inputs):
                _check_pair(output, other, arguments, work)


def _check_pair(output: _Span, other: _Span, arguments: list[_Argument], work: _Work) -> None:
    if not _spans_overlap(output, other, work):
        return
    name = arguments[output.argument].label(output.position)
    other_name = arguments[other.argument].label(other.position)
    if arguments[other.argument].in_place and output.position == other.position:
        exactly = "in the same place with the same strides and dtype"
        rule = f"unless it is exactly {other_name}, {exactly}, it must share no memory with it"
    else:
        rule = "what is written must share no memory with it"
    raise ValueError(f"{name} overlaps {other_name}: {rule}")


def _span(argument: int, index: int, tensor: Tensor) -> _Span:
    start = tensor.data_ptr()
    axes = _byte_axes(tensor.shape, tensor.stride(), tensor.element_size())
    return _Span(argument, index, tensor, _space(tensor), start, start + _length(tensor), axes)


def _space(tensor: Tensor) -> tuple:
    """Where addresses count: on a device, as two storages may hold the same foreign memory."""
    return (tensor.device, tensor.untyped_storage()._cdata) if tensor.is_meta else (tensor.device,)


@functools.lru_cache(maxsize=4096)
def _byte_axes(shape: torch.Size, strides: tuple[int, ...], width: int) -> list[tuple[int, int]]:
    """Strides in bytes and sizes of as few axes as there may be, from the largest stride to 1."""
    pairs = zip(strides, shape, strict=True)
    axes = [(1, width)]
    steps = sorted((width * stride, size) for stride, size in pairs if size > 1 and stride > 0)
    for stride, size in steps:
        inner_stride, inner_size = axes[-1]
        # Steps that lead no further than the inner axis' end: together they are one longer axis.
        if stride % inner_stride == 0 and stride <= inner_size * inner_stride:
            axes[-1] = (inner_stride, (size - 1) * (stride // inner_stride) + inner_size)
        else:
            axes.append((stride, size))
    return axes[::-1]


def _spans_overlap(first: _Span, second: _Span, work: _Work) -> bool | None:
    """Whether two spans of one space share a byte."""
    if first.start >= second.end or second.start >= first.end:
        return False
    offset = second.start - first.start
    *first_axes, (_, first_run) = first.axes
    *second_axes, (_, second_run) = second.axes
    axes = first_axes + second_axes
    # Count in the largest unit that both tensors are made of, in general their elements.
    unit = math.gcd(offset, first_run, second_run, *(stride for stride, _ in axes))
    # sum i_k s_k - sum j_k t_k = offset; with m_k - 1 - j_k instead of j_k all signs are the same.
    terms = [(stride // unit, size - 1) for stride, size in axes]
    terms.append((1, (first_run + second_run) // unit - 2))
    last = sum((size - 1) * stride for stride, size in second_axes) + second_run - unit
    return _has_solution(terms, (offset + last) // unit, work)


def _has_solution(terms: list[tuple[int, int]], target: int, work: _Work) -> bool | None:
    """Whether sum_k c_k x_k = target for integers 0 <= x_k <= b_k; `terms` are (c_k > 0, b_k)."""
    bounds: dict[int, int] = {}
    for coefficient, bound in terms:
        if bound > 0:
            bounds[coefficient] = bounds.get(coefficient, 0) + bound
    if not 0 <= target <= sum(coefficient * bound for coefficient, bound in bounds.items()):
        return False
    # The largest coefficient first decides nested strides; for others, few values first may do.
    answer = _search(sorted(bounds.items(), reverse=True), target, work)
    if answer is None:
        answer = _search(sorted(bounds.items(), key=operator.itemgetter(1)), target, work)
    return answer


class _Suffix(NamedTuple):
    """The sums of terms: multiples of `divisor` up to `reach`, all of them if `complete`."""

    divisor: int
    reach: int
    complete: bool


def _suffix(terms: list[tuple[int, int]]) -> _Suffix:
    divisor, reach, complete = 0, 0, True
    for coefficient, bound in sorted(terms):
        if divisor > 0:
            complete = complete and coefficient % divisor == 0 and coefficient <= reach + divisor
        divisor = math.gcd(divisor, coefficient)
        reach += coefficient * bound
    return _Suffix(divisor, reach, complete)


def _search(terms: list[tuple[int, int]], target: int, work: _Work) -> bool | None:
    if work.left == 0:
        return None
    suffixes = [_suffix(terms[position:]) for position in range(len(terms) + 1)]
    limit = max(work.left - _STEPS_OF_A_PAIR, 0)
    # What is left of the target for the terms from a position on.
    open_cases: list[Iterator[tuple[int, int]]] = [iter([(0, target)])]
    while open_cases:
        case = next(open_cases[-1], None)
        if case is None:
            open_cases.pop()
            continue
        if work.left <= limit:
            return None
        work.left -= 1
        position, rest = case
        suffix = suffixes[position]
        if not 0 <= rest <= suffix.reach or rest % (suffix.divisor or 1) != 0:
            continue
        if suffix.complete:
            return True
        values = _values(*terms[position], rest, suffixes[position + 1])
        if suffixes[position + 1].complete:
            if values:
                return True
            continue
        open_cases.append(_cases(position + 1, rest, terms[position][0], values))
    return False


def _cases(position: int, rest: int, coefficient: int, values: range) -> Iterator[tuple[int, int]]:
    for value in values:
        yield position, rest - coefficient * value


def _values(coefficient: int, bound: int, rest: int, others: _Suffix) -> range:
    """Values of a term that leave a rest in the reach of `others`, a multiple of their divisor."""
    first = max(0, -((others.reach - rest) // coefficient))
    last = min(bound, rest // coefficient)
    common = math.gcd(coefficient, others.divisor)
    step = others.divisor // common
    residue = rest // common * pow(coefficient // common, -1, step)
    return range(first + (residue - first) % step, last + 1, step)


def _clusters(spans: list[_Span], arguments: list[_Argument]) -> list[list[_Span]]:
    """Parts of `spans` inside which something may overlap, and between which nothing does."""
    depth = max((len(span.axes) for span in spans), default=0)
    parts = [spans]
    for level in range(depth):
        pieces = itertools.chain.from_iterable(_apart(part, level) for part in parts)
        parts = [piece for piece in pieces if _needs_pairs(piece, arguments)]
    # Which overlap a message names does not depend on addresses.
    ordered = [sorted(part, key=_order) for part in parts]
    return sorted(ordered, key=lambda part: _order(part[0]))


def _order(span: _Span) -> tuple[int, int]:
    return span.argument, span.position


def _needs_pairs(spans: list[_Span], arguments: list[_Argument]) -> bool:
    return len(spans) > 1 and any(arguments[span.argument].written for span in spans)


def _apart(spans: list[_Span], level: int) -> list[list[_Span]]:
    """Parts of `spans` with disjoint addresses, modulo the common divisor of outermost strides.

    The `level` outermost ones count. Modulo their divisor a tensor stays in a window, as long as
    its inner axes reach; at level 0 in the range of its addresses.
    """
    # Few, as `_byte_axes` gives equal layouts the same list.
    layouts = {id(span.axes): span.axes for span in spans}
    modulus = math.gcd(*(stride for axes in layouts.values() for stride, _ in axes[:-1][:level]))
    lengths = {key: _window(axes, level) for key, axes in layouts.items()}
    if level > 0 and modulus <= max(lengths.values()):
        return [spans]
    windows = []
    for span in spans:
        first = span.start % modulus if modulus > 0 else span.start
        windows.append((first, first + lengths[id(span.axes)], span))
    windows.sort(key=operator.itemgetter(0))
    parts: list[list[_Span]] = []
    starts: list[int] = []
    end = -1
    for first, window_end, span in windows:
        if first >= end:
            parts.append([])
            starts.append(first)
        parts[-1].append(span)
        end = max(end, window_end)
    if modulus == 0:
        return parts
    # What of the last windows goes past the modulus goes on from 0.
    joined = bisect.bisect_left(starts[:-1], end - modulus)
    parts[-1] += itertools.chain.from_iterable(parts[:joined])
    return parts[joined:]


def _window(axes: list[tuple[int, int]], level: int) -> int:
    """Bytes from the first to the last one of the axes inside the `level` outermost ones."""
    inner = axes[min(level, len(axes) - 1) :]
    return sum((size - 1) * stride for stride, size in inner) + 1
