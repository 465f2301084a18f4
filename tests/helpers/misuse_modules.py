"""Rows of the table of misuse: the modules, built and called."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

import featkd
from tests.helpers.misuse_functions import mask_row, pair_cells
from tests.helpers.misuse_kinds import (
    ABOVE_0,
    AT_LEAST_0,
    CHOICE,
    COUNT,
    FLAG,
    INF,
    MAP,
    MAP2,
    MAP_OF_2,
    NAN,
    NO_FUNCTION,
    NO_LEVELS,
    NO_MODEL,
    NO_MODULE,
    NO_OPTION,
    NO_ORDER,
    NO_PATH,
    NO_TENSOR,
    ONE_TENSOR,
    OPTIONAL_COUNT,
    Row,
    Wrong,
    choice,
    empty_or_zero,
    equals,
    feature_map,
    flag,
    kind_errors,
    normal,
    not_hidden,
    number,
    poisoned,
    refused,
)

# --- what they are built of -----------------------------------------------------------------------

SETTINGS = {"alpha": 1.0, "beta": 1.0, "gamma": 1.0, "temperature": 0.5}
BUILT = NO_TENSOR | NO_FUNCTION | NO_MODEL
CHANNELS = {"student_channels": COUNT, "teacher_channels": COUNT}
RESIZE = choice(optional=True)


def build(name: str, right: Mapping[str, Any], wrong: Mapping[str, list[Wrong]]) -> Row:
    """What applies to no argument does not apply."""
    kinds = {cell.kind for wrongs in wrong.values() for cell in wrongs}
    options = (NO_OPTION - kinds) | BUILT
    return Row(name, getattr(featkd, name), right, wrong, not_applicable=options)


TEMPERATURE = number(0, 0.0, -1, -0.5, optional=True)
BATCH_NORM = [*FLAG, Wrong("no flag", True, ValueError, ("`batch_norm`", "`residual`"))]
THREE_TWO = {"student_channels": 3, "teacher_channels": 2}
RELATION = {
    "kind": CHOICE,
    "inter_channels": OPTIONAL_COUNT,
    "subsample": COUNT,
    "residual": FLAG,
    "batch_norm": BATCH_NORM,
}
ENTIRE = partial(featkd.FeatureDistillationLoss, hyperparameters=featkd.TWO_STAGE)
LEVELS = {"c3": 3, "c4": 4}


def levels(*args: Any, **options: Any) -> Callable[[], Any]:
    return partial(ENTIRE, *args, **options)


CONSTRUCTORS = [
    build("SpatialAttention", {}, {"absolute": FLAG}),
    build("ChannelAttention", {}, {"absolute": FLAG}),
    build("AttentionMask", {"temperature": 0.5}, {"temperature": ABOVE_0, "fusion": CHOICE}),
    build(
        "AttentionTransferLoss",
        THREE_TWO,
        {
            **CHANNELS,
            "attention": CHOICE,
            "absolute": FLAG,
            "reduction": CHOICE,
            "resize": RESIZE,
            "normalize": FLAG,
            "standardize": FLAG,
        },
    ),
    build(
        "AttentionMaskedLoss",
        THREE_TWO | {"temperature": 0.5},
        {
            **CHANNELS,
            "temperature": TEMPERATURE,
            "fusion": CHOICE,
            "attention": CHOICE,
            "reduction": CHOICE,
            "resize": RESIZE,
            "normalize": FLAG,
            "standardize": FLAG,
        },
    ),
    build(
        "NonLocalRelation",
        {"in_channels": 3, "kind": "gaussian"},
        {"in_channels": COUNT, **RELATION},
    ),
    build(
        "NonLocalLoss",
        THREE_TWO | {"kind": "gaussian"},
        {
            **CHANNELS,
            **RELATION,
            "teacher_relation": CHOICE,
            "reduction": CHOICE,
            "resize": RESIZE,
            "normalize": FLAG,
            "standardize": FLAG,
        },
    ),
    build(
        "Hyperparameters",
        SETTINGS,
        {
            **dict.fromkeys(("alpha", "beta", "gamma"), AT_LEAST_0),
            "temperature": TEMPERATURE,
            "fusion": CHOICE,
            "absolute": FLAG,
            "reduction": CHOICE,
            "transfer_attention": CHOICE,
            "masked_attention": CHOICE,
            "kind": CHOICE,
            "residual": FLAG,
            "batch_norm": BATCH_NORM,
            "teacher_relation": CHOICE,
            "normalize": FLAG,
            "standardize": FLAG,
        },
    ),
    Row(
        "FeatureDistillationLoss",
        featkd.FeatureDistillationLoss,
        THREE_TWO | {"hyperparameters": featkd.Hyperparameters(0, 0, 0, 0.5)},
        {
            "student_channels": COUNT,
            "teacher_channels": COUNT,
            "hyperparameters": kind_errors(
                "levels", [None, {"alpha": 1.0}, "TWO_STAGE", featkd.Hyperparameters], TypeError
            ),
            "inter_channels": OPTIONAL_COUNT,
            "subsample": COUNT,
            "resize": RESIZE,
            "normalize": flag(optional=True),
        },
        {
            "a level that the teacher lacks": refused(
                "levels", ValueError, levels(LEVELS, {"c3": 3}), "`teacher_channels`", "c4"
            ),
            "a level that the student lacks": refused(
                "levels", ValueError, levels({"c3": 3}, LEVELS), "`teacher_channels`", "c4"
            ),
            "another name": refused(
                "levels", ValueError, levels(LEVELS, {"c3": 3, "p4": 4}), "c4", "p4"
            ),
            "no level": refused("levels", ValueError, levels({}, {}), "at least one", "[]"),
            "a mapping and a number": refused(
                "levels", TypeError, levels(LEVELS, 3), "`teacher_channels`", "int"
            ),
            "a number and a mapping": refused(
                "levels", TypeError, levels(3, LEVELS), "`teacher_channels`", "dict"
            ),
            "a level without a name": refused("levels", ValueError, levels({"": 3}, {"": 3})),
            "a level with a slash": refused(
                "levels", ValueError, levels({"a/b": 3}, {"a/b": 3}), "a/b"
            ),
            "a level named like an attribute": refused(
                "levels", ValueError, levels({"keys": 3}, {"keys": 3}), "keys"
            ),
            "a level that is a number": refused("levels", TypeError, levels({3: 3}, {3: 3}), "int"),
            "a string at a level": refused(
                "no number",
                TypeError,
                levels(LEVELS, LEVELS | {"c4": "4"}),
                "`teacher_channels['c4']`",
                "str",
            ),
            "no channel at a level": refused(
                "number",
                ValueError,
                levels(LEVELS | {"c4": 0}, LEVELS),
                "`student_channels['c4']`",
                0,
            ),
            "subsample of a level missing": refused(
                "levels", ValueError, levels(LEVELS, LEVELS, subsample={"c3": 2}), "`subsample`"
            ),
            "subsample of a level, a string": refused(
                "no number",
                TypeError,
                levels(LEVELS, LEVELS, subsample={"c3": 2, "c4": "2"}),
                "`subsample['c4']`",
            ),
            "inter_channels of a level too many": refused(
                "levels",
                ValueError,
                levels(LEVELS, LEVELS, inter_channels=LEVELS | {"c5": 2}),
                "`inter_channels`",
                "c5",
            ),
        },
        NO_TENSOR | NO_FUNCTION | NO_MODULE | NO_PATH | NO_ORDER,
    ),
]


# --- what they are called with --------------------------------------------------------------------

AWAY = {(2, 7, 4, 5): 3, (2, 2, 4, 5): 3, (2, 4, 5, 3): "from_channels_last"}
TOKENS_OF_3 = torch.ones(2, 20, 3)
FORWARD = NO_OPTION | NO_FUNCTION | NO_MODEL


def of_module(module: nn.Module, names: tuple[str, str], **right: Any) -> Row:
    """Of a loss of 3 and 2 channels."""
    ours, theirs = names
    other_sizes = dict.fromkeys(((2, 3, 4, 6), (2, 3, 5, 4)), "`resize`")
    wrong = {
        ours: [
            *feature_map(MAP, {**AWAY, **other_sizes, (1, 3, 4, 5): (2, 2, 4, 5)}),
            Wrong("rank", TOKENS_OF_3, ValueError, ((2, 20, 3), "from_tokens")),
        ],
        theirs: [
            *feature_map(
                MAP_OF_2,
                {
                    (2, 7, 4, 5): 2,
                    (2, 3, 4, 5): 2,
                    (2, 4, 5, 2): "from_channels_last",
                    (2, 2, 4, 6): "`resize`",
                    (1, 2, 4, 5): (2, 3, 4, 5),
                },
            ),
            Wrong("rank", torch.ones(2, 20, 2), ValueError, ((2, 20, 2), "from_tokens")),
        ],
    }
    call = partial(module)
    return Row(
        f"{type(module).__name__}.forward",
        call,
        {ours: MAP, theirs: MAP_OF_2, **right},
        wrong,
        pair_cells(call, MAP, MAP_OF_2, detaches=True),
        FORWARD,
    )


TRANSFER = featkd.AttentionTransferLoss(3, 2)
MASKED = featkd.AttentionMaskedLoss(3, 2, temperature=0.5)
NON_LOCAL = featkd.NonLocalLoss(3, 2, kind="embedded_gaussian")
BLOCK = featkd.NonLocalRelation(3, kind="gaussian", residual=True)
TOTAL = ENTIRE(3, 2)
BY_LEVEL = ENTIRE({"c3": 3, "c4": 3}, {"c3": 2, "c4": 2})
OURS, THEIRS = {"c3": MAP, "c4": MAP2}, {"c3": MAP_OF_2, "c4": MAP_OF_2}
FEATURES = ("student_features", "teacher_features")


def masks_row() -> Row:
    right = {"student": MAP, "adapted": MAP_OF_2, "teacher": normal(2, 2, 4, 5)}
    shape = tuple(MAP_OF_2.shape)
    wrong = {
        "student": feature_map(MAP, {(2, 7, 4, 5): 3, (2, 3, 4, 6): shape, (1, 3, 4, 5): shape}),
        "adapted": feature_map(MAP_OF_2, dict.fromkeys(((2, 3, 4, 5), (1, 2, 4, 5)), shape)),
        "teacher": feature_map(MAP_OF_2, dict.fromkeys(((2, 3, 4, 5), (2, 2, 5, 4)), shape)),
    }
    # The student's numbers concern the spatial mask alone, the adapted ones the channel mask.
    for side in ("student", "adapted"):
        wrong[side] = [w for w in wrong[side] if w.kind not in ("NaN", "inf")]
    constant = lambda masks: not any(mask.requires_grad for mask in masks)  # noqa: E731
    leaf = MAP_OF_2.clone().requires_grad_()
    cells = {
        "an empty batch": Wrong(
            "zero size",
            partial(MASKED.masks, MAP[:0], MAP_OF_2[:0], MAP_OF_2[:0]),
            empty_or_zero,
        ),
        "a student in float16": Wrong(
            "mixed dtypes",
            partial(MASKED.masks, MAP.half(), MAP_OF_2, MAP_OF_2),
            equals(partial(MASKED.masks, MAP.half().float(), MAP_OF_2, MAP_OF_2), torch.float32),
        ),
        "a teacher that requires a gradient": Wrong(
            "teacher's gradient", partial(MASKED.masks, MAP, leaf, leaf), constant
        ),
    }
    for which, side in enumerate(("student", "adapted")):
        for kind, value in (("NaN", NAN), ("inf", INF)):
            with_it = partial(MASKED.masks, **right | {side: poisoned(right[side], value)})
            holds = lambda masks, which=which: not_hidden(masks[which])  # noqa: E731
            cells[f"{kind} in {side}"] = Wrong(kind, with_it, holds)
    return Row("AttentionMaskedLoss.masks", MASKED.masks, right, wrong, cells, FORWARD)


def total_row() -> Row:
    row = of_module(TOTAL, FEATURES)
    level, away = "`student_features['c4']`", MAP.to("meta")

    def cell(kind: str, error: type[Exception], ours: Any, theirs: Any, *mentions: Any) -> Wrong:
        return refused(kind, error, partial(BY_LEVEL, ours, theirs), *mentions)

    one = {"c3": MAP}
    cells = {
        "a level that the student lacks": cell(
            "levels", ValueError, one, THEIRS, FEATURES[0], "c4"
        ),
        "a level that the teacher lacks": cell("levels", ValueError, OURS, one, "teacher", "c4"),
        "a level too many": cell("levels", ValueError, OURS | {"c5": MAP}, THEIRS, "c5"),
        "another name": cell("levels", ValueError, {"c3": MAP, "p4": MAP}, THEIRS, "p4"),
        "a number for a level": cell("levels", ValueError, {"c3": MAP, 4: MAP}, THEIRS, "4"),
        "a tensor for a mapping": cell("levels", TypeError, MAP, THEIRS, FEATURES[0], "Tensor"),
        "a list for a mapping": cell("levels", TypeError, OURS, [MAP, MAP], FEATURES[1], "list"),
        "a mapping for a tensor": refused(
            "levels", TypeError, partial(TOTAL, {"features": MAP}, MAP_OF_2), FEATURES[0], "dict"
        ),
        "None at a level": cell("no tensor", TypeError, OURS | {"c4": None}, THEIRS, level),
        "integers at a level": cell("dtype", TypeError, OURS | {"c4": MAP.long()}, THEIRS, level),
        "a flat level": cell("rank", ValueError, OURS | {"c4": MAP[0]}, THEIRS, level),
        "a level's channels": cell("shape", ValueError, OURS | {"c4": MAP_OF_2}, THEIRS, level),
        "a level's size": cell(
            "shape",
            ValueError,
            OURS | {"c4": MAP[..., 1:]},
            THEIRS,
            level,
            "`teacher_features['c4']`",
            (2, 3, 4, 4),
            "resize",
        ),
        "an empty level": cell("zero size", ValueError, OURS | {"c4": MAP[..., :0]}, THEIRS, level),
        "a level elsewhere": cell("device", ValueError, OURS | {"c4": away}, THEIRS, level),
    }
    return replace(row, others={**row.others, **cells}, not_applicable=FORWARD - NO_LEVELS)


def one_tensor_module(module: nn.Module) -> Row:
    shapes = AWAY if module is BLOCK else {}
    name = f"{type(module).__name__}.forward"
    wrong = {"features": feature_map(MAP, shapes, alone=True)}
    cells = {"an empty batch": Wrong("zero size", partial(module, MAP[:0]), empty_or_zero)}
    not_applicable = ONE_TENSOR | FORWARD
    if module is BLOCK:
        cells["away from the module"] = refused(
            "device",
            ValueError,
            partial(module, MAP.to("meta")),
            "`features`",
            f"`{type(module).__name__}`",
            "cpu",
            "meta",
        )
        not_applicable -= {"device"}
    else:
        not_applicable |= {"shape"}
    return Row(name, partial(module), {"features": MAP}, wrong, cells, not_applicable)


CALLS = [
    one_tensor_module(featkd.SpatialAttention()),
    one_tensor_module(featkd.ChannelAttention()),
    one_tensor_module(BLOCK),
    mask_row("AttentionMask.forward", partial(featkd.AttentionMask(0.5)), {}),
    of_module(TRANSFER, ("student", "teacher")),
    of_module(MASKED, ("student", "teacher")),
    masks_row(),
    of_module(NON_LOCAL, ("student", "teacher")),
    total_row(),
]
