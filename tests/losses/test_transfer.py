"""L_AT, eq. (1)."""

import math

import pytest
import torch
from hypothesis import given

import featkd
from featkd import AttentionTransferLoss, functional
from featkd.losses.attention import MAPS
from tests.helpers.strategies import factors, generic_pairs
from tests.helpers.tensors import close, normal, tensor


# A student of zeros; teachers of one channel and one row: image 0 is (-3, 4), image 1 is (6, 8).
# |A|: G_s has norms 5 and 10, G_c is 3.5 and 7. Signed: norms 5 and 10, means 0.5 and 7.
@pytest.mark.parametrize(
    ("absolute", "reduction", "expected"),
    [
        (True, "none", [5 + 3.5, 10 + 7]),
        (True, "mean", 12.75),
        (True, "sum", 25.5),
        (True, "norm", math.sqrt(5**2 + 10**2) + math.sqrt(3.5**2 + 7**2)),
        (True, "mean_square", (5**2 + 10**2 + 3.5**2 + 7**2) / 2),
        (False, "none", [5 + 0.5, 10 + 7]),
        (False, "norm", math.sqrt(5**2 + 10**2) + math.sqrt(0.5**2 + 7**2)),
    ],
)
def test_golden_attention_transfer(absolute, reduction, expected):
    teacher = tensor([[[[-3, 4]]], [[[6, 8]]]])
    loss = functional.attention_transfer_loss(
        torch.zeros_like(teacher), teacher, absolute=absolute, reduction=reduction
    )
    close(loss, tensor(expected))


@pytest.mark.parametrize(
    ("attention", "built"), [("spatial", "spatial_adapter"), ("channel", "channel_adapter")]
)
def test_an_attention_that_is_left_out_has_no_adapter(attention, built):
    names = {
        name.split(".")[0] for name in AttentionTransferLoss(4, 3, attention=attention).state_dict()
    }
    assert names == {built}


@pytest.mark.parametrize("attention", MAPS)
def test_a_normalized_loss_of_a_student_of_zeros_is_1(attention):
    loss = AttentionTransferLoss(3, 3, attention=attention, normalize=True, reduction="none")
    teacher = normal(2, 3, 4, 5, dtype=torch.float32)
    close(loss(torch.zeros_like(teacher), teacher), torch.ones(2), 1e-6)


@given(generic_pairs(), factors)
def test_a_normalized_transfer_loss_does_not_depend_on_the_scale(pair, k):
    channels = pair[1].shape[1]
    loss = featkd.AttentionTransferLoss(channels, channels, normalize=True).double()
    close(loss(k * pair[0], k * pair[1]), loss(*pair))
