"""G_s, G_c and the masks made of them: section 3.1."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import featkd
from featkd import (
    AttentionMask,
    ChannelAttention,
    SpatialAttention,
    attention_mask,
    channel_attention,
    functional,
    spatial_attention,
)
from tests.helpers.cases import FUSIONS
from tests.helpers.strategies import factors, fusions, generic_pairs, maps_of, pairs, temperatures
from tests.helpers.tensors import LargestTensor, close, normal, tensor


def test_golden_attention():
    features = tensor([[[[1, -2]], [[3, 4]]]])  # two channels of one row: (1, -2) and (3, 4)
    # Over the channels: (1 + 3) / 2 = 2 and (2 + 4) / 2 = 3; signed (1 + 3) / 2 and (-2 + 4) / 2.
    close(functional.spatial_attention(features), tensor([[[2, 3]]]))
    close(functional.spatial_attention(features, absolute=False), tensor([[[2, 1]]]))
    # Over the positions: (1 + 2) / 2 = 1.5 and (3 + 4) / 2 = 3.5; signed (1 - 2) / 2 and 3.5.
    close(functional.channel_attention(features), tensor([[1.5, 3.5]]))
    close(functional.channel_attention(features, absolute=False), tensor([[-0.5, 3.5]]))
    spatial, channel = functional.attention_maps(features)
    close(spatial, tensor([[[2, 3]]]))
    close(channel, tensor([[1.5, 3.5]]))


@pytest.mark.parametrize(
    ("temperature", "fusion", "expected"),
    [
        # softmax(0, ln 2 + ln 2) = (1, 4) / 5, times n = 2.
        (1.0, "logits", [0.4, 1.6]),
        # Halved logits: softmax(0, ln 2) = (1, 2) / 3, times 2.
        (2.0, "logits", [2 / 3, 4 / 3]),
        # The mean of softmax(0, ln 2) with itself: (1, 2) / 3, times 2.
        (1.0, "probabilities", [2 / 3, 4 / 3]),
        # Doubled logits: softmax(0, 2 ln 2) = (1, 4) / 5, times 2.
        (0.5, "probabilities", [0.4, 1.6]),
    ],
)
def test_golden_mask(temperature, fusion, expected):
    attention = tensor([[0, math.log(2)]])
    mask = functional.attention_mask(attention, attention, temperature=temperature, fusion=fusion)
    close(mask, tensor([expected]))


def test_golden_mask_of_different_maps():
    # softmax(0 + ln 3, ln 2 + 0) = (3, 2) / 5; (1, 2) / 3 and (3, 1) / 4 have mean (13, 11) / 24.
    student, teacher = tensor([[0, math.log(2)]]), tensor([[math.log(3), 0]])
    close(functional.attention_mask(student, teacher, temperature=1.0), tensor([[1.2, 0.8]]))
    close(
        functional.attention_mask(student, teacher, temperature=1.0, fusion="probabilities"),
        tensor([[13 / 12, 11 / 12]]),
    )


def test_peaks_far_apart_share_the_mask():
    """Either map's softmax underflows at the other's peak; that of their sum does not."""
    student, teacher = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 1.0]])
    mask = functional.attention_mask(student, teacher, temperature=1e-3)
    close(mask, torch.tensor([[1.5, 0.0, 1.5]]), 0.0)


@pytest.mark.parametrize("fusion", ["logits", "probabilities"])
@pytest.mark.parametrize("temperature", [1e-320, 1e-46])
def test_a_temperature_below_the_dtype_s_numbers_is_sharp_and_no_nan(temperature, fusion):
    maps = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 1.0]])
    mask = functional.attention_mask(maps, maps, temperature=temperature, fusion=fusion)
    close(mask, tensor([[1, 1, 1], [1.5, 0, 1.5]]), 1e-6)


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("name", ["spatial_attention", "channel_attention"])
def test_attention_makes_no_full_size_temporary(name, absolute):
    features = torch.ones(1, 64, 256, 512)  # 32 MiB
    with LargestTensor() as largest:
        getattr(functional, name)(features, absolute=absolute)
    assert largest.elements < features.numel() / 2


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize(
    ("module", "function"),
    [
        (SpatialAttention, featkd.spatial_attention),
        (ChannelAttention, featkd.channel_attention),
    ],
)
def test_attention_modules_equal_their_functions(module, function, absolute):
    features = normal(2, 3, 4, 5)
    close(module(absolute=absolute)(features), function(features, absolute=absolute), 0.0)
    close(module()(features), function(features), 0.0)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_mask_module_equals_its_function(fusion):
    maps = normal(2, 4, 5, seed=1), normal(2, 4, 5, seed=2)
    expected = featkd.attention_mask(*maps, temperature=0.3, fusion=fusion)
    close(AttentionMask(0.3, fusion)(*maps), expected, 0.0)
    close(AttentionMask(0.3, fusion=fusion)(*maps), expected, 0.0)
    assert AttentionMask(0.3).fusion == "logits"


# --- what holds for any input ---------------------------------------------------------------------


@given(pairs, factors)
def test_signed_attention_is_odd(pair, k):
    for attention in (spatial_attention, channel_attention):
        close(attention(-k * pair[0], absolute=False), -k * attention(pair[0], absolute=False))


@given(pairs, temperatures, fusions)
def test_a_mask_has_mean_1_over_each_image(pair, temperature, fusion):
    for maps in maps_of(*pair).values():
        mask = attention_mask(*maps, temperature=temperature, fusion=fusion)
        assert mask.shape == maps[0].shape
        assert (mask >= 0).all()
        close(mask.flatten(1).mean(1), torch.ones(len(mask)))


@given(pairs, temperatures, factors, fusions)
def test_a_mask_is_unchanged_if_maps_and_temperature_scale_alike(pair, temperature, k, fusion):
    for maps in maps_of(*pair).values():
        mask = attention_mask(*maps, temperature=temperature, fusion=fusion)
        scaled = attention_mask(
            k * maps[0], k * maps[1], temperature=k * temperature, fusion=fusion
        )
        close(scaled, mask)


@given(pairs, fusions)
def test_a_mask_of_infinite_temperature_is_ones(pair, fusion):
    for maps in maps_of(*pair).values():
        mask = attention_mask(*maps, temperature=1e12, fusion=fusion)
        close(mask, torch.ones_like(mask), 1e-9)


@given(generic_pairs(), fusions)
def test_a_mask_of_temperature_near_0_is_all_on_the_largest_element(pair, fusion):
    for attention, _ in maps_of(*pair).values():
        mask = attention_mask(attention, attention, temperature=1e-12, fusion=fusion).flatten(1)
        largest = attention.flatten(1).argmax(1, keepdim=True)
        close(mask, torch.zeros_like(mask).scatter(1, largest, float(mask.shape[1])), 1e-6)


@given(pairs, temperatures, fusions)
def test_a_mask_grows_with_the_attention(pair, temperature, fusion):
    for attention, _ in maps_of(*pair).values():
        mask = attention_mask(attention, attention, temperature=temperature, fusion=fusion)
        order = attention.flatten(1).argsort(1)
        assert (mask.flatten(1).gather(1, order).diff(dim=1) >= 0).all()


@given(pairs, st.floats(-100, 100), fusions)
def test_a_mask_is_unchanged_if_a_constant_is_added_to_a_map(pair, constant, fusion):
    for student, teacher in maps_of(*pair).values():
        mask = attention_mask(student, teacher, temperature=0.5, fusion=fusion)
        close(attention_mask(student + constant, teacher, temperature=0.5, fusion=fusion), mask)
