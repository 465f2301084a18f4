"""What losses and presets let a caller choose, and the checks of it."""

from __future__ import annotations

from typing import Literal, get_args

from .._checks import require_choice

Attention = Literal["both", "spatial", "channel"]
Fusion = Literal["logits", "probabilities"]
Kind = Literal["gaussian", "embedded_gaussian", "dot_product", "concatenation"]
TeacherRelation = Literal["fixed", "trained"]
Reduction = Literal["none", "mean", "sum", "norm", "mean_square"]

# Here, not in the checks: torch 2.4 compiles no get_args.
ATTENTIONS = get_args(Attention)
FUSIONS = get_args(Fusion)
KINDS = get_args(Kind)
TEACHER_RELATIONS = get_args(TeacherRelation)
REDUCTIONS = get_args(Reduction)
RESIZE_MODES = ("nearest", "area", "bilinear", "bicubic")


def require_reduction(reduction: object) -> None:
    require_choice("reduction", reduction, REDUCTIONS)


def require_resize(resize: object) -> None:
    if resize is not None:
        require_choice("resize", resize, RESIZE_MODES)
