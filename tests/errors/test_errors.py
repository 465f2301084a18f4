"""Misuse that no single argument shows, and one text of each message; the rest is in the table."""

import dataclasses
import sys
from functools import partial

import pytest
import torch

import featkd
from featkd import functional as f
from featkd._checks import require_losses
from featkd.taps.layouts import converts_by_side
from tests.helpers.misuse_kinds import NESTED
from tests.helpers.models import raises

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


def test_the_largest_number_is_finite():
    assert featkd.AttentionMask(sys.float_info.max).temperature == sys.float_info.max
    raises(ValueError, lambda: featkd.AttentionMask(2 * sys.float_info.max), "got inf")


# --- every message once, word for word ------------------------------------------------------------

META = MAP.to("meta")
LAST = torch.ones(2, 4, 5, 3)
LARGE = torch.ones(2, 3, 8, 8)
TRANSFER = featkd.AttentionTransferLoss(3, 3)
CHANNEL = featkd.AttentionTransferLoss(3, 3, attention="channel")
MASKED = featkd.AttentionMaskedLoss(3, 3, temperature=0.5)
OVERALL = featkd.FeatureDistillationLoss
RELATION = partial(featkd.NonLocalRelation, kind="gaussian")
NON_LOCAL = partial(featkd.NonLocalLoss, kind="gaussian")
CONVERT = partial(converts_by_side, levels=["c1"])
OTHER_SIZE = (
    'got (2, 3, 8, 8): take layers of one stride, or the loss\'s `resize` ("bilinear"); for models '
    "that resize images the distiller's `shared_input`."
)


def masked(**masks):
    return f.attention_masked_loss(MAP, MAP, **masks)


def transfer(teacher=MAP, **options):
    return f.attention_transfer_loss(MAP, teacher, **options)


def masks_of(student=MAP, teacher=MAP, **options):
    return f.attention_mask(student, teacher, **{"temperature": 1.0, **options})


def at_level(student=MAP, teacher=MAP, **options):
    return OVERALL({"c1": 3}, {"c1": 3}, **options)({"c1": student}, {"c1": teacher})


TEXTS = {
    "`normalize` must be False with `standardize`, got True.": (
        lambda: featkd.NonLocalLoss(3, 3, kind="gaussian", normalize=True, standardize=True)
    ),
    "`reduction` must be 'none', 'mean' or 'sum' with `standardize`, which gives no norm, "
    "got 'norm'.": lambda: f.non_local_loss(MAP, MAP, reduction="norm", standardize=True),
    "`reduction` must be 'none', 'mean' or 'sum' with `standardize`, which gives no norm, "
    "got 'mean_square'.": lambda: f.non_local_loss(
        MAP, MAP, reduction="mean_square", standardize=True
    ),
    "`student_features` must have the shape (B, 7, H, W), got (2, 3, 4, 5).": (
        lambda: featkd.FeatureDistillationLoss(7, 3)(MAP, MAP)
    ),
    # the checks
    "`features` must be a tensor, got list.": lambda: f.spatial_attention([1.0]),
    "`features` must be a tensor of float16, bfloat16, float32 or float64, got torch.int64.": (
        lambda: f.channel_attention(MAP.long())
    ),
    "`features` must be a dense tensor, got a nested tensor.": lambda: f.spatial_attention(NESTED),
    "`features` must have the shape (B, C, H, W) with C, H and W at least 1, got (3, 4, 5).": (
        lambda: f.channel_attention(MAP[0])
    ),
    "`student` must have the shape of `teacher` (2, 7, 4, 5), got (2, 3, 4, 5): "
    "`featkd.AttentionMaskedLoss` has an adapter, and `resize`.": (
        lambda: f.attention_masked_loss(MAP, OTHER_CHANNELS)
    ),
    "`student` must have the shape of `teacher` (2, 3, 4, 5), got (2, 4, 5, 3): of channels that "
    "come last `featkd.from_channels_last` makes a map.": (
        lambda: f.attention_masked_loss(MAP.permute(0, 2, 3, 1), MAP)
    ),
    "`student` must have the shape of `teacher` (2, 7, 4, 5), got (2, 3, 4, 5): "
    "`featkd.AttentionTransferLoss` has an adapter, and `resize`.": (
        lambda: f.attention_transfer_loss(MAP, OTHER_CHANNELS)
    ),
    "`student` must have the batch, height and width of `teacher` (2, 7, 6, 5), "
    "got (2, 3, 4, 5).": lambda: transfer(torch.ones(2, 7, 6, 5), channel_adapter=len),
    "`reduction` must be one of 'none', 'mean', 'sum', 'norm', 'mean_square', got int.": (
        lambda: transfer(reduction=1)
    ),
    "`reduction` must be one of 'none', 'mean', 'sum', 'norm', 'mean_square', got 'max'.": (
        lambda: transfer(reduction="max")
    ),
    "`absolute` must be True or False, got int.": lambda: transfer(absolute=1),
    "`temperature` must be a number, got str.": lambda: masks_of(temperature="1"),
    "`temperature` must be finite and above 0, got 0.": lambda: masks_of(temperature=0),
    "`alpha` must be at least 0, got -1.": lambda: featkd.Hyperparameters(-1, 0, 0, 1),
    "`student_channels` must be an integer, got str.": lambda: NON_LOCAL("3", 3),
    "`teacher_channels` must be below 2**31, got 2147483648.": lambda: OVERALL(3, 2**31),
    "`loss` must return a mapping from name to tensor, got list.": lambda: require_losses([], None),
    "`loss` must return tensors, got float for 'l'.": lambda: require_losses({"l": 1.0}, None),
    # functions
    "`spatial_adapter` must be callable or None, got str.": (
        lambda: transfer(spatial_adapter="conv")
    ),
    "`spatial_adapter` must return a tensor, got float.": (
        lambda: transfer(spatial_adapter=lambda x: 1.0)
    ),
    "`spatial_adapter` must have a result of the shape (2, 1, 4, 5), got (1, 1, 4, 5).": (
        lambda: transfer(spatial_adapter=lambda x: x[:1])
    ),
    "`spatial_mask` must have the shape (2, 4, 5), got (2, 5, 4).": (
        lambda: masked(spatial_mask=torch.ones(2, 5, 4))
    ),
    "`channel_mask` must be on the device of `student` cpu, got meta.": (
        lambda: masked(channel_mask=torch.ones(2, 3, device="meta"))
    ),
    "`student_attention` must have the shape (B, ...) with at least one element per image, "
    "got (3,).": lambda: masks_of(torch.ones(3)),
    "`teacher_attention` must have the shape of `student_attention` (2, 3, 4, 5), "
    "got (3, 4, 5).": lambda: masks_of(teacher=MAP[0]),
    "`features` must have the shape (B, D, *positions) with at least one position, got (4, 5).": (
        lambda: f.gaussian_relation(MAP[0, 0], MAP)
    ),
    "`theta` must have the shape (B, 1, *positions), got (2, 3, 4, 5).": (
        lambda: f.concatenation_relation(MAP, MAP, MAP)
    ),
    "`phi` must have the batch and width of `theta` (2, 3, 4, 5), got (2, 7, 4, 5).": (
        lambda: f.dot_product_relation(MAP, OTHER_CHANNELS, MAP)
    ),
    "`g` must have the batch and positions of `phi` (2, 3, 4, 5), got (2, 3, 8, 8).": (
        lambda: f.dot_product_relation(MAP, MAP, LARGE)
    ),
    "`scale` must be finite, got nan.": (
        lambda: f.embedded_gaussian_relation(MAP, MAP, MAP, scale=float("nan"))
    ),
    "`student_relation` must have the shape of `teacher_relation` (2, 7, 4, 5), "
    "got (2, 3, 4, 5): `featkd.NonLocalLoss` has an adapter, and `resize`.": (
        lambda: f.non_local_loss(MAP, OTHER_CHANNELS)
    ),
    # layouts
    "`features` must have the shape (B, H, W, C) with H, W and C at least 1, got (3, 4, 5).": (
        lambda: featkd.from_channels_last(MAP[0])
    ),
    "`size` must be a pair (H, W), got 'ab'.": lambda: featkd.from_tokens(MAP[0], "ab"),
    "`tokens` must have the shape (B, 2147483660, C), 2147483647 + 3 x 4 + 1 tokens (`prefix`, "
    "positions, `suffix`), got (3, 4, 5).": (
        lambda: featkd.from_tokens(MAP[0], (3, 4), prefix=2**31 - 1, suffix=1)
    ),
    "`convert` must be a mapping from level to function, got list.": lambda: CONVERT([abs]),
    "`convert` must name levels of ['c1'], got 'c2'.": lambda: CONVERT({"c2": abs}),
    "`convert['c1']` must be a function or a (student's, teacher's) pair of functions or None, "
    "got None.": lambda: CONVERT({"c1": None}),
    # modules
    "`student` must have the shape (B, 3, H, W), got (2, 4, 5, 3): if its channels come last, "
    "see `featkd.from_channels_last` and the argument `convert` of taps and distillers, for which "
    "`match_layers` has `match.convert`.": (lambda: TRANSFER(LAST, MAP)),
    "`teacher` must have the shape (B, 3, H, W), got (2, 20, 3): if its channels come last, "
    "see `featkd.from_tokens` and the argument `convert` of taps and distillers, for which "
    "`match_layers` has `match.convert`.": (lambda: TRANSFER(MAP, LAST.flatten(1, 2))),
    "`student` must have the shape (B, 3, H, W), got (2, 7, 4, 5).": (
        lambda: TRANSFER(OTHER_CHANNELS, MAP)
    ),
    "`student` must have the shape (B, 3, H, W), got (2, 7, 4, 5), and `teacher` (2, 3, 4, 5) has "
    "the 3 channels: the student comes first.": (
        lambda: featkd.AttentionTransferLoss(3, 7)(OTHER_CHANNELS, MAP)
    ),
    f"`student` must have the height and width of `teacher` (2, 3, 4, 5), {OTHER_SIZE}": (
        lambda: TRANSFER(LARGE, MAP)
    ),
    "`student` must be on the device of `loss` cpu, got meta.": lambda: CHANNEL(META, META),
    "`batch_norm` must be False without `residual`, got True.": (
        lambda: RELATION(3, batch_norm=True)
    ),
    "`batch_norm` must be False with `teacher_relation` 'fixed', as that block would stay the "
    "identity it starts as, got True.": (
        lambda: dataclasses.replace(featkd.RELEASED_ONE_STAGE, teacher_relation="fixed")
    ),
    # the overall loss
    "`hyperparameters` must be a Hyperparameters, such as `featkd.STANDARDIZED`, got dict.": (
        lambda: featkd.FeatureDistillationLoss(3, 3, hyperparameters={})
    ),
    "`teacher_channels` must be an integer, as `student_channels` is, got dict.": (
        lambda: OVERALL(3, {"c1": 3})
    ),
    "`teacher_channels` must be a mapping, as `student_channels` is, got int.": (
        lambda: OVERALL({"c1": 3}, 3)
    ),
    "`student_channels` must be an integer or a mapping from level to one, got list.": (
        lambda: OVERALL([8, 8], [8, 8])
    ),
    "`student_channels` must have strings for level names, got int.": lambda: OVERALL({1: 3}, {}),
    "`student_channels` must have at least one level, none with a '/' or named like an attribute "
    "of nn.ModuleDict, got ['keys'].": lambda: OVERALL({"keys": 3}, {"keys": 3}),
    "`teacher_channels` must have the levels ['c1'], got ['c2'].": (
        lambda: OVERALL({"c1": 3}, {"c2": 3})
    ),
    "`inter_channels['c1']` must be at least 1, got 0.": lambda: at_level(inter_channels=0),
    "`teacher_features` must be a mapping from level to tensor, got Tensor.": (
        lambda: OVERALL({"c1": 3}, {"c1": 3})({"c1": MAP}, MAP)
    ),
}


@pytest.mark.parametrize("text", TEXTS)
def test_the_text_of_an_error(text):
    with pytest.raises((TypeError, ValueError)) as caught:
        TEXTS[text]()
    assert str(caught.value) == text
