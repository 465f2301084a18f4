"""Channels in blocks of 4 or 16 MiB: whatever their size, the same values and gradients."""

import pytest
import torch
from torch import Tensor

from featkd.losses import _blocks
from tests.helpers.cases import CASES, gradients_of
from tests.helpers.marks import each_case
from tests.helpers.tensors import close, leaves, normal


@pytest.mark.parametrize(
    ("shape", "threads", "widths"),
    [
        ((2, 5, 512, 512), 1, [2, 2, 1]),  # 2 MiB a channel
        ((2, 9, 512, 512), 2, [8, 1]),
        ((2, 9, 512, 512), 64, [8, 1]),
        ((2, 2, 2048, 2048), 2, [1, 1]),  # 32 MiB a channel: never less than one
        ((1, 5, 3, 4), 1, [5]),
        ((0, 5, 3, 4), 1, [5]),
    ],
    ids=str,
)
def test_blocks_of_channels_are_of_4_mib_and_of_16_with_several_threads(
    shape, threads, widths, monkeypatch
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    features = torch.empty(shape)
    with torch.no_grad():
        blocks = _blocks.channel_blocks(features)
        halves = _blocks.channel_blocks(features[:1], maps=2)
        found, of_half = ([part(features).shape[1] for part in parts] for parts in (blocks, halves))
    assert found == widths
    if len(features) == 2:  # two maps of one image
        assert of_half == widths
    assert len(_blocks.channel_blocks(features)) == 1  # where a graph is recorded


def test_in_blocks_each_is_worked_on_once_and_in_place(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    features, worked_on = torch.ones(1, 5, 512, 1024), []

    def factor(part):
        worked_on.append(part(features).storage_offset() // (512 * 1024))
        return (part(features) * 2,)

    with torch.no_grad():
        (doubled,) = _blocks.map_blocks(features, factor)
        assert _blocks.scaled(doubled, torch.tensor(2.0)) is doubled
        assert _blocks.less(doubled, torch.tensor(3.0)) is doubled
    assert worked_on == [0, 2, 4]
    assert (doubled == 1).all()


@pytest.fixture
def blocks_of_one(monkeypatch):
    """The smallest blocks: each channel on its own."""
    monkeypatch.setattr(_blocks, "_BLOCK_BYTES", 1)


@each_case
@pytest.mark.usefixtures("blocks_of_one")
def test_in_blocks_value_and_gradient_are_those_of_the_loops(case):
    tensors = leaves(case.inputs())
    close(case(**tensors), case.expected(**tensors))
    assert torch.autograd.gradcheck(case.of_one, tuple(tensors.values()))


@each_case
@pytest.mark.usefixtures("blocks_of_one")
def test_in_blocks_lower_precision_and_other_layouts_change_nothing(case):
    """The gradient is written in place: in the dtype and the layout of its input."""
    tensors = {name: value.bfloat16() for name, value in case.inputs().items()}
    wide = gradients_of(case, leaves({name: value.float() for name, value in tensors.items()}))
    for turn in (lambda x: x, lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2)):
        narrow = {name: turn(value).requires_grad_() for name, value in tensors.items()}
        for name, gradient in gradients_of(case, narrow).items():
            assert gradient.dtype == torch.bfloat16
            close(gradient, wide[name], 1e-2)


@each_case
def test_in_blocks_second_derivatives_are_those_of_one_block(case, monkeypatch):
    tensors = leaves(case.inputs())
    found = []
    for size in (_blocks._BLOCK_BYTES, 1):
        monkeypatch.setattr(_blocks, "_BLOCK_BYTES", size)
        inputs = tuple(tensors.values())
        value = case(**tensors).square().sum()
        gradient = torch.autograd.grad(value, inputs, create_graph=True)
        total = sum(x.square().sum() for x in gradient)
        found.append(torch.autograd.grad(total, inputs, materialize_grads=True))
    for actual, expected in zip(*found, strict=True):
        close(actual, expected)


def plain_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    maps = [[x.abs().mean(dim).flatten(1) for x in (student, teacher)] for dim in (1, (2, 3))]
    return sum((ours - theirs).norm(dim=1).mean() for ours, theirs in maps)


def plain_masked(
    student: Tensor, teacher: Tensor, spatial_mask: Tensor, channel_mask: Tensor
) -> Tensor:
    weights = spatial_mask[:, None] * channel_mask[:, :, None, None]
    return ((student - teacher).square() * weights).sum((1, 2, 3)).sqrt().mean()


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("spatial_attention", lambda features: features.abs().mean(1)),
        ("spatial_attention-signed", lambda features: features.mean(1)),
        ("channel_attention", lambda features: features.abs().mean((2, 3))),
        ("channel_attention-signed", lambda features: features.mean((2, 3))),
        ("transfer", plain_transfer),
        ("masked-both", plain_masked),
    ],
)
def test_maps_of_several_megabytes_equal_the_plain_formula(name, plain):
    """However the work is cut into blocks, each of 5 channels of 0.96 MB is counted once."""
    case = next(case for case in CASES if case.name == name)
    tensors = {}
    for index, (key, shape) in enumerate(case.shapes(2, 200, 300).items()):
        shape = tuple(5 if size == 3 else size for size in shape)
        tensors[key] = normal(*shape, seed=index)
        if key.endswith("mask"):
            tensors[key] = tensors[key].exp()
    tensors = leaves(tensors)
    expected = plain(**tensors)
    output = case(**tensors)
    close(output, expected)
    weights = normal(*output.shape, seed=9)
    expected = torch.autograd.grad((weights * expected).sum(), tensors.values())
    for a, b in zip(gradients_of(case, tensors).values(), expected, strict=True):
        close(1e3 * a, 1e3 * b)
