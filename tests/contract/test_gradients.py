"""Gradients of every function and module, as autograd and torch.func give them."""

import pytest
import torch
from torch import Tensor

from featkd import functional
from featkd.losses import _blocks
from tests.helpers.cases import REDUCTIONS, gradients_of
from tests.helpers.marks import each_case, each_loss, each_module, torch_loops
from tests.helpers.module_cases import APART
from tests.helpers.tensors import close, gradients, leaves, normal


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
    for a, b in zip(kept, gradients_of(case, tensors).values(), strict=True):
        close(a, b)


@each_case
def test_some_inputs_may_need_no_gradient(case):
    tensors = leaves(case.inputs())
    full = gradients_of(case, tensors)
    for name in tensors:
        others = {key: value.detach() for key, value in tensors.items()}
        output = case(**others | {name: tensors[name]})
        weights = normal(*output.shape, seed=9)
        close(torch.autograd.grad((weights * output).sum(), tensors[name])[0], full[name])


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


@each_case
@torch_loops
@pytest.mark.parametrize("block_bytes", [1, 1 << 22])
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


@each_case
@torch_loops
def test_batched_gradients_have_the_derivatives_of_single_ones(case):
    found = []
    for batched in (True, False):
        tensors = leaves(case.inputs())
        inputs = tuple(tensors.values())
        output = case(**tensors)
        weights = normal(2, *output.shape, seed=9)
        gradients = torch.autograd.grad
        if batched:
            each = gradients(output, inputs, weights, is_grads_batched=True, create_graph=True)
        else:
            single = [gradients(output, inputs, w, create_graph=True) for w in weights]
            each = [torch.stack(gradient) for gradient in zip(*single, strict=True)]
        total = sum(x.square().sum() for x in (*each, *inputs))
        found.append(gradients(total, inputs))
    for actual, expected in zip(*found, strict=True):
        close(actual, expected)


@each_case
def test_torch_func_grad(case):
    tensors = case.inputs()

    def total(*values: Tensor) -> Tensor:
        output = case.of_one(*values)
        return (normal(*output.shape, seed=9) * output).sum()

    actual = torch.func.grad(total, argnums=tuple(range(len(tensors))))(*tensors.values())
    for value, expected in zip(actual, gradients_of(case, leaves(tensors)).values(), strict=True):
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


# --- modules --------------------------------------------------------------------------------------


@each_module
def test_the_gradient_reaches_student_and_adapters_only(case):
    module, (student, teacher) = case.module(), leaves(case.features())
    module(student, teacher).sum().backward()
    assert student.grad.any()
    assert teacher.grad is None
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.any(), name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize("case", APART, ids=str)
@torch_loops
def test_per_sample_gradients(case):
    module, (student, teacher) = case.module(), case.features(batch=3)

    def loss(s, t):
        return module(s[None], t[None]).sum()

    actual = torch.func.vmap(torch.func.grad(loss))(student, teacher)
    for b in range(3):
        image = student[b : b + 1].clone().requires_grad_()
        close(actual[b], gradients(module(image, teacher[b : b + 1]), [image])[0][0])
