"""Misuse that no single argument shows; the rest is in the table of `misuse.py`."""

from functools import partial

import pytest
import torch
from models import raises

import featkd
from featkd import functional as f

MAP = torch.ones(2, 3, 4, 5)
OTHER_CHANNELS = torch.ones(2, 7, 4, 5)


def shapes(*tensors):
    return [str(tuple(tensor.shape)) for tensor in tensors]


def test_a_spatial_adapter_does_not_excuse_other_channels():
    call = partial(f.attention_transfer_loss, spatial_adapter=lambda attention: attention)
    raises(ValueError, lambda: call(MAP, OTHER_CHANNELS), *shapes(MAP, OTHER_CHANNELS))


def test_a_channel_adapter_excuses_other_channels_alone():
    call = partial(f.attention_transfer_loss, channel_adapter=lambda attention: torch.zeros(2, 7))
    assert call(MAP, OTHER_CHANNELS) > 0
    raises(ValueError, lambda: call(MAP, OTHER_CHANNELS[:1]), *shapes(MAP, OTHER_CHANNELS[:1]))


def test_the_concatenation_takes_one_logit_a_side_where_both_have_more():
    raises(ValueError, lambda: f.concatenation_relation(MAP, MAP, MAP), "`theta`", *shapes(MAP))


@pytest.mark.parametrize("value", [MAP[0], MAP[None]], ids=["rank3", "rank5"])
def test_two_maps_of_one_wrong_rank(value):
    for call in (f.attention_transfer_loss, f.attention_masked_loss):
        raises(ValueError, lambda call=call: call(value, value), *shapes(value))


@pytest.mark.parametrize("resize", ["bilinear", "nearest"])
def test_resize_does_not_excuse_another_batch(resize):
    loss = featkd.AttentionMaskedLoss(3, 3, temperature=0.5, resize=resize)
    other = torch.ones(1, 3, 8, 8)
    raises(ValueError, lambda: loss(other, MAP), *shapes(MAP))


@pytest.mark.parametrize("resize", ["bilinear", "nearest"])
def test_resize_does_not_excuse_another_device(resize):
    loss = featkd.AttentionMaskedLoss(3, 3, temperature=0.5, resize=resize)
    other = torch.ones(2, 3, 8, 8, device="meta")
    raises(ValueError, lambda: loss(other, MAP), "cpu", "meta")


def test_terms_without_weight_are_checked_too():
    build = partial(featkd.FeatureDistillationLoss, hyperparameters=featkd.NORMALIZED)
    raises(TypeError, lambda: build(3, 3, subsample="2"), "`subsample`", "str")
    raises(ValueError, lambda: build(3, 3, inter_channels=0), "`inter_channels`", "got 0")
