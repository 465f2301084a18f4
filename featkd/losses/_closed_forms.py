"""The same values as the plain formulas, with their own backward.

Why: autograd keeps every temporary of a formula, each as large as a feature map, and each costs a
trip to memory. The gradients of means and distances are short formulas of the inputs alone. So the
features are read once each way, in blocks that stay in cache. The plain formula stands where each
function is called. It serves the compiler (which fuses it), forward mode, `torch.func`, and
attention maps that have no graph and fit the cache.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._blocks import Part, channel_blocks, map_blocks, product, scaled, whole
from ._numerics import cast, compute_dtype, dtype_for_few

Dims = tuple[int, ...]
# So many numbers torch adds one by one as exactly as by pairs, to 5e-7 in float32.
_FEW = 256
OVER_CHANNELS: Dims = (1,)
OVER_POSITIONS: Dims = (2, 3)


def means(features: Tensor, dims: tuple[Dims, ...], absolute: bool) -> tuple[Tensor, ...]:
    """The means of `features`, or their absolute values, over each of `dims`."""
    result: tuple[Tensor, ...] = _Means.apply(features, dims, absolute)
    return result


def weighted_distance(
    a: Tensor, b: Tensor, by_position: Tensor | None = None, by_channel: Tensor | None = None
) -> Tensor:
    """`sqrt(sum w v (a - b)^2)` per image, `(B,)`: w `(B, H, W)` and v `(B, C)` or 1."""
    result: Tensor = _WeightedDistance.apply(a, b, by_position, by_channel)
    return result


def row_norms(x: Tensor) -> Tensor:
    """The L2 norm of each row of `x`, `(B, N) -> (B,)`."""
    result: Tensor = _RowNorms.apply(x)
    return result


class _Means(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, dims: tuple[Dims, ...], absolute: bool
    ) -> tuple[Tensor, ...]:
        ctx.dims, ctx.absolute = dims, absolute
        ctx.save_for_backward(features)
        dtype = compute_dtype(features)
        over_channels: list[Tensor] = []
        over_positions: list[Tensor] = []
        for index, part in enumerate(channel_blocks(features)):
            wide = cast(part(features), dtype)
            wide = wide.abs() if absolute else wide
            if OVER_CHANNELS in dims:
                _add_pairwise(over_channels, wide.sum(OVER_CHANNELS), index)
            if OVER_POSITIONS in dims:
                over_positions.append(wide.mean(OVER_POSITIONS))
        return tuple(
            sum(over_channels[:-1], start=over_channels[-1]) / _count(features, d)
            if d == OVER_CHANNELS
            else of_all_channels(over_positions)
            for d in dims
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (features,) = ctx.saved_tensors
        slopes = {d: grad / _count(features, d) for d, grad in zip(ctx.dims, grads, strict=True)}
        spatial, channel = slopes.get(OVER_CHANNELS), slopes.get(OVER_POSITIONS)

        def factors(part: Part) -> tuple[Tensor, Tensor]:
            x = part(features)
            terms = [] if spatial is None else [spatial[:, None]]
            terms += [] if channel is None else [part(channel[:, :, None, None])]
            slope = terms[0] if len(terms) == 1 else terms[0] + terms[1]
            return x.sign() if ctx.absolute else torch.ones_like(x), slope

        return product(features, factors), None, None


def _add_pairwise(sums: list[Tensor], part: Tensor, index: int) -> None:
    """Add the part of this index to `sums`, one sum for each 1 among the binary digits of it.

    So an element goes through log2(parts) additions, and as many roundings, not one for each part.
    """
    while index % 2:
        part = part.add_(sums.pop())
        index //= 2
    sums.append(part)


def of_all_channels(parts: list[Tensor], dim: int = 1) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _count(features: Tensor, dims: Dims) -> int:
    return math.prod(features.shape[d] for d in dims)


def _norm(x: Tensor, dims: Dims, keepdim: bool = False) -> Tensor:
    """The L2 norm over `dims` of a fresh `x`, which it may overwrite."""
    # In other layouts it adds all numbers one by one.
    if _count(x, dims) <= _FEW and x.is_contiguous():
        result: Tensor = torch.linalg.vector_norm(x, dim=dims, keepdim=keepdim)
        return result
    return x.square_().sum(dims, keepdim).sqrt()


class _WeightedDistance(torch.autograd.Function):
    """Its gradient is w v (a - b) / distance; inputs and distance alone are saved."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, by_position: Tensor | None, by_channel: Tensor | None
    ) -> Tensor:
        dtype = compute_dtype(a, b, by_position, by_channel)
        weight = None if by_position is None else by_position[:, None]
        even = by_position is None and by_channel is None

        def of_channels(part: Part) -> tuple[Tensor]:
            difference = cast(part(a), dtype) - part(b)
            if even:
                return (_norm(difference, OVER_POSITIONS, keepdim=True),)
            square = difference.square_()
            square = square if weight is None else square.mul_(weight)
            return (square.sum(OVER_POSITIONS, keepdim=True),)

        (each,) = map_blocks(b, of_channels)
        if even:
            distance = _norm(each, (1, 2, 3))
        else:
            energy = each if by_channel is None else each * by_channel[:, :, None, None]
            distance = energy.sum((1, 2, 3)).sqrt()
        ctx.save_for_backward(a, b, by_position, by_channel, distance)
        return distance

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, by_position, by_channel, distance = ctx.saved_tensors
        slope = grad / distance.masked_fill(distance == 0, torch.inf)  # 0 at equality
        weight = None if by_position is None else by_position[:, None]

        def difference(part: Part) -> Tensor:
            result: Tensor = cast(part(a), distance.dtype) - part(b)
            return result

        def gradient(features: Tensor, slope: Tensor) -> Tensor:
            slopes = slope[:, None, None, None]
            if by_channel is not None:
                slopes = slopes * by_channel[:, :, None, None]

            def factors(part: Part) -> tuple[Tensor, Tensor]:
                rest = difference(part)
                rest = rest if weight is None else scaled(rest, weight)
                return rest, slopes if by_channel is None else part(slopes)

            return product(features, factors)

        to_a = gradient(a, slope) if ctx.needs_input_grad[0] else None
        to_b = gradient(b, -slope) if ctx.needs_input_grad[1] else None
        to_position = to_channel = None
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            square = difference(whole).square() * (slope / 2)[:, None, None, None]
            if ctx.needs_input_grad[2]:
                weighted = square if by_channel is None else square * by_channel[:, :, None, None]
                to_position = weighted.sum(1)
            if ctx.needs_input_grad[3]:
                to_channel = (square if weight is None else square * weight).sum(OVER_POSITIONS)
        return to_a, to_b, to_position, to_channel


class _RowNorms(torch.autograd.Function):
    """Torch's own has a second derivative of NaN at 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        exact: Tensor = torch.linalg.vector_norm(x, dim=1, dtype=dtype_for_few(x))
        norms = exact.to(x.dtype)
        ctx.save_for_backward(x, norms)
        return norms

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, norms = ctx.saved_tensors
        unit = x / norms.masked_fill(norms == 0, torch.inf)[:, None]  # 0 at 0
        result: Tensor = unit * grad[:, None]
        return result
