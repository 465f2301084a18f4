"""The standardised form: channels of mean 0 and deviation 1, losses free of scale."""

import functools
import math

import pytest
import torch
from hypothesis import given

import featkd
from featkd import attention_masked_loss, attention_transfer_loss, functional, non_local_loss
from tests.helpers.strategies import factors, generic_pairs, seeds
from tests.helpers.tensors import close, normal, tensor


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
    for value in (0.0, 0.1, 1e-6, 1e6 / 3):
        constant = torch.full((1, 2, 13, 21), value, requires_grad=True)
        assert (functional.standardize(constant) == 0).all()
        loss = functional.attention_masked_loss(
            constant, normal(1, 2, 13, 21, dtype=torch.float32), standardize=True
        )
        (gradient,) = torch.autograd.grad(loss, constant)
        close(loss, 0.5, 1e-6)
        assert (gradient == 0).all()


def test_a_constant_teacher_s_channel_leaves_the_student_s_at_rest():
    """Whatever the student, half its mean square is 1 / 2 there; the other channel learns."""
    student, teacher = normal(1, 2, 3, 4).requires_grad_(), normal(1, 2, 3, 4, seed=1)
    teacher[:, 0] = 7
    loss = functional.attention_masked_loss(student, teacher, standardize=True)
    (gradient,) = torch.autograd.grad(loss, student)
    close(gradient[:, 0], torch.zeros(1, 3, 4))
    assert gradient[:, 1].abs().min() > 1e-4


@pytest.mark.parametrize("size", [1e-3, 1.0, 1000.0])
def test_a_deviation_below_the_rounding_of_the_mean_is_none(size):
    """Neighbours in float32 differ by 6e-8 to 1.2e-7 of their size."""
    features = torch.full((1, 1, 4, 6), size)
    features[..., ::2] = torch.nextafter(features[..., ::2], torch.tensor(math.inf))
    assert (functional.standardize(features) == 0).all()
    teacher = normal(1, 1, 4, 6, dtype=torch.float32)
    close(functional.attention_masked_loss(features, teacher, standardize=True), 0.5, 1e-6)
    apart = features + (features - size) * 16
    assert functional.standardize(apart).square().mean() > 0.99


STANDARDIZED = {
    "transfer": functools.partial(attention_transfer_loss, standardize=True),
    "masked": functools.partial(attention_masked_loss, standardize=True),
    "non_local": functools.partial(non_local_loss, standardize=True),
}
each_standardized = pytest.mark.parametrize("name", STANDARDIZED)


@each_standardized
@given(generic_pairs(), factors, factors)
def test_a_standardized_loss_is_free_of_scale(name, pair, a, b):
    """loss(k S, k T) = loss(S, T), and each side may have a factor of its own."""
    loss, (student, teacher) = STANDARDIZED[name], pair
    close(loss(a * student, b * teacher), loss(student, teacher), 1e-9)


@pytest.mark.parametrize("name", ["masked", "non_local"])
@given(generic_pairs(), seeds)
def test_a_standardized_loss_is_free_of_each_channel_s_scale_and_offset(name, pair, seed):
    loss, (student, teacher) = STANDARDIZED[name], pair
    channels = student.shape[1]
    scale = normal(2, channels, 1, 1, seed=seed).exp()
    offset = normal(2, channels, 1, 1, seed=seed + 1)
    changed = loss(scale[0] * student + offset[0], scale[1] * teacher + offset[1])
    close(changed, loss(student, teacher), 1e-7)


@each_standardized
@given(generic_pairs())
def test_a_standardized_loss_lies_between_0_and_2_a_map(name, pair):
    value = STANDARDIZED[name](*pair, reduction="none")
    maps = 2 if name == "transfer" else 1
    assert ((value >= 0) & (value <= 2 * maps + 1e-12)).all()
    opposite = STANDARDIZED[name](pair[0], -pair[0], reduction="none")
    if name != "transfer" and pair[0][0, 0].numel() > 1:
        close(opposite, torch.full_like(opposite, 2.0))


@given(generic_pairs())
def test_a_standardized_loss_is_1_less_the_correlation(pair):
    student, teacher = pair
    if student[0, 0].numel() == 1:
        return
    expected = [
        1 - torch.corrcoef(torch.stack([s.flatten(), t.flatten()]))[0, 1]
        for image in zip(student, teacher, strict=True)
        for s, t in zip(*image, strict=True)
    ]
    value = attention_masked_loss(student, teacher, standardize=True)
    close(value, torch.stack(expected).mean(), 1e-9)


@given(generic_pairs())
def test_standardized_features_have_mean_0_and_mean_square_1(pair):
    for over, dims in (("image", (2, 3)), ("batch", (0, 2, 3))):
        features = featkd.standardize(pair[0], over=over)
        close(features.mean(dims), torch.zeros(features.mean(dims).shape))
        square = features.square().mean(dims)
        close(square, (square > 0.5).double())


@pytest.mark.parametrize("masked", [False, True])
def test_a_gradient_far_from_0_loses_what_a_mean_in_float32_loses(masked):
    pair = [(normal(2, 3, 8, 9, seed=seed) + 1000.3).float() for seed in (0, 1)]
    mask = normal(2, 8, 9, seed=2).exp().float() if masked else None

    def gradient(*pair):
        student, teacher = pair[0].requires_grad_(), pair[1]
        attention_masked_loss(student, teacher, spatial_mask=mask, standardize=True).backward()
        return student.grad.double()

    exact = gradient(*(x.double() for x in pair))
    error = (gradient(*pair) - exact).abs().max() / exact.abs().max()
    assert error < 2e-5  # a mean of 1000 is known to 3e-5
