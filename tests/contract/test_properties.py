"""What the mathematics promises for any input, each found by hypothesis in float64 with H != W.

What any distance of feature maps promises comes from `featkd.testing`; the rest is this paper's.
"""

import functools
import math

import pytest
import torch
from hypothesis import given, settings

import featkd
from featkd import (
    attention_masked_loss,
    attention_transfer_loss,
    channel_attention,
    non_local_loss,
    spatial_attention,
    testing,
)
from tests.helpers.strategies import (
    factors,
    generic_pairs,
    masks_of,
    pairs,
    permutation,
    reductions,
    seeds,
)
from tests.helpers.tensors import close, normal


def masked(student, teacher, **options):
    """L_AM under the paper's masks, which are constants."""
    with torch.no_grad():
        masks = masks_of(student, teacher)
    return attention_masked_loss(student, teacher, **masks, **options)


def masked_as(student, teacher, **options):
    """L_AM with the masks of this pair, whatever features it is called with."""
    return functools.partial(attention_masked_loss, **masks_of(student, teacher), **options)


LOSSES = [attention_transfer_loss, masked, non_local_loss]
each_loss = pytest.mark.parametrize("loss", LOSSES)
MODULES = {
    "transfer": featkd.AttentionTransferLoss,
    "masked": functools.partial(featkd.AttentionMaskedLoss, temperature=0.5),
    "non_local": functools.partial(featkd.NonLocalLoss, kind="embedded_gaussian"),
}


# --- symmetries -----------------------------------------------------------------------------------


@given(pairs, seeds)
def test_permuting_the_channels(pair, seed):
    student, teacher = pair
    order = permutation(student.shape[1], seed)
    permuted = student[:, order], teacher[:, order]
    close(spatial_attention(permuted[0]), spatial_attention(student))
    close(channel_attention(permuted[0]), channel_attention(student)[:, order])
    for loss in LOSSES:
        close(loss(*permuted), loss(student, teacher))
        testing.assert_channel_permutation_invariant(loss, student, teacher)


@given(pairs)
def test_moving_the_positions_moves_the_maps_and_leaves_the_losses(pair):
    results = [
        lambda s, t: spatial_attention(s) - 2 * spatial_attention(t),
        lambda s, t: channel_attention(s) - 2 * channel_attention(t),
        lambda s, t: masks_of(s, t)["spatial_mask"],
        lambda s, t: masks_of(s, t)["channel_mask"],
        *LOSSES,
    ]
    for result in results:
        testing.assert_spatially_equivariant(result, *pair)


@each_loss
@given(pairs)
def test_student_and_teacher_have_the_same_distance_either_way(loss, pair):
    close(loss(*pair), loss(*reversed(pair)))


# --- what any distance promises, at any magnitude -------------------------------------------------


@pytest.mark.parametrize("holds", testing.DISTANCE, ids=lambda holds: holds.__name__)
@pytest.mark.parametrize("loss", [attention_transfer_loss, attention_masked_loss, non_local_loss])
def test_a_loss_is_a_distance(loss, holds):
    testing.check(loss, [holds])


@pytest.mark.parametrize("holds", testing.LOSS, ids=lambda holds: holds.__name__)
@pytest.mark.parametrize("build", MODULES.values(), ids=MODULES)
def test_a_module_with_adapters_keeps_what_any_loss_does(build, holds):
    unlike = testing.feature_pairs(channels=4, teacher_channels=3, magnitudes=[1e-3, 1.0])
    few = settings(max_examples=10, deadline=None)
    testing.check(build(4, 3).double(), [holds], pairs=unlike, settings=few)


# --- equality and descent -------------------------------------------------------------------------


@each_loss
@given(pairs, reductions)
def test_equal_features_give_0_with_gradient_0(loss, pair, reduction):
    reduced = functools.partial(loss, reduction=reduction)
    testing.assert_zero_at_equality(reduced, *pair)
    testing.assert_finite_gradient_at_equality(reduced, *pair)
    student = pair[0].clone().requires_grad_()
    reduced(student, pair[0]).sum().backward()
    close(student.grad, torch.zeros_like(student), 0.0)


@each_loss
@given(generic_pairs(), reductions)
def test_one_equal_image_leaves_the_gradient_finite(loss, pair, reduction):
    student, teacher = torch.cat([pair[0], pair[0]]).requires_grad_(), torch.cat(pair)
    loss(student, teacher, reduction=reduction).sum().backward()
    assert student.grad.isfinite().all()
    half = len(pair[0])
    close(student.grad[:half], torch.zeros_like(pair[0]), 0.0)
    assert student.grad[half:].any()


@each_loss
@given(pairs, reductions)
def test_one_gradient_step_lowers_the_loss(loss, pair, reduction):
    distance = masked_as(*pair) if loss is masked else loss
    reduced = functools.partial(distance, reduction=reduction)
    testing.assert_gradient_matches_finite_differences(reduced, *pair)
    testing.assert_descends(reduced, *pair)


@pytest.mark.parametrize("build", MODULES.values(), ids=MODULES)
@given(generic_pairs())
def test_the_gradient_reaches_the_student_only(build, pair):
    channels = pair[0].shape[1]
    loss = build(channels, channels).double()
    testing.assert_gradient_reaches_student_only(loss, *pair)
    student = pair[0].clone().requires_grad_()
    loss(student, pair[1]).backward()
    assert student.grad.any()


# --- batches and scale ----------------------------------------------------------------------------


@each_loss
@given(generic_pairs())
def test_duplicating_the_batch(loss, pair):
    twice = [torch.cat([features, features]) for features in pair]
    ratio = {"mean": 1, "sum": 2, "norm": math.sqrt(2), "mean_square": 1}
    for reduction, expected in ratio.items():
        once = loss(*pair, reduction=reduction)
        close(loss(*twice, reduction=reduction) / once, expected)


@each_loss
@given(pairs)
def test_a_batch_has_the_losses_of_its_images(loss, pair):
    for reduction, rule in {
        "none": "mean",
        "mean": "mean",
        "sum": "sum",
        "mean_square": "mean",
    }.items():
        reduced = functools.partial(loss, reduction=reduction)
        testing.assert_batch_consistent(reduced, *pair, reduction=rule)


@each_loss
@given(pairs, seeds)
def test_the_mean_over_equal_ranks_is_the_mean_of_the_whole(loss, pair, seed):
    other = [normal(*features.shape, seed=seed + i) for i, features in enumerate(pair)]
    whole = [torch.cat(features) for features in zip(pair, other, strict=True)]
    close((loss(*pair) + loss(*other)) / 2, loss(*whole))


@given(pairs, factors)
def test_attention_and_losses_are_linear_in_the_scale(pair, k):
    student, teacher = pair
    close(spatial_attention(-k * student), k * spatial_attention(student))
    close(channel_attention(-k * student), k * channel_attention(student))
    for loss in (attention_transfer_loss, attention_masked_loss, non_local_loss):
        close(loss(-k * student, -k * teacher) / k, loss(student, teacher))
