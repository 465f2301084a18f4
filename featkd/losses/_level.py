"""What the losses of one level share: the door where all is checked once, and the reduction."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import (
    require_channels,
    require_count,
    require_not_swapped,
    require_same_batch,
    require_same_device,
)
from ._numerics import cast, compute_dtype, reduced, savable
from ._options import Reduction, require_form, require_resize
from .attention import Maps


class LevelLoss(nn.Module):
    """A loss between a student's and a teacher's features, `(B, C_S, H, W)` and `(B, C_T, H, W)`.

    Args:
        student_channels, teacher_channels: C_S and C_T.
        reduction, resize, normalize, standardize: as in the losses' documentation.
    """

    _shown: tuple[str, ...] = ()  # what repr says besides

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        reduction: Reduction,
        resize: str | None,
        normalize: bool,
        standardize: bool,
    ) -> None:
        super().__init__()
        require_count("student_channels", student_channels)
        require_count("teacher_channels", teacher_channels)
        require_resize(resize)
        require_form(reduction, normalize, standardize)
        self.student_channels = student_channels
        self.teacher_channels = teacher_channels
        self.reduction: Reduction = reduction
        self.resize = resize
        self.normalize = normalize
        self.standardize = standardize

    def extra_repr(self) -> str:
        names = (*self._shown, "reduction", "resize", "normalize", "standardize")
        options = (f"{name}={getattr(self, name)!r}" for name in names)
        return ", ".join((f"{self.student_channels}, {self.teacher_channels}", *options))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of the features, as `reduction` says."""
        student, teacher = admit(
            student,
            teacher,
            (self.student_channels, self.teacher_channels),
            self.resize,
            self,
        )
        return self._of_pair(student, teacher)

    def _of_pair(
        self, student: Tensor, teacher: Tensor, maps: tuple[Maps, Maps] | None = None
    ) -> Tensor:
        """The loss of features that :func:`admit` let in; `maps`: their attention maps if known."""
        distances = self._distances(student, teacher, maps)
        first, *others = (reduced(distance, self.reduction) for distance in distances)
        return first + others[0] if others else first

    @abstractmethod
    def _distances(
        self, student: Tensor, teacher: Tensor, maps: tuple[Maps, Maps] | None
    ) -> list[Tensor]:
        """What is reduced over the images, then added: one or two of `(B,)`."""


def admit(
    student: Tensor,
    teacher: Tensor,
    channels: tuple[int, int],
    resize: str | None,
    loss: nn.Module | None,
    names: tuple[str, str] = ("student", "teacher"),
) -> tuple[Tensor, Tensor]:
    """Both maps, checked: the student's at the teacher's size if asked, the teacher's detached.

    The parameters of `loss`, if any, lie on the features' device.
    """
    require_not_swapped(student, teacher, channels, names)
    for name, features, count in zip(names, (student, teacher), channels, strict=True):
        require_channels(name, features, count)
    if student.shape[2:] != teacher.shape[2:]:
        if resize is None:
            raise ValueError(
                f"`{names[0]}` must have the height and width of `{names[1]}` "
                f"{tuple(teacher.shape)}, got {tuple(student.shape)}: take layers of one "
                'stride, or the loss\'s `resize` ("bilinear"); for models that resize images the '
                "distiller's `shared_input`."
            )
        wide = cast(student, compute_dtype(student))
        student = F.interpolate(wide, teacher.shape[2:], mode=resize)
    require_same_device(names[0], student, names[1], teacher)
    require_same_batch(names[0], student, names[1], teacher)
    # The compiler has an error of its own there.
    if loss is not None and not torch.compiler.is_compiling():
        weight = _first_parameter(loss)
        require_same_device(names[0], student, "loss", student if weight is None else weight)
    return savable(student), savable(teacher.detach())


def _first_parameter(module: nn.Module) -> Tensor | None:
    """Not by `parameters()`, which walks all of the module: as long as a small map's distance."""
    for parameter in module._parameters.values():
        if parameter is not None:
            return parameter
    for child in module._modules.values():
        found = None if child is None else _first_parameter(child)
        if found is not None:
            return found
    return None
