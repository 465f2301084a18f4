"""Calling the loss under test, and comparing what it returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._checks import require_feature_pair, require_tensor

Loss = Callable[[Tensor, Tensor], Tensor]
Property = Callable[[Loss, Tensor, Tensor], Any]


def require_arguments(
    loss: object, student: Tensor, teacher: Tensor, *, same_channels: bool = False
) -> None:
    """What every assertion takes: a loss to call, and features with numbers in them."""
    if not callable(loss):
        raise TypeError(f"`loss` must be callable, got {type(loss).__name__}.")
    require_feature_pair(student, teacher, same_channels=same_channels)
    if student.shape[0] == 0 or student.is_meta:
        found = "the meta device" if student.is_meta else tuple(student.shape)
        raise ValueError(f"`student` must hold at least one image's values, got {found}.")


def value_of(loss: Loss, student: Tensor, teacher: Tensor) -> Tensor:
    value = loss(student, teacher)
    require_tensor("loss", value, verb="return")
    return value


def gradient_of(prefix: str, loss: Loss, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and the gradient of its sum to the student, in the student's own layout."""
    student = student.detach().requires_grad_()
    value = value_of(loss, student, teacher.detach())
    gradient = None
    if value.requires_grad:
        (gradient,) = torch.autograd.grad(value.sum(), student, allow_unused=True)
    if gradient is None:
        raise AssertionError(f"{prefix}: a gradient must reach the student, got none.")
    return value.detach(), gradient


def close(found: Tensor, expected: Tensor, size: float) -> bool:
    """Equal up to two thirds of the digits of `size` or of what is expected; NaN equals NaN."""
    if found.shape != expected.shape:
        return False
    bound = max(size, _largest(expected)) * float(torch.finfo(expected.dtype).eps ** (2 / 3))
    return torch.allclose(found, expected.to(found.dtype), rtol=0, atol=bound, equal_nan=True)


def size_of(loss: Loss, student: Tensor, teacher: Tensor) -> float:
    """What the loss is where the features plainly differ: its rounding is a part of this."""
    return _largest(value_of(loss, student, -2 * teacher))


def rounding(value: Tensor, size: float) -> float:
    """What a loss that ought to be 0 may be off by: a few last digits of `size`.

    Or of numbers near 1 on the way to it, such as a softmax's.
    """
    return 8 * float(torch.finfo(value.dtype).eps) * max(1.0, size)


def _largest(x: Tensor) -> float:
    return float(x.detach().double().nan_to_num(0, 0, 0).abs().max()) if x.numel() else 0.0


def text(x: Tensor, most: int = 12) -> str:
    """The first numbers of `x`; -0 reads 0."""
    numbers = [f"{number + 0.0:.6g}" for number in x.detach().flatten()[:most].tolist()]
    rest = ", ..." if x.numel() > most else ""
    return numbers[0] if x.dim() == 0 else f"[{', '.join(numbers)}{rest}]"
