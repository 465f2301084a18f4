"""featkd.testing: each assertion holds for featkd's losses and fails for one made to break it."""

import functools
import subprocess
import sys

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import featkd
from featkd import testing
from tests.helpers.tensors import normal

DETERMINISTIC = settings(derandomize=True, database=None, deadline=None, max_examples=30)
NOT_SHRUNK = settings(DETERMINISTIC, phases=[Phase.generate])

PROPERTIES = {
    name.removeprefix("assert_"): getattr(testing, name)
    for name in testing.__all__
    if name.startswith("assert_")
}

# --- losses, right and wrong ----------------------------------------------------------------------


def l2(student, teacher):
    return torch.linalg.vector_norm(student - teacher, dim=(1, 2, 3)).mean()


def root_of_sum(student, teacher):
    return ((student - teacher).square().sum((1, 2, 3)) ** 0.5).mean()


def root_unless_the_batch_is_equal(student, teacher):
    return root_of_sum(student, teacher) if student.ne(teacher).any() else 0 * student.sum()


def of_the_batch(student, teacher):
    return torch.linalg.vector_norm(student - teacher)


def by_rank_in_the_batch(student, teacher):
    return torch.linalg.vector_norm(student - teacher, dim=(1, 2, 3)) / len(student)


def signed(student, teacher):
    return (student - teacher).mean()


def with_eps(student, teacher):
    return ((student - teacher).square().sum((1, 2, 3)) + 1e-12).sqrt().mean()


def below_0_at_equality(student, teacher):
    return l2(student, teacher) - 1e-3


def weighted_channels(student, teacher):
    weight = torch.arange(1.0, student.shape[1] + 1)[:, None, None]
    return (weight * (student - teacher)).square().mean()


def weighted_rows(student, teacher):
    weight = torch.arange(1.0, student.shape[2] + 1)[:, None]
    return (weight * (student - teacher)).square().mean()


def viewed(student, teacher):
    return l2(student.view(len(student), -1, 1, 1), teacher.reshape(len(teacher), -1, 1, 1))


def by_memory_order(student, teacher):
    ours, theirs = (
        x.as_strided(x.shape, torch.empty(x.shape).stride()) for x in (student, teacher)
    )
    return l2(ours, theirs)


def teacher_not_detached(student, teacher):
    return l2(student, teacher)


def student_detached(student, teacher):
    return l2(student.detach(), teacher)


def detached(student, teacher):
    return l2(student, teacher).detach()


def half_detached(student, teacher):
    return l2(student, teacher) + l2(student.detach(), teacher)


def uphill(student, teacher):
    difference = l2(student, teacher)
    return 2 * difference.detach() - difference


def nan_dropped(student, teacher):
    return (student - teacher).nan_to_num().square().mean()


def nan_of_the_teacher_dropped(student, teacher):
    return (student - teacher.nan_to_num()).square().mean()


def doubled_by_layout(student, teacher):
    return l2(student, teacher) * (1 if teacher.is_contiguous() else 2)


WRONG = [
    ("zero_at_equality", with_eps),
    ("zero_at_equality", below_0_at_equality),
    ("finite_gradient_at_equality", root_of_sum),
    ("finite_gradient_at_equality", root_unless_the_batch_is_equal),
    ("non_negative", signed),
    ("batch_consistent", of_the_batch),
    ("batch_consistent", by_rank_in_the_batch),
    ("channel_permutation_invariant", weighted_channels),
    ("spatially_equivariant", weighted_rows),
    ("layout_independent", viewed),
    ("layout_independent", by_memory_order),
    ("layout_independent", doubled_by_layout),
    ("gradient_reaches_student_only", teacher_not_detached),
    ("gradient_reaches_student_only", student_detached),
    ("gradient_reaches_student_only", detached),
    ("gradient_matches_finite_differences", half_detached),
    ("gradient_matches_finite_differences", student_detached),
    ("descends", uphill),
    ("descends", student_detached),
    ("nan_is_not_hidden", nan_dropped),
    ("nan_is_not_hidden", nan_of_the_teacher_dropped),
]
each_wrong = pytest.mark.parametrize(("name", "loss"), WRONG)


def masked(student, teacher):
    maps = [featkd.spatial_attention(x).detach() for x in (student, teacher)]
    mask = featkd.attention_mask(*maps, temperature=0.5)
    return featkd.attention_masked_loss(student, teacher, spatial_mask=mask)


def related(student, teacher):
    return featkd.non_local_loss(
        *(featkd.dot_product_relation(x, x, x) for x in (student, teacher))
    )


DISTANCES = [
    l2,
    featkd.attention_transfer_loss,
    featkd.attention_masked_loss,
    featkd.non_local_loss,
    related,
    functools.partial(featkd.non_local_loss, reduction="none"),
]


def pair(batch=2, channels=3, dtype=torch.float64):
    shape = (batch, channels, 2, 4)
    return normal(*shape, seed=0, dtype=dtype), normal(*shape, seed=1, dtype=dtype)


# --- the assertions on given tensors --------------------------------------------------------------


def test_every_assertion_has_a_loss_that_breaks_it():
    assert {name for name, _ in WRONG} == set(PROPERTIES)
    assert set(testing.DISTANCE) == set(PROPERTIES.values()) - {
        testing.assert_gradient_reaches_student_only
    }
    assert set(testing.LOSS) < set(testing.DISTANCE)


@each_wrong
def test_a_wrong_loss_fails_under_the_name_of_its_property(name, loss):
    with pytest.raises(AssertionError, match=rf"^assert_{name}: .* must .*, got "):
        PROPERTIES[name](loss, *pair())


@pytest.mark.parametrize("holds", testing.DISTANCE, ids=lambda holds: holds.__name__)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("loss", DISTANCES)
def test_a_right_loss_passes(loss, dtype, holds):
    holds(loss, *pair(dtype=dtype))


@each_wrong
def test_a_wrong_loss_is_found_by_check(name, loss):
    with pytest.raises(AssertionError, match=rf"^assert_{name}: "):
        testing.check(loss, [PROPERTIES[name]], settings=NOT_SHRUNK)


def test_a_loss_that_detaches_keeps_what_any_loss_does():
    for holds in testing.LOSS:
        holds(masked, *pair())


def test_a_module_with_adapters_keeps_what_any_loss_does():
    student, teacher = pair()
    weights = featkd.Hyperparameters(1.0, 1.0, 1.0, 0.5)
    module = featkd.FeatureDistillationLoss(2, 3, hyperparameters=weights).double()
    for holds in testing.LOSS:
        holds(lambda s, t: sum(module(s, t).values()), student[:, :2], teacher)


def test_a_module_gives_no_gradient_to_the_teacher():
    loss = featkd.AttentionTransferLoss(3, 3).double()
    testing.assert_gradient_reaches_student_only(loss, *pair())


@pytest.mark.parametrize("reduction", ["sum", "norm"])
def test_another_reduction_is_an_option(reduction):
    loss = functools.partial(featkd.non_local_loss, reduction=reduction)
    testing.assert_batch_consistent(loss, *pair(), reduction=reduction)
    with pytest.raises(AssertionError, match="their mean"):
        testing.assert_batch_consistent(loss, *pair())


def test_one_image_is_compared_with_itself_twice():
    with pytest.raises(AssertionError, match="the loss of 2 images"):
        testing.assert_batch_consistent(of_the_batch, *pair(batch=1))


def test_a_tolerance_admits_a_loss_that_rounds_at_equality():
    def angle(student, teacher):
        return 1 - torch.nn.functional.cosine_similarity(student.flatten(1), teacher.flatten(1))

    with pytest.raises(AssertionError, match="must be 0, got"):
        testing.assert_zero_at_equality(angle, *pair(batch=50))
    testing.assert_zero_at_equality(angle, *pair(batch=50), tolerance=1e-14)


def kl_divergence(student, teacher):
    logits, target = (x.flatten(2) for x in (student, teacher.detach()))
    pointwise = torch.nn.functional.kl_div(
        logits.log_softmax(-1), target.softmax(-1), reduction="none"
    )
    return pointwise.sum((1, 2)).mean()


def cosine_distance(student, teacher):
    return 1 - torch.nn.functional.cosine_similarity(student, teacher, dim=1).mean()


@pytest.mark.parametrize("loss", [kl_divergence, cosine_distance])
def test_a_loss_that_rounds_around_0_keeps_what_it_promises(loss):
    properties = [
        testing.assert_non_negative,
        testing.assert_finite_gradient_at_equality,
        testing.assert_gradient_matches_finite_differences,
        testing.assert_descends,
    ]
    testing.check(loss, properties, settings=settings(DETERMINISTIC, max_examples=100))


def test_a_gradient_of_0_need_not_descend():
    testing.assert_descends(l2, *[pair()[0]] * 2)


@pytest.mark.parametrize("seed", range(5))
def test_rounding_where_the_loss_is_0_is_no_difference(seed):
    """The sums of one side run in another order in another layout."""
    features = normal(1, 1, 4, 3, seed=seed)
    testing.assert_layout_independent(featkd.attention_transfer_loss, features, features)


def test_a_map_moves_with_the_positions():
    def gap(student, teacher):
        return featkd.spatial_attention(student) - featkd.spatial_attention(teacher)

    testing.assert_spatially_equivariant(gap, *pair())
    with pytest.raises(AssertionError, match="flipped left to right"):
        testing.assert_spatially_equivariant(lambda s, t: gap(s, t).cumsum(-1), *pair())


def test_a_kink_asserts_no_slope():
    """Autograd gives 0 between the slopes 0.9 and 1; a norm at 0 has the slopes -1 and 1."""

    def bent(student, teacher):
        return (student.relu() - 0.9 * (-student).relu()).sum()

    zeros = torch.zeros(1, 2, 1, 3)
    for loss in (bent, l2):
        testing.assert_gradient_matches_finite_differences(loss, zeros, zeros)


# --- check ----------------------------------------------------------------------------------------


def message(loss, *properties, **options):
    with pytest.raises(AssertionError) as error:
        testing.check(loss, properties, settings=DETERMINISTIC, **options)
    return str(error.value).splitlines()


def test_check_reports_the_smallest_pair():
    first, *sides = message(root_of_sum, testing.assert_finite_gradient_at_equality)
    assert first.endswith("where student = teacher must be finite, got [nan, nan].")
    assert sides == [
        "  student: float64 (1, 1, 1, 2) [0, 0]",
        "  teacher: float64 (1, 1, 1, 2) [0, 0]",
    ]


def test_check_reports_every_property_that_broke():
    lines = message(
        signed,
        testing.assert_non_negative,
        testing.assert_zero_at_equality,
        testing.assert_descends,
        testing.assert_gradient_reaches_student_only,
    )
    assert [line.split(":")[0] for line in lines] == [
        "assert_non_negative",
        "  student",
        "  teacher",
        "assert_gradient_reaches_student_only",
        "  student",
        "  teacher",
    ]


def test_check_names_the_property_under_which_a_loss_fails():
    def narrow(student, teacher):
        if student.shape[1] > 2:
            raise RuntimeError("too wide")
        return l2(student, teacher)

    def given_three_channels(loss, student, teacher):
        narrow(student.repeat(1, 3, 1, 1), teacher)

    first, student, _ = message(l2, functools.partial(given_three_channels))
    assert first == "given_three_channels: the loss must not fail, got RuntimeError: too wide"
    assert student == "  student: float64 (1, 1, 1, 2) [0, 0]"


def test_check_reports_a_loss_that_fails_once_with_its_cause():
    def narrow(student, teacher):
        if student.shape[1] > 2:
            raise RuntimeError("too wide")
        return l2(student, teacher)

    with pytest.raises(AssertionError) as error:
        testing.check(narrow, settings=DETERMINISTIC)
    first, student, _ = str(error.value).splitlines()
    assert first == "check: the loss must not fail, got RuntimeError: too wide"
    assert student == "  student: float64 (1, 3, 1, 2) [0, 0, 0, 0, 0, 0]"
    assert str(error.value.__cause__) == "too wide"


@pytest.mark.parametrize(
    "loss",
    [
        lambda s, t: l2(torch.nn.functional.dropout(s), t),
        lambda s, t: l2(s, t) * (1 + torch.rand(())),
    ],
    ids=["dropout", "factor"],
)
def test_check_says_that_a_loss_is_random(loss):
    first, *_ = message(loss, *testing.DISTANCE)
    assert first.startswith("check: the loss must give one value for one pair, got ")


def test_check_takes_properties_of_your_own():
    def assert_symmetric(loss, student, teacher):
        hypothesis.assume(len(student) == 2)
        if loss(student, teacher) != loss(teacher, student):
            raise AssertionError("assert_symmetric: no")

    testing.check(l2, [assert_symmetric], settings=DETERMINISTIC)
    assert message(lambda s, t: s.sum(), assert_symmetric)[0] == "assert_symmetric: no"


def test_check_shows_long_and_strided_features_in_short():
    def never(loss, student, teacher):
        raise AssertionError("never")

    pairs = testing.feature_pairs(channels=4, height=2, width=4, layouts=["channels_last"])
    _, student, _ = message(l2, never, pairs=pairs)
    zeros = ", ".join(["0"] * 12)
    assert student == f"  student: float64 (1, 4, 2, 4) strides (32, 1, 16, 4) [{zeros}, ...]"


# --- strategies -----------------------------------------------------------------------------------


def seen(strategy, count=200):
    """Some features that the strategy gives."""
    drawn = []

    @settings(
        DETERMINISTIC,
        max_examples=count,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def draw(value):
        drawn.append(value)

    draw()
    return drawn


def test_feature_maps_cover_their_ranges_with_unequal_sides():
    drawn = seen(testing.feature_maps(batch=(1, 2), channels=3, height=(2, 4), width=(1, 4)))
    assert {x.shape[0] for x in drawn} == {1, 2}
    assert {x.shape[1] for x in drawn} == {3}
    assert {x.shape[2:] for x in drawn} == {
        (h, w) for h in range(2, 5) for w in range(1, 5) if h != w
    }


def test_feature_maps_are_square_only_if_asked():
    assert {x.shape[2:] for x in seen(testing.feature_maps(height=3, width=3), 5)} == {(3, 3)}


@pytest.mark.parametrize(
    ("dtype", "extreme"),
    [(torch.float64, 1e30), (torch.float32, 1e9), (torch.bfloat16, 1e9), (torch.float16, 256)],
    ids=str,
)
def test_feature_maps_are_finite_with_zeros_and_extremes_by_dtype(dtype, extreme):
    drawn = seen(testing.feature_maps(dtype=dtype))
    assert {x.dtype for x in drawn} == {dtype}
    assert all(x.isfinite().all() for x in drawn)
    largest = [float(x.abs().max()) for x in drawn]
    assert max(largest) >= extreme
    assert 0 in largest
    assert 0 < min(x for x in largest if x) <= 10 / extreme


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_a_layout_keeps_the_numbers(layout):
    features = normal(2, 3, 4, 5)
    laid_out = testing.LAYOUTS[layout](features)
    assert laid_out.equal(features[:1].expand(2, -1, -1, -1) if layout == "expanded" else features)
    assert laid_out.is_contiguous() == (layout == "contiguous")


def test_feature_pairs_agree_in_all_but_channels_and_layout():
    pairs = testing.feature_pairs(channels=2, teacher_channels=(3, 4), layouts=testing.LAYOUTS)
    drawn = seen(pairs)
    assert {(s.shape[1], t.shape[1]) for s, t in drawn} == {(2, 3), (2, 4)}
    assert all(s.shape[0] == t.shape[0] and s.shape[2:] == t.shape[2:] for s, t in drawn)
    assert len({(s.is_contiguous(), t.is_contiguous()) for s, t in drawn}) == 4
    assert all(s.shape == t.shape for s, t in seen(testing.feature_pairs(), 20))


@given(testing.feature_pairs(), st.sampled_from(list(testing.LAYOUTS)))
def test_pairs_are_an_ordinary_strategy(pair, layout):
    student, teacher = map(testing.LAYOUTS[layout], pair)
    testing.assert_non_negative(featkd.non_local_loss, student, teacher)


# --- the extra ------------------------------------------------------------------------------------


def test_featkd_needs_no_hypothesis_and_testing_says_what_to_install():
    code = """
import sys, featkd
assert "hypothesis" not in sys.modules
sys.modules["hypothesis"] = None  # as where it is not installed
import featkd.testing
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: `featkd.testing` needs hypothesis: pip install" in result.stderr
