"""Student, teacher and loss as one module: what a training script wraps, compiles and optimizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ._checks import require_callable, require_flag, require_losses
from .losses.overall import FeatureDistillationLoss
from .report.levels import Step
from .report.preserve import preserved
from .report.report import Report, introduce, make_report
from .taps.early_stop import left_early
from .taps.layouts import Convert, converts_by_side
from .taps.paths import pair_of, require_apart, require_module, resolve
from .taps.tap import FeatureTap


class Distiller(nn.Module):
    """Runs the student, the teacher on the same pixels, and the distillation loss of their taps.

    `output, losses = distiller(*student_args)` is the student's output, untouched, and the losses.
    The student and the loss (with its adapters) are children: wrap, compile and optimize the
    distiller. The teacher is no child: it is not in `parameters()`, `state_dict()`, `train()` or
    `to()`; it runs under `no_grad`, in `eval` mode, at every step, on the device and in the dtype
    where you put it. The first training step in eager mode logs the levels (`logging.INFO`) and
    what is wrong with the teacher's features (`logging.WARNING`) on the logger `featkd`.

    Args:
        student: the model to train.
        teacher: another model.
        loss: :class:`featkd.FeatureDistillationLoss`, or any module that takes two mappings from
            level to features and returns a dictionary of losses.
        layers: from level name to a path in both models or to a (student path, teacher path) pair;
            see :class:`featkd.FeatureTap` for paths and :func:`featkd.match_layers` to find them.
        shared_input: a submodule's path in both models, or a (student path, teacher path) pair: the
            tensor that enters the student's is given to the teacher's, and nothing else of the
            teacher runs. Detectors that resize inside the model need this (`"backbone"` for
            torchvision's): called with the same images, the teacher would see other pixels.
        teacher_forward: `teacher_forward(teacher, *args, **kwargs)` replaces the teacher's call.
            With neither, the teacher is called as the student is.
        early_stop: leave the teacher's forward with the last capture, for teachers without such a
            seam: what lies behind the last tap does not run, hooks and the model's own counters
            included (not for a sharded teacher), and a tapped module that would run a second time
            there is not noticed. Compiled code is not left before its end.
        convert: from level to a function that makes a feature map `(B, C, H, W)` of what both taps
            captured, or to a (student's, teacher's) pair of functions, `None` for what is one:
            `{"c4": (None, featkd.PatchTokens(14, prefix=5))}` for a vision transformer's tokens.

    Returns (forward):
        `(output, losses)`. To validate, call `distiller.student`: the teacher does not run.

    Raises:
        TypeError: an argument is not of its kind.
        ValueError: a path is unknown, or levels do not fit the loss.
        RuntimeError: in a forward a tapped module did not run once, see
            :meth:`featkd.FeatureTap.pop`.

    Reference: Zhang & Ma (ICLR 2021), figure 2d.

    Example:
        >>> import torch
        >>> from featkd import ONE_STAGE, FeatureDistillationLoss
        >>> student = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
        >>> teacher = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU())
        >>> loss = FeatureDistillationLoss({"c1": 8}, {"c1": 16}, hyperparameters=ONE_STAGE)
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
        teacher_forward: Callable[..., object] | None = None,
        early_stop: bool = False,
        convert: Mapping[str, Convert | tuple[Convert | None, Convert | None]] | None = None,
    ) -> None:
        super().__init__()
        for name, module in (("student", student), ("teacher", teacher), ("loss", loss)):
            require_module(name, module)
        require_apart("student", student, teacher)
        require_apart("loss", loss, teacher)
        if not isinstance(layers, Mapping):
            found = type(layers).__name__
            raise TypeError(f"`layers` must be a mapping from level to path, got {found}.")
        require_callable("teacher_forward", teacher_forward)
        require_flag("early_stop", early_stop)
        if shared_input is not None and teacher_forward is not None:
            raise ValueError(
                "`shared_input` must be None where `teacher_forward` is given, "
                f"got {shared_input!r}."
            )
        pairs = {level: pair_of(f"layers[{level!r}]", path) for level, path in layers.items()}
        if isinstance(loss, FeatureDistillationLoss):
            fits = len(pairs) == 1 if loss.single else set(pairs) == set(loss.levels)
            if not fits:
                levels = list(loss.levels)
                raise ValueError(
                    f"`layers` must have the levels of `loss` {levels}, got {list(pairs)}."
                )
        self.student = student
        self.loss = loss
        # A tuple keeps the teacher, and the part that runs, out of parameters(), state_dict(),
        # train() and to().
        self._teacher = (teacher, teacher)
        self.teacher_forward = teacher_forward
        self.early_stop = early_stop
        self._introduced = False
        converts = converts_by_side(convert, pairs)
        self._student_tap, self._teacher_tap = (
            FeatureTap(
                model,
                {level: pair[side] for level, pair in pairs.items()},
                convert=converts[side],
            )
            for side, model in enumerate((student, teacher))
        )
        self._input_tap: FeatureTap | None = None
        self.shared_input: tuple[str, str] | None = None
        if shared_input is not None:
            self.shared_input = pair_of("shared_input", shared_input)
            source, target = self.shared_input
            resolve(student, source, "shared_input")
            self._input_tap = FeatureTap(student, {"shared_input": f"{source}:input"})
            part, _, _ = resolve(teacher, target, "shared_input")
            self._teacher = (teacher, part)
            within = set(part.modules())
            for level, (_, path) in pairs.items():
                name = f"layers[{level!r}]"
                if resolve(teacher, path, name)[0] not in within:
                    raise ValueError(
                        f"`{name}` must lie within the teacher's {target!r}, which "
                        f"`shared_input` runs, got {path!r}."
                    )

    @property
    def teacher(self) -> nn.Module:
        return self._teacher[0]

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module would take a new teacher for a child, and go on with the old one.
        if name == "teacher":
            raise AttributeError("`teacher` must stay: make a new Distiller for another one.")
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return (
            f"teacher={type(self.teacher).__name__}, layers={self._student_tap.layers}, "
            f"shared_input={self.shared_input}"
        )

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        step = self._step(args, kwargs)
        if not torch.compiler.is_compiling() and self.training and not self._introduced:
            self._introduced = True
            introduce(step, self.loss)
        return step.output, step.losses

    def report(
        self, *args: Any, optimizer: torch.optim.Optimizer | None = None, **kwargs: Any
    ) -> Report:
        """Runs one trial step and says what is tapped, how large it is, and what each term does.

        A term is judged by its gradient's norm over that of the detector's loss, on the student's
        parameters that the distillation reaches: about 1 is good. Noted too are a teacher whose
        features are no trained teacher's, losses that are not finite, and terms without a gradient.
        Call it as the distiller itself, in training mode and before DDP or FSDP; no gradient,
        buffer, mode or random number is changed. The detector's loss is known where the student's
        output is a mapping of scalars, has a `.loss`, is a `(loss, items)` pair or a scalar. Each
        term takes one backward (which reentrant checkpointing refuses).

        Args:
            args, kwargs: a batch, as for the distiller.
            optimizer: to be checked for the parameters of student and adapters: those that it does
                not hold are noted.

        Returns:
            :class:`featkd.Report`; printed, a table.

        Raises:
            TypeError: `optimizer` has no `param_groups`.

        Example:
            >>> import torch
            >>> from featkd import NORMALIZED, FeatureDistillationLoss
            >>> student = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 2, 1), torch.nn.Tanh())
            >>> teacher = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, 2, 1), torch.nn.Tanh())
            >>> loss = FeatureDistillationLoss({"c1": 8}, {"c1": 16}, hyperparameters=NORMALIZED)
            >>> distiller = Distiller(student, teacher, loss, {"c1": "0"})
            >>> report = distiller.report(torch.randn(2, 3, 16, 16))
            >>> report.levels[0].student_stride, report.levels[0].adapter_parameters
            (2.0, 144)
        """
        with preserved(self, self.teacher), torch.enable_grad():
            return make_report(self._step(args, kwargs), self.student, self.loss, optimizer)

    def _step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step:
        shared = None
        if self._input_tap is None:
            with self._student_tap:
                output = self.student(*args, **kwargs)
        else:
            with self._student_tap, self._input_tap:
                output = self.student(*args, **kwargs)
            shared = self._input_tap.pop()["shared_input"]
        student_features = self._student_tap.pop()
        for level, features in student_features.items():
            if torch.is_grad_enabled() and not features.requires_grad:
                raise RuntimeError(
                    f"`layers[{level!r}]` must carry a gradient, got a frozen part of the student: "
                    "unfreeze it, or leave this level out of `layers` and `loss`."
                )
        teacher_features = self._teacher_features(args, kwargs, shared)
        for level, features in teacher_features.items():
            if features.is_meta and not student_features[level].is_meta:
                raise ValueError(
                    f"`layers[{level!r}]` must have values in the teacher, got the meta device."
                )
            teacher_features[level] = features.to(student_features[level].device)
        if isinstance(self.loss, FeatureDistillationLoss) and self.loss.single:
            (level,) = student_features
            losses = self.loss(student_features[level], teacher_features[level])
        else:
            losses = self.loss(student_features, teacher_features)
        require_losses(losses)
        inputs = (args, kwargs) if shared is None else shared
        paths = self._student_tap.layers, self._teacher_tap.layers
        return Step(output, losses, student_features, teacher_features, inputs, paths)

    @torch.no_grad()
    def _teacher_features(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], shared: Tensor | None
    ) -> dict[str, Tensor]:
        teacher = self.teacher
        if any(module.training for module in teacher.modules()):
            teacher.eval()
        with self._teacher_tap:
            # Raising inside a compiled graph would break it.
            if self.early_stop and not torch.compiler.is_compiling():
                with left_early(self._teacher_tap):
                    self._call_teacher(args, kwargs, shared)
            else:
                self._call_teacher(args, kwargs, shared)
        return self._teacher_tap.pop()

    def _call_teacher(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], shared: Tensor | None
    ) -> None:
        teacher, part = self._teacher
        if shared is not None:
            weights = (value for value in part.parameters() if value.is_floating_point())
            weight = next(weights, shared)
            part(shared.to(weight.device, weight.dtype))
        elif self.teacher_forward is not None:
            self.teacher_forward(teacher, *args, **kwargs)
        else:
            teacher(*args, **kwargs)
