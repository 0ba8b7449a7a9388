"""Overlap of strided tensors against sets of byte addresses, and the check of written tensors."""

import itertools
import random

import numpy
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from genrep_fast.memory_overlap import check_no_overlap, in_same_place, overlaps, overlaps_itself

BUFFER_BYTES = 512
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.uint8]


def element_addresses(tensor):
    """The first byte of every element, in no order, as often as elements have it."""
    width = tensor.element_size()
    indices = itertools.product(*map(range, tensor.shape))
    offsets = [sum(map(int.__mul__, index, tensor.stride())) for index in indices]
    return [tensor.data_ptr() + width * offset for offset in offsets]


def byte_addresses(tensor):
    width = tensor.element_size()
    return {address + byte for address in element_addresses(tensor) for byte in range(width)}


def describe(tensor):
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()


def random_view(buffer, generator):
    """A view of a byte buffer: any dtype, up to four axes, any strides; it may overlap itself."""
    flat = buffer.view(generator.choice(DTYPES))
    shape = [generator.choice([0, 1, 2, 2, 3, 4, 5, 7]) for _ in range(generator.randrange(5))]
    strides = [generator.choice([0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 31]) for _ in shape]
    if generator.random() < 0.5:  # nested, as slices of a dense tensor are
        room = generator.choice([1, 2, 3])
        for axis in range(len(shape)):
            strides[axis] = room
            room *= generator.choice([shape[axis] or 1, shape[axis] + 1, 2 * shape[axis] + 1])
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True) if size > 1)
    if last >= len(flat):
        return random_view(buffer, generator)
    offset = generator.randrange(min(len(flat) - last, generator.choice([4, 16, 512])))
    return flat.as_strided(shape, strides, offset)


@pytest.mark.parametrize("seed", range(8))
def test_two_views_overlap_where_their_byte_addresses_meet(seed):
    generator = random.Random(seed)
    buffer = torch.zeros(BUFFER_BYTES, dtype=torch.uint8)
    counts = {True: 0, False: 0, None: 0}
    for _ in range(1500):
        first, second = random_view(buffer, generator), random_view(buffer, generator)
        expected = not byte_addresses(first).isdisjoint(byte_addresses(second))
        answer = overlaps(first, second)
        counts[answer] += 1
        assert answer in (expected, None), (describe(first), describe(second))
        assert overlaps(second, first) in (expected, None)
    print(counts)
    assert counts[None] == 0 and min(counts[True], counts[False]) > 150


@pytest.mark.parametrize("seed", range(4))
def test_a_view_overlaps_itself_where_two_elements_have_one_address(seed):
    generator = random.Random(seed)
    buffer = torch.zeros(BUFFER_BYTES, dtype=torch.uint8)
    counts = {True: 0, False: 0}
    for _ in range(1500):
        view = random_view(buffer, generator)
        addresses = element_addresses(view)
        expected = len(set(addresses)) < len(addresses)
        assert overlaps_itself(view) is expected, (view.shape, view.stride())
        counts[expected] += 1
    assert min(counts.values()) > 100


@pytest.mark.parametrize("seed", range(8))
def test_a_list_is_refused_where_a_written_tensor_meets_another(seed):
    generator = random.Random(seed)
    counts = {True: 0, False: 0}
    for _ in range(400):
        buffers = [torch.zeros(BUFFER_BYTES, dtype=torch.uint8) for _ in range(2)]
        views = [random_view(generator.choice(buffers), generator) for _ in range(4)]
        lists = [views[:2], views[2:]]
        written, read = [[byte_addresses(tensor) for tensor in tensors] for tensors in lists]
        pairs = [*itertools.combinations(written, 2), *itertools.product(written, read)]
        expected = any(not first.isdisjoint(second) for first, second in pairs)
        counts[expected] += 1
        try:
            check_no_overlap({"out": lists[0]}, {"source": lists[1]})
            refused = False
        except ValueError:
            refused = True
        assert refused is expected, list(map(describe, views))
    assert min(counts.values()) > 40


def nested_views(generator):
    """All parts of a tensor that is cut along random axes; they share nothing."""
    shape = [generator.choice([2, 3, 4, 6]) for _ in range(4)]
    parts = [torch.zeros(shape, dtype=generator.choice(DTYPES))]
    for _ in range(2):
        axis = generator.randrange(4)
        cut = generator.choice(
            [
                lambda part, axis=axis: [part.transpose(0, axis)[first::2] for first in (0, 1)],
                lambda part, axis=axis: list(part.split(2, dim=axis)),
            ]
        )
        parts = [piece for part in parts for piece in cut(part)]
    return [part.permute(generator.sample(range(4), 4)) for part in parts]


@pytest.mark.parametrize("seed", range(4))
def test_parts_of_a_tensor_are_accepted_and_one_that_comes_twice_is_refused(seed):
    generator = random.Random(seed)
    for _ in range(200):
        parts = [part for part in nested_views(generator) if part.numel() > 0]
        check_no_overlap({"out": parts[::2]}, {"source": parts[1::2]})
        again = generator.choice(parts)
        with pytest.raises(ValueError, match="overlaps"):
            check_no_overlap({"out": [*parts, again[-1:]]})


B = torch.arange(64.0)
M = torch.zeros(4, 5, 6)
FOREIGN = numpy.zeros(8, dtype=numpy.float32)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (B[:5], B[1:6], True),
        (B[:5], B[5:10], False),
        (B[::2], B[1::2], False),
        (B[::2], B[1::3], True),  # 4
        (B[:3:2], B[1:8:3], False),  # 0, 2 and 1, 4, 7
        (B[:60:6], B[1::9], False),  # modulo 3
        (B.view(8, 8)[:, 0], B.view(8, 8)[:, 1], False),
        (B.view(8, 8)[:, :4], B.view(8, 8)[:, 4:], False),
        (B.view(8, 8)[:, :4], B.view(8, 8)[:, 3:], True),
        (B.view(8, 8)[:4, :4], B.view(8, 8)[4:, :4], False),
        (B.view(8, 8)[1:, 0], B.view(8, 8).diagonal(), False),
        (B.view(8, 8), B.view(8, 8).T, True),
        (B.view(4, 4, 4)[:, ::2], B.view(4, 4, 4)[:, 1::2], False),
        (B.view(4, 4, 4)[:, ::2, 1], B.view(4, 4, 4)[:, ::2, 2:], False),
        (M[:, 1], M[:, 2], False),
        (M[:, :, 1:3], M[:, 2, 2:4], True),
        (B.view(torch.bfloat16)[::2], B.view(torch.bfloat16)[1::2], False),
        (B.view(torch.bfloat16)[1::4], B[::2], True),
        (B.view(torch.bfloat16)[3::4], B[::2], False),
        (B[3:3], B, False),
        (torch.from_numpy(FOREIGN[:5]), torch.from_numpy(FOREIGN[4:]), True),  # two storages
        (torch.from_numpy(FOREIGN[:4]), torch.from_numpy(FOREIGN[4:]), False),
        (B, torch.zeros(64, device="meta"), False),
        (torch.zeros(64, device="meta"), torch.zeros(64, device="meta"), False),
        (B.expand(3, 64), B[:1], True),
        (B[1:3].expand(3, 2), B[::3], False),
    ],
)
def test_views_that_programs_make(first, second, expected):
    assert overlaps(first, second) is expected and overlaps(second, first) is expected
    for arguments in (
        ({"a": first}, {"b": second}),
        ({"a": second}, {"b": first}),
        ({"a": first, "b": second},),
    ):
        if expected:
            with pytest.raises(
                ValueError,
                match=r"^(a overlaps b|b overlaps a): what is written must share no memory",
            ):
                check_no_overlap(*arguments)
        else:
            check_no_overlap(*arguments)


def test_views_of_one_meta_storage():
    base = torch.zeros(8, device="meta")
    assert overlaps(base[:5], base[4:]) is True and overlaps(base[:4], base[4:]) is False


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (B[:1].expand(5), True),
        (B[:1].expand(1), False),
        (B.as_strided((4, 3), (2, 1)), True),
        (B.as_strided((4, 2), (2, 1)), False),
        (B.unfold(0, 3, 2), True),
        (B.unfold(0, 3, 3), False),
        (B.as_strided((3, 2), (2, 3)), False),  # 0, 2, 4 and 3, 5, 7: interleaved, and none twice
        (B.as_strided((3, 3), (2, 3)), False),  # 6, 8, 10, too: 0 + 6 would need a fourth step of 2
        (B.as_strided((4, 3), (2, 3)), True),
        (B.as_strided((0, 4), (0, 0)), False),
        (B.view(8, 8).T, False),
        (M.permute(1, 2, 0)[::2], False),
    ],
)
def test_tensors_that_overlap_themselves(tensor, expected):
    addresses = element_addresses(tensor)
    assert (len(set(addresses)) < len(addresses)) is expected
    assert overlaps_itself(tensor) is expected


def hard_pair():
    """Two views that overlap where some of twenty numbers add up to another, of 2 ** 20 sums."""
    generator = random.Random(0)
    strides = [[generator.randrange(10**9, 2 * 10**9) for _ in range(10)] for _ in range(2)]
    base = torch.empty(2**36, device="meta")
    offsets = (0, 10**8 + 1)
    pairs = zip(strides, offsets, strict=True)
    return [base.as_strided((2,) * 10, steps, offset) for steps, offset in pairs]


def test_what_takes_too_long_counts_as_no_overlap():
    first, second = hard_pair()
    assert overlaps(first, second) is None
    check_no_overlap({"out": first}, {"source": second})
    # The call as a whole is bounded, too.
    check_no_overlap({"out": [first, second]}, {"source": [second[..., :1]] * 200})


# The check of lists


def test_the_same_place_is_the_same_elements_in_the_same_order():
    square = torch.zeros(3, 3)
    assert in_same_place(square, square.detach()) and in_same_place(B[2:4], B[2:6][:2])
    # A stride that no step takes.
    assert in_same_place(square[:1], square[:1].as_strided((1, 3), (7, 1)))
    assert not in_same_place(square, square.T)
    assert not in_same_place(B[:4], B[1:5]) and not in_same_place(B[:4], B[:2])
    assert not in_same_place(B[:4], B.view(torch.int32)[:4])


def test_in_place_is_for_the_same_index_alone():
    a, b = torch.zeros(3), torch.zeros(3)
    for same in (a, a.detach()):
        check_no_overlap({"out": [same, b]}, {"p": [a, b], "q": [a, None]}, in_place=("p", "q"))
        with pytest.raises(
            ValueError,
            match=r"^out\[0\] overlaps p\[1\]: what is written must share no memory with it$",
        ):
            check_no_overlap({"out": [same, None]}, {"p": [b, a]}, in_place=("p",))
        with pytest.raises(ValueError, match=r"^out\[0\] overlaps q\[0\]: what is written"):
            check_no_overlap({"out": [same]}, {"p": [a], "q": [a]}, in_place=("p",))
        with pytest.raises(ValueError, match=r"^out\[0\] overlaps out\[1\]"):
            check_no_overlap({"out": [same, a]}, {"p": [a, b]}, in_place=("p",))
    with pytest.raises(
        ValueError,
        match=r"^out\[0\] overlaps p\[0\]: unless it is exactly p\[0\], in the same place",
    ):
        check_no_overlap({"out": [a.view(torch.int32)]}, {"p": [a]}, in_place=("p",))


def test_positions_without_a_tensor_and_tensors_without_elements_count_for_nothing():
    check_no_overlap({"out": [None, B[3:3], B[:2]]}, {"p": [B[3:], B[2:], None], "q": B[:0]})
    check_no_overlap({"out": []}, {"p": []})
    check_no_overlap({})


def test_a_mapping_names_its_tensors():
    with pytest.raises(ValueError, match=r"^ema\[a\.weight\] overlaps params\[b\.weight\]:"):
        params = {"a.weight": B[8:], "b.weight": B[3:5]}
        check_no_overlap({"ema": {"a.weight": B[:4]}}, {"params": params})


def test_inputs_may_share_memory_with_each_other():
    scalar = torch.ones(1).expand(4)
    inputs = {"p": [scalar] * 4, "q": [B[:4], B[:4], B[2:], B]}
    check_no_overlap({"out": [torch.zeros(4)] + [None] * 3}, inputs)


def test_columns_of_long_lists_take_no_pairs():
    # A thousand interleaved tensors would be half a million pairs; a call gives up long before.
    columns = torch.zeros(50, 1000).unbind(1)
    check_no_overlap({"out": columns[:500]}, {"p": columns[500:]})
    with pytest.raises(ValueError, match=r"^out\[499\] overlaps p\[3\]:"):
        check_no_overlap({"out": columns[:500]}, {"p": [*columns[997:], columns[499]]})
    channels = torch.zeros(3, 300, 4, 5).unbind(1)
    with pytest.raises(ValueError, match=r"^out\[7\] overlaps p\[1\]:"):
        check_no_overlap({"out": channels[:150]}, {"p": [channels[200], channels[7]]})


class Marked(torch.Tensor):
    pass


def test_tensors_whose_memory_is_not_their_own_are_passed_over():
    marked = B.as_subclass(Marked)
    assert overlaps(B, marked) is None
    check_no_overlap({"out": [marked, B[:2]]}, {"p": marked})
    with FakeTensorMode():
        fake = torch.zeros(6)
        check_no_overlap({"out": [fake, fake[1:]]}, {"p": fake[:3]})

    def transformed(tensor):
        check_no_overlap({"out": [tensor, tensor]})
        return tensor.sum()

    torch.func.grad(transformed)(torch.ones(3))
    torch.func.vmap(transformed)(torch.ones(3, 2))
    torch.func.functionalize(transformed)(torch.ones(3))
    torch.compile(transformed, fullgraph=True, backend="eager")(torch.ones(3))
    torch.compile(transformed, fullgraph=True, backend="eager", dynamic=True)(torch.ones(4))
