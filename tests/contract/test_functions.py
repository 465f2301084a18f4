"""Every function: golden values, the NumPy loops, gradients, dtypes, layouts, bad numbers."""

import contextlib
import functools
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import featkd
from featkd import functional
from featkd.losses import _blocks
from featkd.losses._numerics import savable
from tests.helpers.cases import CASES, LOSSES, REDUCTIONS, RELATIONS, Case, close, normal

each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_loss = pytest.mark.parametrize("case", LOSSES, ids=str)
each_relation = pytest.mark.parametrize("case", RELATIONS, ids=str)

# torch has no batching rule for its fused attention kernels yet: it loops, and says so.
torch_loops = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")

FUNCTIONS = [
    "spatial_attention",
    "channel_attention",
    "standardize",
    "attention_mask",
    "attention_transfer_loss",
    "attention_masked_loss",
    "gaussian_relation",
    "embedded_gaussian_relation",
    "dot_product_relation",
    "concatenation_relation",
    "non_local_loss",
]


def tensor(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def leaves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone().requires_grad_() for name, value in tensors.items()}


def to_float(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.float() for name, value in tensors.items()}


def gradients(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a fixed weighted sum of the output."""
    output = case(**tensors)
    weights = normal(*output.shape, seed=9, dtype=output.dtype)
    return dict(
        zip(tensors, torch.autograd.grad((weights * output).sum(), tensors.values()), strict=True)
    )


# --- surface --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_is_importable_from_the_package(name):
    assert getattr(featkd, name) is getattr(functional, name)
    assert name in featkd.__all__
    assert name in functional.__all__


def test_the_table_of_cases_has_every_function():
    assert {case.function.__name__ for case in CASES} == set(FUNCTIONS)


# --- golden values, each worked out by hand -------------------------------------------------------


def test_golden_standardize():
    # Means 2 and 30; deviations 1 and 10. A constant channel, whatever its size, is 0.
    features = tensor([[[[1, 3]], [[20, 40]], [[7, 7]]]])
    close(functional.standardize(features), tensor([[[[-1, 1]], [[-1, 1]], [[0, 0]]]]))
    # The batch's second image has the mean 6: over both the mean is 4, the deviation sqrt(5).
    batch = tensor([[[[1, 3]]], [[[5, 7]]]])
    expected = tensor([[[[-3, -1]]], [[[1, 3]]]]) / math.sqrt(5)
    close(functional.standardize(batch, over="batch"), expected)


def test_golden_standardized_losses():
    # Correlations 1 and -1: 1 - correlation is 0 and 2, 1 in the mean.
    student = tensor([[[[0, 1]], [[0, 1]]]])
    teacher = tensor([[[[10, 30]], [[5, 1]]]])
    close(functional.attention_masked_loss(student, teacher, standardize=True), 1.0)
    close(functional.non_local_loss(student, teacher, standardize=True), 1.0)
    # (s - t)^2 is 0 and 4; the masks leave 1.5 of the first position and .5 of the second channel.
    spatial, channel = tensor([[[1.5, 0.5]]]), tensor([[1.5, 0.5]])
    masked = functional.attention_masked_loss(
        student, teacher, spatial_mask=spatial, channel_mask=channel, standardize=True
    )
    close(masked, (1.5 + 0.5) * 4 * 0.5 / (2 * 2 * 2))
    # Spatial maps (0, 1) and (7.5, 15.5), correlation 1; channel maps (.5, .5), constant, and
    # (20, 3), whose half mean square is 1 / 2.
    close(functional.attention_transfer_loss(student, teacher, standardize=True), 0.5)


def test_a_constant_channel_counts_as_one_however_it_rounds():
    """The mean of 0.1 in float32 is off by its rounding: without care that would be 1."""
    for value in (0.1, 1e-6, 1e6 / 3):
        constant = torch.full((1, 2, 13, 21), value, requires_grad=True)
        assert (functional.standardize(constant) == 0).all()
        loss = functional.attention_masked_loss(
            constant, normal(1, 2, 13, 21, dtype=torch.float32), standardize=True
        )
        (gradient,) = torch.autograd.grad(loss, constant)
        close(loss, 0.5, 1e-6)
        assert (gradient == 0).all()


def test_golden_attention():
    features = tensor([[[[1, -2]], [[3, 4]]]])  # two channels of one row: (1, -2) and (3, 4)
    # Over the channels: (1 + 3) / 2 = 2 and (2 + 4) / 2 = 3; signed (1 + 3) / 2 and (-2 + 4) / 2.
    close(functional.spatial_attention(features), tensor([[[2, 3]]]))
    close(functional.spatial_attention(features, absolute=False), tensor([[[2, 1]]]))
    # Over the positions: (1 + 2) / 2 = 1.5 and (3 + 4) / 2 = 3.5; signed (1 - 2) / 2 and 3.5.
    close(functional.channel_attention(features), tensor([[1.5, 3.5]]))
    close(functional.channel_attention(features, absolute=False), tensor([[-0.5, 3.5]]))


@pytest.mark.parametrize(
    ("temperature", "fusion", "expected"),
    [
        # softmax(0, ln 2 + ln 2) = (1, 4) / 5, times n = 2.
        (1.0, "logits", [0.4, 1.6]),
        # Halved logits: softmax(0, ln 2) = (1, 2) / 3, times 2.
        (2.0, "logits", [2 / 3, 4 / 3]),
        # The mean of softmax(0, ln 2) with itself: (1, 2) / 3, times 2.
        (1.0, "probabilities", [2 / 3, 4 / 3]),
        # Doubled logits: softmax(0, 2 ln 2) = (1, 4) / 5, times 2.
        (0.5, "probabilities", [0.4, 1.6]),
    ],
)
def test_golden_mask(temperature, fusion, expected):
    attention = tensor([[0, math.log(2)]])
    mask = functional.attention_mask(attention, attention, temperature=temperature, fusion=fusion)
    close(mask, tensor([expected]))


def test_golden_mask_of_different_maps():
    # softmax(0 + ln 3, ln 2 + 0) = (3, 2) / 5; (1, 2) / 3 and (3, 1) / 4 have mean (13, 11) / 24.
    student, teacher = tensor([[0, math.log(2)]]), tensor([[math.log(3), 0]])
    close(functional.attention_mask(student, teacher, temperature=1.0), tensor([[1.2, 0.8]]))
    close(
        functional.attention_mask(student, teacher, temperature=1.0, fusion="probabilities"),
        tensor([[13 / 12, 11 / 12]]),
    )


def test_peaks_far_apart_share_the_mask():
    """Either map's softmax underflows at the other's peak; that of their sum does not."""
    student, teacher = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 1.0]])
    mask = functional.attention_mask(student, teacher, temperature=1e-3)
    close(mask, torch.tensor([[1.5, 0.0, 1.5]]), 0.0)


# A student of zeros; teachers of one channel and one row: image 0 is (-3, 4), image 1 is (6, 8).
# |A|: G_s has norms 5 and 10, G_c is 3.5 and 7. Signed: norms 5 and 10, means 0.5 and 7.
@pytest.mark.parametrize(
    ("absolute", "reduction", "expected"),
    [
        (True, "none", [5 + 3.5, 10 + 7]),
        (True, "mean", 12.75),
        (True, "sum", 25.5),
        (True, "norm", math.sqrt(5**2 + 10**2) + math.sqrt(3.5**2 + 7**2)),
        (True, "mean_square", (5**2 + 10**2 + 3.5**2 + 7**2) / 2),
        (False, "none", [5 + 0.5, 10 + 7]),
        (False, "norm", math.sqrt(5**2 + 10**2) + math.sqrt(0.5**2 + 7**2)),
    ],
)
def test_golden_attention_transfer(absolute, reduction, expected):
    teacher = tensor([[[[-3, 4]]], [[[6, 8]]]])
    loss = functional.attention_transfer_loss(
        torch.zeros_like(teacher), teacher, absolute=absolute, reduction=reduction
    )
    close(loss, tensor(expected))


def test_golden_attention_masked():
    student, teacher = tensor([[[[1, 1]]]]), tensor([[[[2, 3]]]])  # differences 1 and 2
    spatial, channel = tensor([[[4, 1]]]), tensor([[2]])
    loss = functional.attention_masked_loss
    close(loss(student, teacher), math.sqrt(1 + 4))
    close(loss(student, teacher, spatial_mask=spatial), math.sqrt(4 * 1 + 1 * 4))
    close(loss(student, teacher, channel_mask=channel), math.sqrt(2 * 1 + 2 * 4))
    close(loss(student, teacher, spatial_mask=spatial, channel_mask=channel), 4.0)


def test_golden_gaussian():
    # Products with x = (0, sqrt(ln 3)): row 0 is (0, 0) -> weights 1/2, 1/2; row 1 is (0, ln 3) ->
    # weights 1/4, 3/4. With g = (2, 6) the means are 4 and 5.
    features, g = tensor([[[0, math.sqrt(math.log(3))]]]), tensor([[[2, 6]]])
    close(functional.gaussian_relation(features, g), tensor([[[4, 5]]]))


def test_golden_embedded_gaussian():
    # theta phi = (0, 2 ln 3): weights (1, 9) / 10 -> 5.6; at half the scale (1, 3) / 4 -> 5.
    theta, phi, g = tensor([[[2]]]), tensor([[[0, math.log(3)]]]), tensor([[[2, 6]]])
    relation = functional.embedded_gaussian_relation
    close(relation(theta, phi, g), tensor([[[5.6]]]))
    close(relation(theta, phi, g, scale=0.5), tensor([[[5]]]))


def test_golden_dot_product():
    # (1 * 3 * 5 + 1 * 4 * 6) / 2 = 19.5, and twice that for theta = 2.
    theta, phi, g = tensor([[[1, 2]]]), tensor([[[3, 4]]]), tensor([[[5, 6]]])
    close(functional.dot_product_relation(theta, phi, g), tensor([[[19.5, 39]]]))


def test_golden_concatenation():
    # theta = 1: relu(3, 0, 6) . (1, 10, 100) / 3 = 603 / 3; theta = -4: relu(-2, -5, 1) -> 100 / 3.
    theta, phi, g = tensor([[[1, -4]]]), tensor([[[2, -1, 5]]]), tensor([[[1, 10, 100]]])
    close(functional.concatenation_relation(theta, phi, g), tensor([[[201, 100 / 3]]]))


def test_golden_non_local():
    student, teacher = tensor([[[[1, 1]]], [[[0, 0]]]]), tensor([[[[4, 5]]], [[[0, 12]]]])
    # Differences (3, 4) and (0, 12): norms 5 and 12; over the batch sqrt(25 + 144) = 13.
    close(functional.non_local_loss(student, teacher), 8.5)
    close(functional.non_local_loss(student, teacher, reduction="norm"), 13.0)


# --- values and gradients -------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize(
    ("batch", "positions"), [(2, (3, 4)), (3, (5, 2)), (1, (1, 6)), (2, (1, 1))]
)
def test_value_equals_the_loops(case, batch, positions):
    tensors = case.inputs(batch, positions)
    output = case(**tensors)
    assert output.dtype == torch.float64
    expected = case.expected(**tensors)
    assert output.shape == np.shape(expected)
    close(output, expected)


@each_case
def test_inputs_are_left_as_they_are(case):
    tensors = case.inputs()
    before = {name: value.clone() for name, value in tensors.items()}
    case(**tensors)
    for name, value in tensors.items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


@each_loss
def test_losses_are_scalars_unless_none(case):
    none = case.options.get("reduction") == "none"
    assert case(**case.inputs(batch=3)).shape == ((3,) if none else ())


@pytest.mark.parametrize("name", ["transfer", "masked-both", "non_local"])
def test_reductions_agree(name):
    by_reduction = {
        case.options["reduction"]: case(**case.inputs(batch=3))
        for case in LOSSES
        if case.name in {f"{name}-{reduction}" for reduction in REDUCTIONS}
    }
    default = next(case for case in LOSSES if case.name == name)
    close(by_reduction["sum"], by_reduction["none"].sum())
    close(by_reduction["mean"], by_reduction["none"].mean())
    close(default(**default.inputs(batch=3)), by_reduction["mean"])
    if name != "transfer":  # there each of the two distances is reduced before they are added
        close(by_reduction["norm"], by_reduction["none"].square().sum().sqrt())
        close(by_reduction["mean_square"], by_reduction["none"].square().mean())


@each_case
def test_gradcheck(case):
    tensors = leaves(case.inputs(2, (2, 3)))
    assert torch.autograd.gradcheck(case.of_one, tuple(tensors.values()))


@each_case
def test_gradgradcheck(case):
    tensors = leaves(case.inputs(2, (2, 3)))
    assert torch.autograd.gradgradcheck(case.of_one, tuple(tensors.values()))


@each_case
def test_the_gradient_is_the_same_where_its_graph_is_kept(case):
    """A backward of its own for double backward must give the same first derivative."""
    tensors = leaves(case.inputs())
    output = case(**tensors)
    weights = normal(*output.shape, seed=9)
    kept = torch.autograd.grad((weights * output).sum(), tensors.values(), create_graph=True)
    for a, b in zip(kept, gradients(case, tensors).values(), strict=True):
        close(a, b)


@each_case
def test_some_inputs_may_need_no_gradient(case):
    tensors = leaves(case.inputs())
    full = gradients(case, tensors)
    for name in tensors:
        others = {key: value.detach() for key, value in tensors.items()}
        output = case(**others | {name: tensors[name]})
        weights = normal(*output.shape, seed=9)
        close(torch.autograd.grad((weights * output).sum(), tensors[name])[0], full[name])


@each_case
def test_torch_func_grad(case):
    tensors = case.inputs()

    def total(*values: Tensor) -> Tensor:
        output = case.of_one(*values)
        return (normal(*output.shape, seed=9) * output).sum()

    actual = torch.func.grad(total, argnums=tuple(range(len(tensors))))(*tensors.values())
    for value, expected in zip(actual, gradients(case, leaves(tensors)).values(), strict=True):
        close(value, expected)


@each_case
@torch_loops
def test_torch_func_vmap(case):
    tensors = [case.inputs(seed=seed) for seed in range(3)]
    stacked = [torch.stack([one[name] for one in tensors]) for name in tensors[0]]
    close(torch.func.vmap(case.of_one)(*stacked), torch.stack([case(**one) for one in tensors]))


@each_loss
def test_torch_func_gradient_of_each_sample(case):
    tensors = case.inputs(batch=3)

    def of_one_image(*values: Tensor) -> Tensor:
        return case.of_one(*(value.unsqueeze(0) for value in values)).sum()

    actual = torch.func.vmap(torch.func.grad(of_one_image))(*tensors.values())
    for b, value in enumerate(actual):
        image = leaves({name: whole[b : b + 1] for name, whole in tensors.items()})
        student = next(iter(image.values()))
        close(value, torch.autograd.grad(case(**image).sum(), student)[0][0])


@each_case
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # torch's own
def test_torch_func_jvp_is_the_gradient_along_a_direction(case):
    tensors = case.inputs()
    tangents = tuple(normal(*value.shape, seed=7) for value in tensors.values())
    _, actual = torch.func.jvp(
        lambda *values: case.of_one(*values).sum(), tuple(tensors.values()), tangents
    )
    tensors = leaves(tensors)
    gradient = torch.autograd.grad(case(**tensors).sum(), tensors.values())
    close(actual, sum((g * t).sum() for g, t in zip(gradient, tangents, strict=True)))


@each_case
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # torch's own
def test_dual_numbers_carry_the_gradient_along_a_direction(case):
    tensors = leaves(case.inputs())
    tangents = {name: normal(*value.shape, seed=7) for name, value in tensors.items()}
    gradient = torch.autograd.grad(case(**tensors).sum(), tensors.values())
    with forward_ad.dual_level():
        duals = {n: forward_ad.make_dual(x.detach(), tangents[n]) for n, x in tensors.items()}
        actual = forward_ad.unpack_dual(case(**duals).sum()).tangent
    close(actual, sum((g * t).sum() for g, t in zip(gradient, tangents.values(), strict=True)))


# --- blocks of channels ---------------------------------------------------------------------------


@pytest.fixture
def blocks_of_one(monkeypatch):
    """The smallest blocks: each channel on its own."""
    monkeypatch.setattr(_blocks, "_BLOCK_BYTES", 1)


@each_case
@pytest.mark.usefixtures("blocks_of_one")
def test_in_blocks_value_and_gradient_are_those_of_the_loops(case):
    tensors = leaves(case.inputs())
    close(case(**tensors), case.expected(**tensors))
    assert torch.autograd.gradcheck(case.of_one, tuple(tensors.values()))


@each_case
@pytest.mark.usefixtures("blocks_of_one")
def test_in_blocks_lower_precision_and_other_layouts_change_nothing(case):
    """The gradient is written in place: in the dtype and the layout of its input."""
    tensors = {name: value.bfloat16() for name, value in case.inputs().items()}
    wide = gradients(case, leaves({name: value.float() for name, value in tensors.items()}))
    for turn in (lambda x: x, lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2)):
        narrow = {name: turn(value).requires_grad_() for name, value in tensors.items()}
        for name, gradient in gradients(case, narrow).items():
            assert gradient.dtype == torch.bfloat16
            close(gradient, wide[name], 1e-2)


@each_case
@torch_loops
@pytest.mark.parametrize("block_bytes", [1, 1 << 21])
def test_gradients_can_be_batched(case, block_bytes, monkeypatch):
    monkeypatch.setattr(_blocks, "_BLOCK_BYTES", block_bytes)
    tensors = leaves(case.inputs())
    output = case(**tensors)
    weights = normal(3, *output.shape, seed=9)
    inputs = tuple(tensors.values())
    one_by_one = [torch.autograd.grad(output, inputs, w, retain_graph=True) for w in weights]
    batched = torch.autograd.grad(output, inputs, weights, is_grads_batched=True)
    for actual, expected in zip(batched, zip(*one_by_one, strict=True), strict=True):
        close(actual, torch.stack(expected))


@pytest.mark.parametrize(
    ("shape", "widths"),
    [
        ((1, 5, 512, 512), [2, 2, 1]),  # 1 MiB a channel
        ((2, 2, 1024, 1024), [1, 1]),  # 8 MiB a channel: never less than one
        ((1, 5, 3, 4), [5]),
        ((0, 5, 3, 4), [5]),
    ],
    ids=str,
)
def test_blocks_of_channels_are_of_2_mib(shape, widths):
    features = torch.empty(shape)
    with torch.no_grad():
        blocks = _blocks.channel_blocks(features)
    assert [block.stop - block.start for block in blocks] == widths
    assert len(_blocks.channel_blocks(features)) == 1  # where a graph is recorded


@each_case
def test_in_blocks_second_derivatives_are_those_of_one_block(case, monkeypatch):
    tensors = leaves(case.inputs())
    found = []
    for size in (_blocks._BLOCK_BYTES, 1):
        monkeypatch.setattr(_blocks, "_BLOCK_BYTES", size)
        inputs = tuple(tensors.values())
        value = case(**tensors).square().sum()
        gradient = torch.autograd.grad(value, inputs, create_graph=True)
        total = sum(x.square().sum() for x in gradient)
        found.append(torch.autograd.grad(total, inputs, materialize_grads=True))
    for actual, expected in zip(*found, strict=True):
        close(actual, expected)


@pytest.mark.parametrize("far", [-1e4, -1e9, -3e38])
def test_concatenation_in_float32_is_as_exact_beside_keys_that_no_query_sees(far):
    """Padding, for one; the gradient of g is the same sum with queries and keys exchanged."""
    theta, phi, g = normal(2, 1, 20, seed=1), normal(2, 1, 64, seed=2), normal(2, 3, 64, seed=3)
    phi[..., ::4] = far
    pairs = (theta[:, 0, :, None] + phi).relu()
    exact = (pairs @ g.mT / 64).mT
    close(functional.concatenation_relation(theta.float(), phi.float(), g.float()), exact, 1e-6)
    theta, phi, g = phi, theta, normal(2, 3, 20, seed=4).float().requires_grad_()
    weights = normal(2, 3, 64, seed=5)
    relation = functional.concatenation_relation(theta.float(), phi.float(), g)
    (actual,) = torch.autograd.grad(relation[..., 1:4].sum() + relation[..., 5:8].sum(), g)
    chosen = torch.zeros_like(weights)
    chosen[..., 1:4] = chosen[..., 5:8] = 1
    close(actual, (pairs @ chosen.mT / 20).mT, 1e-6)


def test_a_concatenation_s_nan_query_costs_the_others_no_digits():
    theta, phi, g = normal(1, 1, 20, seed=1), normal(1, 1, 64, seed=2), normal(1, 3, 64, seed=3)
    phi[..., ::2] = -1e9
    exact = ((theta[:, 0, :, None] + phi).relu() @ g.mT / 64).mT
    theta[..., 0] = math.nan
    found = functional.concatenation_relation(theta.float(), phi.float(), g.float())
    assert found[..., 0].isnan().all()
    close(found[..., 1:], exact[..., 1:], 1e-6)


@pytest.mark.parametrize("outlier", [-1e6, 1e6])
def test_a_concatenation_s_key_far_off_costs_the_queries_that_do_not_see_it_no_digits(outlier):
    theta, phi, g = normal(1, 1, 20, seed=1), normal(1, 1, 64, seed=2), normal(1, 3, 64, seed=3)
    phi[..., 7], g[..., 7] = outlier, 0
    theta[..., 0] = 2e6  # sees it, so that it is not at the border
    exact = ((theta[:, 0, :, None] + phi).relu() @ g.mT / 64).mT
    found = functional.concatenation_relation(theta.float(), phi.float(), g.float())
    close(found[..., 1:], exact[..., 1:], 1e-6)


def test_second_derivatives_of_the_concatenation_are_those_of_all_pairs():
    def pairs(theta, phi, g):
        return g @ (theta.mT + phi).relu().mT / phi.shape[2]

    tensors = tuple(
        normal(2, width, 5, seed=i).requires_grad_() for i, width in enumerate((1, 1, 3))
    )
    found = []
    for function in (functional.concatenation_relation, pairs):
        value = function(*tensors).square().sum()
        gradient = torch.autograd.grad(value, tensors, create_graph=True)
        found.append(torch.autograd.grad(sum(x.square().sum() for x in gradient), tensors))
    for actual, expected in zip(*found, strict=True):
        close(actual, expected)


@pytest.mark.parametrize("width", [1, 7, 8, 9, 17])
@pytest.mark.parametrize("width_of_g", [1, 9])
def test_softmax_attention_of_any_width_is_that_of_all_pairs(width, width_of_g):
    """The fused kernels take multiples of 8: the rest is padding."""
    theta, phi = normal(2, width, 5, seed=1), normal(2, width, 6, seed=2)
    g = normal(2, width_of_g, 6, seed=3)
    expected = g @ (theta.mT @ phi).softmax(2).mT
    close(functional.embedded_gaussian_relation(theta, phi, g), expected)


# --- dtypes ---------------------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_at_least_float32_whatever_comes_in(case, dtype):
    tensors = leaves(case.inputs(2, (5, 7), dtype))
    output = case(**tensors)
    assert output.dtype == torch.float32
    close(output, case.expected(**tensors), 1e-5)  # of the rounded inputs
    for name, gradient in gradients(case, tensors).items():
        assert gradient.dtype == dtype, name
        assert gradient.isfinite().all(), name


@pytest.mark.parametrize(
    "function",
    [
        functional.attention_transfer_loss,
        functional.attention_masked_loss,
        functional.gaussian_relation,
        functional.non_local_loss,
    ],
)
def test_a_gradient_of_half_precision_is_that_of_float32_rounded_once(function):
    features, other = (normal(1, 8, 5, 7, seed=i).bfloat16() for i in range(2))
    narrow, wide = (x.requires_grad_() for x in (features, features.float()))
    for x in (narrow, wide):
        function(x, other).sum().backward()
    assert torch.equal(narrow.grad, wide.grad.bfloat16())


@each_case
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("high", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("first_is_low", [True, False])
def test_mixed_dtypes(case, low, high, first_is_low):
    """A bfloat16 teacher beside a float32 student, and every other mixture."""
    tensors = case.inputs()
    for index, (name, value) in enumerate(tensors.items()):
        tensors[name] = value.to(low if (index == 0) == first_is_low else high)
    tensors = leaves(tensors)
    output = case(**tensors)
    dtypes = [value.dtype for value in tensors.values()]
    assert output.dtype == functools.reduce(torch.promote_types, dtypes, torch.float32)
    close(output, case.expected(**tensors), 1e-5)
    for name, gradient in gradients(case, tensors).items():
        assert gradient.dtype == tensors[name].dtype, name


@each_case
@pytest.mark.parametrize("formula", ["closed", "plain"])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float32], ids=str)
def test_one_wide_tensor_among_narrow_ones_widens_all(case, formula, narrow):
    tolerance = 1e-5 if "transfer" in case.name else 1e-10  # a side's maps keep its own precision
    with contextlib.nullcontext() if formula == "closed" else forward_ad.dual_level():
        for wide, value in case.inputs().items():
            tensors = case.inputs(dtype=narrow) | {wide: value}
            output = case(**tensors)
            assert output.dtype == torch.float64, wide
            close(output, case.expected(**tensors), tolerance)


@each_case
def test_the_plain_formula_computes_half_precision_in_float32_too(case):
    tensors = case.inputs(dtype=torch.float16)
    with forward_ad.dual_level():
        output = case(**tensors)
    assert output.dtype == torch.float32
    close(output, case.expected(**tensors), 1e-5)


@pytest.mark.parametrize("case", [case for case in CASES if not case.adapters], ids=str)
def test_half_precision_of_magnitude_300_does_not_overflow(case):
    """256 channels of 16x16, as the design asks; float16 ends at 65504."""
    tensors = {}
    for index, (name, shape) in enumerate(case.shapes(2, 16, 16).items()):
        shape = tuple(256 if size == 3 else size for size in shape)
        magnitude = 1 if name.endswith("mask") else 300
        values = magnitude * (0.5 + normal(*shape, seed=index).abs().clamp(max=0.5))
        signs = normal(*shape, seed=index + 50).sign() if magnitude > 1 else 1
        tensors[name] = (values * signs).half()
    output = case(**tensors)
    assert output.isfinite().all()
    if "gaussian" not in case.name:  # a softmax of such logits hangs on the last bit
        exact = case(**{name: value.double() for name, value in tensors.items()})
        close(output, exact, 1e-5)
    for name, gradient in gradients(case, leaves(to_float(tensors))).items():
        assert gradient.isfinite().all(), name


# --- layouts --------------------------------------------------------------------------------------


def channels_last(value: Tensor) -> Tensor:
    return value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value


def strided(value: Tensor) -> Tensor:
    return torch.stack([value, value + 1], dim=-1).flatten(-2)[..., ::2]


def cropped(value: Tensor) -> Tensor:
    return torch.nn.functional.pad(value, (2, 1), value=7.0)[..., 2:-1]


def transposed(value: Tensor) -> Tensor:
    return value.transpose(-1, -2).contiguous().transpose(-1, -2)


def batch_last(value: Tensor) -> Tensor:
    return value.movedim(0, -1).contiguous().movedim(-1, 0)


@each_case
@pytest.mark.parametrize("layout", [channels_last, strided, cropped, transposed, batch_last])
def test_layout_does_not_matter(case, layout):
    tensors = case.inputs()
    expected = gradients(case, leaves(tensors))
    laid_out = {name: layout(value) for name, value in tensors.items()}
    close(case(**laid_out), case(**tensors), 1e-13)
    laid_out = {name: value.detach().requires_grad_() for name, value in laid_out.items()}
    for name, gradient in gradients(case, laid_out).items():
        close(gradient, expected[name], 1e-13)


@each_case
def test_expanded_inputs(case):
    """One image expanded to a batch shares its memory; the result is that of copies."""
    tensors = case.inputs(batch=1)
    shapes = case.shapes(3, 3, 4)
    expanded = {name: value.expand(shapes[name]) for name, value in tensors.items()}
    copies = {name: value.contiguous() for name, value in expanded.items()}
    close(case(**expanded), case(**copies), 1e-13)


# --- the edges of the domain ----------------------------------------------------------------------


def test_masks_of_zeros_give_0_with_gradient_0_for_the_masks_too():
    tensors = leaves(
        {"student": normal(2, 3, 4, 5, seed=1), "teacher": normal(2, 3, 4, 5, seed=2)}
        | {"spatial_mask": torch.zeros(2, 4, 5), "channel_mask": torch.ones(2, 3)}
    )
    loss = functional.attention_masked_loss(**tensors)
    close(loss, 0.0, 0.0)
    for gradient in torch.autograd.grad(loss, tensors.values()):
        close(gradient, torch.zeros_like(gradient), 0.0)


@each_case
def test_an_empty_batch_gives_a_differentiable_zero(case):
    tensors = leaves(case.inputs(batch=0))
    output = case(**tensors)
    assert output.shape == np.shape(case.expected(**tensors))
    assert (output == 0).all()
    output.sum().backward()
    for name, value in tensors.items():
        assert value.grad is not None, name
        assert value.grad.shape == value.shape


@each_case
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_nan_and_inf_are_never_hidden(case, bad):
    """Wherever the loops give NaN or inf for one bad number, the output is not finite."""
    for name in case.inputs():
        tensors = case.inputs()
        if name.endswith("mask") and bad == -math.inf:
            continue  # a negative mask is outside of the domain
        tensors[name].view(-1)[1] = bad
        expected = torch.as_tensor(case.expected(**tensors))
        output = case(**tensors)
        assert not output[~expected.isfinite()].isfinite().any(), name
        if math.isnan(bad):
            assert output[expected.isnan()].isnan().all(), name


@pytest.mark.parametrize("fusion", ["logits", "probabilities"])
@pytest.mark.parametrize("temperature", [1e-320, 1e-46])
def test_a_temperature_below_the_dtype_s_numbers_is_sharp_and_no_nan(temperature, fusion):
    maps = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 1.0]])
    mask = functional.attention_mask(maps, maps, temperature=temperature, fusion=fusion)
    close(mask, tensor([[1, 1, 1], [1.5, 0, 1.5]]), 1e-6)


def test_a_number_may_be_an_integer_of_any_size():
    maps, size = torch.tensor([[1.0, 0.0, 2.0]]), 10**30
    close(functional.attention_mask(maps, maps, temperature=size), torch.ones(1, 3), 1e-6)
    relation = functional.embedded_gaussian_relation(*[maps[None]] * 3, scale=size)
    close(relation, tensor([[[2, 1, 2]]]), 1e-6)
    settings = featkd.Hyperparameters(size, 0, 0, temperature=size)
    loss = featkd.FeatureDistillationLoss(3, 3, hyperparameters=settings)
    features = torch.ones(1, 3, 2, 2)
    expected = featkd.attention_transfer_loss(0 * features, features)
    close(loss(0 * features, features)["loss_attention_transfer"] / 1e30, expected, 1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "loss",
    [
        functional.attention_transfer_loss,
        functional.attention_masked_loss,
        functional.non_local_loss,
    ],
)
def test_second_derivatives_at_equality_are_finite(loss, reduction):
    teacher = normal(2, 3, 2, 4)
    student = teacher.clone().requires_grad_()
    value = loss(student, teacher, reduction=reduction).sum()
    (slope,) = torch.autograd.grad(value, student, create_graph=True)
    (second,) = torch.autograd.grad((slope * normal(*slope.shape, seed=1)).sum(), student)
    assert second.isfinite().all()


@pytest.mark.parametrize("keys", [1, 2, 5, 12, 16, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", [c for c in RELATIONS if c.name.endswith("-keys")], ids=str)
def test_relations_show_nan_for_any_number_of_keys(case, dtype, keys):
    """Vectorised kernels treat the last few keys apart."""
    for name in ("theta", "phi", "g"):
        tensors = {key: value.flatten(2) for key, value in case.inputs(1, (2, 3), dtype).items()}
        tensors |= {key: tensors[key][..., :1].repeat(1, 1, keys) for key in ("phi", "g")}
        tensors[name][0, 0, -1] = math.nan
        expected = torch.as_tensor(case.expected(**tensors))
        assert case(**tensors)[expected.isnan()].isnan().all(), name


def test_logits_that_overflow_show_at_a_single_query_too():
    theta, phi = torch.full((1, 4, 1), 1e19), torch.full((1, 4, 16), -1e19)
    assert functional.embedded_gaussian_relation(theta, phi, torch.ones(1, 3, 16)).isnan().all()


@pytest.mark.parametrize(
    "case",
    [
        c
        for c in CASES
        if (not c.loss or c.options.get("reduction") == "none") and "over" not in c.options
    ],
    ids=str,
)
def test_a_bad_image_leaves_the_others_alone(case):
    tensors = case.inputs(batch=3)
    expected = case(**tensors)
    for value in tensors.values():
        value[1] = math.nan
    output = case(**tensors)
    close(output[[0, 2]], expected[[0, 2]], 1e-13)
    assert output[1].isnan().all()


@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0])
def test_prefix_sums_of_60_000_positions_keep_float32_s_accuracy(spread):
    """Values and gradients within 1e-5 of float64: the sums run over all positions."""
    tensors = {
        "theta": spread * normal(1, 1, 60_000, seed=1, dtype=torch.float32) + 1,
        "phi": spread * normal(1, 1, 60_000, seed=2, dtype=torch.float32) + 2,
        "g": normal(1, 4, 60_000, seed=3, dtype=torch.float32),
    }
    case = next(case for case in RELATIONS if case.name == "concatenation")
    wide = leaves({name: value.double() for name, value in tensors.items()})
    output, expected = case(**tensors).double(), case(**wide)
    assert (output - expected).norm() <= 1e-5 * expected.norm()
    for name, gradient in gradients(case, leaves(tensors)).items():
        exact = gradients(case, wide)[name]
        assert (gradient - exact).norm() <= 1e-5 * exact.norm(), name


@each_case
def test_autocast_changes_nothing(case):
    tensors = case.inputs(2, (5, 7), torch.float32)
    expected = case(**tensors)
    with torch.autocast("cpu", torch.bfloat16):
        output = case(**tensors)
        assert torch.is_autocast_enabled("cpu")
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, expected, rtol=0, atol=0)


@each_case
def test_a_tensor_made_under_inference_mode_gives_the_same(case):
    """A teacher's, say: autograd itself saves no such tensor."""
    tensors = leaves(case.inputs())
    for name in tensors:
        with torch.inference_mode():
            frozen = tensors[name].clone()
        others = [value for key, value in tensors.items() if key != name]
        found, expected = case(**tensors | {name: frozen}), case(**tensors)
        close(found, expected, 0.0)
        if others:
            weights = normal(*expected.shape, seed=9)
            found, expected = (
                torch.autograd.grad((weights * value).sum(), others) for value in (found, expected)
            )
            for a, b in zip(found, expected, strict=True):
                close(a, b, 0.0)


def test_a_tensor_made_under_inference_mode_is_copied_only_for_a_gradient():
    with torch.inference_mode():
        frozen = torch.ones(2, 3, 4, 5)
        assert savable(frozen) is frozen
    with torch.no_grad():
        assert savable(frozen) is frozen
    copied = savable(frozen)
    assert not copied.is_inference()
    assert savable(copied) is copied


@each_case
def test_no_graph_without_gradients(case):
    assert not case(**case.inputs()).requires_grad
    with torch.no_grad():
        assert not case(**leaves(case.inputs())).requires_grad
    with torch.inference_mode():
        case(**case.inputs())


# --- memory ---------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation made; not views."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        sizes = [output.numel() for output in outputs if isinstance(output, Tensor)]
        if not function.is_view:
            self.elements = max([self.elements, *sizes])
        return result


@each_relation
def test_relations_build_no_matrix_of_all_pairs(case):
    tensors = leaves(case.inputs(1, (40, 10), torch.float32))
    keys = next(tensors[name] for name in ("phi", "features") if name in tensors)
    pairs = 400 * keys[0, 0].numel()
    with LargestTensor() as largest:
        case(**tensors).sum().backward()
    assert largest.elements < pairs / 4


def test_softmax_relations_build_none_at_widths_that_need_no_padding():
    theta, phi, g = (torch.randn(1, 8, 400, requires_grad=True) for _ in range(3))
    with LargestTensor() as largest:
        functional.embedded_gaussian_relation(theta, phi, g).sum().backward()
    assert largest.elements < 400 * 400 / 4


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("name", ["spatial_attention", "channel_attention"])
def test_attention_makes_no_full_size_temporary(name, absolute):
    features = torch.ones(1, 64, 128, 256)  # 8 MiB
    with LargestTensor() as largest:
        getattr(functional, name)(features, absolute=absolute)
    assert largest.elements < features.numel() / 2


def plain_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    maps = [[x.abs().mean(dim).flatten(1) for x in (student, teacher)] for dim in (1, (2, 3))]
    return sum((ours - theirs).norm(dim=1).mean() for ours, theirs in maps)


def plain_masked(
    student: Tensor, teacher: Tensor, spatial_mask: Tensor, channel_mask: Tensor
) -> Tensor:
    weights = spatial_mask[:, None] * channel_mask[:, :, None, None]
    return ((student - teacher).square() * weights).sum((1, 2, 3)).sqrt().mean()


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("spatial_attention", lambda features: features.abs().mean(1)),
        ("spatial_attention-signed", lambda features: features.mean(1)),
        ("channel_attention", lambda features: features.abs().mean((2, 3))),
        ("channel_attention-signed", lambda features: features.mean((2, 3))),
        ("transfer", plain_transfer),
        ("masked-both", plain_masked),
    ],
)
def test_maps_of_several_megabytes_equal_the_plain_formula(name, plain):
    """However the work is cut into blocks, each of 5 channels of 0.96 MB is counted once."""
    case = next(case for case in CASES if case.name == name)
    tensors = {}
    for index, (key, shape) in enumerate(case.shapes(2, 200, 300).items()):
        shape = tuple(5 if size == 3 else size for size in shape)
        tensors[key] = normal(*shape, seed=index)
        if key.endswith("mask"):
            tensors[key] = tensors[key].exp()
    tensors = leaves(tensors)
    expected = plain(**tensors)
    output = case(**tensors)
    close(output, expected)
    weights = normal(*output.shape, seed=9)
    expected = torch.autograd.grad((weights * expected).sum(), tensors.values())
    for a, b in zip(gradients(case, tensors).values(), expected, strict=True):
        close(1e3 * a, 1e3 * b)


def test_masked_loss_saves_no_chain_of_temporaries():
    """Of the size of the features, backward keeps at most the two inputs."""
    kept = set()

    def pack(value: Tensor) -> Tensor:
        if value.numel() == student.numel():
            kept.add(value.untyped_storage().data_ptr())
        return value

    student, teacher = normal(2, 8, 6, 7, seed=1).requires_grad_(), normal(2, 8, 6, 7, seed=2)
    spatial, channel = normal(2, 6, 7, seed=3).exp(), normal(2, 8, seed=4).exp()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        functional.attention_masked_loss(
            student, teacher, spatial_mask=spatial, channel_mask=channel
        )
    assert kept <= {student.data_ptr(), teacher.data_ptr()}
