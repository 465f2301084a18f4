"""The means of a feature map over its channels and over its positions: the two attention maps."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from ._blocks import channel_blocks, product, takes_closed_form
from ._precision import compute_dtype

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
