"""Adaptation layers (appendix B): the student's side of a comparison, trained and then thrown away.

They compute in at least float32 with autocast off, whatever the dtype of features and parameters.
Where the channel counts are equal they start as the identity: equal features start at loss 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._checks import (
    require_choice,
    require_count,
    require_feature_map,
    require_feature_pair,
    require_same_device,
    require_tensor,
)
from ._precision import compute_dtype, full_precision

RESIZE_MODES = ("nearest", "area", "bilinear", "bicubic")


class Conv2d(nn.Conv2d):
    """A convolution of odd `kernel_size` that keeps H x W."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        start_as_identity(self)

    def forward(self, input: Tensor) -> Tensor:
        require_same_device("student", input, "loss", self.weight)
        dtype = compute_dtype(input, self.weight)
        bias = None if self.bias is None else self.bias.to(dtype)
        with full_precision(input):
            return F.conv2d(input.to(dtype), self.weight.to(dtype), bias, padding=self.padding)


class Linear(nn.Linear):
    """A linear layer on channel attention maps, `(B, C_S) -> (B, C_T)`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        start_as_identity(self)

    def forward(self, input: Tensor) -> Tensor:
        require_same_device("student", input, "loss", self.weight)
        dtype = compute_dtype(input, self.weight)
        with full_precision(input):
            return F.linear(input.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


@torch.no_grad()
def start_as_identity(layer: nn.Conv2d | nn.Linear) -> None:
    """Zero bias; the identity where the layer keeps the channel count, else torch's own start."""
    if layer.bias is not None:
        layer.bias.zero_()
    if layer.weight.shape[0] != layer.weight.shape[1]:
        return
    if isinstance(layer, nn.Conv2d):
        nn.init.dirac_(layer.weight)
    else:
        nn.init.eye_(layer.weight)


def require_channel_counts(student_channels: object, teacher_channels: object) -> None:
    require_count("student_channels", student_channels)
    require_count("teacher_channels", teacher_channels)


def require_channels(name: str, features: Tensor, channels: int) -> None:
    require_tensor(name, features)
    shape = tuple(features.shape)
    if len(shape) in (3, 4) and shape[-1] == channels != shape[1]:
        function = "from_tokens" if len(shape) == 3 else "from_channels_last"
        raise ValueError(
            f"`{name}` must have the shape (B, {channels}, H, W), got {shape}: if its channels "
            f"come last, see `featkd.{function}` and the argument `convert` of taps and distillers."
        )
    require_feature_map(name, features)
    if shape[1] != channels:
        raise ValueError(f"`{name}` must have the shape (B, {channels}, H, W), got {shape}.")


def require_resize(resize: object) -> None:
    if resize is not None:
        require_choice("resize", resize, RESIZE_MODES)


def prepare_pair(
    student: Tensor,
    teacher: Tensor,
    channels: tuple[int, int],
    resize: str | None,
    names: tuple[str, str] = ("student", "teacher"),
) -> tuple[Tensor, Tensor]:
    """Both maps, checked: the student's at the teacher's size if asked, the teacher's detached."""
    for name, features, count in zip(names, (student, teacher), channels, strict=True):
        require_channels(name, features, count)
    if student.shape[2:] != teacher.shape[2:]:
        if resize is None:
            raise ValueError(
                f"`{names[0]}` must have the height and width of `{names[1]}` "
                f"{tuple(teacher.shape)}, got {tuple(student.shape)}: for other strides take the "
                "loss's `resize`, for models that resize images the distiller's `shared_input`."
            )
        wide = student.to(compute_dtype(student))
        student = F.interpolate(wide, teacher.shape[2:], mode=resize)
    require_feature_pair(student, teacher, same_channels=False, names=names)
    # Features made under `inference_mode` cannot be saved for a backward; a copy of them can.
    inference = not torch.compiler.is_compiling() and teacher.is_inference()
    return student, teacher.clone() if inference else teacher.detach()
