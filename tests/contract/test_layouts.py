"""However the features lie in memory, the result is that of contiguous ones."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.cases import gradients_of
from tests.helpers.marks import each_case, each_module
from tests.helpers.tensors import close, leaves


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
    expected = gradients_of(case, leaves(tensors))
    laid_out = {name: layout(value) for name, value in tensors.items()}
    close(case(**laid_out), case(**tensors), 1e-13)
    laid_out = {name: value.detach().requires_grad_() for name, value in laid_out.items()}
    for name, gradient in gradients_of(case, laid_out).items():
        close(gradient, expected[name], 1e-13)


@each_case
def test_expanded_inputs(case):
    """One image expanded to a batch shares its memory; the result is that of copies."""
    tensors = case.inputs(batch=1)
    shapes = case.shapes(3, 3, 4)
    expanded = {name: value.expand(shapes[name]) for name, value in tensors.items()}
    copies = {name: value.contiguous() for name, value in expanded.items()}
    close(case(**expanded), case(**copies), 1e-13)


@each_module
def test_layout_does_not_matter_to_a_module(case):
    module, (student, teacher) = case.module(), case.features()
    expected = module(student, teacher)
    last = torch.channels_last
    close(module(student.contiguous(memory_format=last), teacher), expected, 1e-13)
    close(module(student, teacher.mT.contiguous().mT), expected, 1e-13)
    wide = [F.pad(features, (1, 2, 2, 1), value=5.0) for features in (student, teacher)]
    close(module(*(features[..., 2:-1, 1:-2] for features in wide)), expected, 1e-13)
