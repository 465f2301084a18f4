"""The levels of one step in figures, and the table of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from .._table import table, times
from ..losses._levels import module_name
from ..losses.overall import FeatureDistillationLoss
from ..taps.trace import Shape, largest, maps_in, stride_of
from .magnitudes import Magnitude


class Step(NamedTuple):
    """One forward of a distiller."""

    output: Any
    losses: dict[str, Tensor]
    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    inputs: Any
    """What the student got; the tensor that it shares with the teacher where there is one."""
    paths: Mapping[str, tuple[str, str]]
    """From level to the student's path and the teacher's."""
    notes: tuple[str, ...]
    """What may be wrong with what the teacher got."""


@dataclass(frozen=True)
class LevelReport:
    """One level: what is tapped, how large it is, and what lies between the two."""

    name: str
    student_path: str
    teacher_path: str
    student_shape: tuple[int, ...]
    teacher_shape: tuple[int, ...]
    student_stride: float | None
    teacher_stride: float | None
    """The image's height over the feature's; `None` where no input is an image."""
    student_rms: float | None
    """Root mean square of the features, before any adapter; `None` where they hold no values."""
    teacher_rms: float | None
    adapter_parameters: int | None
    """How many values the loss trains for this level; `None` where their names do not tell."""


def level_reports(
    step: Step, loss: nn.Module, found: Mapping[str, Magnitude]
) -> tuple[LevelReport, ...]:
    image = largest(list(maps_in(step.inputs)))
    counts = _adapter_parameters(loss, list(step.student))
    levels = []
    for level, ours in step.student.items():
        theirs = step.teacher[level]
        levels.append(
            LevelReport(
                name=level,
                student_path=step.paths[level][0],
                teacher_path=step.paths[level][1],
                student_shape=tuple(ours.shape),
                teacher_shape=tuple(theirs.shape),
                student_stride=_stride(ours, image),
                teacher_stride=_stride(theirs, image),
                student_rms=found[level].student,
                teacher_rms=found[level].teacher,
                adapter_parameters=counts[level],
            )
        )
    return tuple(levels)


def _stride(feature: Tensor, image: Shape | None) -> float | None:
    shape = next(maps_in(feature), None)
    return None if image is None or shape is None else stride_of(shape, image)


def _trained(loss: nn.Module) -> int:
    return sum(value.numel() for value in loss.parameters() if value.requires_grad)


def _adapter_parameters(loss: nn.Module, levels: Sequence[str]) -> dict[str, int | None]:
    """By level, as a part of the parameter's name says it; all of it where there is but one."""
    counts = dict.fromkeys(levels, 0)
    for name, value in loss.named_parameters():
        parts = name.split(".")
        own = [level for level in levels if len(levels) == 1 or module_name(level) in parts]
        if value.requires_grad and len(own) == 1:
            counts[own[0]] += value.numel()
    told = sum(counts.values()) == _trained(loss)
    return {level: count if told or count else None for level, count in counts.items()}


def without_level(levels: Sequence[LevelReport], loss: nn.Module) -> Iterator[str]:
    rest = _trained(loss) - sum(level.adapter_parameters or 0 for level in levels)
    if rest:
        yield f"the loss trains {rest:,} parameters whose names tell no level."


def far_strides(levels: Sequence[LevelReport]) -> Iterator[str]:
    """A ViT's 14 beside 16 is by design; a factor of 2 is another level."""
    for level in levels:
        ours, theirs = level.student_stride, level.teacher_stride
        if ours is not None and theirs is not None and max(ours, theirs) >= 1.5 * min(ours, theirs):
            yield (
                f"level {level.name!r} pairs a student's stride of {ours:g} with a teacher's of "
                f"{theirs:g}: take layers of one stride, as `match_layers` does."
            )


def without_a_shape(levels: Sequence[LevelReport], loss: nn.Module) -> Iterator[str]:
    """Two values standardised are -1 and 1, whatever they were, and one is 0.

    Channel attention is standardised over the channels.
    """
    if not isinstance(loss, FeatureDistillationLoss) or not loss.hyperparameters.standardize:
        return
    if loss.hyperparameters.alpha and loss.hyperparameters.transfer_attention != "spatial":
        return
    for level in levels:
        positions = math.prod(level.teacher_shape[2:])
        if positions <= 2:
            yield (
                f"level {level.name!r} has {positions} of the three positions that standardised "
                "features need at least: it teaches nothing, leave it out."
            )


def level_table(levels: Sequence[LevelReport]) -> str:
    rows = [("level", "model", "path", "shape", "stride", "rms", "channels", "adapters")]
    for level in levels:
        channels = f"{level.student_shape[1]} -> {level.teacher_shape[1]}"
        count = "-" if level.adapter_parameters is None else f"{level.adapter_parameters:,}"
        ours = level.student_path, times(level.student_shape)
        theirs = level.teacher_path, times(level.teacher_shape)
        sizes = _figure(level.student_stride, ""), _figure(level.student_rms, ".3")
        rows.append((level.name, "student", *ours, *sizes, channels, count))
        sizes = _figure(level.teacher_stride, ""), _figure(level.teacher_rms, ".3")
        rows.append(("", "teacher", *theirs, *sizes, "", ""))
    return table(rows)


def _figure(value: float | None, precision: str) -> str:
    return "-" if value is None else f"{value:{precision}g}"
