"""Input checks: by kind, rank, shape, dtype and device; never by value, which would synchronise.

Text: `` `name` must <rule>, got <found>. ``; TypeError for kind, ValueError for value or shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

from torch import Tensor


def require_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be a tensor, got {type(value).__name__}.")
    if not value.is_floating_point():
        raise TypeError(f"`{name}` must be a floating-point tensor, got {value.dtype}.")


def require_feature_map(name: str, value: Tensor) -> None:
    require_tensor(name, value)
    if value.dim() != 4 or 0 in value.shape[1:]:
        raise ValueError(
            f"`{name}` must have the shape (B, C, H, W) with C, H and W at least 1, "
            f"got {tuple(value.shape)}."
        )


def require_shape(name: str, value: Tensor, shape: tuple[int, ...], rule: str) -> None:
    """`rule` says whose shape it is: "the shape of `teacher`"."""
    if tuple(value.shape) != shape:
        raise ValueError(f"`{name}` must have {rule} {shape}, got {tuple(value.shape)}.")


def require_same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(
            f"`{name}` must be on the device of `{other_name}` {other.device}, got {value.device}."
        )


def require_feature_pair(
    student: Tensor,
    teacher: Tensor,
    *,
    same_channels: bool,
    names: tuple[str, str] = ("student", "teacher"),
) -> None:
    """Feature maps of one batch, height and width, and, if asked, of one channel count."""
    for name, value in zip(names, (student, teacher), strict=True):
        require_feature_map(name, value)
    require_same_device(names[0], student, names[1], teacher)
    rule = "shape" if same_channels else "batch, height and width"
    first = 1 if same_channels else 2
    if student.shape[0] != teacher.shape[0] or student.shape[first:] != teacher.shape[first:]:
        raise ValueError(
            f"`{names[0]}` must have the {rule} of `{names[1]}` {tuple(teacher.shape)}, "
            f"got {tuple(student.shape)}."
        )


def require_choice(name: str, value: object, choices: Collection[str]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"`{name}` must be a string, got {type(value).__name__}.")
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def require_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, got {type(value).__name__}.")


def require_number(name: str, value: object, *, above: float = -math.inf) -> None:
    """A finite real number above `above`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number, got {type(value).__name__}.")
    if not math.isfinite(value) or value <= above:
        bound = "" if above == -math.inf else f" and above {above:g}"
        raise ValueError(f"`{name}` must be finite{bound}, got {value}.")


def require_weight(name: str, value: object) -> None:
    require_number(name, value)
    if isinstance(value, (int, float)) and value < 0:
        raise ValueError(f"`{name}` must be at least 0, got {value}.")


def require_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer, got {type(value).__name__}.")
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}.")


def require_callable(name: str, value: Callable[..., object] | None) -> None:
    if value is not None and not callable(value):
        raise TypeError(f"`{name}` must be callable or None, got {type(value).__name__}.")
