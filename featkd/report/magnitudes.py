"""How large features are, and what is wrong with a teacher that shows in them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# A trained network's features lie far inside.
SMALLEST, LARGEST = 1e-6, 1e3


class Magnitude(NamedTuple):
    """Of one level's features; `None` where they have no values to be read."""

    student: float | None
    """Root mean square."""
    teacher: float | None
    fault: str
    """What the teacher's features are that no trained teacher's are; empty where nothing is."""


def magnitudes(
    student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]
) -> dict[str, Magnitude]:
    found = {}
    for level, ours in student.items():
        theirs = teacher[level]
        try:
            found[level] = Magnitude(_rms(ours), _rms(theirs), _fault(ours, theirs))
        except RuntimeError:  # on the meta device, inside torch.func
            found[level] = Magnitude(None, None, "")
    return found


def faults(found: Mapping[str, Magnitude]) -> Iterator[str]:
    """One line for each kind, whatever the number of its levels."""
    levels: dict[str, list[str]] = {}
    for level, magnitude in found.items():
        if magnitude.fault:
            levels.setdefault(magnitude.fault, []).append(level)
    for fault, names in levels.items():
        yield f"the teacher's features at {', '.join(names)} {fault}"


@torch.no_grad()
def _rms(features: Tensor) -> float | None:
    if not features.numel():
        return None
    dtype = torch.promote_types(features.dtype, torch.float32)
    # Divided first, as the square of what is absurd is infinite.
    scale = features.abs().max()
    if not scale.isfinite() or not scale:
        return float(scale)
    norm = torch.linalg.vector_norm(features.to(dtype) / scale)
    return float(scale * norm) / math.sqrt(features.numel())


@torch.no_grad()
def _fault(student: Tensor, teacher: Tensor) -> str:
    rms = _rms(teacher)
    if rms is None:
        return ""
    if not teacher.isfinite().all():
        return "are not finite: look for broken weights, or a dtype that overflows."
    if rms == 0:
        return "are zero: a layer in front of them is dead, or its weights were not loaded."
    if student.shape == teacher.shape and torch.equal(student, teacher.to(student.dtype)):
        return "are the student's own: it has the same weights, and nothing to teach."
    if _is_constant(teacher, rms):
        return "are the same at every position: its weights were not loaded, or not trained."
    if not SMALLEST <= rms <= LARGEST:
        return (
            f"have an absurd size (root mean square outside {SMALLEST:g} to {LARGEST:g}): its "
            "weights were not loaded, or its batch normalisations never saw data."
        )
    return ""


def _is_constant(features: Tensor, rms: float) -> bool:
    """Each channel has one value, to rounding, in all images and positions."""
    if features.dim() < 2 or features.numel() == features.shape[1]:
        return False
    values = features.transpose(0, 1).flatten(1)
    return bool(((values - values[:, :1]).abs() <= 1e-6 * rms).all())
