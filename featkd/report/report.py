"""What a distiller does, in figures: its levels, and each term's gradient beside the detector's."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._table import table
from ..losses._numerics import compute_dtype
from .detector_loss import detector_loss
from .levels import (
    LevelReport,
    Step,
    far_strides,
    level_reports,
    level_table,
    without_a_shape,
    without_level,
)
from .magnitudes import Magnitude, faults, magnitudes
from .models import larger_student, same_weights

LOGGER = logging.getLogger("featkd")
NO_DETECTOR_LOSS = (
    "The detector's loss is not known: the student returned no mapping of scalars, no object with "
    "a `.loss`, no (loss, items) pair and no scalar. `student_forward` can return one."
)
IN_EVAL_MODE = "the student is in `eval` mode where it is to be trained: `distiller.train()`."
NOT_DISTILLING = (
    "the distiller is in `eval` mode, the student trains and is not taught: `distiller.train()`."
)
AIM = (
    "Where distillation helped, it was 1 to 5 after some hundred steps. Of an untrained student it "
    "says little."
)


@dataclass(frozen=True)
class TermReport:
    """One term of the training loss, weighted."""

    name: str
    value: float
    gradient_norm: float
    """Of the student's parameters that the distillation reaches."""
    gradient_ratio: float | None
    """The gradient's norm over the detector's; `None` where that is not known or 0."""


@dataclass(frozen=True)
class Report:
    """What :meth:`featkd.Distiller.report` found; printed, it is a table."""

    levels: tuple[LevelReport, ...]
    terms: tuple[TermReport, ...]
    distillation: TermReport
    """The sum of the terms."""
    detector: TermReport | None
    """The student's own loss, where its output says it."""
    notes: tuple[str, ...] = ()
    """What is to be aimed at, and what is wrong."""

    def __str__(self) -> str:
        rows = [("term", "value", "gradient", "gradient / detector's")]
        total = [self.distillation] if len(self.terms) > 1 else []
        for term in (self.detector, *self.terms, *total):
            if term is not None:
                ratio = "-" if term.gradient_ratio is None else f"{term.gradient_ratio:.3g}"
                rows.append((term.name, f"{term.value:.4g}", f"{term.gradient_norm:.3g}", ratio))
        return "\n\n".join([level_table(self.levels), table(rows), *self.notes])


def make_report(
    step: Step,
    student: nn.Module,
    teacher: nn.Module,
    loss: nn.Module,
    optimizer: object,
    called_alike: bool,
) -> Report:
    """By one backward a term, one of their sum, and one of the detector's loss.

    `called_alike`: nothing replaces the call of either model.
    """
    trained = {
        f"{name}.{key}": value
        for name, part in (("student", student), ("loss", loss))
        for key, value in part.named_parameters()
        if value.requires_grad
    }
    left_out = list(_left_out(trained, optimizer))
    losses = {name: value.sum() for name, value in step.losses.items()}
    if any(value.is_meta for value in losses.values()):
        raise ValueError("`distiller` must hold values to report, got the meta device.")
    detector = detector_loss(step.output)
    reached = [value for value in student.parameters() if value.requires_grad]
    whole = torch.stack(list(losses.values())).sum() if losses else torch.zeros(())
    gradients = _gradients(whole, reached)
    reached = [value for value, g in zip(reached, gradients, strict=True) if g is not None]
    norm = None if detector is None else _norm(_gradients(detector, reached))

    def term(name: str, value: Tensor, own: float) -> TermReport:
        return TermReport(name, value.item(), own, own / norm if norm else None)

    terms = tuple(
        term(name, value, _norm(_gradients(value, reached))) for name, value in losses.items()
    )
    total = term("distillation", whole, _norm(gradients))
    found = magnitudes(step.student, step.teacher)
    levels = level_reports(step, loss, found)
    notes = [
        _aim(total, norm),
        *([] if student.training else [IN_EVAL_MODE]),
        *left_out,
        *without_level(levels, loss),
        *_seen_forward(step, levels, found, loss),
        *_without_gradient(terms),
    ]
    if called_alike and not any(faults(found)):
        notes += same_weights(student, teacher)
    notes += larger_student(student, teacher)
    own = None if detector is None or norm is None else term("detector", detector, norm)
    return Report(levels, terms, total, own, tuple(note[0].upper() + note[1:] for note in notes))


def log_first_step(step: Step, student: nn.Module, teacher: nn.Module, loss: nn.Module) -> None:
    """Logs what a report would say and needs no backward: the levels, and what is wrong.

    Of several processes the first alone speaks.
    """
    if not _speaks() or not LOGGER.isEnabledFor(logging.WARNING):
        return
    found = magnitudes(step.student, step.teacher)
    levels = level_reports(step, loss, found)
    LOGGER.info("Distilling\n%s", level_table(levels))
    if all(magnitude.student is not None for magnitude in found.values()):
        for text in (*_seen_forward(step, levels, found, loss), *larger_student(student, teacher)):
            LOGGER.warning(text)


def log_modes(distilling: bool) -> bool:
    """Warns where the student trains and the distiller does not, or the other way round.

    False where it may be meant: detectors give a validation loss in training mode alone.
    """
    if not distilling and not torch.is_grad_enabled():
        return False
    if _speaks():
        LOGGER.warning(IN_EVAL_MODE if distilling else NOT_DISTILLING)
    return True


def _speaks() -> bool:
    return not (dist.is_available() and dist.is_initialized() and dist.get_rank() > 0)


def _aim(distillation: TermReport, detector: float | None) -> str:
    if detector is None:
        return NO_DETECTOR_LOSS
    ratio = distillation.gradient_ratio
    if ratio is None:
        return "the detector's loss has no gradient where the distillation's is: none to compare."
    return f"The distillation's gradient is {ratio:.3g} times the detector's. {AIM}"


def _seen_forward(
    step: Step, levels: Sequence[LevelReport], found: Mapping[str, Magnitude], loss: nn.Module
) -> Iterator[str]:
    """What is wrong and shows without a backward."""
    yield from step.notes
    yield from far_strides(levels)
    yield from without_a_shape(levels, loss)
    yield from faults(found)
    values = {name: value.sum().item() for name, value in step.losses.items()}
    for name, value in values.items():
        if not math.isfinite(value):
            yield f"the term {name!r} is {value}: a step with it spoils every weight."
    if not any(values.values()):
        yield "the distillation loss is 0: nothing is distilled."


def _without_gradient(terms: Sequence[TermReport]) -> Iterator[str]:
    for term in terms:
        if term.value and term.gradient_norm == 0:
            yield (
                f"the term {term.name!r} has no gradient to the student's parameters, which it "
                "cannot train."
            )


def _left_out(trained: Mapping[str, nn.Parameter], optimizer: object) -> Iterator[str]:
    if optimizer is None:
        return
    groups = getattr(optimizer, "param_groups", None)
    if not isinstance(groups, Sequence):
        found = type(optimizer).__name__
        raise TypeError(f"`optimizer` must be a torch.optim.Optimizer or None, got {found}.")
    held = {id(value) for group in groups for value in group["params"]}
    left_out = {name: value.numel() for name, value in trained.items() if id(value) not in held}
    if left_out:
        yield (
            f"{sum(left_out.values()):,} parameters in {len(left_out)} tensors (such as "
            f"{next(iter(left_out))!r}) are in no param_group of the optimizer, and are not "
            "trained: give it `distiller.parameters()`."
        )


def _gradients(value: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    if not value.requires_grad or not parameters:
        return (None,) * len(parameters)
    return torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)


def _norm(gradients: Sequence[Tensor | None]) -> float:
    """Over all gradients; in float16 it would overflow."""
    found = [g for g in gradients if g is not None]
    return math.hypot(*(float(torch.linalg.vector_norm(g, dtype=compute_dtype(g))) for g in found))
