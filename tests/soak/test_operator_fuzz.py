"""Every operator on every backend that runs here against the reference: random shapes, strides,
dtypes and options, with the bounds of the tests in tests/kernels.

Those bounds compare the errors of a kernel and of the plain formula, which says little of a few
numbers: where an output has few, an example draws its values several times and compares the errors
of all draws together.
"""

import math
from collections import defaultdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from soak_share import examples

from genrep_fast.dispatch.operators import schemas
from genrep_fast.reference import alignment as alignment_reference
from genrep_fast.reference import optimizer as optimizer_reference
from genrep_fast.reference import posterior as posterior_reference
from genrep_fast.reference import reverse_step as step_reference
from genrep_fast.reference import scoring as reference
from kernel_cases import (
    BF16,
    F16,
    F32,
    LAYOUTS,
    added_sizes,
    assert_accurate,
    double,
    operators,
    prior_of,
    random,
    state_of,
    tables,
)
from tensor_list_cases import assert_accurate as assert_lists_accurate
from tensor_list_cases import (
    assert_equal_bits,
    assert_gram,
    assert_surroundings_untouched,
    copies,
    tensors,
)

# As many numbers of an output make its error comparable with that of the plain formula.
ENOUGH = 128
DTYPE = st.sampled_from((F32, F32, BF16, F16))
FEW = st.sampled_from((0, 1, 1, 2, 3, 5))
MANY = st.sampled_from((1, 2, 3, 7, 16, 63, 64, 127, 129, 257))


class Errors:
    """Outputs of several draws by name, compared all together."""

    def __init__(self):
        self.outputs = defaultdict(list)

    def add(self, name, result, plain, exact, size=None):
        assert result.shape == plain.shape and result.dtype == plain.dtype, name
        assert result.is_contiguous()
        # Infinities and NaN are where the definition has them.
        finite = exact.isfinite()
        torch.testing.assert_close(
            result[~finite].double(), exact[~finite].double(), rtol=0, atol=0, equal_nan=True
        )
        size = exact if size is None else size
        row = (result, plain, exact, size.expand_as(exact))
        self.outputs[name].append([value[finite] for value in row])

    @property
    def enough(self):
        counts = [sum(rows[0].numel() for rows in row) for row in self.outputs.values()]
        return all(count >= ENOUGH or count == 0 for count in counts)

    def check(self):
        for name, rows in self.outputs.items():
            assert_accurate(name, *(torch.cat(column) for column in zip(*rows, strict=True)))


def draws(run):
    """Call ``run(errors, seed)`` until there are enough numbers to compare."""
    errors = Errors()
    for seed in range(0, 100 * ENOUGH, 100):
        run(errors, seed)
        if errors.enough:
            break
    errors.check()


def spatial_of(draw, small):
    side = st.sampled_from((0, 1, 2, 3)) if small else st.sampled_from((0, 1, 2, 5, 7, 13))
    return draw(st.sampled_from(((), "line", "plane", "plane"))), draw(side), draw(side)


def laid_out(tensor, layout, axis):
    """`tensor` in another layout of memory, and expanded along one of its leading axes."""
    if tensor is None or tensor.numel() == 0:
        return tensor
    if layout != "steps first" or tensor.ndim > 4:
        tensor = LAYOUTS[layout](tensor)
    if axis is not None and axis < tensor.ndim - 3:
        tensor = tensor.narrow(axis, 0, 1).expand_as(tensor)
    return tensor


def chunk_of(draw, small):
    """A function of a seed that makes the leading arguments of a scoring operator."""
    kind, height, width = spatial_of(draw, small)
    spatial = {"line": (width,), "plane": (height, width)}.get(kind, ())
    batch, classes = draw(FEW), draw(FEW)
    steps = draw(st.sampled_from((1, 1, 2, 3) if small else (1, 1, 2, 3, 9, 17)))
    channels = draw(st.sampled_from((1, 2, 3)) if small or spatial else MANY)
    extra, dtypes = draw(st.sampled_from((0, 0, 1, channels))), [draw(DTYPE) for _ in range(3)]
    shared = draw(st.booleans())
    axes = draw(st.none() | st.tuples(*[st.booleans()] * 3))
    layouts = [draw(st.sampled_from(sorted(LAYOUTS))) for _ in range(3)]
    expanded = [draw(st.sampled_from((None, None, 0, 1, 2))) for _ in range(3)]

    def make(seed):
        lead = (1 if shared else batch, classes, steps)
        x = random(batch, channels, *spatial, seed=seed + 1, dtype=dtypes[0])
        output = random(*lead, channels + extra, *spatial, seed=seed + 2, dtype=dtypes[1])
        noisy = None
        if axes is not None:
            sizes = zip(axes, (batch, classes, steps), strict=True)
            own = [1 if is_one else size for is_one, size in sizes]
            noisy = random(*own, channels, *spatial, seed=seed + 3, dtype=dtypes[2])
        if len(spatial) == 2:
            x, output, noisy = map(laid_out, (x, output, noisy), layouts, expanded)
        return x, output, noisy, tables(steps, max(channels * math.prod(spatial), 1))

    return make, batch, classes, steps, spatial


def fuzz_log_likelihood(draw, small):
    make, *_ = chunk_of(draw, small)
    options = (draw(st.sampled_from(("mixture", "mean"))), draw(st.booleans()))
    mask = [draw(st.booleans()) for _ in range(3)]

    def run(errors, seed):
        arguments = make(seed)
        likelihood, remainder = operators.log_likelihood(*arguments, *options)
        plain, exact = (
            reference.log_likelihood(*values, *options)[0]
            for values in (arguments, double(arguments))
        )
        errors.add("likelihood", likelihood, plain, exact)
        grad = random(*likelihood.shape, seed=seed + 9)
        needed = [
            want and tensor is not None for want, tensor in zip(mask, arguments[:3], strict=True)
        ]
        rows = [
            backward(grad, likelihood, remainder, *values, *options, needed)
            for backward, values in (
                (operators.log_likelihood_backward, arguments),
                (reference.log_likelihood_backward, arguments),
                (reference.log_likelihood_backward, double(arguments)),
            )
        ]
        sizes = added_sizes(grad, arguments, options)
        for name, want, *gradients in zip(("x", "model_output", "x_t"), needed, *rows, strict=True):
            if want:
                errors.add(f"gradient of {name}", *gradients, sizes[name])

    draws(run)


def fuzz_score_update(draw, small):
    make, batch, classes, steps, spatial = chunk_of(draw, small)
    reduction, per_location = draw(st.sampled_from(("mixture", "mean"))), draw(st.booleans())
    more = draw(st.integers(0, 2))
    order = draw(st.permutations(range(classes + more)))[:classes]
    index = None if more == 0 and draw(st.booleans()) else torch.tensor(order, dtype=torch.int64)

    def run(errors, seed):
        states = [
            state_of(batch, classes + more, spatial, reduction, per_location) for _ in range(3)
        ]
        for turn in range(2):
            x, output, noisy, columns = make(seed + 10 * turn)
            if turn and noisy is None and classes != output.shape[1]:
                continue
            arguments = (x, output, noisy, columns)
            options = (index, reduction, per_location)
            operators.score_update(*arguments, *options, *states[0])
            reference.score_update(*arguments, *options, *states[1])
            reference.score_update(*double(arguments), *options, *states[2])
        assert all(torch.equal(count, states[2][0]) for count, _ in states)
        for query in (reference.state_log_likelihood, reference.state_effective_components):
            results = [query(*state, reduction).contiguous() for state in states]
            errors.add(query.__name__, results[0].float(), results[1].float(), results[2])

    draws(run)


def fuzz_bayes(draw, small):
    kind, height, width = spatial_of(draw, small)
    spatial = {"line": (width,), "plane": (height, width)}.get(kind, ())
    shape = (draw(FEW), draw(st.sampled_from((1, 2, 5, 17)) if small else MANY), *spatial)
    dtypes = draw(DTYPE), draw(DTYPE)
    prior_kind = draw(st.sampled_from((None, "shared", "own", "excludes")))
    temperature = draw(st.sampled_from((0.5, 1.0, 7.0)))
    mask = [draw(st.booleans()), draw(st.booleans())]
    layout = draw(st.sampled_from(sorted(set(LAYOUTS) - {"steps first"})))

    def run(errors, seed):
        logits = (3 * random(*shape, seed=seed + 1)).to(dtypes[0])
        likelihood = (10 * random(*shape, seed=seed + 2)).to(dtypes[1])
        if len(shape) == 4 and logits.numel():
            logits, likelihood = LAYOUTS[layout](logits), LAYOUTS[layout](likelihood)
        prior = prior_of(prior_kind, shape)
        if prior is not None and not prior.isfinite().any(1).all():
            prior = None
        arguments = (logits, likelihood, prior, temperature)
        log_p = posterior_reference.posterior(*double(arguments[1:]))
        log_q = logits.double().log_softmax(1)
        terms = torch.where(log_p == -math.inf, 0, log_p.exp() * (log_p.abs() + log_q.abs()))
        grad = random(shape[0], *shape[2:], seed=seed + 3)
        size = log_p.exp() * terms.sum(1, keepdim=True) + terms
        size = size * grad.unsqueeze(1).abs() / temperature
        for name, values, sizes in (
            ("posterior", arguments[1:], (None,)),
            ("distillation_loss", arguments, (terms.sum(1),)),
            ("distillation_loss_backward", (grad, *arguments, mask), (None, size)),
        ):
            compare(errors, name, posterior_reference, values, sizes)

    draws(run)


def compare(errors, name, module, arguments, sizes):
    rows = [getattr(operators, name)(*arguments)]
    rows += [getattr(module, name)(*values) for values in (arguments, double(arguments))]
    rows = [(row,) if isinstance(row, torch.Tensor) else row for row in rows]
    for number, (*values, size) in enumerate(zip(*rows, sizes, strict=True)):
        if values[0].shape == values[2].shape and values[0].dtype == values[1].dtype:
            size = None if size is not None and size.shape != values[2].shape else size
        errors.add(f"{name} {number}", *values, size)


def fuzz_reverse_step(draw, small):
    kind, height, width = spatial_of(draw, small)
    spatial = {"line": (width,), "plane": (height, width)}.get(kind, ())
    batch, channels = draw(FEW), draw(st.sampled_from((1, 2, 3, 5)) if spatial or small else MANY)
    extra, steps = draw(st.sampled_from((0, 1, channels))), draw(st.sampled_from((1, 3, 7)))
    dtypes = [draw(DTYPE) for _ in range(3)]
    step = draw(st.integers(0, steps - 1))
    noise = draw(st.integers(-(2**63), 2**63 - 1))
    chains = draw(st.lists(st.integers(0, 2**32 - 1), min_size=batch, max_size=batch))
    scored, scaled = draw(st.booleans()), draw(st.sampled_from((None, "all", "one")))
    layout = draw(st.sampled_from(sorted(set(LAYOUTS) - {"steps first"})))

    def run(errors, seed):
        shape = (batch, channels, *spatial)
        x_t = random(*shape, seed=seed + 1, dtype=dtypes[0])
        output = random(batch, channels + extra, *spatial, seed=seed + 2, dtype=dtypes[1])
        x = random(*shape, seed=seed + 3, dtype=dtypes[2]) if scored else None
        scale = None
        if scaled is not None:
            scale = random(*(shape if scaled == "all" else [1] * len(shape)), seed=seed + 4).exp()
            scale = scale.expand(shape)
        if len(shape) == 4 and x_t.numel():
            x_t, output = LAYOUTS[layout](x_t), LAYOUTS[layout](output)
            x = None if x is None else LAYOUTS[layout](x)
        rising = torch.linspace(0, 1, steps, dtype=torch.float64)
        own = (1.1 - 0.3 * rising, -0.2 - rising, 0.1 + 0.3 * rising)
        columns = torch.stack([*tables(steps, 1), *(column.float() for column in own)])
        ids = torch.tensor(chains, dtype=torch.int64)
        arguments = (x_t, output, columns, step, noise + seed // 100, ids, x, scale)
        rows = (
            operators.reverse_step(*arguments),
            step_reference.reverse_step(*arguments),
            step_reference.reverse_step(*double(arguments)),
        )
        for name, *values in zip(("x_prev", "score"), *rows, strict=True):
            errors.add(name, *values)

    noise = min(noise, 2**63 - 1 - ENOUGH)
    draws(run)


def lists_of(draw, small):
    """Sizes of tensors, their groups, the number of groups, and the dtypes of n losses."""
    size = st.sampled_from((0, 1, 2, 63, 127, 129, 256) + (() if small else (1009, 16384 + 5)))
    sizes = [*draw(st.lists(size, min_size=1, max_size=6)), 63, 65]
    num_groups = draw(st.integers(1, 4))
    groups = [draw(st.integers(-1, num_groups - 1)) for _ in sizes]
    dtypes = [draw(DTYPE) for _ in range(draw(st.sampled_from((2, 2, 3) if small else (2, 3, 8))))]
    return sizes, groups, num_groups, dtypes


def gradients_of(draw, sizes, dtypes):
    """Gradients loss by loss; some losses do not reach some tensors, but every one is reached."""
    flat = []
    seed = draw(st.integers(0, 1000))
    for loss, dtype in enumerate(dtypes):
        of_loss = tensors(dtype, seed=seed + loss, shift=0.2 * loss, sizes=sizes)
        for t in range(len(sizes) - 1):
            kind = draw(st.sampled_from(("", "", "", "zeros", "none")))
            if kind == "zeros":
                of_loss[t].zero_()
            if kind == "none" and loss > 0:
                of_loss[t] = None
        flat += of_loss
    return flat


def coefficients_of(draw, num_groups, n):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    return torch.randn(n, num_groups, generator=generator, dtype=torch.float64).T


def fuzz_gram(draw, small):
    sizes, groups, num_groups, dtypes = lists_of(draw, small)
    groups = [max(group, 0) for group in groups]
    gradients = gradients_of(draw, sizes, dtypes)
    result = operators.gram(gradients, len(dtypes), groups, num_groups)
    assert_gram(result, gradients, len(dtypes), groups, num_groups)


def own_matrices(draw, n):
    """Gram matrices of tensors, with zeros where some loss does not reach one."""
    count = draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    factors = torch.randn(count, n, 4, generator=generator, dtype=torch.float64)
    missing = torch.rand(count, n, generator=generator) < draw(st.sampled_from((0.0, 0.3, 1.0)))
    factors[missing] = 0.0
    return factors @ factors.mT


def fuzz_matrices(draw, small):
    n, num_groups = draw(st.sampled_from((2, 3, 8))), draw(st.integers(1, 9))
    grams = own_matrices(draw, n)
    groups = [draw(st.integers(-1, num_groups - 1)) for _ in grams]
    if draw(st.booleans()):
        grams = grams.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    expected = alignment_reference.group_gram(grams, groups, num_groups)
    result = operators.group_gram(grams, groups, num_groups)
    # Sums in another order: a rounding of the largest entry for each of the tensors.
    atol = len(grams) * torch.finfo(torch.float64).eps * grams.abs().max().item() * len(grams)
    torch.testing.assert_close(result, expected, rtol=0, atol=atol)
    assert torch.equal(result == 0, expected == 0)
    weights = [0.7 - 0.2 * i for i in range(n)]
    arguments = (coefficients_of(draw, num_groups, n), grams, groups, weights)
    rows = (module.tensor_coefficients(*arguments) for module in (operators, alignment_reference))
    assert_equal_bits(*([row] for row in rows))


def fuzz_alignment_coefficients(draw, small):
    grams = own_matrices(draw, 2) * 10.0 ** draw(st.integers(-30, 30))
    weights = [draw(st.sampled_from((0.0, 0.3, 0.7, 1.0))) for _ in range(2)]
    power = draw(st.sampled_from((0.0, 1.0, 2.0, 7.3)))
    results, expected = (
        module.alignment_coefficients(grams, weights, power)
        for module in (operators, alignment_reference)
    )
    # The bound of the test in tests/kernels.
    torch.testing.assert_close(list(results), list(expected), rtol=1e-12, atol=1e-15)


def fuzz_combine(draw, small):
    sizes, groups, num_groups, dtypes = lists_of(draw, small)
    n = len(dtypes)
    gradients, out = (
        gradients_of(draw, sizes, dtypes),
        tensors(draw(DTYPE), seed=8, scale=math.nan, sizes=sizes),
    )
    coefficients, weights = coefficients_of(draw, num_groups, n), [0.7 - 0.2 * i for i in range(n)]
    plain, exact = copies(out), [value.double() for value in out]
    alignment_reference.combine(gradients, coefficients, groups, weights, plain)
    wide = [None if value is None else value.double() for value in gradients]
    alignment_reference.combine(wide, coefficients, groups, weights, exact)
    operators.combine(gradients, coefficients, groups, weights, out)
    assert_surroundings_untouched(out)
    assert_lists_accurate(f"{out[0].dtype}", out, plain, exact)


def fuzz_adamw_step(draw, small):
    sizes, groups, num_groups, dtypes = lists_of(draw, small)
    n, dtype, state_dtype = (
        len(dtypes),
        *draw(st.sampled_from(((F32, F32), (BF16, BF16), (F16, F32), (BF16, F32)))),
    )
    state = [
        tensors(dtype, seed=10, sizes=sizes),
        tensors(state_dtype, seed=11, scale=0.1, sizes=sizes),
        [view.square_() for view in tensors(state_dtype, seed=12, scale=0.1, sizes=sizes)],
        tensors(state_dtype, seed=13, sizes=sizes) if draw(st.booleans()) else [],
    ]
    gradients = gradients_of(draw, sizes, dtypes)
    found_inf = draw(st.sampled_from((None, None, 0.0, 1.0)))
    rest = (
        coefficients_of(draw, num_groups, n),
        groups,
        [0.7 - 0.2 * i for i in range(n)],
        [torch.tensor(float(draw(st.integers(1, 2000)))) for _ in sizes],
        torch.tensor(draw(st.sampled_from((0.0, 1e-3, 0.1))), dtype=torch.float64),
        draw(st.sampled_from((0.0, 0.9))),
        0.999,
        1e-8,
        draw(st.sampled_from((0.0, 0.05))),
        draw(st.sampled_from((0.0, 0.99, 1.0))),
        None if found_inf is None else torch.tensor([found_inf]),
    )
    plain = [copies(values) for values in state]
    exact = [[value.double() for value in values] for values in state]
    before = [copies(values) for values in state]
    wide = [None if value is None else value.double() for value in gradients]
    optimizer_reference.adamw_step(*plain, gradients, *rest)
    optimizer_reference.adamw_step(*exact, wide, *rest)
    operators.adamw_step(*state, gradients, *rest)
    for number, name in enumerate(("params", "exp_avgs", "exp_avg_sqs", "emas")):
        assert_surroundings_untouched(state[number])
        if found_inf == 1.0:
            assert_equal_bits(state[number], before[number])
        elif state[number]:
            assert_lists_accurate(name, state[number], plain[number], exact[number])


FUZZERS = {
    fuzz_log_likelihood: ("log_likelihood", "log_likelihood_backward"),
    fuzz_score_update: ("score_update",),
    fuzz_bayes: ("posterior", "distillation_loss", "distillation_loss_backward"),
    fuzz_reverse_step: ("reverse_step",),
    fuzz_gram: ("gram",),
    fuzz_matrices: ("group_gram", "tensor_coefficients"),
    fuzz_alignment_coefficients: ("alignment_coefficients",),
    fuzz_combine: ("combine",),
    fuzz_adamw_step: ("adamw_step",),
}


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
@pytest.mark.parametrize("fuzz", FUZZERS, ids=lambda fuzz: fuzz.__name__)
def test_backends_agree_with_the_reference(fuzz, backend, interpreted):
    @examples(*((1, 3) if interpreted else (8, 60)))
    @given(st.data())
    def check(data):
        fuzz(data.draw, interpreted)

    check()


def test_every_operator_has_a_fuzzer():
    assert {name for names in FUZZERS.values() for name in names} == set(schemas)
