"""The error bounds that docs/numerics.md publishes, and equal bits from run to run."""

import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import featkd
from benchmarks import accuracy
from featkd import functional
from featkd.losses._closed_forms import _FEW as FEW
from tests.helpers.cases import CASES, KINDS
from tests.helpers.tensors import close, normal

TABLE = (Path(__file__).parents[2] / "docs" / "numerics.md").read_text()
ROW = re.compile(r"^\| `(\w+)`( \(long\))? \| (\S+) \| (\S+) \|", re.MULTILINE)
ROWS = ROW.findall(TABLE)
BOUNDS = {name: (float(value), float(slope)) for name, long, value, slope in ROWS if not long}
OVER_MANY_KEYS = {name: (float(value), float(slope)) for name, long, value, slope in ROWS if long}
MAGNITUDES = {
    torch.float32: (1e-15, 1e-7, 1.0, 1e7, 1e15),
    torch.float16: (6e-8, 1e-4, 1.0, 65504.0),  # subnormal to largest
    torch.bfloat16: (1e-15, 1.0, 1e15),
}
CELLS = [(dtype, magnitude) for dtype, found in MAGNITUDES.items() for magnitude in found]
each_function = pytest.mark.parametrize("name", functional.__all__)


def size_of(name, positions, channels):
    if accuracy.CALLS[name].pairs:
        return (channels, min(positions, 16), positions)
    return (2 if positions < 10_000 else 1, channels, 1, positions)


def hold(name, pattern, size, magnitude=1.0, dtype=torch.float32):
    bounds = BOUNDS[name]
    if size[-1] > 10_000 and pattern not in ("normal", "nearly equal"):
        bounds = OVER_MANY_KEYS.get(name, bounds)
    found = accuracy.errors(name, pattern, size, magnitude, dtype)
    for what, error, bound in zip(("value", "gradient"), found, bounds, strict=True):
        assert error <= bound, (what, pattern, size, magnitude, dtype)


def test_the_table_has_every_function():
    assert set(BOUNDS) == set(functional.__all__)


@each_function
@pytest.mark.parametrize("pattern", accuracy.PATTERNS)
@pytest.mark.parametrize(("dtype", "magnitude"), CELLS, ids=str)
def test_bounds_hold_for_every_dtype_and_magnitude(name, pattern, dtype, magnitude):
    hold(name, pattern, size_of(name, 60, 16), magnitude, dtype)


@each_function
@pytest.mark.parametrize("pattern", accuracy.PATTERNS)
@pytest.mark.parametrize(("positions", "channels"), [(1, 1), (1, 2048), (100_000, 4)])
def test_bounds_hold_from_one_to_100_000_positions(name, pattern, positions, channels):
    hold(name, pattern, size_of(name, positions, channels))


@each_function
# Elements of the mask underflow.
@example(pattern="nearly equal", positions=44, channels=1, exponent=1, dtype=torch.float32)
@given(
    pattern=st.sampled_from(accuracy.PATTERNS),
    positions=st.integers(1, 300),
    channels=st.integers(1, 40),
    exponent=st.integers(-15, 15),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_bounds_hold_for_any_shape(name, pattern, positions, channels, exponent, dtype):
    hold(name, pattern, size_of(name, positions, channels), 10.0**exponent, dtype)


@pytest.mark.parametrize("pattern", accuracy.PATTERNS)
@pytest.mark.parametrize(("dtype", "magnitude"), CELLS, ids=str)
def test_bounds_hold_where_few_keys_are_sorted(pattern, dtype, magnitude, monkeypatch):
    monkeypatch.setattr(featkd.losses._pairs, "_FEW_RECTIFIED", 0)
    for positions in (60, 300):
        size = size_of("concatenation_relation", positions, 16)
        hold("concatenation_relation", pattern, size, magnitude, dtype)


def test_a_million_equal_differences_are_added_without_loss():
    """One by one in float32 they lose 1e-3."""
    pair = torch.full((1, 16, 250, 400), 1 / 3), torch.zeros(1, 16, 250, 400)
    exact = (1.6e6 * pair[0].double()[0, 0, 0, 0] ** 2).sqrt()
    for loss in (functional.non_local_loss, functional.attention_masked_loss):
        assert abs(loss(*pair) - exact) < 2e-6 * exact


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size", [(1, 1, FEW), (8, 2, FEW // 2), (FEW, 1, 1)], ids=str)
def test_few_equal_differences_are_added_without_loss(size, layout):
    """1,024 of them one by one lose 8e-6."""
    values = torch.linspace(1, 2, 50)[:, None, None, None]
    ours = values.expand(-1, *size).contiguous(memory_format=layout)
    found = functional.attention_masked_loss(ours, torch.zeros_like(ours), reduction="none")
    exact = values.flatten().double() * math.prod(size) ** 0.5
    assert (found - exact).abs().max() < 1e-6 * exact.min()


@pytest.mark.parametrize("size", [256, 10_000])
def test_equal_elements_of_a_mask_are_added_without_loss(size):
    """In float32 1,024 of them in vectors of eight lose 2e-6."""
    maps = torch.linspace(-1, 0, 500)[:, None].repeat(1, size)
    maps[:, 0] = 0
    found = functional.attention_mask(maps, torch.zeros_like(maps), temperature=1.0)
    exact = maps.double().softmax(1) * size
    assert ((found - exact).abs() / exact / (1 - maps.amin(1, keepdim=True))).max() < 1e-7


@pytest.mark.parametrize("name", ["spatial_attention", "attention_transfer_loss"])
def test_many_blocks_of_channels_are_added_by_pairs(name, monkeypatch):
    """One by one, 2,047 small channels behind a large one lose 1e-4."""
    monkeypatch.setattr(featkd.losses._blocks, "_BLOCK_BYTES", 1)
    hold(name, "spike", (1, 2048, 1, 8))


@pytest.mark.parametrize("name", ["spatial_attention", "channel_attention"])
def test_subnormal_features_have_subnormal_maps(name):
    features = normal(2, 8, 3, 5, dtype=torch.float32) * 1e-40
    exact = getattr(functional, name)(features.double())
    assert (getattr(functional, name)(features) - exact).abs().max() < 3e-45


@pytest.mark.parametrize("name", ["attention_masked_loss", "non_local_loss"])
@pytest.mark.parametrize("magnitude", [1e-40, 1e-30, 1e-23, 1e-22, 1e-21, 1e-20])
def test_tiny_differences_underflow_as_published(name, magnitude):
    student, teacher = (normal(2, 8, 3, 5, seed=i).mul(magnitude).float() for i in range(2))
    loss, exact = (
        getattr(functional, name)(student.to(d), teacher.to(d), reduction="none")
        for d in (torch.float32, torch.float64)
    )
    assert (loss - exact).abs().max() < 4e-23 * (8 * 3 * 5) ** 0.5 + 2e-6 * exact.max()


@pytest.mark.parametrize("name", ["attention_masked_loss", "non_local_loss"])
@pytest.mark.parametrize("magnitude", [1e17, 1e20, 1e37])
def test_a_loss_beyond_the_squares_is_inf_and_never_less(name, magnitude):
    loss, exact = loss_of_size(name, magnitude)
    assert loss.isfinite() == (exact < 1.8e19)
    assert loss.isinf() or abs(loss - exact) < 4e-6 * exact


@pytest.mark.parametrize("magnitude", [1e-40, 1e-30, 1e20, 1e36])
def test_an_attention_transfer_holds_where_its_squares_do_not(magnitude):
    loss, exact = loss_of_size("attention_transfer_loss", magnitude)
    assert abs(loss - exact) < 4e-6 * exact + 1e-44


@pytest.mark.parametrize("magnitude", [1e-40, 1e-35, 1e-20, 1e20])
def test_gradients_of_an_attention_transfer_are_finite_and_of_its_size(magnitude):
    student, teacher = (normal(1, 8, 3, 5, seed=i).mul(magnitude).float() for i in range(2))
    student.requires_grad_()
    scale = 65536.0  # as AMP's scaler
    (found,) = torch.autograd.grad(
        scale * functional.attention_transfer_loss(student, teacher), student
    )
    wide = student.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(
        scale * functional.attention_transfer_loss(wide, teacher.double()), wide
    )
    assert (found - exact).abs().max() < 1e-3 * exact.abs().max()


@pytest.mark.parametrize("magnitude", [1e-25, 1.0, 1e20])
def test_a_normalised_attention_transfer_is_the_same_at_any_size(magnitude):
    loss = featkd.AttentionTransferLoss(8, 8, normalize=True)
    maps = [normal(2, 8, 3, 5, seed=i).float() for i in range(2)]
    close(loss(*(x * magnitude for x in maps)), loss(*maps).item(), 1e-5)


def loss_of_size(name, magnitude):
    student, teacher = (normal(1, 8, 3, 5, seed=i).mul(magnitude).float() for i in range(2))
    loss = getattr(functional, name)
    return loss(student, teacher), loss(student.double(), teacher.double())


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("magnitude", [1e18, 1e19, 1e20, 1e30])
def test_logits_beyond_float32_give_nan_or_the_exact_choice(sign, magnitude):
    """The fused kernels take a row of -inf for a masked one, and give 0."""
    theta, phi = torch.full((1, 4, 8), magnitude), sign * torch.full((1, 4, 16), magnitude)
    g = normal(1, 3, 16, dtype=torch.float32)
    relation = functional.embedded_gaussian_relation(theta, phi, g)
    mean = g.mean(2, keepdim=True).expand_as(relation)
    exact = torch.full_like(mean, torch.nan) if 4 * magnitude**2 > 3.4e38 else mean
    torch.testing.assert_close(relation, exact, rtol=0, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("fusion", ["logits", "probabilities"])
@pytest.mark.parametrize("offset", [0.0, 1e6, 1e30])
def test_what_two_maps_have_in_common_costs_a_mask_no_digits(fusion, offset):
    maps = [(normal(2, 5, 7, seed=i).float() * max(offset, 1) * 1e-6 + offset) for i in range(2)]
    options = {"temperature": max(offset, 1) * 1e-6, "fusion": fusion}
    mask = functional.attention_mask(*maps, **options)
    exact = functional.attention_mask(*(x.double() for x in maps), **options)
    assert ((mask - exact).abs() < 2e-7 * exact).all()


@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("fusion", ["logits", "probabilities"])
def test_a_mask_without_a_wider_dtype_takes_each_map_less_its_largest(wide, fusion, monkeypatch):
    """As float64 maps do, and all on devices without float64."""
    monkeypatch.setattr(featkd.losses.attention, "dtype_for_few", lambda x: wide)
    options = {"temperature": 1e-3, "fusion": fusion}
    rest = [normal(2, 5, 7, seed=i) * 1e-3 for i in range(2)]
    offset = 2.0 ** (30 if wide == torch.float64 else 10)
    maps = [(x + offset).to(wide) for x in rest]
    exact = functional.attention_mask(*(x.double() - offset for x in maps), **options)
    close(
        functional.attention_mask(*maps, **options).double(),
        exact,
        1e-9 if wide == torch.float64 else 1e-5,
    )


def test_a_mask_of_float64_maps_holds_to_its_ends():
    maps = torch.tensor([[0.0, 1e-40, 3e-40]], dtype=torch.float64), torch.zeros(1, 3).double()
    scaled = functional.attention_mask(maps[0] * 1e40, maps[1], temperature=1.0)
    close(functional.attention_mask(*maps, temperature=1e-40), scaled)
    huge = torch.tensor([[0.0, 1e300, 2e300]], dtype=torch.float64)
    close(functional.attention_mask(huge, huge, temperature=1e-20), [[0, 0, 3]])


# --- determinism ----------------------------------------------------------------------------------


def bits(function, tensors):
    """Value and gradients as bytes."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    value = function(*leaves)
    gradients = torch.autograd.grad(value.square().sum(), leaves)
    return [x.detach().numpy().tobytes() for x in (value, *gradients)]


@pytest.fixture
def deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def overall_loss(kind):
    torch.manual_seed(0)
    settings = featkd.Hyperparameters(1.0, 1.0, 1.0, 0.5, kind=kind)
    return featkd.FeatureDistillationLoss(8, 16, hyperparameters=settings)


def overall_bits(kind):
    loss = overall_loss(kind)
    teacher = normal(2, 16, 12, 20, seed=1, dtype=torch.float32)
    student = normal(2, 8, 12, 20, dtype=torch.float32)

    def total(features):
        return torch.stack(list(loss(features, teacher).values()))

    found = bits(total, [student])
    total(student).sum().backward()
    gradients = [p.grad for p in loss.parameters() if p.grad is not None]
    return found + [x.numpy().tobytes() for x in gradients]


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", [case for case in CASES if not case.adapters], ids=str)
def test_functions_repeat_bit_for_bit(case, threads, deterministic_algorithms):
    torch.set_num_threads(threads)
    positions = (30, 40) if "gaussian" in case.name else (150, 200)  # enough for two threads
    tensors = case.inputs(positions=positions, dtype=torch.float32).values()
    first = bits(case.of_one, tensors)
    assert all(bits(case.of_one, tensors) == first for _ in range(3))


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_overall_loss_repeats_bit_for_bit(kind, threads, deterministic_algorithms):
    torch.set_num_threads(threads)
    first = overall_bits(kind)
    assert all(overall_bits(kind) == first for _ in range(2))
