"""The four relations: each position's mean of all others, weighted by pairs."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featkd import (
    concatenation_relation,
    dot_product_relation,
    embedded_gaussian_relation,
    functional,
    gaussian_relation,
)
from featkd.losses import _pairs, relation
from tests.helpers import reference
from tests.helpers.cases import KINDS, MANY_PAIRS, RELATIONS, gradients_of
from tests.helpers.marks import each_kind
from tests.helpers.strategies import (
    RELATION,
    each_symmetry,
    factors,
    permutation,
    positions,
    relation_arguments,
)
from tests.helpers.tensors import LargestTensor, close, leaves, normal, tensor


@pytest.fixture(params=["few pairs", "many pairs"], autouse=True, scope="module")
def pairs(request):
    """Each test of this file on the matrix of pairs, and on what does without it."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "many pairs":
            patch.setattr(_pairs, "_FEW", 0)
            patch.setattr(_pairs, "_FEW_RECTIFIED", 0)
        yield request.param


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


def test_attention_in_float64_on_a_gpu_holds_few_pairs_at_a_time():
    """No fused kernel takes it there, nor on the meta device."""
    tensors = [torch.empty(1, 8, 8192, dtype=torch.float64, device="meta") for _ in range(3)]
    tensors = leaves(tensors)
    with LargestTensor() as largest:
        value = functional.embedded_gaussian_relation(*tensors)
        torch.autograd.grad(value.sum(), tensors)
    assert largest.elements == _pairs._PAIRS


@pytest.mark.parametrize(
    ("dtype", "device", "keys", "starts"),
    [
        (torch.float64, "meta", _pairs._PAIRS // 4, [0, 2, 4]),
        (torch.float64, "meta", 2 * _pairs._PAIRS, [0, 1, 2, 3, 4]),
        (torch.float32, "meta", _pairs._PAIRS // 4, [0]),
        (torch.float64, "cpu", 7, [0]),
    ],
)
def test_blocks_of_queries_hold_so_many_pairs_and_each_query_once(dtype, device, keys, starts):
    query, key = (torch.empty(2, n, 8, dtype=dtype, device=device) for n in (5, keys))
    width = starts[1] if starts[1:] else 5
    expected = [slice(start, start + width) for start in starts]
    assert _pairs._query_blocks(query, key) == expected


def test_attention_in_blocks_of_queries_is_attention(monkeypatch):
    tensors = leaves([normal(2, 3, 7, seed=seed) for seed in range(3)])
    found = []
    for blocks in ([slice(0, 7)], [slice(0, 3), slice(3, 6), slice(6, 9)]):
        monkeypatch.setattr(_pairs, "_query_blocks", lambda *_, blocks=blocks: blocks)
        value = functional.embedded_gaussian_relation(*tensors)
        found.append((value, *torch.autograd.grad(value.square().sum(), tensors)))
    for actual, expected in zip(*found, strict=True):
        close(actual, expected)


def test_dot_products_summed_in_parts_are_those_of_all_pairs(monkeypatch):
    monkeypatch.setattr(relation, "_SUMMED", 3)
    tensors = leaves([normal(2, 4, 7), normal(2, 4, 8), normal(2, 5, 8)])
    theta, phi, g = tensors
    value = functional.dot_product_relation(theta, phi, g)
    expected = g @ (theta.mT @ phi).mT / 8
    close(value, expected)
    weight = normal(2, 5, 7)
    for found, exact in zip(
        torch.autograd.grad((value * weight).sum(), tensors),
        torch.autograd.grad((expected * weight).sum(), tensors),
        strict=True,
    ):
        close(found, exact)


# --- softmax relations ----------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 7, 8, 9, 17])
@pytest.mark.parametrize("width_of_g", [1, 9])
def test_softmax_attention_of_any_width_is_that_of_all_pairs(width, width_of_g):
    """The fused kernels take multiples of 8: the rest is padding."""
    theta, phi = normal(2, width, 5, seed=1), normal(2, width, 6, seed=2)
    g = normal(2, width_of_g, 6, seed=3)
    expected = g @ (theta.mT @ phi).softmax(2).mT
    close(functional.embedded_gaussian_relation(theta, phi, g), expected)


def test_logits_that_overflow_show_at_a_single_query_too():
    theta, phi = torch.full((1, 4, 1), 1e19), torch.full((1, 4, 16), -1e19)
    assert functional.embedded_gaussian_relation(theta, phi, torch.ones(1, 3, 16)).isnan().all()


@given(st.data())
def test_the_gaussian_is_the_embedded_gaussian_of_the_features(data):
    features, g = data.draw(relation_arguments("gaussian"))
    close(gaussian_relation(features, g), embedded_gaussian_relation(features, features, g))


@given(st.data(), factors)
def test_scale_multiplies_the_products_of_the_embedded_gaussian(data, k):
    theta, phi, g = data.draw(relation_arguments("embedded_gaussian"))
    expected = embedded_gaussian_relation(k * theta, phi, g)
    close(embedded_gaussian_relation(theta, phi, g, scale=k), expected)


@pytest.mark.parametrize("kind", ["gaussian", "embedded_gaussian"])
@given(st.data())
def test_a_softmax_relation_averages_g(kind, data):
    *embedded, g = data.draw(relation_arguments(kind))
    relation = RELATION[kind](*embedded, g).flatten(2)
    g = g.flatten(2)
    assert (relation <= g.amax(2, keepdim=True) + 1e-12).all()
    assert (relation >= g.amin(2, keepdim=True) - 1e-12).all()


# --- dot product and concatenation ----------------------------------------------------------------


@given(st.data(), factors)
def test_the_dot_product_relation_is_cubic(data, k):
    theta, phi, g = data.draw(relation_arguments("dot_product"))
    expected = dot_product_relation(theta, phi, g)
    close(dot_product_relation(-k * theta, -k * phi, -k * g) / k**3, -expected)


@given(st.data(), factors)
def test_the_concatenation_relation_is_quadratic(data, k):
    theta, phi, g = data.draw(relation_arguments("concatenation"))
    expected = concatenation_relation(theta, phi, g)
    close(concatenation_relation(k * theta, k * phi, -k * g) / k**2, -expected)


@given(
    st.lists(st.integers(-2, 2), min_size=1, max_size=6),
    st.lists(st.integers(-2, 2), min_size=1, max_size=6),
)
def test_the_concatenation_relation_equals_the_double_loop_at_ties(queries, keys):
    """Small integers: equal keys, and sums of exactly 0."""
    theta, phi = (torch.tensor([[x]], dtype=torch.float64) for x in (queries, keys))
    g = normal(1, 2, len(keys))
    expected = reference.concatenation_relation(theta.numpy(), phi.numpy(), g.numpy())
    close(concatenation_relation(theta, phi, g), expected)


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
    for name, gradient in gradients_of(case, leaves(tensors)).items():
        exact = gradients_of(case, wide)[name]
        assert (gradient - exact).norm() <= 1e-5 * exact.norm(), name


# --- every relation -------------------------------------------------------------------------------


@each_kind
@given(st.data())
def test_a_relation_equals_the_double_loop(kind, data):
    """Sequences, images and volumes; theta may have other positions, even of another rank."""
    query_positions, key_positions = data.draw(positions), data.draw(positions)
    arguments = data.draw(relation_arguments(kind, query_positions, key_positions))
    relation = RELATION[kind](*arguments)
    expected = getattr(reference, f"{kind}_relation")(*(x.numpy() for x in arguments))
    assert relation.shape == expected.shape
    close(relation, expected)


@each_kind
@given(st.data())
def test_a_relation_treats_each_image_alone(kind, data):
    arguments = data.draw(relation_arguments(kind))
    whole = RELATION[kind](*arguments)
    for b in range(len(whole)):
        close(RELATION[kind](*(x[b : b + 1] for x in arguments)), whole[b : b + 1])


@each_kind
@given(st.data(), factors)
def test_a_relation_is_linear_in_g(kind, data, k):
    *embedded, g = data.draw(relation_arguments(kind))
    other = normal(*g.shape, seed=3)
    separate = k * RELATION[kind](*embedded, g) + RELATION[kind](*embedded, other)
    close(RELATION[kind](*embedded, k * g + other), separate)


@each_kind
@given(st.data())
def test_repeating_every_key_leaves_the_relation(kind, data):
    """Every relation is a mean over the keys; the number of keys cancels."""
    arguments = data.draw(relation_arguments(kind))
    if kind == "gaussian":
        arguments = (arguments[0], *arguments)  # theta and phi are the features
    theta, phi, g = arguments
    relation = RELATION["embedded_gaussian" if kind == "gaussian" else kind]
    doubled = relation(theta, torch.cat([phi, phi], -1), torch.cat([g, g], -1))
    close(doubled, relation(theta, phi, g))


@each_kind
@given(st.data())
def test_permuting_the_channels_of_a_relation(kind, data):
    *embedded, g = data.draw(relation_arguments(kind))
    channels, values = permutation(embedded[0].shape[1], 1), permutation(g.shape[1], 2)
    permuted = RELATION[kind](*(x[:, channels] for x in embedded), g[:, values])
    close(permuted, RELATION[kind](*embedded, g)[:, values])


@each_symmetry
@each_kind
@given(st.data())
def test_moving_the_positions_moves_the_relation(kind, move, data):
    arguments = data.draw(relation_arguments(kind))
    close(RELATION[kind](*map(move, arguments)), move(RELATION[kind](*arguments)))


@each_symmetry
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gaussian"])
@given(st.data())
def test_moving_the_keys_alone_leaves_the_relation(kind, move, data):
    theta, phi, g = data.draw(relation_arguments(kind, (2, 3), (4, 3)))
    close(RELATION[kind](theta, move(phi), move(g)), RELATION[kind](theta, phi, g))


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


@pytest.mark.parametrize(
    "case", [c for c in RELATIONS if "dot_product" in c.name] + MANY_PAIRS, ids=str
)
def test_relations_build_no_matrix_of_many_pairs(case):
    tensors = leaves(case.inputs(1, (40, 10), torch.float32))
    keys = next(tensors[name] for name in ("phi", "features") if name in tensors)
    pairs = 400 * keys[0, 0].numel()
    with LargestTensor() as largest:
        case(**tensors).sum().backward()
    assert largest.elements < pairs / 4


@pytest.mark.parametrize(
    ("width", "positions", "few"),
    [(1, 304, True), (1, 305, False), (64, 140, True), (64, 141, False)],
)
def test_a_concatenation_of_few_pairs_builds_their_matrix(width, positions, few, pairs):
    """It is faster there."""
    theta, phi, g = (torch.randn(2, channels, positions) for channels in (1, 1, width))
    with LargestTensor() as largest:
        functional.concatenation_relation(theta, phi, g)
    assert (largest.elements == 2 * positions**2) == (few and pairs == "few pairs")


def test_softmax_relations_build_none_at_widths_that_need_no_padding(monkeypatch):
    monkeypatch.setattr(_pairs, "_FEW", 0)
    theta, phi, g = (torch.randn(1, 8, 400, requires_grad=True) for _ in range(3))
    with LargestTensor() as largest:
        functional.embedded_gaussian_relation(theta, phi, g).sum().backward()
    assert largest.elements < 400 * 400 / 4


@pytest.mark.parametrize(
    ("queries", "keys", "few"), [(1024, 1024, True), (1024, 1025, False), (64, 1025, False)]
)
def test_a_softmax_relation_of_few_pairs_builds_their_matrix(queries, keys, few, pairs):
    """It is faster there; over more keys it would lose digits."""
    theta, phi, g = (torch.randn(2, 1, n) for n in (queries, keys, keys))
    with LargestTensor() as largest:
        functional.embedded_gaussian_relation(theta, phi, g)
    assert (largest.elements == 2 * queries * keys) == (few and pairs == "few pairs")


@pytest.mark.parametrize(("positions", "most"), [(4, 32), (7, 56), (8, 64), (9, 72)])
def test_a_dot_product_takes_the_order_of_fewer_multiplications(positions, most):
    """Between 8 channels and 8: the pairs, below 64, or the channels' products, 64."""
    tensors = leaves([normal(1, 8, positions, seed=seed) for seed in range(3)])
    with LargestTensor() as largest:
        value = functional.dot_product_relation(*tensors)
        torch.autograd.grad(value.sum(), tensors)
    assert largest.elements == most
    theta, phi, g = tensors
    close(value, g @ (theta.mT @ phi).mT / positions)
