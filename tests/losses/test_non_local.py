"""L_NLD, eq. (3): the distance of two relations, and what training does to them."""

import copy

import pytest
import torch

from featkd import NonLocalLoss, functional
from tests.helpers.marks import each_kind
from tests.helpers.models import raises
from tests.helpers.tensors import close, normal, tensor, trained


def test_golden_non_local():
    student, teacher = tensor([[[[1, 1]]], [[[0, 0]]]]), tensor([[[[4, 5]]], [[[0, 12]]]])
    # Differences (3, 4) and (0, 12): norms 5 and 12; over the batch sqrt(25 + 144) = 13.
    close(functional.non_local_loss(student, teacher), 8.5)
    close(functional.non_local_loss(student, teacher, reduction="norm"), 13.0)


@each_kind
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("teacher_relation", ["fixed", "trained"])
def test_equal_features_start_at_relation_distance_0(kind, residual, teacher_relation):
    features = normal(2, 4, 3, 5, dtype=torch.float32)
    loss = NonLocalLoss(4, 4, kind=kind, residual=residual, teacher_relation=teacher_relation)
    close(loss(features, features), 0.0, 0.0)
    assert loss(features, features.flip(-1)) > 0


def test_a_normalized_relation_of_equal_features_times_k():
    """Without biases the dot product is cubic on both sides, so the ratio stays."""
    loss = NonLocalLoss(4, 4, kind="dot_product", normalize=True).double()
    for parameter in loss.parameters():
        if parameter.ndim == 1:
            parameter.detach().zero_()
    student, teacher = normal(2, 4, 3, 5, seed=1), normal(2, 4, 3, 5, seed=2)
    close(loss(7 * student, 7 * teacher), loss(student, teacher))


# --- the teacher's relation -----------------------------------------------------------------------


def train(loss, student, teacher, steps=60, optimizer=torch.optim.Adam, **options):
    optimizer = optimizer(trained(loss), **options)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(student, teacher).backward()
        optimizer.step()


def mismatched():
    """Features that no layer on the student's side can turn into the teacher's."""
    return normal(4, 4, 4, 6, seed=1).float(), normal(4, 6, 4, 6, seed=2).float()


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.Adam, {"lr": 0.05}),
        (torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.5}),
        (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}),
    ],
)
@each_kind
def test_a_fixed_teacher_relation_does_not_collapse(kind, optimizer, options):
    student, teacher = mismatched()
    loss = NonLocalLoss(4, 6, kind=kind)
    before = loss.teacher_relation(teacher)
    assert before.norm() > 0.1
    # Even if everything the module calls a parameter is given to the optimizer.
    loss.requires_grad_(False)
    for side in (loss.student_relation, loss.adapter):
        side.requires_grad_(True)
    train(loss, student, teacher, optimizer=optimizer, **options)
    close(loss.teacher_relation(teacher), before, 0.0)
    assert loss(student, teacher) > 0.1 * before.flatten(1).norm(dim=1).mean()


def test_a_fixed_teacher_relation_has_no_batch_normalisation_to_train():
    options = {"kind": "dot_product", "residual": True, "batch_norm": True}
    raises(ValueError, lambda: NonLocalLoss(4, 4, **options), "`teacher_relation` 'fixed'")
    NonLocalLoss(4, 4, teacher_relation="trained", **options)


def test_parameters_of_a_fixed_teacher_relation_need_no_gradient():
    fixed, free = (
        NonLocalLoss(4, 6, kind="dot_product", teacher_relation=mode)
        for mode in ("fixed", "trained")
    )
    assert not any(p.requires_grad for p in fixed.teacher_relation.parameters())
    assert all(p.requires_grad for p in free.parameters())
    assert set(fixed.state_dict()) == set(free.state_dict())


def test_a_fixed_teacher_relation_stays_fixed_if_someone_unfreezes_it():
    student, teacher = mismatched()
    loss = NonLocalLoss(4, 6, kind="dot_product").requires_grad_(True)
    before = loss.teacher_relation(teacher).detach()
    train(loss, student, teacher, lr=0.05)
    close(loss.teacher_relation(teacher), before, 0.0)


def test_a_trained_teacher_relation_collapses_without_residual():
    student, teacher = mismatched()
    loss = NonLocalLoss(4, 6, kind="dot_product", teacher_relation="trained")
    before = loss.teacher_relation(teacher).norm()
    train(loss, student, teacher, lr=0.05)
    assert loss.teacher_relation(teacher).norm() < 0.1 * before


def test_a_residual_keeps_a_trained_teacher_relation_up():
    student, teacher = mismatched()
    loss = NonLocalLoss(4, 6, kind="dot_product", teacher_relation="trained", residual=True)
    train(loss, student, teacher, lr=0.05)
    assert loss.teacher_relation(teacher).norm() > 0.3 * teacher.norm()


def test_both_released_blocks_are_trained():
    student, teacher = mismatched()
    loss = NonLocalLoss(
        4, 6, kind="dot_product", teacher_relation="trained", residual=True, batch_norm=True
    )
    start = copy.deepcopy(loss.state_dict())
    train(loss, student, teacher, lr=0.05)
    moved = [name for name, value in loss.state_dict().items() if not value.equal(start[name])]
    assert {name for name in start if "relation" in name} <= set(moved)
    assert loss.teacher_relation(teacher).norm() > 0.3 * teacher.norm()
