"""Half the mean squared difference of standardised features, with its own backward.

Why: see `_closed_forms.py`. The plain formula stands in `standardize.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._blocks import Part, less, map_blocks, product, scaled, whole
from ._closed_forms import OVER_POSITIONS, Dims
from ._numerics import cast, compute_dtype


def correlation_distance(
    a: Tensor, b: Tensor, by_position: Tensor | None = None, by_channel: Tensor | None = None
) -> Tensor:
    """Half the mean of `w v (s - t)^2` per image, `(B,)`, of `a` and `b` standardised."""
    result: Tensor = _CorrelationDistance.apply(a, b, by_position, by_channel)
    return result


class _CorrelationDistance(torch.autograd.Function):
    """Of a slope u at s goes through the standardisation (u - mean u - s mean(u s)) / sigma.

    Here u is w v (s - t) / (CHW). The inputs and five numbers a channel are saved. Without w all
    of it is v (c s - t) / (CHW sigma): the mean of (s - t)^2 says the correlation c.
    """

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, by_position: Tensor | None, by_channel: Tensor | None
    ) -> Tensor:
        dtype = compute_dtype(a, b, by_position, by_channel)

        def numbers(part: Part) -> tuple[Tensor, Tensor, Tensor]:
            both = torch.stack([cast(part(x), dtype) for x in (a, b)])
            rest, (means, inverses) = centred(both, (3, 4), fresh=True)
            rest = rest.mul_(inverses)
            square = rest[0].sub_(rest[1]).square_()  # unpacked, no tracer would take it
            if by_position is not None:
                square = square.mul_(by_position[:, None])
            return means, inverses, square.mean(OVER_POSITIONS, keepdim=True)

        means, inverses, energy = map_blocks(b, numbers, maps=2)
        ctx.save_for_backward(a, b, by_position, by_channel, means, inverses, energy)
        if by_channel is not None:
            energy = energy * by_channel[:, :, None, None]
        return energy.mean((1, 2, 3)) / 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, by_position, by_channel, means, inverses, energy = ctx.saved_tensors
        known = by_position is None
        if torch.is_grad_enabled():  # for a second derivative all depends on the features
            known = False
            sides = (centred(cast(x, means.dtype), OVER_POSITIONS)[1] for x in (a, b))
            means, inverses = zip(*sides, strict=True)
        slope = (grad / math.prod(a.shape[1:]))[:, None, None, None]
        weighted = slope if by_channel is None else slope * by_channel[:, :, None, None]

        def scaled_rest(side: int, part: Part, factor: Tensor) -> Tensor:
            mean = means[side]
            rest: Tensor = cast(part((a, b)[side]), mean.dtype) - part(mean)
            return scaled(rest, part(factor))

        def gradient(side: int) -> Tensor:
            inverse, other = inverses[side], inverses[1 - side]
            factor = weighted * inverse
            # The correlation is 0 beside a constant.
            scale = inverse * (other.sign() + 1 - energy) / 2 if known else inverse

            def factors(part: Part) -> tuple[Tensor, Tensor]:
                s, t = scaled_rest(side, part, scale), scaled_rest(1 - side, part, other)
                if known:
                    return less(s, t), part(factor)
                u = s - t if by_position is None else scaled(s - t, by_position[:, None])
                along = (u * s).mean(OVER_POSITIONS, keepdim=True)
                u = less(u, u.mean(OVER_POSITIONS, keepdim=True))
                return less(u, scaled(s, along)), part(factor)

            return product((a, b)[side], factors)

        to_a = gradient(0) if ctx.needs_input_grad[0] else None
        to_b = gradient(1) if ctx.needs_input_grad[1] else None
        to_position = to_channel = None
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            s, t = (scaled_rest(side, whole, inverses[side]) for side in (0, 1))
            square = (s - t).square() / 2
            if ctx.needs_input_grad[2]:
                to_position = (square * weighted).sum(1)
            if ctx.needs_input_grad[3]:
                square = square if by_position is None else square * by_position[:, None]
                to_channel = square.sum(OVER_POSITIONS) * slope[:, :, 0, 0]
        return to_a, to_b, to_position, to_channel


def centred(x: Tensor, dims: Dims, fresh: bool = False) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """`x` less its mean over `dims`; the mean, and 1 over the deviation, or 0 if `x` is constant.

    It counts as constant where its deviation is but the rounding of its mean. `fresh`: `x` may be
    overwritten.
    """
    mean = x.mean(dims, keepdim=True)
    rest = less(x, mean) if fresh else x - mean
    # What rounding left of the mean: of a constant nothing stays. 0 otherwise, derivatives too.
    left = rest.detach().mean(dims, keepdim=True)
    rest = less(rest, left)
    variance = rest.square().mean(dims, keepdim=True)
    constant = variance <= (torch.finfo(x.dtype).eps * mean).square()
    # No `rsqrt`: its derivative has the variance to the power 3/2, which overflows before it.
    inverse = variance.masked_fill(constant, torch.inf).sqrt().reciprocal()
    return rest, (mean + left, inverse)
