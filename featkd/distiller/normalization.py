"""How a detector says that it normalises its images, and the way from one such to another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..losses._numerics import compute_dtype
from ..taps.paths import innermost


@dataclass(frozen=True)
class Normalization:
    """`(pixel - mean) / std` of pixels in 0..1, with a number for each channel or one for all."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    bgr: bool = False

    def agrees(self, other: Normalization) -> bool:
        # Where mmdet's numbers are torchvision's times 255, they round otherwise.
        ours, theirs = (*self.mean, *self.std), (*other.mean, *other.std)
        pairs = zip(ours, theirs, strict=False)
        equal = all(math.isclose(a, b, rel_tol=1e-5) for a, b in pairs)
        return self.bgr == other.bgr and len(ours) == len(theirs) and equal

    def each(self, channels: int) -> list[tuple[float, float]]:
        """Mean and standard deviation, channel by channel."""
        mean, std = (v * channels if len(v) == 1 else v for v in (self.mean, self.std))
        return list(zip(mean, std, strict=True))


@dataclass(frozen=True)
class Renormalize:
    """Images as the student normalised them, as the teacher would have; anything else as it is."""

    student: Normalization
    teacher: Normalization

    def __call__(self, images: Tensor) -> Tensor:
        channels = images.shape[1] if images.dim() == 4 else 0
        if not self._fits(channels):
            return images
        planes = images.to(compute_dtype(images)).unbind(1)
        ours = zip(planes, self.student.each(channels), strict=True)
        pixels = [plane * std + mean for plane, (mean, std) in ours]
        if self.student.bgr != self.teacher.bgr:
            pixels.reverse()
        theirs = zip(pixels, self.teacher.each(channels), strict=True)
        return torch.stack([(plane - mean) / std for plane, (mean, std) in theirs], dim=1)

    def _fits(self, channels: int) -> bool:
        """Deeper in a model have maps other channels; one number stands for grey and for colour."""
        sides = self.student, self.teacher
        lengths = {len(values) for side in sides for values in (side.mean, side.std)}
        return lengths <= {1, channels} and (channels in lengths or channels == 3)


def renormalization(ours: Normalization | None, theirs: Normalization | None) -> Renormalize | None:
    """`None` where the two agree, or where one of the models says nothing."""
    if ours is None or theirs is None or ours.agrees(theirs):
        return None
    return Renormalize(ours, theirs)


def require_one_normalization(student: nn.Module, teacher: nn.Module) -> None:
    """For models that take one batch, normalised already: mmdet's."""
    ours, theirs = innermost(student), innermost(teacher)
    if renormalization(stated(ours, ours), stated(theirs, theirs)) is not None:
        raise ValueError(
            "`shared_input` must be given where the models' `data_preprocessor` normalise "
            "otherwise, such as 'backbone', or `teacher_forward` that does, got None."
        )


def stated(model: nn.Module, part: nn.Module) -> Normalization | None:
    """Of what enters `part`, by the innermost of what holds it."""
    holders = [module for module in model.modules() if part in set(module.modules())]
    for module in reversed(holders):
        # mmdet normalises in front of the whole detector, torchvision inside of it.
        found = _of_mmdet(module) or (None if module is part else _of_torchvision(module))
        if found is not None:
            return found
    return None


def _of_torchvision(module: nn.Module) -> Normalization | None:
    """Of its `transform`."""
    transform = getattr(module, "transform", None)
    mean, std = (getattr(transform, name, None) for name in ("image_mean", "image_std"))
    return None if mean is None or std is None else Normalization(_numbers(mean), _numbers(std))


def _of_mmdet(module: nn.Module) -> Normalization | None:
    """Of its `data_preprocessor`, in 0..255; it reads files as BGR."""
    preprocessor: Any = getattr(module, "data_preprocessor", None)
    normalizes = getattr(preprocessor, "_enable_normalize", None)
    to_rgb = getattr(preprocessor, "_channel_conversion", None)
    if normalizes is None or to_rgb is None:
        return None
    mean, std = (
        getattr(preprocessor, v) if normalizes else d for v, d in (("mean", 0), ("std", 1))
    )
    return Normalization(_numbers(mean, 255), _numbers(std, 255), bgr=not to_rgb)


def _numbers(values: object, whole: float = 1.0) -> tuple[float, ...]:
    numbers = torch.as_tensor(values, dtype=torch.float64).flatten()
    return tuple((numbers / whole).tolist())
