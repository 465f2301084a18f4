"""Every function and module computes in at least float32, autocast or not."""

import contextlib
import copy
import functools

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from featkd import functional
from tests.helpers.cases import CASES, gradients_of
from tests.helpers.marks import each_case, each_module
from tests.helpers.tensors import close, gradients, leaves, normal


def to_float(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.float() for name, value in tensors.items()}


@each_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_at_least_float32_whatever_comes_in(case, dtype):
    tensors = leaves(case.inputs(2, (5, 7), dtype))
    output = case(**tensors)
    assert output.dtype == torch.float32
    close(output, case.expected(**tensors), 1e-5)  # of the rounded inputs
    for name, gradient in gradients_of(case, tensors).items():
        assert gradient.dtype == dtype, name
        assert gradient.isfinite().all(), name


@pytest.mark.parametrize(
    "function",
    [
        functional.attention_transfer_loss,
        functional.attention_masked_loss,
        functional.gaussian_relation,
        functional.non_local_loss,
    ],
)
def test_a_gradient_of_half_precision_is_that_of_float32_rounded_once(function):
    features, other = (normal(1, 8, 5, 7, seed=i).bfloat16() for i in range(2))
    narrow, wide = (x.requires_grad_() for x in (features, features.float()))
    for x in (narrow, wide):
        function(x, other).sum().backward()
    assert torch.equal(narrow.grad, wide.grad.bfloat16())


@each_case
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("high", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("first_is_low", [True, False])
def test_mixed_dtypes(case, low, high, first_is_low):
    """A bfloat16 teacher beside a float32 student, and every other mixture."""
    tensors = case.inputs()
    for index, (name, value) in enumerate(tensors.items()):
        tensors[name] = value.to(low if (index == 0) == first_is_low else high)
    tensors = leaves(tensors)
    output = case(**tensors)
    dtypes = [value.dtype for value in tensors.values()]
    assert output.dtype == functools.reduce(torch.promote_types, dtypes, torch.float32)
    close(output, case.expected(**tensors), 1e-5)
    for name, gradient in gradients_of(case, tensors).items():
        assert gradient.dtype == tensors[name].dtype, name


@each_case
@pytest.mark.parametrize("formula", ["closed", "plain"])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float32], ids=str)
def test_one_wide_tensor_among_narrow_ones_widens_all(case, formula, narrow):
    tolerance = 1e-5 if "transfer" in case.name else 1e-10  # a side's maps keep its own precision
    with contextlib.nullcontext() if formula == "closed" else forward_ad.dual_level():
        for wide, value in case.inputs().items():
            tensors = case.inputs(dtype=narrow) | {wide: value}
            output = case(**tensors)
            assert output.dtype == torch.float64, wide
            close(output, case.expected(**tensors), tolerance)


@each_case
def test_the_plain_formula_computes_half_precision_in_float32_too(case):
    tensors = case.inputs(dtype=torch.float16)
    with forward_ad.dual_level():
        output = case(**tensors)
    assert output.dtype == torch.float32
    close(output, case.expected(**tensors), 1e-5)


@pytest.mark.parametrize("case", [case for case in CASES if not case.adapters], ids=str)
def test_half_precision_of_magnitude_300_does_not_overflow(case):
    """256 channels of 16x16, as the design asks; float16 ends at 65504."""
    tensors = {}
    for index, (name, shape) in enumerate(case.shapes(2, 16, 16).items()):
        shape = tuple(256 if size == 3 else size for size in shape)
        magnitude = 1 if name.endswith("mask") else 300
        values = magnitude * (0.5 + normal(*shape, seed=index).abs().clamp(max=0.5))
        signs = normal(*shape, seed=index + 50).sign() if magnitude > 1 else 1
        tensors[name] = (values * signs).half()
    output = case(**tensors)
    assert output.isfinite().all()
    if "gaussian" not in case.name:  # a softmax of such logits hangs on the last bit
        exact = case(**{name: value.double() for name, value in tensors.items()})
        close(output, exact, 1e-5)
    for name, gradient in gradients_of(case, leaves(to_float(tensors))).items():
        assert gradient.isfinite().all(), name


@each_case
def test_autocast_changes_nothing(case):
    tensors = case.inputs(2, (5, 7), torch.float32)
    expected = case(**tensors)
    with torch.autocast("cpu", torch.bfloat16):
        output = case(**tensors)
        assert torch.is_autocast_enabled("cpu")
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, expected, rtol=0, atol=0)


# --- modules --------------------------------------------------------------------------------------


@each_module
@pytest.mark.parametrize(
    ("student_dtype", "teacher_dtype"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
def test_a_module_computes_in_at_least_float32(case, student_dtype, teacher_dtype):
    student, teacher = case.features()
    student, teacher = student.to(student_dtype), teacher.to(teacher_dtype)
    expected = case.module()(student.double(), teacher.double())
    for module in (case.module().float(), case.module()):
        value = module(student.requires_grad_(), teacher)
        assert value.dtype == next(module.parameters()).dtype
        close(value, expected, 1e-4)
        (gradient,) = gradients(value, [student])
        assert gradient.dtype == student_dtype
        assert gradient.isfinite().all()


@each_module
def test_half_precision_parameters_compute_in_float32(case):
    module, (student, teacher) = case.module().bfloat16(), case.features(dtype=torch.bfloat16)
    value = module(student, teacher)
    assert value.dtype == torch.float32
    close(value, copy.deepcopy(module).double()(student.double(), teacher.double()), 1e-4)


@each_module
def test_autocast_changes_nothing_in_a_module(case):
    module, (student, teacher) = case.module().float(), case.features(dtype=torch.float32)
    expected = module(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        value = module(student, teacher)
    assert value.dtype == torch.float32
    close(value, expected, 0.0)
