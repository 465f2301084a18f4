"""Forward mode and Hessians: constants for backward are constants there too."""

from functools import partial

import pytest
import torch
from torch.autograd import forward_ad

import featkd
from featkd import FeatureDistillationLoss
from tests.helpers.marks import each_case, torch_loops, torch_scripts
from tests.helpers.module_cases import APART, MODULE_CASES, SumOfTerms, randomize
from tests.helpers.tensors import close, gradients, leaves, normal


@each_case
@torch_scripts
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
@torch_scripts
def test_dual_numbers_carry_the_gradient_along_a_direction(case):
    tensors = leaves(case.inputs())
    tangents = {name: normal(*value.shape, seed=7) for name, value in tensors.items()}
    gradient = torch.autograd.grad(case(**tensors).sum(), tensors.values())
    with forward_ad.dual_level():
        duals = {n: forward_ad.make_dual(x.detach(), tangents[n]) for n, x in tensors.items()}
        actual = forward_ad.unpack_dual(case(**duals).sum()).tangent
    close(actual, sum((g * t).sum() for g, t in zip(gradient, tangents.values(), strict=True)))


# --- modules and presets --------------------------------------------------------------------------


def preset(name):
    # `eval`: torch.func takes no batch normalisation that keeps statistics of what it is given.
    loss = FeatureDistillationLoss(4, 3, hyperparameters=getattr(featkd, name)).double().eval()
    randomize(loss)
    return SumOfTerms(loss)


PRESETS = ["TWO_STAGE", "ONE_STAGE", "STANDARDIZED", "FPN_OUTPUTS"]
PRESETS += ["RELEASED_TWO_STAGE", "RELEASED_ONE_STAGE"]
DIFFERENTIABLE = {
    **{case.name: (case.module, case.teacher_channels) for case in APART},
    **{name: (partial(preset, name), 3) for name in PRESETS},
}
each_differentiable = pytest.mark.parametrize(
    ("build", "channels"), DIFFERENTIABLE.values(), ids=DIFFERENTIABLE
)


def total(loss, parameters, student, teacher):
    return torch.func.functional_call(loss, parameters, (student, teacher)).sum()


@each_differentiable
@torch_scripts
def test_forward_mode_is_the_gradient_along_a_direction(build, channels):
    """Of student, teacher and all parameters at once, those that are frozen included."""
    loss = build().requires_grad_()
    names = [name for name, _ in loss.named_parameters()]
    points = [normal(2, 4, 4, 6, seed=1), normal(2, channels, 4, 6, seed=2), *loss.parameters()]
    points = leaves(points)
    directions = [normal(*x.shape, seed=10 + index) for index, x in enumerate(points)]

    def value(student, teacher, *parameters):
        return total(loss, dict(zip(names, parameters, strict=True)), student, teacher)

    slopes = gradients(value(*points), points)
    expected = sum((a * b).sum() for a, b in zip(slopes, directions, strict=True))
    point = tuple(x.detach() for x in points)
    close(torch.func.jvp(value, point, tuple(directions))[1], expected)


@each_differentiable
@torch_scripts
@torch_loops
def test_the_hessian_is_symmetric_and_that_of_double_backward(build, channels):
    loss, teacher = build(), normal(1, channels, 2, 3, seed=2)
    student = normal(1, 4, 2, 3, seed=1)
    found = torch.func.hessian(lambda x: loss(x, teacher).sum())(student).reshape(24, 24)
    close(found, found.mT)
    twice = torch.autograd.functional.hessian(lambda x: loss(x, teacher).sum(), student)
    close(found, twice.reshape(24, 24))


@torch_loops
@pytest.mark.parametrize("name", PRESETS)
def test_per_sample_gradients_of_a_preset(name):
    loss, student, teacher = preset(name), normal(3, 4, 4, 6, seed=1), normal(3, 3, 4, 6, seed=2)
    actual = torch.func.vmap(torch.func.grad(lambda s, t: loss(s[None], t[None])))(student, teacher)
    for b in range(3):
        image = student[b : b + 1].clone().requires_grad_()
        close(actual[b], gradients(loss(image, teacher[b : b + 1]), [image])[0][0])


@torch_scripts
def test_forward_mode_through_a_batch_normalisation_in_training():
    case = next(case for case in MODULE_CASES if not case.images_apart)
    loss, (student, teacher) = case.module(), case.features()
    direction = normal(*student.shape, seed=9)
    with forward_ad.dual_level():
        value = loss(forward_ad.make_dual(student, direction), teacher)
        along = forward_ad.unpack_dual(value).tangent
    (slope,) = gradients(loss(student.requires_grad_(), teacher), [student])
    close(along, (slope * direction).sum())
