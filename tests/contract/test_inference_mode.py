"""Tensors made under inference mode, and calls without a graph."""

import pytest
import torch

from tests.helpers.marks import each_case, each_module
from tests.helpers.tensors import close, gradients, leaves, normal, trained


@each_case
def test_a_tensor_made_under_inference_mode_gives_the_same(case):
    """A teacher's, say: autograd itself saves no such tensor."""
    tensors = leaves(case.inputs())
    for name in tensors:
        with torch.inference_mode():
            frozen = tensors[name].clone()
        others = [value for key, value in tensors.items() if key != name]
        found, expected = case(**tensors | {name: frozen}), case(**tensors)
        close(found, expected, 0.0)
        if others:
            weights = normal(*expected.shape, seed=9)
            found, expected = (
                torch.autograd.grad((weights * value).sum(), others) for value in (found, expected)
            )
            for a, b in zip(found, expected, strict=True):
                close(a, b, 0.0)


@each_case
def test_no_graph_without_gradients(case):
    assert not case(**case.inputs()).requires_grad
    with torch.no_grad():
        assert not case(**leaves(case.inputs())).requires_grad
    with torch.inference_mode():
        case(**case.inputs())


@each_module
@pytest.mark.parametrize("side", [0, 1])
def test_a_side_that_was_run_under_inference_mode_gives_the_same(case, side):
    module, features = case.module(), leaves(case.features())
    value = module(*features)
    with torch.inference_mode():
        frozen = [x.clone() if index == side else x for index, x in enumerate(features)]
    found = module(*frozen)
    close(found, value, 0.0)
    wanted = [features[1 - side], *trained(module)]
    for a, b in zip(gradients(found, wanted), gradients(value, wanted), strict=True):
        close(a, b, 0.0)
