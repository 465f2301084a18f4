"""L_AM, eq. (2)."""

import math

import torch
from hypothesis import given
from torch import Tensor

from featkd import attention_masked_loss, functional
from tests.helpers.strategies import factors, masks_of, pairs
from tests.helpers.tensors import close, leaves, normal, tensor


def test_golden_attention_masked():
    student, teacher = tensor([[[[1, 1]]]]), tensor([[[[2, 3]]]])  # differences 1 and 2
    spatial, channel = tensor([[[4, 1]]]), tensor([[2]])
    loss = functional.attention_masked_loss
    close(loss(student, teacher), math.sqrt(1 + 4))
    close(loss(student, teacher, spatial_mask=spatial), math.sqrt(4 * 1 + 1 * 4))
    close(loss(student, teacher, channel_mask=channel), math.sqrt(2 * 1 + 2 * 4))
    close(loss(student, teacher, spatial_mask=spatial, channel_mask=channel), 4.0)


def test_masks_of_zeros_give_0_with_gradient_0_for_the_masks_too():
    tensors = leaves(
        {"student": normal(2, 3, 4, 5, seed=1), "teacher": normal(2, 3, 4, 5, seed=2)}
        | {"spatial_mask": torch.zeros(2, 4, 5), "channel_mask": torch.ones(2, 3)}
    )
    loss = functional.attention_masked_loss(**tensors)
    close(loss, 0.0, 0.0)
    for gradient in torch.autograd.grad(loss, tensors.values()):
        close(gradient, torch.zeros_like(gradient), 0.0)


def test_masked_loss_saves_no_chain_of_temporaries():
    """Of the size of the features, backward keeps at most the two inputs."""
    kept = set()

    def pack(value: Tensor) -> Tensor:
        if value.numel() == student.numel():
            kept.add(value.untyped_storage().data_ptr())
        return value

    student, teacher = normal(2, 8, 6, 7, seed=1).requires_grad_(), normal(2, 8, 6, 7, seed=2)
    spatial, channel = normal(2, 6, 7, seed=3).exp(), normal(2, 8, seed=4).exp()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        functional.attention_masked_loss(
            student, teacher, spatial_mask=spatial, channel_mask=channel
        )
    assert kept <= {student.data_ptr(), teacher.data_ptr()}


@given(pairs, factors, factors)
def test_a_mask_enters_the_masked_loss_by_its_square_root(pair, k, m):
    masks = masks_of(*pair)
    scaled = {"spatial_mask": k * masks["spatial_mask"], "channel_mask": m * masks["channel_mask"]}
    expected = attention_masked_loss(*pair, **masks)
    close(attention_masked_loss(*pair, **scaled) / math.sqrt(k * m), expected)
