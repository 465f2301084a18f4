"""Input checks: by kind, rank, shape, dtype and device; never by value, which would synchronise.

Text: `` `name` must <rule>, got <found>. ``; TypeError for kind, ValueError for value or shape.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

# The others that count as floating-point, of 8 bits, promote to nothing.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# torch 2.4's compiler does not read the attribute itself.
_LARGEST = sys.float_info.max


def require_tensor(name: str, value: object, *, verb: str = "be") -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must {verb} a tensor, got {type(value).__name__}.")
    if value.dtype not in _DTYPES:
        raise TypeError(
            f"`{name}` must {verb} a tensor of float16, bfloat16, float32 or float64, "
            f"got {value.dtype}."
        )
    if value.layout != torch.strided or value.is_nested:
        found = "a nested tensor" if value.is_nested else value.layout
        raise TypeError(f"`{name}` must {verb} a dense tensor, got {found}.")


def require_feature_map(name: str, value: Tensor) -> None:
    require_tensor(name, value)
    if value.dim() != 4 or 0 in value.shape[1:]:
        raise ValueError(
            f"`{name}` must have the shape (B, C, H, W) with C, H and W at least 1, "
            f"got {tuple(value.shape)}."
        )


def require_channels(name: str, features: Tensor, channels: int) -> None:
    """A feature map of so many channels."""
    require_tensor(name, features)
    shape = tuple(features.shape)
    if len(shape) == 4 and shape[1] == channels and 0 not in shape:
        return
    if len(shape) in (3, 4) and shape[-1] == channels != shape[1]:
        function = "from_tokens" if len(shape) == 3 else "from_channels_last"
        raise ValueError(
            f"`{name}` must have the shape (B, {channels}, H, W), got {shape}: if its channels "
            f"come last, see `featkd.{function}` and the argument `convert` of taps and "
            "distillers, for which `match_layers` has `match.convert`."
        )
    require_feature_map(name, features)
    if shape[1] != channels:
        raise ValueError(f"`{name}` must have the shape (B, {channels}, H, W), got {shape}.")


def require_not_swapped(
    student: Tensor, teacher: Tensor, channels: tuple[int, int], names: tuple[str, str]
) -> None:
    """Where each of a pair of feature maps has the other's channels."""
    pair = student, teacher
    if channels[0] == channels[1] or not all(isinstance(x, Tensor) and x.dim() == 4 for x in pair):
        return
    if (teacher.shape[1], student.shape[1]) == channels:
        raise ValueError(
            f"`{names[0]}` must have the shape (B, {channels[0]}, H, W), got "
            f"{tuple(student.shape)}, and `{names[1]}` {tuple(teacher.shape)} has the "
            f"{channels[0]} channels: the student comes first."
        )


def require_shape(
    name: str, value: Tensor, shape: tuple[int, ...], rule: str, advice: str = ""
) -> None:
    """`rule` says whose shape it is: "the shape of `teacher`"."""
    if tuple(value.shape) != shape:
        raise ValueError(f"`{name}` must have {rule} {shape}, got {tuple(value.shape)}{advice}.")


def require_same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(
            f"`{name}` must be on the device of `{other_name}` {other.device}, got {value.device}."
        )


def require_same_batch(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Of one batch, height and width; the channels may differ."""
    if value.shape[0] != other.shape[0] or value.shape[2:] != other.shape[2:]:
        raise ValueError(
            f"`{name}` must have the batch, height and width of `{other_name}` "
            f"{tuple(other.shape)}, got {tuple(value.shape)}."
        )


def require_feature_pair(
    student: Tensor,
    teacher: Tensor,
    *,
    same_channels: bool,
    names: tuple[str, str] = ("student", "teacher"),
    module: str = "",
) -> None:
    """Feature maps of one batch, height and width, and, if asked, of one channel count.

    `module` is the public loss that takes others.
    """
    for name, value in zip(names, (student, teacher), strict=True):
        require_feature_map(name, value)
    require_same_device(names[0], student, names[1], teacher)
    if same_channels:
        advice = f": `featkd.{module}` has an adapter, and `resize`" if module else ""
        if student.shape != teacher.shape:
            for x, other in ((student, teacher), (teacher, student)):
                if x.movedim(-1, 1).shape == other.shape:
                    advice = ": of channels that come last `featkd.from_channels_last` makes a map"
        rule = f"the shape of `{names[1]}`"
        require_shape(names[0], student, tuple(teacher.shape), rule, advice)
    else:
        require_same_batch(names[0], student, names[1], teacher)


def require_choice(name: str, value: object, choices: Collection[str]) -> None:
    if not isinstance(value, str):
        found = type(value).__name__
        raise TypeError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {found}.")
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def require_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, got {type(value).__name__}.")


def require_number(
    name: str, value: object, *, above: float = -math.inf, least: float = -math.inf
) -> None:
    """A finite real number above `above` and at least `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number, got {type(value).__name__}.")
    if not (abs(value) <= _LARGEST and value > above):
        bound = "" if above == -math.inf else f" and above {above:g}"
        raise ValueError(f"`{name}` must be finite{bound}, got {value}.")
    if value < least:
        raise ValueError(f"`{name}` must be at least {least:g}, got {value}.")


def require_count(name: str, value: object, *, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer, got {type(value).__name__}.")
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}.")
    if value >= 2**31:
        raise ValueError(f"`{name}` must be below 2**31, got {value}.")


def require_callable(name: str, value: Callable[..., object] | None) -> None:
    if value is not None and not callable(value):
        raise TypeError(f"`{name}` must be callable or None, got {type(value).__name__}.")


def require_losses(losses: object, output: object) -> None:
    """By name, and none of a name in the detector's own mapping: together one would be lost."""
    if not isinstance(losses, Mapping):
        found = type(losses).__name__
        raise TypeError(f"`loss` must return a mapping from name to tensor, got {found}.")
    for name, value in losses.items():
        if not isinstance(value, Tensor):
            found = type(value).__name__
            raise TypeError(f"`loss` must return tensors, got {found} for {name!r}.")
        if isinstance(output, Mapping) and name in output:
            raise ValueError(
                "`loss` must return other names than the student's output "
                f"{list(output)}, got {name!r}."
            )
