"""What losses and presets let a caller choose, and the checks of it."""

from __future__ import annotations

from typing import Literal, get_args

from .._checks import require_choice, require_flag, require_number

Attention = Literal["both", "spatial", "channel"]
Fusion = Literal["logits", "probabilities"]
Kind = Literal["gaussian", "embedded_gaussian", "dot_product", "concatenation"]
TeacherRelation = Literal["fixed", "trained"]
Over = Literal["image", "batch"]
Reduction = Literal["none", "mean", "sum", "norm", "mean_square"]

# Here, not in the checks: torch 2.4 compiles no get_args.
ATTENTIONS = get_args(Attention)
FUSIONS = get_args(Fusion)
KINDS = get_args(Kind)
TEACHER_RELATIONS = get_args(TeacherRelation)
OVER = get_args(Over)
REDUCTIONS = get_args(Reduction)
RESIZE_MODES = ("nearest", "area", "bilinear", "bicubic")


def require_reduction(reduction: object) -> None:
    require_choice("reduction", reduction, REDUCTIONS)


def require_form(reduction: object, normalize: object, standardize: object) -> None:
    """How the distances are scaled and reduced: a standardised one is no norm."""
    require_reduction(reduction)
    require_flag("normalize", normalize)
    require_flag("standardize", standardize)
    if standardize and normalize:
        raise ValueError("`normalize` must be False with `standardize`, got True.")
    if standardize and reduction in ("norm", "mean_square"):
        raise ValueError(
            "`reduction` must be 'none', 'mean' or 'sum' with `standardize`, which gives no norm, "
            f"got {reduction!r}."
        )


def require_temperature(temperature: object) -> None:
    if temperature is not None:
        require_number("temperature", temperature, above=0)


def require_resize(resize: object) -> None:
    if resize is not None:
        require_choice("resize", resize, RESIZE_MODES)


def require_block(
    residual: object, batch_norm: object, teacher_relation: TeacherRelation = "trained"
) -> None:
    """The non-local block's options, which are not all free of each other."""
    require_flag("residual", residual)
    require_flag("batch_norm", batch_norm)
    if batch_norm and not residual:
        raise ValueError("`batch_norm` must be False without `residual`, got True.")
    if batch_norm and teacher_relation == "fixed":
        raise ValueError(
            "`batch_norm` must be False with `teacher_relation` 'fixed', as that block would stay "
            "the identity it starts as, got True."
        )
