"""The means of a feature map over its channels and over its positions: the two attention maps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ._blocks import channel_blocks, product, takes_closed_form
from .._checks import require_same_device, require_shape, require_tensor
from ._numerics import compute_dtype

Attention = Literal["both", "spatial", "channel"]
Dims = tuple[int, ...]
Maps = dict[Dims, Tensor]

OVER_CHANNELS: Dims = (1,)
OVER_POSITIONS: Dims = (2, 3)
MAPS: dict[Attention, tuple[Dims, ...]] = {
    "both": (OVER_CHANNELS, OVER_POSITIONS),
    "spatial": (OVER_CHANNELS,),
    "channel": (OVER_POSITIONS,),
}


def attention_maps(features: Tensor, dims: tuple[Dims, ...], absolute: bool = True) -> Maps:
    """The mean over each of `dims`, :data:`OVER_CHANNELS` or :data:`OVER_POSITIONS`, in one go."""
    if takes_closed_form():
        return dict(zip(dims, _Means.apply(features, dims, absolute), strict=True))
    wide = features.to(compute_dtype(features))
    wide = wide.abs() if absolute else wide
    return {d: wide.mean(d) for d in dims}


def require_maps(maps: object, dims: tuple[Dims, ...], student: Tensor, teacher: Tensor) -> None:
    """`None`, or what :func:`attention_maps` gives for each side."""
    if maps is None:
        return
    if not isinstance(maps, tuple) or not all(isinstance(of_side, Mapping) for of_side in maps):
        found = type(maps).__name__
        raise TypeError(f"`maps` must be a (student's, teacher's) pair of mappings, got {found}.")
    if len(maps) != 2 or not all(d in of_side for d in dims for of_side in maps):
        keys = [list(of_side) for of_side in maps]
        raise ValueError(f"`maps` must be two mappings with the keys {list(dims)}, got {keys}.")
    for side, features in enumerate((student, teacher)):
        for d in dims:
            name, found = f"maps[{side}][{d}]", maps[side][d]
            require_tensor(name, found)
            shape = tuple(n for i, n in enumerate(features.shape) if i not in d)
            require_shape(name, found, shape, "the shape")
            require_same_device(name, found, "student", student)


class _Means(torch.autograd.Function):
    """The means with their gradient in closed form: the features are read once each way."""

    @staticmethod
    def forward(features: Tensor, dims: tuple[Dims, ...], absolute: bool) -> tuple[Tensor, ...]:
        dtype = compute_dtype(features)
        over_channels: list[Tensor] = []
        over_positions: list[Tensor] = []
        for index, block in enumerate(channel_blocks(features)):
            wide = features[:, block].to(dtype)
            wide = wide.abs() if absolute else wide
            if OVER_CHANNELS in dims:
                _add_pairwise(over_channels, wide.sum(OVER_CHANNELS), index)
            if OVER_POSITIONS in dims:
                over_positions.append(wide.sum(OVER_POSITIONS))
        sums = {
            d: sum(over_channels[:-1], start=over_channels[-1])
            if d == OVER_CHANNELS
            else torch.cat(over_positions, 1)
            for d in dims
        }
        return tuple(total / _count(features, d) for d, total in sums.items())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        features, ctx.dims, ctx.absolute = inputs
        ctx.save_for_backward(features)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (features,) = ctx.saved_tensors
        slopes = {d: grad / _count(features, d) for d, grad in zip(ctx.dims, grads, strict=True)}
        spatial, channel = slopes.get(OVER_CHANNELS), slopes.get(OVER_POSITIONS)

        def factors(block: slice) -> tuple[Tensor, Tensor]:
            part = features[:, block]
            terms = [] if spatial is None else [spatial[:, None]]
            terms += [] if channel is None else [channel[:, block, None, None]]
            slope = terms[0] if len(terms) == 1 else terms[0] + terms[1]
            return part.sign() if ctx.absolute else torch.ones_like(part), slope

        return product(features, factors), None, None


def _add_pairwise(sums: list[Tensor], part: Tensor, index: int) -> None:
    """Add the part of this index to `sums`, one sum for each 1 among the binary digits of it.

    So an element goes through log2(parts) additions, and as many roundings, not one for each part.
    """
    while index % 2:
        part = part.add_(sums.pop())
        index //= 2
    sums.append(part)


def _count(features: Tensor, dims: Dims) -> int:
    return math.prod(features.shape[d] for d in dims)
