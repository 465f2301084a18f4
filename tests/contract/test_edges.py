"""The edges of the domain: no image, one position, NaN and inf, numbers of any size."""

import math

import numpy as np
import pytest
import torch

import featkd
from featkd import functional
from tests.helpers.cases import CASES
from tests.helpers.marks import each_case, each_module
from tests.helpers.tensors import close, gradients, leaves, tensor, trained


@each_case
def test_an_empty_batch_gives_a_differentiable_zero(case):
    tensors = leaves(case.inputs(batch=0))
    output = case(**tensors)
    assert output.shape == np.shape(case.expected(**tensors))
    assert (output == 0).all()
    output.sum().backward()
    for name, value in tensors.items():
        assert value.grad is not None, name
        assert value.grad.shape == value.shape


@each_case
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_nan_and_inf_are_never_hidden(case, bad):
    """Wherever the loops give NaN or inf for one bad number, the output is not finite."""
    for name in case.inputs():
        tensors = case.inputs()
        if name.endswith("mask") and bad == -math.inf:
            continue  # a negative mask is outside of the domain
        tensors[name].view(-1)[1] = bad
        expected = torch.as_tensor(case.expected(**tensors))
        output = case(**tensors)
        assert not output[~expected.isfinite()].isfinite().any(), name
        if math.isnan(bad):
            assert output[expected.isnan()].isnan().all(), name


@pytest.mark.parametrize(
    "case",
    [
        c
        for c in CASES
        if (not c.loss or c.options.get("reduction") == "none") and "over" not in c.options
    ],
    ids=str,
)
def test_a_bad_image_leaves_the_others_alone(case):
    tensors = case.inputs(batch=3)
    expected = case(**tensors)
    for value in tensors.values():
        value[1] = math.nan
    output = case(**tensors)
    close(output[[0, 2]], expected[[0, 2]], 1e-13)
    assert output[1].isnan().all()


def test_a_number_may_be_an_integer_of_any_size():
    maps, size = torch.tensor([[1.0, 0.0, 2.0]]), 10**30
    close(functional.attention_mask(maps, maps, temperature=size), torch.ones(1, 3), 1e-6)
    relation = functional.embedded_gaussian_relation(*[maps[None]] * 3, scale=size)
    close(relation, tensor([[[2, 1, 2]]]), 1e-6)
    settings = featkd.Hyperparameters(size, 0, 0, temperature=size)
    loss = featkd.FeatureDistillationLoss(3, 3, hyperparameters=settings)
    features = torch.ones(1, 3, 2, 2)
    expected = featkd.attention_transfer_loss(0 * features, features)
    close(loss(0 * features, features)["loss_attention_transfer"] / 1e30, expected, 1e-6)


# --- modules --------------------------------------------------------------------------------------


@each_module
def test_an_empty_batch_gives_a_module_s_differentiable_zero(case):
    module, (student, teacher) = case.module(), leaves(case.features(batch=0))
    value = module(student, teacher)
    assert (value == 0).all()
    value.sum().backward()
    assert student.grad.shape == student.shape
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name


@each_module
def test_maps_of_one_position(case):
    module, (student, teacher) = case.module(), leaves(case.features(positions=(1, 1)))
    value = module(student, teacher)
    assert value.isfinite().all()
    assert all(g.isfinite().all() for g in gradients(value, [student, *trained(module)]))


@each_module
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_nan_and_inf_are_never_hidden_by_a_module(case, bad, side):
    features = case.features()
    features[side][0, 1, 2, 3] = bad
    value = case.module()(*features)
    assert not value.reshape(-1)[0].isfinite()
