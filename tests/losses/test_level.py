"""What every loss module does before and after its formula: resizing and normalisation."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given

from featkd import AttentionMaskedLoss, AttentionTransferLoss, FeatureDistillationLoss, NonLocalLoss
from featkd.losses._options import RESIZE_MODES
from tests.helpers.module_cases import ALL_TERMS
from tests.helpers.strategies import generic_pairs, reductions
from tests.helpers.tensors import close, normal


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("size", [(2, 3), (7, 5), (4, 6)])
@pytest.mark.parametrize(
    "build",
    [
        lambda **o: AttentionTransferLoss(4, 3, **o),
        lambda **o: AttentionMaskedLoss(4, 3, temperature=0.5, **o),
        lambda **o: NonLocalLoss(4, 3, kind="dot_product", **o),
        lambda **o: FeatureDistillationLoss(4, 3, hyperparameters=ALL_TERMS, **o),
    ],
    ids=["transfer", "masked", "non_local", "total"],
)
def test_resize_brings_the_student_to_the_teacher(build, size, mode):
    def values(loss, *features):
        value = loss(*features)
        return list(value.values()) if isinstance(value, dict) else [value]

    student, teacher = normal(2, 4, *size, seed=1), normal(2, 3, 4, 6, seed=2)
    resizing, plain = build(resize=mode).double(), build().double()
    plain.load_state_dict(resizing.state_dict())
    align = {"align_corners": False} if mode == "bilinear" else {}
    resized = F.interpolate(student, (4, 6), mode=mode, **align)
    for a, b in zip(
        values(resizing, student, teacher), values(plain, resized, teacher), strict=True
    ):
        close(a, b)
    for value in values(resizing, student.bfloat16(), teacher):
        assert value.dtype == torch.float64


@pytest.mark.parametrize("mode", RESIZE_MODES)
def test_a_resized_student_of_half_precision_is_not_rounded_again(mode):
    loss = AttentionMaskedLoss(4, 4, temperature=0.5, resize=mode)
    student, teacher = normal(2, 4, 3, 5, seed=1).half(), normal(2, 4, 4, 6, seed=2).half()
    close(loss(student, teacher), loss(student.float(), teacher.float()), 0.0)


# --- normalisation --------------------------------------------------------------------------------

NORMALIZED = {
    "transfer": lambda **o: AttentionTransferLoss(4, 3, normalize=True, **o),
    "masked": lambda **o: AttentionMaskedLoss(4, 3, temperature=0.5, normalize=True, **o),
    "non_local": lambda **o: NonLocalLoss(4, 3, kind="dot_product", normalize=True, **o),
}


@pytest.mark.parametrize("build", NORMALIZED.values(), ids=NORMALIZED)
def test_a_teacher_of_zeros_is_left_undivided(build):
    """Its relation is not zero but a constant if g has a bias; then the division is finite too."""
    loss = build(reduction="none").double()
    for parameter in loss.parameters():
        if parameter.ndim == 1:
            parameter.detach().zero_()
    student, teacher = normal(2, 4, 3, 5), torch.zeros(2, 3, 3, 5, dtype=torch.float64)
    plain = copy.deepcopy(loss)
    plain.normalize = False
    close(loss(student, teacher), plain(student, teacher))


@pytest.mark.parametrize("build", NORMALIZED.values(), ids=NORMALIZED)
def test_a_normalized_loss_treats_each_image_alone(build):
    loss = build(reduction="none").double()
    student, teacher = normal(3, 4, 3, 5, seed=1), normal(3, 3, 3, 5, seed=2)
    teacher = teacher * torch.tensor([1e-3, 1.0, 1e3]).double().reshape(3, 1, 1, 1)
    alone = [loss(student[b : b + 1], teacher[b : b + 1]) for b in range(3)]
    close(loss(student, teacher), torch.cat(alone))


@pytest.mark.parametrize(
    "build",  # a relation's g has a bias
    [AttentionTransferLoss, partial(AttentionMaskedLoss, temperature=0.5)],
    ids=["transfer", "masked"],
)
@given(generic_pairs(), reductions)
def test_a_normalized_loss_of_a_student_of_zeros_is_1(build, pair, reduction):
    channels = pair[1].shape[1]
    loss = build(channels, channels, normalize=True, reduction=reduction).double()
    value = loss(torch.zeros_like(pair[0]), pair[1])
    images = len(pair[0])
    expected = {"mean": 1, "sum": images, "none": torch.ones(images)}
    if reduction in expected:
        close(value, torch.as_tensor(expected[reduction]))
