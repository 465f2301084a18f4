"""Student, teacher and loss as one module: what a training script wraps, compiles and optimizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import require_callable, require_flag, require_losses
from .._placement import home, placed
from .._preserve import preserved
from ..losses.overall import FeatureDistillationLoss
from ..report.levels import Step
from ..report.report import Report, log_first_step, log_modes, make_report
from ..taps.layouts import Convert, converts_by_side
from ..taps.paths import pair_of, require_in_both, require_module
from ..taps.tap import FeatureTap, capture_names
from .call import called
from .models import (
    images_in,
    require_as_given,
    require_gradients,
    require_no_shared_weights,
    require_synchronised,
)
from .normalization import require_one_normalization
from .shared_input import SharedInput
from .teacher import teacher_features


class Distiller(nn.Module):
    """Runs the student, the teacher on the same pixels, and the distillation loss of their taps.

    `output, losses = distiller(*student_args)` is the student's output, untouched, and the losses.
    The student and the loss (with its adapters) are children: wrap, compile and optimize the
    distiller. The teacher is no child: it is not in `parameters()`, `state_dict()`, `train()` or
    `to()`. It runs under `no_grad` and in `eval` mode at every step, on the device and in the dtype
    where you put it. The first training step in eager mode logs the levels (`logging.INFO`) and
    what is wrong with the teacher's features (`logging.WARNING`) on the logger `featkd`.

    Args:
        student: the model to train.
        teacher: another model.
        loss: :class:`featkd.FeatureDistillationLoss`, or any module that takes two mappings from
            level to features and returns a dictionary of losses.
        layers: from level name to a path in both models or to a (student path, teacher path) pair.
            See :class:`featkd.FeatureTap` for paths and :func:`featkd.match_layers` to find them.
        shared_input: a submodule's path in both models, or a (student path, teacher path) pair. The
            tensor that enters the student's is given to the teacher's, and nothing else of the
            teacher runs. Detectors that resize inside the model need this (`"backbone"` for
            torchvision's): of the same images the teacher would see other pixels.
        convert_input: a function from that tensor to the one that the teacher is given. `None`:
            images go from the student's normalisation to the teacher's, padding like any pixel.
            Both models must state theirs, as torchvision's and mmdet's do; it is read once, here.
        student_forward: `student_forward(student, *args, **kwargs)` replaces the student's call.
        teacher_forward: the same of the teacher, whose arguments come on its device and, where
            floating-point, in its dtype.
        early_stop: leave the teacher's forward with the last capture, for teachers without such a
            seam. What lies behind it does not run, and a second run of a tapped module there is
            not noticed. A sharded or a compiled teacher cannot be left.
        calls: from level to how often its module runs in one forward of either model, where that is
            not once. The loss's levels are then `level[0]`, `level[1]`, ...
        convert: from level to a function that makes a feature map `(B, C, H, W)` of what both taps
            captured. Or to a (student's, teacher's) pair of functions, `None` for what is a map:
            `{"c4": (None, featkd.PatchTokens(14, prefix=5))}` for a vision transformer's tokens.

    Returns (forward):
        `(output, losses)`; in `eval` mode `(output, {})`, and the teacher does not run.

    Raises:
        TypeError: an argument is not of its kind.
        ValueError: a path is unknown, levels do not fit, or two losses have one name.
        RuntimeError: in a forward a tapped module did not run once: :meth:`featkd.FeatureTap.pop`.

    Reference: Zhang & Ma (ICLR 2021), figure 2d.

    Example:
        >>> import torch
        >>> from featkd import FeatureDistillationLoss
        >>> student = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
        >>> teacher = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU())
        >>> loss = FeatureDistillationLoss({"c1": 8}, {"c1": 16})
        >>> distiller = Distiller(student, teacher, loss, {"c1": "1"})
        >>> output, losses = distiller(torch.randn(2, 3, 16, 16))
        >>> sum(losses.values()).backward()
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        loss: nn.Module,
        layers: Mapping[str, str | tuple[str, str]],
        *,
        shared_input: str | tuple[str, str] | None = None,
        convert_input: Callable[[Tensor], Tensor] | None = None,
        student_forward: Callable[..., object] | None = None,
        teacher_forward: Callable[..., object] | None = None,
        early_stop: bool = False,
        calls: Mapping[str, int] | None = None,
        convert: Mapping[str, Convert | tuple[Convert | None, Convert | None]] | None = None,
    ) -> None:
        super().__init__()
        for name, module in (("student", student), ("teacher", teacher), ("loss", loss)):
            require_module(name, module)
        require_no_shared_weights("student", student, teacher)
        require_no_shared_weights("loss", loss, teacher)
        require_synchronised(student, loss)
        if not isinstance(layers, Mapping):
            found = type(layers).__name__
            raise TypeError(f"`layers` must be a mapping, as `match.layers` is, got {found}.")
        require_callable("convert_input", convert_input)
        require_callable("student_forward", student_forward)
        require_callable("teacher_forward", teacher_forward)
        require_flag("early_stop", early_stop)
        if shared_input is not None and teacher_forward is not None:
            raise ValueError(
                "`shared_input` must be None where `teacher_forward` is given, "
                f"got {shared_input!r}."
            )
        if shared_input is None and convert_input is not None:
            raise ValueError("`shared_input` must be given beside `convert_input`, got None.")
        pairs = {level: pair_of(f"layers[{level!r}]", path) for level, path in layers.items()}
        for level, paths in pairs.items():
            require_in_both(f"layers[{level!r}]", paths, student, teacher)
        converts = converts_by_side(convert, pairs)
        self._student_tap, self._teacher_tap = (
            FeatureTap(
                model,
                {level: pair[side] for level, pair in pairs.items()},
                calls=calls,
                convert=converts[side],
            )
            for side, model in enumerate((student, teacher))
        )
        # Of each level that the loss gets.
        self._paths = {
            name: pairs[level]
            for level, count in self._student_tap.calls.items()
            for name in capture_names(level, count)
        }
        if isinstance(loss, FeatureDistillationLoss):
            found, levels = list(self._paths), list(loss.levels)
            if len(found) != 1 if loss.single else set(found) != set(levels):
                raise ValueError(f"`layers` must have the levels of `loss` {levels}, got {found}.")
        self.student = student
        self.loss = loss
        # A tuple keeps the teacher out of parameters(), state_dict(), train() and to().
        self._teacher = (teacher,)
        self.shared_input = None if shared_input is None else pair_of("shared_input", shared_input)
        self.student_forward = student_forward
        self.teacher_forward = teacher_forward
        self.early_stop = early_stop
        self._logged = self._warned = False
        self._shared: SharedInput | None = None
        if self.shared_input is not None:
            self._shared = SharedInput(student, teacher, self.shared_input, pairs, convert_input)
        elif student_forward is None and teacher_forward is None:
            require_one_normalization(student, teacher)

    @property
    def teacher(self) -> nn.Module:
        return self._teacher[0]

    def __setattr__(self, name: str, value: Any) -> None:
        # The taps would stay on the old one, and an optimizer would go on with its parameters.
        # DataParallel's replicas have others, and say themselves what is wrong with them.
        if name in ("student", "teacher", "loss") and not hasattr(self, "_is_replica"):
            held = self._modules.get(name)
            wraps = isinstance(value, nn.Module) and any(held in (m, None) for m in value.modules())
            if name == "teacher" or not wraps:
                raise AttributeError(
                    f"`{name}` must stay: make a new Distiller for another one, and an optimizer "
                    "of its parameters."
                )
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return (
            f"teacher={type(self.teacher).__name__}, layers={self._student_tap.layers}, "
            f"shared_input={self.shared_input}"
        )

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        in_eager = not torch.compiler.is_compiling()
        if in_eager and self.student.training != self.training and not self._warned:
            self._warned = log_modes(self.training)
        if not self.training:
            return called(self.student_forward, self.student, *args, **kwargs), {}
        step = self._step(args, kwargs)
        if in_eager and not self._logged:
            self._logged = True
            log_first_step(step, self.student, self.teacher, self.loss)
        return step.output, step.losses

    def report(
        self, *args: Any, optimizer: torch.optim.Optimizer | None = None, **kwargs: Any
    ) -> Report:
        """Runs one trial step and says what is tapped, how large it is, and what each term does.

        A term is judged by its gradient's norm over that of the detector's loss, on the student's
        parameters that the distillation reaches. The detector's loss is known
        where the output is a mapping of scalars, has a `.loss`, is a `(loss, items)` pair or a
        scalar. Call it as the distiller itself, in training mode and before DDP or FSDP. No
        gradient, buffer, mode or random number is changed, but a buffer that a first forward
        makes. It takes one backward a term.

        Args:
            args, kwargs: a batch, as for the distiller.
            optimizer: parameters of student and adapters that it does not hold are noted.

        Returns:
            :class:`featkd.report.Report`; printed, a table.

        Raises:
            TypeError: `optimizer` has no `param_groups`.

        Example:
            >>> import torch
            >>> from featkd import FeatureDistillationLoss
            >>> student = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 2, 1), torch.nn.Tanh())
            >>> teacher = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, 2, 1), torch.nn.Tanh())
            >>> loss = FeatureDistillationLoss({"c1": 8}, {"c1": 16})
            >>> distiller = Distiller(student, teacher, loss, {"c1": "0"})
            >>> report = distiller.report(torch.randn(2, 3, 16, 16))
            >>> report.levels[0].student_stride, report.levels[0].adapter_parameters
            (2.0, 144)
        """
        with preserved(self, self.teacher), torch.enable_grad():
            step = self._step(args, kwargs)
            alike = self.student_forward is None and self.teacher_forward is None
            return make_report(step, self.student, self.teacher, self.loss, optimizer, alike)

    def _step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step:
        input_tap = nullcontext() if self._shared is None else self._shared.tap
        images = images_in((args, kwargs)) if self._shared is None else {}
        with self._student_tap, input_tap:
            output = called(self.student_forward, self.student, *args, **kwargs)
        require_as_given((args, kwargs), images)
        shared = None if self._shared is None else self._shared.pop()
        ours = self._student_tap.pop()
        require_gradients(ours)
        call = partial(self._call_teacher, args, kwargs, shared)
        theirs = teacher_features(self._teacher_tap, call, self.early_stop, ours)
        if isinstance(self.loss, FeatureDistillationLoss) and self.loss.single:
            losses = self.loss(*ours.values(), *theirs.values())
        else:
            losses = self.loss(ours, theirs)
        require_losses(losses, output)
        inputs = (args, kwargs) if shared is None else shared
        notes = () if self._shared is None or shared is None else self._shared.notes(shared)
        return Step(output, losses, ours, theirs, inputs, self._paths, notes)

    def _call_teacher(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], shared: Tensor | None
    ) -> None:
        if self._shared is not None and shared is not None:
            self._shared.run_teacher(shared)
        else:
            args, kwargs = placed((args, kwargs), *home(self.teacher))
            called(self.teacher_forward, self.teacher, *args, **kwargs)
