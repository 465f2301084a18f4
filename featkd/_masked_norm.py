"""The norm of eq. (2): the L2 distance of two feature maps under both masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._blocks import channel_blocks, product, scaled, takes_closed_form
from ._precision import compute_dtype, savable
from ._reduction import root


def masked_norm(
    student: Tensor, teacher: Tensor, spatial_mask: Tensor | None, channel_mask: Tensor | None
) -> Tensor:
    """Eq. (2) per image, `(B,)`."""
    student, teacher = savable(student), savable(teacher)
    spatial_mask = None if spatial_mask is None else savable(spatial_mask)
    channel_mask = None if channel_mask is None else savable(channel_mask)
    if takes_closed_form():
        result: Tensor = _MaskedNorm.apply(student, teacher, spatial_mask, channel_mask)
        return result
    dtype = compute_dtype(student, teacher, spatial_mask, channel_mask)
    square = _weigh((student.to(dtype) - teacher).square(), spatial_mask, channel_mask)
    return root(square.sum((1, 2, 3)))


def _weigh(x: Tensor, spatial_mask: Tensor | None, channel_mask: Tensor | None) -> Tensor:
    """`x * M_s * M_c` for `x` of shape (B, C, H, W), of the widest dtype."""
    if spatial_mask is not None:
        x = x * spatial_mask[:, None]
    if channel_mask is not None:
        x = x * channel_mask[:, :, None, None]
    return x


class _MaskedNorm(torch.autograd.Function):
    """Eq. (2) with its gradient in closed form, M_s M_c (S - T) / L; saves inputs and L alone."""

    @staticmethod
    def forward(
        student: Tensor, teacher: Tensor, spatial_mask: Tensor | None, channel_mask: Tensor | None
    ) -> Tensor:
        dtype = compute_dtype(student, teacher, spatial_mask, channel_mask)
        weight = None if spatial_mask is None else spatial_mask[:, None]
        energies = []
        for block in channel_blocks(teacher):
            square = (student[:, block].to(dtype) - teacher[:, block]).square_()
            square = square if weight is None else square.mul_(weight)
            energies.append(square.sum((2, 3)))
        energy = torch.cat(energies, 1)
        if channel_mask is not None:
            energy = energy * channel_mask
        return energy.sum(1).sqrt()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, spatial_mask, channel_mask, norm = ctx.saved_tensors
        zero = norm == 0
        slope = torch.where(zero, 0.0, grad / torch.where(zero, 1.0, norm))
        weight = None if spatial_mask is None else spatial_mask[:, None]

        def difference(block: slice) -> Tensor:
            result: Tensor = student[:, block].to(norm.dtype) - teacher[:, block]
            return result

        def gradient(features: Tensor, sign: int) -> Tensor:
            by_channel = (sign * slope)[:, None].expand(features.shape[:2])
            if channel_mask is not None:
                by_channel = by_channel * channel_mask

            def factors(block: slice) -> tuple[Tensor, Tensor]:
                part = difference(block)
                part = part if weight is None else scaled(part, weight)
                return part, by_channel[:, block, None, None]

            return product(features, factors)

        to_student = to_teacher = to_spatial = to_channel = None
        if ctx.needs_input_grad[0]:
            to_student = gradient(student, 1)
        if ctx.needs_input_grad[1]:
            to_teacher = gradient(teacher, -1)
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            square = difference(slice(None)).square() * (slope / 2)[:, None, None, None]
            if ctx.needs_input_grad[2]:
                to_spatial = _weigh(square, None, channel_mask).sum(1)
            if ctx.needs_input_grad[3]:
                to_channel = _weigh(square, spatial_mask, None).sum((2, 3))
        return to_student, to_teacher, to_spatial, to_channel
