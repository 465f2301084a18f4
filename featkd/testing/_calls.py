"""Calling the loss under test, and comparing what it returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._checks import require_feature_pair

Loss = Callable[[Tensor, Tensor], Tensor]
Property = Callable[[Loss, Tensor, Tensor], Any]


def value_of(loss: Loss, student: Tensor, teacher: Tensor) -> Tensor:
    require_feature_pair(student, teacher, same_channels=False)
    value = loss(student, teacher)
    if not isinstance(value, Tensor):
        raise TypeError(f"`loss` must return a tensor, got {type(value).__name__}.")
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


def _largest(x: Tensor) -> float:
    return float(x.detach().double().nan_to_num(0, 0, 0).abs().max()) if x.numel() else 0.0


def text(x: Tensor, most: int = 12) -> str:
    """The first numbers of `x`; -0 reads 0."""
    numbers = [f"{number + 0.0:.6g}" for number in x.detach().flatten()[:most].tolist()]
    rest = ", ..." if x.numel() > most else ""
    return numbers[0] if x.dim() == 0 else f"[{', '.join(numbers)}{rest}]"
