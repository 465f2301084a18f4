"""What a distiller does, in figures: its levels, and each term's share of loss and gradient."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ._preserve import preserved
from ._text import table, times
from ._trace import Shape, maps_in, stride_of
from .distillation import SINGLE_LEVEL, FeatureDistillationLoss, _module_name

if TYPE_CHECKING:
    from .distiller import Distiller

LOGGER = logging.getLogger("featkd")
OUT_OF_SCALE = 100.0
NO_DETECTOR_LOSS = (
    "The detector's loss is not known: the student returned none (torchvision's detectors return "
    "theirs in training mode alone: `distiller.train()`)."
)


class Step(NamedTuple):
    """One forward of a distiller."""

    output: Any
    losses: dict[str, Tensor]
    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    inputs: Any
    """What the student got; the tensor that it shares with the teacher where there is one."""


@dataclass(frozen=True)
class LevelReport:
    """One level: what is tapped, and what lies between the two."""

    name: str
    student_path: str
    teacher_path: str
    student_shape: tuple[int, ...]
    teacher_shape: tuple[int, ...]
    student_stride: float | None
    teacher_stride: float | None
    """The image's height over the feature's; `None` where no input is an image."""
    adapter_parameters: int | None
    """How many values the loss trains for this level; `None` for a loss that is not featkd's."""


@dataclass(frozen=True)
class TermReport:
    """One term of the training loss, weighted."""

    name: str
    value: float
    loss_share: float | None
    """Its part of the training loss; `None` where the detector's loss is not known."""
    gradient_share: float
    """Its gradient's norm over the sum of all terms' norms; of the student's parameters."""


@dataclass(frozen=True)
class Report:
    """What :meth:`featkd.Distiller.report` found; printed, it is a table."""

    levels: tuple[LevelReport, ...]
    terms: tuple[TermReport, ...]
    detector: TermReport | None
    """The student's own loss, where its output says it."""
    warnings: tuple[str, ...] = ()
    """What :meth:`featkd.Distiller.report` warned of."""

    def __str__(self) -> str:
        rows = [("term", "value", "of the loss", "of the gradient")]
        for term in (self.detector, *self.terms):
            if term is not None:
                share = "-" if term.loss_share is None else f"{term.loss_share:.2%}"
                rows.append((term.name, f"{term.value:.4g}", share, f"{term.gradient_share:.2%}"))
        notes = [] if self.detector else [NO_DETECTOR_LOSS]
        notes += [f"Warning: {text}" for text in self.warnings]
        return "\n\n".join([_level_table(self.levels), table(rows), *notes])


def make_report(
    distiller: Distiller, args: tuple[Any, ...], kwargs: dict[str, Any], optimizer: object
) -> Report:
    said = list(_left_out(distiller, optimizer))
    with preserved(distiller, distiller.teacher), torch.enable_grad():
        step = distiller._step(args, kwargs)
        losses = {name: value.sum() for name, value in step.losses.items()}
        if any(value.is_meta for value in losses.values()):
            raise ValueError("`distiller` must hold values to report, got the meta device.")
        detector = detector_loss(step.output)
        named = [] if detector is None else [("detector", detector)]
        named += losses.items()
        trained = [value for value in distiller.student.parameters() if value.requires_grad]
        norms = [_gradient_norm(value, trained) for _, value in named]
    values = [value.item() for _, value in named]
    terms = [
        TermReport(
            name,
            value,
            None if detector is None else _ratio(value, sum(values)),
            _ratio(norm, sum(norms)),
        )
        for (name, _), value, norm in zip(named, values, norms, strict=True)
    ]
    own = None if detector is None else terms.pop(0)
    said += [*_out_of_scale(losses, detector), *_without_effect(terms)]
    for text in said:
        warnings.warn(text, stacklevel=3)
    return Report(tuple(_levels(distiller, step)), tuple(terms), own, tuple(said))


def introduce(distiller: Distiller, step: Step) -> None:
    """Logs the levels, and what is out of scale: what a report would say and need no backward.

    Of several processes the first alone speaks.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
        return
    if LOGGER.isEnabledFor(logging.INFO):
        LOGGER.info("Distilling\n%s", _level_table(tuple(_levels(distiller, step))))
    if not LOGGER.isEnabledFor(logging.WARNING):
        return
    losses = {name: value.sum() for name, value in step.losses.items()}
    try:
        texts = list(_out_of_scale(losses, detector_loss(step.output)))
    except RuntimeError:  # without a value to be read: on the meta device, inside torch.func
        return
    for text in texts:
        LOGGER.warning(text)


def detector_loss(output: object) -> Tensor | None:
    """The sum of a mapping of scalars (or lists of them), of `.loss`, or a scalar itself."""
    loss = getattr(output, "loss", output)
    found: list[object] = [loss]
    if isinstance(loss, Mapping):
        found = []
        for value in loss.values():
            found += value if isinstance(value, list | tuple) else [value]
    scalars = [value for value in found if isinstance(value, Tensor) and value.numel() == 1]
    if len(scalars) < len(found):
        return None
    # An accuracy beside the losses has no gradient.
    trained = [value.sum() for value in scalars if value.requires_grad]
    return torch.stack(trained).sum() if trained else None


def _out_of_scale(losses: Mapping[str, Tensor], detector: Tensor | None) -> Iterator[str]:
    against = 0.0 if detector is None else abs(detector.item())
    for name, loss in losses.items():
        value = loss.item()
        if not math.isfinite(value):
            yield f"{name} is {value}: a step with it spoils every weight."
            continue
        ratio = _ratio(abs(value), against)
        # A term without weight is exactly 0.
        if not (ratio >= OUT_OF_SCALE or 0 < ratio <= 1 / OUT_OF_SCALE):
            continue
        side, advice = ("larger", "lower") if ratio > 1 else ("smaller", "raise")
        factor = max(ratio, 1 / ratio)
        yield (
            f"{name} is {value:.3g}, {factor:.3g} times {side} than the detector's loss of "
            f"{against:.3g}: {advice} its weight, or take weights that carry over from model to "
            "model (`featkd.NORMALIZED`)."
        )


def _without_effect(terms: Sequence[TermReport]) -> Iterator[str]:
    if not any(term.value for term in terms):
        yield "the distillation loss is 0: nothing is distilled."
    for term in terms:
        if term.value and term.gradient_share == 0:
            yield f"{term.name} has no gradient to the student's parameters, which it cannot train."


def _left_out(distiller: nn.Module, optimizer: object) -> Iterator[str]:
    if optimizer is None:
        return
    groups = getattr(optimizer, "param_groups", None)
    if not isinstance(groups, Sequence):
        found = type(optimizer).__name__
        raise TypeError(f"`optimizer` must be a torch.optim.Optimizer or None, got {found}.")
    held = {id(value) for group in groups for value in group["params"]}
    left_out = {
        name: value.numel()
        for name, value in distiller.named_parameters()
        if value.requires_grad and id(value) not in held
    }
    if left_out:
        yield (
            f"{sum(left_out.values()):,} parameters in {len(left_out)} tensors (such as "
            f"{next(iter(left_out))!r}) are in no param_group of the optimizer, and are not "
            "trained: give it `distiller.parameters()`."
        )


def _gradient_norm(value: Tensor, parameters: list[nn.Parameter]) -> float:
    if not value.requires_grad or not parameters:
        return 0.0
    found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return math.hypot(*(float(torch.linalg.vector_norm(g)) for g in found if g is not None))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _levels(distiller: Distiller, step: Step) -> Iterator[LevelReport]:
    image = next(maps_in(step.inputs), None)
    for level, ours in step.student.items():
        theirs = step.teacher[level]
        yield LevelReport(
            name=level,
            student_path=distiller._paths[level][0],
            teacher_path=distiller._paths[level][1],
            student_shape=tuple(ours.shape),
            teacher_shape=tuple(theirs.shape),
            student_stride=_stride(ours, image),
            teacher_stride=_stride(theirs, image),
            adapter_parameters=_adapter_parameters(distiller.loss, level),
        )


def _stride(feature: Tensor, image: Shape | None) -> float | None:
    shape = next(maps_in(feature), None)
    return None if image is None or shape is None else stride_of(shape, image)


def _adapter_parameters(loss: nn.Module, level: str) -> int | None:
    if not isinstance(loss, FeatureDistillationLoss):
        return None
    key = _module_name(SINGLE_LEVEL if loss.single else level)
    return sum(
        value.numel()
        for name, value in loss.named_parameters()
        if value.requires_grad and name.split(".")[1] == key
    )


def _level_table(levels: Sequence[LevelReport]) -> str:
    rows = [("level", "model", "path", "shape", "stride", "channels", "adapters")]
    for level in levels:
        channels = f"{level.student_shape[1]} -> {level.teacher_shape[1]}"
        count = "-" if level.adapter_parameters is None else f"{level.adapter_parameters:,}"
        for side, name, path, shape, stride in (
            (0, "student", level.student_path, level.student_shape, level.student_stride),
            (1, "teacher", level.teacher_path, level.teacher_shape, level.teacher_stride),
        ):
            ends = ("", "") if side else (channels, count)
            strides = "-" if stride is None else f"{stride:g}"
            rows.append(("" if side else level.name, name, path, times(shape), strides, *ends))
    return table(rows)
