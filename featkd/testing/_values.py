"""Assertions on the value of a loss; `DISTANCE` and `LOSS` say which of them hold for what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from .._checks import require_choice, require_number
from ._calls import (
    Loss,
    close,
    gradient_of,
    require_arguments,
    rounding,
    size_of,
    text,
    value_of,
)
from ._strategies import LAYOUTS


def assert_zero_at_equality(
    loss: Loss, student: Tensor, teacher: Tensor, *, tolerance: float = 0.0
) -> None:
    r"""The loss of equal features is 0: :math:`L(T, T) = 0`; likewise at the student's features.

    Args:
        tolerance: absolute, for a loss that rounds there, as :math:`1 - \cos` does.

    Raises:
        AssertionError: it is not.
        ValueError: the features have not one shape.

    Example:
        >>> import torch
        >>> from featkd import non_local_loss
        >>> student, teacher = torch.randn(2, 1, 3, 2, 3)
        >>> assert_zero_at_equality(non_local_loss, student, teacher)
    """
    require_arguments(loss, student, teacher, same_channels=True)
    require_number("tolerance", tolerance, least=0)
    for features in (student, teacher):
        value = value_of(loss, features.clone(), features)
        if not (value.abs() <= tolerance).all():
            raise AssertionError(
                f"assert_zero_at_equality: the loss of a teacher with itself must be 0, "
                f"got {text(value)} at {text(features)}."
            )


def assert_non_negative(loss: Loss, student: Tensor, teacher: Tensor) -> None:
    r"""The loss is at least 0, up to rounding, and a number: :math:`L(S, T) \ge 0`.

    Raises:
        AssertionError: it is negative or NaN.

    Example:
        >>> import torch
        >>> assert_non_negative(lambda s, t: (s - t).mean(), *torch.zeros(2, 1, 1, 1, 2))
    """
    require_arguments(loss, student, teacher)
    value = value_of(loss, student, teacher)
    if not (value >= -rounding(value, size_of(loss, student, teacher))).all():
        raise AssertionError(
            f"assert_non_negative: the loss must be at least 0, got {text(value)}."
        )


def assert_batch_consistent(
    loss: Loss,
    student: Tensor,
    teacher: Tensor,
    *,
    reduction: Literal["mean", "sum", "norm"] = "mean",
) -> None:
    r"""The loss of a batch is the mean of its images' losses, of any batch size and in any company.

    .. math:: L([S_1 \ldots S_B], [T_1 \ldots T_B]) = \frac{1}{B} \sum_b L(S_b, T_b)

    for the batch and for the batch twice over. A loss of the shape `(B,)` must hold its images'
    losses in order.

    Args:
        reduction: `"mean"`, or what the loss does instead: `"sum"`, or `"norm"`, the L2 norm.

    Raises:
        AssertionError: it is another number, or of another shape.

    Example:
        >>> import torch
        >>> student, teacher = torch.randn(2, 3, 4, 2, 5)
        >>> total = lambda s, t: (s - t).square().sum()
        >>> assert_batch_consistent(total, student, teacher, reduction="sum")
    """
    require_arguments(loss, student, teacher)
    require_choice("reduction", reduction, _REDUCE)
    images = zip(student[:, None], teacher[:, None], strict=True)
    values = torch.stack([_one_number(value_of(loss, *image)) for image in images])
    size = size_of(loss, student, teacher)
    for times in (1, 2):
        value = value_of(loss, torch.cat([student] * times), torch.cat([teacher] * times))
        parts = torch.cat([values] * times)
        expected = parts if value.dim() else _REDUCE[reduction](parts)
        if not close(value, expected, size):
            raise AssertionError(
                f"assert_batch_consistent: the loss of {len(parts)} images whose losses are "
                f"{text(parts)} must be {_RULE[reduction]} {text(expected)}, got {text(value)}."
            )


def _one_number(value: Tensor) -> Tensor:
    if tuple(value.shape) not in ((), (1,)):
        raise ValueError(
            f"`loss` must return a scalar or the shape (B,), got {tuple(value.shape)} for 1 image."
        )
    return value.reshape(())


_REDUCE = {"mean": torch.mean, "sum": torch.sum, "norm": torch.linalg.vector_norm}
_RULE = {"mean": "their mean", "sum": "their sum", "norm": "their L2 norm"}


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


def assert_nan_is_not_hidden(loss: Loss, student: Tensor, teacher: Tensor) -> None:
    """One NaN among the features of an image, student's or teacher's, gives a NaN loss.

    A loss that drops it (`nan_to_num`, `nansum`, a comparison) lets a diverged model train on.

    Raises:
        AssertionError: it does not.

    Example:
        >>> import torch
        >>> tamed = lambda s, t: (s - t).abs().nan_to_num().mean()
        >>> assert_nan_is_not_hidden(tamed, *torch.zeros(2, 1, 1, 1, 2))
        Traceback (most recent call last):
        AssertionError: assert_nan_is_not_hidden: ... NaN in the student ..., got 0.
    """
    require_arguments(loss, student, teacher)
    for side, name in enumerate(("student", "teacher")):
        for index in (0, -1):
            pair = [x.clone(memory_format=torch.contiguous_format) for x in (student, teacher)]
            pair[side].view(-1)[index] = torch.nan
            value = value_of(loss, *pair)
            if not (value[index] if value.dim() else value).isnan().all():
                raise AssertionError(
                    f"assert_nan_is_not_hidden: the loss with a NaN in the {name} must be NaN, "
                    f"got {text(value)}."
                )
