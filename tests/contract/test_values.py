"""Every function equals the NumPy loops, every module its functions."""

import numpy as np
import pytest
import torch

import featkd
from featkd import functional
from tests.helpers.cases import CASES, LOSSES, REDUCTIONS
from tests.helpers.marks import each_case, each_loss, each_module
from tests.helpers.module_cases import MODULE_CASES
from tests.helpers.tensors import close, gradients, leaves, normal, trained

FUNCTIONS = [
    "spatial_attention",
    "channel_attention",
    "attention_maps",
    "standardize",
    "attention_mask",
    "attention_transfer_loss",
    "attention_masked_loss",
    "gaussian_relation",
    "embedded_gaussian_relation",
    "dot_product_relation",
    "concatenation_relation",
    "non_local_loss",
]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_is_importable_from_the_package(name):
    assert getattr(featkd, name) is getattr(functional, name)
    assert name in featkd.__all__
    assert name in functional.__all__


def test_the_table_of_cases_has_every_function():
    assert {case.function.__name__ for case in CASES} == set(FUNCTIONS)


@each_case
@pytest.mark.parametrize(
    ("batch", "positions"), [(2, (3, 4)), (3, (5, 2)), (1, (1, 6)), (2, (1, 1))]
)
def test_value_equals_the_loops(case, batch, positions):
    tensors = case.inputs(batch, positions)
    output = case(**tensors)
    assert output.dtype == torch.float64
    expected = case.expected(**tensors)
    assert output.shape == np.shape(expected)
    close(output, expected)


@each_case
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_inputs_are_left_as_they_are(case, mode):
    tensors = case.inputs()
    before = {name: value.clone() for name, value in tensors.items()}
    with mode():
        output = case(**{name: value.requires_grad_() for name, value in tensors.items()})
    if output.requires_grad:
        slope = normal(*output.shape, seed=9)
        output.backward(slope)
        close(slope, normal(*output.shape, seed=9), 0.0)
    for name, value in tensors.items():
        torch.testing.assert_close(value.detach(), before[name], rtol=0, atol=0)


@each_loss
def test_losses_are_scalars_unless_none(case):
    none = case.options.get("reduction") == "none"
    assert case(**case.inputs(batch=3)).shape == ((3,) if none else ())


@pytest.mark.parametrize("name", ["transfer", "masked-both", "non_local"])
def test_reductions_agree(name):
    by_reduction = {
        case.options["reduction"]: case(**case.inputs(batch=3))
        for case in LOSSES
        if case.name in {f"{name}-{reduction}" for reduction in REDUCTIONS}
    }
    default = next(case for case in LOSSES if case.name == name)
    close(by_reduction["sum"], by_reduction["none"].sum())
    close(by_reduction["mean"], by_reduction["none"].mean())
    close(default(**default.inputs(batch=3)), by_reduction["mean"])
    if name != "transfer":  # there each of the two distances is reduced before they are added
        close(by_reduction["norm"], by_reduction["none"].square().sum().sqrt())
        close(by_reduction["mean_square"], by_reduction["none"].square().mean())


# --- modules --------------------------------------------------------------------------------------


@each_module
def test_a_loss_module_equals_its_functions(case):
    module, (student, teacher) = case.module(), leaves(case.features())
    expected = case.by_functions(module, student, teacher)
    actual = module(student, teacher)
    assert actual.shape == expected.shape
    close(actual, expected)
    wanted = [student, *trained(module)]
    for a, b in zip(gradients(actual, wanted), gradients(expected, wanted), strict=True):
        close(a, b)


@each_module
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_module_leaves_its_inputs_as_they_are(case, mode):
    module, features = case.module(), leaves(case.features())
    before = [each.detach().clone() for each in features]
    with mode():
        output = module(*features)
    if output.requires_grad:
        output.sum().backward()
    for each, expected in zip(features, before, strict=True):
        close(each, expected, 0.0)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 3)])
@pytest.mark.parametrize("case", [c for c in MODULE_CASES if c.teacher_channels == 4], ids=str)
def test_equal_features_start_at_0(case, size):
    student, _ = leaves(case.features(positions=size))
    module = case.module(seed=None)
    value = module(student, student.detach())
    close(value, torch.zeros_like(value), 0.0)
    for gradient in gradients(value, [student, *trained(module)]):
        close(gradient, torch.zeros_like(gradient), 0.0)
