"""What the tests of kernels of tensor lists share: tensors, and bounds of errors.

Tensors are views of odd sizes into larger buffers, whose surroundings must stay as they are.
"""

import math

import torch

from genrep_fast.reference import alignment as alignment_reference
from kernel_cases import note_accuracy

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# The second of 256 is unaligned, the last one is of several chunks.
SIZES = [1, 63, 0, 127, 129, 1009, 256, 256, 2 * 16384 + 5]
GROUPS = [0, 1, 1, -1, 3, 0, 0, 1, 3]  # group 2 is empty
NUM_GROUPS = 5
DTYPES = [
    (F32, F32),
    (BF16, BF16),
    (F16, F16),
    (F32, BF16),
    (BF16, F16),
    (F32, BF16, F16),
    (F32,) * 8,
]
operators = torch.ops.genrep_fast


def tensors(dtype, *, seed, scale=1.0, shift=0.0, sizes=SIZES):
    """Views into larger buffers, the first of each size aligned; the rest of the buffers must stay
    7.
    """
    generator = torch.Generator().manual_seed(seed)
    views = []
    for t, size in enumerate(sizes):
        first = 1 if size in sizes[:t] else 0
        buffer = torch.full((size + 65,), 7.0, dtype=dtype, device=DEVICE)
        view = buffer[first : first + size]
        view.copy_(scale * torch.randn(size, generator=generator, dtype=torch.float64) + shift)
        views.append(view)
    return views


def losses(dtypes, **options):
    return [
        tensor
        for i, dtype in enumerate(dtypes)
        for tensor in tensors(dtype, seed=i, shift=0.2 * i, **options)
    ]


def double(values):
    return [None if value is None else value.double() for value in values]


def copies(values):
    """Copies whose surroundings and alignment are those of the originals."""
    return [
        value._base.clone()[value.storage_offset() : value.storage_offset() + len(value)]
        for value in values
    ]


def assert_surroundings_untouched(values):
    for value in values:
        before, after = (
            value._base[: value.storage_offset()],
            value._base[value.storage_offset() + len(value) :],
        )
        assert (before == 7).all() and (after == 7).all()


def norm(values):
    return math.sqrt(sum(value.double().square().sum().item() for value in values))


def difference(results, exact):
    return norm(
        [result.double() - value.double() for result, value in zip(results, exact, strict=True)]
    )


def assert_accurate(name, results, plain, exact):
    """At most twice the error of the plain formula in the same dtype, and an eighth of a rounding,
    as it may be exact by chance.
    """
    error, plain_error = (
        difference(results, exact) / norm(exact),
        difference(plain, exact) / norm(exact),
    )
    bound = 2 * plain_error + torch.finfo(results[0].dtype).eps / 8
    print(f"{name}: error {error:.1e}, plain formula {plain_error:.1e}, bound {bound:.1e}")
    note_accuracy(name, error, bound)
    assert error <= bound


def assert_equal_bits(results, expected):
    for result, value in zip(results, expected, strict=True):
        assert torch.equal(result.view(torch.uint8), value.view(torch.uint8))


GRAM_GROUPS = [max(group, 0) for group in GROUPS]


def assert_gram(result, gradients, n, groups=GRAM_GROUPS, num_groups=NUM_GROUPS):
    expected = alignment_reference.gram(double(gradients), n, groups, num_groups)
    scale = expected.diagonal(dim1=1, dim2=2).sqrt()  # [G, n]
    error = (
        ((result - expected).abs() / (scale[:, :, None] * scale[:, None, :]))
        .nan_to_num(nan=0)
        .max()
        .item()
    )
    print(f"error {error:.1e}")
    assert result.dtype == torch.float64 and result.shape == expected.shape
    # Products of float32 are summed in float32 up to 16 at a time ("cpu", "cuda"), or in float64.
    assert error < 2e-7 and torch.equal(result == 0, expected == 0)
    assert torch.equal(result, result.mT)


def random_coefficients(n, num_groups=NUM_GROUPS):
    """Coefficients [num_groups, n], not contiguous."""
    generator = torch.Generator().manual_seed(9)
    return torch.randn(n, num_groups, generator=generator, dtype=torch.float64).to(DEVICE).T


def long_list(length, n):
    """Sizes of `length` tensors and of some empty ones between them, and the gradients of n losses,
    of mixed dtypes; a sixth is missing.
    """
    generator = torch.Generator().manual_seed(0)
    sizes, gradients = [], []
    for t in range(length):
        sizes += [0, t % 13 + 1] if t % 20 == 0 else [t % 13 + 1]
    for i in range(n):
        for t, size in enumerate(sizes):
            values = torch.randn(size, generator=generator).to(DEVICE, (F32, BF16, F16)[t % 3])
            gradients.append(None if (t + i) % 6 == 0 else values)
    return sizes, gradients
