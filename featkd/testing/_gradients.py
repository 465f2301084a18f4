"""Assertions on the gradient of a loss to the student's features."""

from __future__ import annotations

import torch
from torch import Tensor

from ._calls import Loss, gradient_of, require_arguments, rounding, text, value_of


def assert_finite_gradient_at_equality(loss: Loss, student: Tensor, teacher: Tensor) -> None:
    r"""The gradient is finite where the student equals the teacher, in all images or in the first.

    :math:`\partial \sqrt{\sum x^2} / \partial x` is 0/0 at 0: `sum() ** 0.5` and `sqrt()` give NaN,
    which one equal image spreads to every weight; `torch.linalg.vector_norm` gives 0.

    Raises:
        AssertionError: it is NaN or infinite, or does not reach the student.
        ValueError: the features have not one shape.

    Example:
        >>> import torch
        >>> root = lambda s, t: (s - t).square().sum() ** 0.5
        >>> assert_finite_gradient_at_equality(root, *torch.zeros(2, 1, 1, 1, 2))
        Traceback (most recent call last):
        AssertionError: assert_finite_gradient_at_equality: ... got [nan, nan].
    """
    name = "assert_finite_gradient_at_equality"
    require_arguments(loss, student, teacher, same_channels=True)
    first_equal = torch.cat([teacher[:1].to(student.dtype), student[1:]])
    where = {"student = teacher": (teacher.clone(), teacher), "image 0 is": (first_equal, teacher)}
    for equal, pair in where.items():
        _, gradient = gradient_of(name, loss, *pair)
        if not gradient.isfinite().all():
            raise AssertionError(
                f"{name}: the gradient where {equal} must be finite, got {text(gradient)}."
            )


def assert_gradient_reaches_student_only(loss: Loss, student: Tensor, teacher: Tensor) -> None:
    r"""Gradients flow to the student and none to the teacher, :math:`\partial L / \partial T = 0`.

    For losses that promise it, as featkd's modules do and its functions do not. The teacher's
    features count as constants even where they require a gradient.

    Raises:
        AssertionError: none reaches the student, or one reaches the teacher, be it all zeros.

    Example:
        >>> import torch
        >>> from featkd import non_local_loss
        >>> student, teacher = torch.randn(2, 1, 3, 2, 3)
        >>> assert_gradient_reaches_student_only(
        ...     lambda s, t: non_local_loss(s, t.detach()), student, teacher
        ... )
    """
    name = "assert_gradient_reaches_student_only"
    require_arguments(loss, student, teacher)
    gradient_of(name, loss, student, teacher)
    teacher = teacher.detach().requires_grad_()
    value = value_of(loss, student.detach().requires_grad_(), teacher)
    (gradient,) = torch.autograd.grad(value.sum(), teacher, allow_unused=True)
    if gradient is not None:
        raise AssertionError(
            f"{name}: a teacher that requires a gradient must get none, got {text(gradient)}."
        )


def assert_gradient_matches_finite_differences(
    loss: Loss, student: Tensor, teacher: Tensor
) -> None:
    r"""The gradient to the student is the slope of the loss along a random direction v.

    .. math:: \nabla L(S) \cdot v = \frac{L(S + hv) - L(S - hv)}{2h}

    in float64, up to rounding and to the gap between the two halves of the right-hand side. Where
    they differ plainly the loss has a kink, as of \|A\| at 0, and nothing is asserted. A loss that
    holds something made of the student constant (detached masks) has no such gradient.

    Raises:
        AssertionError: the slope by the gradient is another, or none reaches the student.

    Example:
        >>> import torch
        >>> from featkd import attention_transfer_loss
        >>> student, teacher = torch.randn(2, 1, 3, 2, 3)
        >>> assert_gradient_matches_finite_differences(attention_transfer_loss, student, teacher)
    """
    name = "assert_gradient_matches_finite_differences"
    require_arguments(loss, student, teacher)
    student, teacher = student.detach().double(), teacher.detach().double()
    value, gradient = gradient_of(name, loss, student, teacher)
    generator = torch.Generator().manual_seed(0)
    direction = 2 * torch.rand(student.shape, generator=generator, dtype=torch.float64) - 1
    direction = direction.to(student.device)
    precision = float(torch.finfo(value.dtype).eps ** (1 / 3))
    step = precision * _scale(student, teacher)

    def slope(sign: int) -> float:
        moved = value_of(loss, student + sign * step * direction, teacher).detach()
        return sign * float((moved - value).double().sum()) / step

    low, high = sorted((slope(-1), slope(1)))
    size = max(abs(low), abs(high))
    if high - low > 100 * precision * size:
        return
    found = float((gradient * direction).sum())
    slack = high - low + 10 * precision**2 * (size + float(value.double().abs().sum()) / step)
    slack += rounding(value, 0.0) * (1 + 1 / step)
    if not low - slack <= found <= high + slack:
        raise AssertionError(
            f"{name}: the slope of the loss must be {(low + high) / 2:.6g}, "
            f"got {found:.6g} by the gradient {text(gradient)}."
        )


def assert_descends(loss: Loss, student: Tensor, teacher: Tensor) -> None:
    r"""A small step of the student against its gradient lowers the loss.

    .. math:: L(S - \eta \, \nabla L) < L(S)

    for one step size at least, from 1/100 of the features' size down to :math:`10^{-10}` of it.
    Where the gradient is 0, or too small for the loss to show the step, nothing is asserted.

    Raises:
        AssertionError: no step lowers the loss, or no gradient reaches the student.

    Example:
        >>> import torch
        >>> def uphill(student, teacher):
        ...     loss = (student - teacher).square().mean()
        ...     return 2 * loss.detach() - loss
        >>> assert_descends(uphill, torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2))
        Traceback (most recent call last):
        AssertionError: assert_descends: a step against the gradient [1, 1] must lower the loss ...
    """
    name = "assert_descends"
    require_arguments(loss, student, teacher)
    value, gradient = gradient_of(name, loss, student, teacher)
    before, largest = float(value.sum()), float(gradient.abs().max())
    least = rounding(value, 0.0)
    if largest <= least:
        return
    direction = gradient / largest
    size = _scale(student, teacher)
    slope = float((gradient * direction).sum())
    if 1e-2 * size * slope < max(100 * torch.finfo(value.dtype).eps * abs(before), least):
        return
    for step in (1e-2, 1e-4, 1e-6, 1e-8, 1e-10):
        with torch.no_grad():
            moved = value_of(loss, student - step * size * direction, teacher)
        if float(moved.sum()) < before:
            return
    raise AssertionError(
        f"{name}: a step against the gradient {text(gradient)} must lower the loss {before:.6g}, "
        f"got {float(moved.sum()):.6g}."
    )


def _scale(student: Tensor, teacher: Tensor) -> float:
    """The largest magnitude of both, 1 where all is 0."""
    return float(torch.maximum(student.detach().abs().max(), teacher.detach().abs().max())) or 1.0
