"""Assertions on the value of a loss: at equality, its sign, its batch, NaN."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .._checks import require_choice, require_number
from ._calls import (
    Loss,
    close,
    require_arguments,
    rounding,
    size_of,
    text,
    value_of,
)


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
