"""The closed forms' own backward: what it works out, and what not."""

import pytest
import torch

from featkd.losses import _closed_forms, _correlation
from tests.helpers.tensors import LargestTensor, close, leaves, normal

DISTANCES = [_closed_forms.weighted_distance, _correlation.correlation_distance]
each_distance = pytest.mark.parametrize("distance", DISTANCES)


def test_parts_are_added_to_one_sum_for_each_binary_digit_1_of_their_number():
    sums = []
    for index in range(20):
        _closed_forms._add_pairwise(sums, torch.ones(1), index)
        assert len(sums) == (index + 1).bit_count()
        assert sum(sums) == index + 1


@each_distance
@pytest.mark.parametrize("side", [0, 1])
def test_no_gradient_is_worked_out_for_a_side_that_needs_none(distance, side, monkeypatch):
    pair, products, product = (
        [normal(2, 3, 4, 5, seed=s) for s in (0, 1)],
        [],
        _closed_forms.product,
    )

    def counted(features, factors):
        products.append(features)
        return product(features, factors)

    for module in (_closed_forms, _correlation):
        monkeypatch.setattr(module, "product", counted)
    pair[side].requires_grad_()
    distance(*pair).sum().backward()
    (features,) = products
    close(features, pair[side], 0.0)


@each_distance
def test_a_channel_mask_alone_has_its_gradient(distance):
    a, b, mask = leaves([*(normal(2, 3, 4, 5, seed=s) for s in (0, 1)), normal(2, 3).exp()])
    assert torch.autograd.gradcheck(lambda *x: distance(x[0], x[1], None, x[2]), (a, b, mask))


def test_gradients_of_a_channel_mask_in_a_batch_make_no_map_for_each():
    a, b = (normal(2, 3, 4, 5, seed=s) for s in (0, 1))
    mask = normal(2, 3).exp().requires_grad_()
    values = _correlation.correlation_distance(a, b, None, mask)
    with LargestTensor() as largest:
        torch.autograd.grad(values, mask, torch.eye(2).double().repeat(8, 1), is_grads_batched=True)
    assert largest.elements == a.numel()


@each_distance
@pytest.mark.parametrize("channels", [1, 2])
def test_a_result_without_a_gradient_may_be_added_to_in_place(distance, channels):
    """As a sum of losses is; torch refuses that of views made in a custom function."""
    found, other = distance(*torch.randn(2, 3, channels, 4, 5)), torch.ones(3, requires_grad=True)
    found += other
    (slope,) = torch.autograd.grad(found.sum(), other)
    close(slope, torch.ones(3), 0.0)


@each_distance
def test_a_graph_of_the_gradient_rounds_narrow_features_no_more_than_none(distance):
    """Far from 0, where a mean in bfloat16 would be off by 1/16."""
    pair = [(10 + normal(2, 3, 4, 5, seed=s)).bfloat16().requires_grad_() for s in (0, 1)]
    loss = distance(*pair).sum()
    plain = torch.autograd.grad(loss, pair, retain_graph=True)
    with_graph = torch.autograd.grad(loss, pair, create_graph=True)
    for expected, found in zip(plain, with_graph, strict=True):
        size = expected.float().abs().max()
        close(found.float() / size, expected.float() / size, 1e-2)
