"""The tensor that enters a part of the student, for the same part of the teacher."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from .._placement import placed, weights_of
from ..taps.paths import resolve
from ..taps.tap import FeatureTap
from .normalization import renormalization, stated

NAME = "shared_input"
TEACHER_ALONE = (
    "the teacher normalises its images and the student does not say how it does: the teacher gets "
    "the student's pixels as they are. Give `convert_input`, which may return them as they are."
)


class SharedInput:
    """Taps what enters the student's part, and calls the teacher's with it."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        paths: tuple[str, str],
        layers: Mapping[str, tuple[str, str]],
        convert: Callable[[Tensor], Tensor] | None,
    ) -> None:
        ours = resolve(student, paths[0], NAME)[0]
        self.part = resolve(teacher, paths[1], NAME)[0]
        _require_one_input(paths[0], ours)
        _require_one_input(paths[1], self.part)
        within = set(self.part.modules())
        for level, (_, path) in layers.items():
            name = f"layers[{level!r}]"
            if resolve(teacher, path, name)[0] not in within:
                raise ValueError(
                    f"`{name}` must lie within the teacher's {paths[1]!r}, which "
                    f"`shared_input` runs, got {path!r}."
                )
        # A path with `:input[item]` names one of several.
        path = paths[0] if ":" in paths[0] else f"{paths[0]}:input"
        self.tap = FeatureTap(student, {NAME: path})
        own, theirs = stated(student, ours), stated(teacher, self.part)
        self.convert = convert or renormalization(own, theirs)
        self.teacher_alone = convert is None and own is None and theirs is not None

    def pop(self) -> Tensor:
        runs = len(self.tap._store.captured.get(NAME, []))
        if runs > 1:
            raise RuntimeError(
                f"`shared_input` must name a part that runs once in a forward, got {runs} runs of "
                f"{self.tap.layers[NAME]!r}: leave it out where neither model resizes its images."
            )
        return self.tap.pop()[NAME]

    def notes(self, shared: Tensor) -> tuple[str, ...]:
        """What may be wrong with images, of one channel or three."""
        is_image = shared.dim() == 4 and shared.shape[1] in (1, 3)
        return (TEACHER_ALONE,) if self.teacher_alone and is_image else ()

    def run_teacher(self, shared: Tensor) -> None:
        found: object = shared if self.convert is None else self.convert(shared)
        if not isinstance(found, Tensor):
            raise TypeError(f"`convert_input` must return a tensor, got {type(found).__name__}.")
        weight = next(weights_of(self.part), found)
        self.part(placed(found, None if weight.is_meta else weight.device, weight.dtype))


def _require_one_input(path: str, part: nn.Module) -> None:
    required = _required(part)
    if len(required) < 2:
        return
    inner = (name for name, module in part.named_modules() if name and len(_required(module)) == 1)
    nearest = min(inner, key=lambda name: name.count("."), default=None)
    advice = "" if nearest is None else f": try {f'{path}.{nearest}'.removeprefix('.')!r}"
    raise ValueError(
        f"`shared_input` must name a module that takes one tensor, got {path!r}, which takes "
        f"{' and '.join(required)}{advice}."
    )


def _required(module: nn.Module) -> list[str]:
    """The arguments that no call can leave out; none where the signature is not known."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.kind in kinds and p.default is p.empty]
