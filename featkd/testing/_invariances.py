"""Assertions on what a loss does not change under: orders of channels, moves, layouts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._calls import (
    Loss,
    close,
    gradient_of,
    require_arguments,
    size_of,
    text,
    value_of,
)
from ._strategies import LAYOUTS


def assert_channel_permutation_invariant(loss: Loss, student: Tensor, teacher: Tensor) -> None:
    r"""One order of the channels is as good as another: :math:`L(S_\pi, T_\pi) = L(S, T)`.

    Tried for the swap of the first two channels and the shift by one, of which every permutation
    is made.

    Raises:
        AssertionError: the loss changes.
        ValueError: the features have not one shape.

    Example:
        >>> import torch
        >>> from featkd import attention_transfer_loss
        >>> student, teacher = torch.randn(2, 1, 3, 2, 3)
        >>> assert_channel_permutation_invariant(attention_transfer_loss, student, teacher)
    """
    require_arguments(loss, student, teacher, same_channels=True)
    value, size = value_of(loss, student, teacher), size_of(loss, student, teacher)
    channels = list(range(student.shape[1]))
    for order in (channels[:2][::-1] + channels[2:], channels[1:] + channels[:1]):
        permuted = value_of(loss, student[:, order], teacher[:, order])
        if not close(permuted, value, size):
            raise AssertionError(
                f"assert_channel_permutation_invariant: the loss must stay {text(value)} with the "
                f"channels in the order {order}, got {text(permuted)}."
            )


_MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "flipped left to right": lambda x: x.flip(-1),
    "flipped upside down": lambda x: x.flip(-2),
    "rolled by one down and two right": lambda x: x.roll((1, 2), (-2, -1)),
    "transposed": lambda x: x.mT,
}


def assert_spatially_equivariant(loss: Loss, student: Tensor, teacher: Tensor) -> None:
    r"""Moving the positions of both moves maps alike and leaves losses:
    :math:`L(mS, mT) = L(S, T)`.

    Tried for flips, a roll and the transposition. What ends in `(H, W)` is moved in its turn before
    it is compared; a scalar, `(B,)` or `(B, C)` has no positions and must stay. A loss with a
    convolution wider than 1x1 has no such symmetry.

    Raises:
        AssertionError: the result changes in another way.

    Example:
        >>> import torch
        >>> from featkd import spatial_attention
        >>> student, teacher = torch.randn(2, 1, 3, 2, 3)
        >>> gap = lambda s, t: spatial_attention(s) - spatial_attention(t)
        >>> assert_spatially_equivariant(gap, student, teacher)
    """
    require_arguments(loss, student, teacher)
    value, size = value_of(loss, student, teacher), size_of(loss, student, teacher)
    for name, move in _MOVES.items():
        moved = value_of(loss, move(student), move(teacher))
        expected = move(value) if value.dim() > 2 else value
        if not close(moved, expected, size):
            raise AssertionError(
                f"assert_spatially_equivariant: the result of both {name} must be "
                f"{text(expected)}, got {text(moved)}."
            )


def assert_layout_independent(loss: Loss, student: Tensor, teacher: Tensor) -> None:
    """Loss and gradient depend on the numbers, not on how they lie in memory.

    Tried for every layout of `LAYOUTS`, on either side, against contiguous copies.

    Raises:
        AssertionError: loss or gradient differs, or the loss refuses the layout (`Tensor.view`).

    Example:
        >>> import torch
        >>> student, teacher = torch.randn(2, 2, 3, 2, 3)
        >>> by_view = lambda s, t: (s - t).view(len(s), -1).norm(dim=1).mean()
        >>> assert_layout_independent(by_view, student, teacher)
        Traceback (most recent call last):
        AssertionError: assert_layout_independent: ... `channels_last`, got RuntimeError: ...
    """
    require_arguments(loss, student, teacher)
    size = size_of(loss, student, teacher)
    for layout, lay_out in LAYOUTS.items():
        ours, theirs = lay_out(student), lay_out(teacher)
        copies = [x.clone(memory_format=torch.contiguous_format) for x in (ours, theirs)]
        expected = _both(loss, copies[0], copies[1])
        for side, pair in (("student", (ours, copies[1])), ("teacher", (copies[0], theirs))):
            where = f"a {side} in the layout `{layout}`"
            try:
                found = _both(loss, *pair)
            except RuntimeError as error:
                raise AssertionError(
                    f"assert_layout_independent: the loss must take {where}, "
                    f"got {type(error).__name__}: {error}"
                ) from error
            _require_equal(where, found, expected, size)


def _both(loss: Loss, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    return gradient_of("assert_layout_independent", loss, student, teacher)


def _require_equal(
    where: str, found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], size: float
) -> None:
    at_zero = close(torch.zeros_like(expected[0]), expected[0], size)
    for what, one, other in zip(("loss", "gradient"), found, expected, strict=True):
        if what == "gradient" and at_zero:
            return  # the gradient of a norm at 0 up to rounding is any
        if not close(one, other, size if what == "loss" else 0.0):
            raise AssertionError(
                f"assert_layout_independent: the {what} with {where} must be {text(other)}, as "
                f"with a contiguous copy, got {text(one)}."
            )
