"""Rows of the table of misuse: functions, modules and what modules are built of."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import featkd
from featkd import functional as f
from tests.helpers.misuse_kinds import (
    ABOVE_0,
    AT_LEAST_0,
    CHOICE,
    COUNT,
    FINITE,
    FLAG,
    FUNCTION,
    INF,
    MAP,
    MAP2,
    MAP_OF_2,
    NAN,
    NO_FLAG,
    NO_FUNCTION,
    NO_LEVELS,
    NO_MODEL,
    NO_MODULE,
    NO_NUMBER,
    NO_OPTION,
    NO_ORDER,
    NO_PATH,
    NO_STRING,
    NO_TEACHER,
    NO_TENSOR,
    ONE_TENSOR,
    OPTIONAL_COUNT,
    Row,
    Wrong,
    choice,
    count,
    empty_or_zero,
    equals,
    feature_map,
    flag,
    kind_errors,
    normal,
    not_hidden,
    number,
    poisoned,
    shown,
    tensor,
    tensors_in,
)

# --- functions ------------------------------------------------------------------------------------


def teacher_gradients(call: Callable[[Tensor, Tensor], Any], *pair: Tensor) -> list[bool]:
    """Whether a gradient reaches the student, and whether one reaches the teacher."""
    student, teacher = (x.detach().clone().requires_grad_() for x in pair)
    sum(x.sum() for x in tensors_in(call(student, teacher))).backward()
    return [x.grad is not None and bool((x.grad != 0).any()) for x in (student, teacher)]


def pair_cells(
    call: Callable[[Tensor, Tensor], Any],
    student: Tensor,
    teacher: Tensor,
    *,
    detaches: bool,
    meta: bool = True,
) -> dict[str, Wrong]:
    """What two tensors do together; both are of the same wrong rank or on the same device."""
    wide = partial(call, student.half().double(), teacher)
    reached = [True, not detaches]
    cells = {
        "student float16, teacher float32": Wrong(
            "mixed dtypes",
            partial(call, student.half(), teacher),
            equals(wide, torch.float32),
        ),
        "student float32, teacher float64": Wrong(
            "mixed dtypes",
            partial(call, student, teacher.double()),
            equals(partial(call, student.double(), teacher.double()), torch.float64),
        ),
        "a teacher that requires a gradient": Wrong(
            "teacher's gradient",
            partial(teacher_gradients, call, student, teacher),
            lambda found: found == reached,
        ),
        "an empty batch": Wrong(
            "zero size", partial(call, student[:0], teacher[:0]), empty_or_zero
        ),
    }
    if meta:  # a module's own parameters are elsewhere
        both = partial(call, student.to("meta"), teacher.to("meta"))
        cells["both on another device"] = Wrong(
            "device", both, ValueError, ("`loss`", "cpu", "meta")
        )
    return cells


def one_map(name: str) -> Row:
    call = getattr(f, name)
    return Row(
        name,
        call,
        {"features": MAP},
        {"features": feature_map(MAP, alone=True), "absolute": FLAG},
        {"an empty batch": Wrong("zero size", partial(call, MAP[:0]), empty_or_zero)},
        ONE_TENSOR | {"shape"} | NO_NUMBER | NO_STRING | NO_FUNCTION | NO_MODEL,
    )


def two_maps(name: str, wrong: Mapping[str, list[Wrong]], **others: Wrong) -> Row:
    call = getattr(f, name)
    shapes = ((2, 3, 4, 6), (2, 3, 5, 4), (1, 3, 4, 5), (2, 7, 4, 5), (2, 1, 4, 5))
    beside = dict.fromkeys(shapes, tuple(MAP.shape))
    maps = {"student": feature_map(MAP, beside), "teacher": feature_map(MAP2, beside)}
    more = {what.replace("_", " "): other for what, other in others.items()}
    not_applicable = NO_NUMBER | NO_MODEL
    if not any(wrong is FUNCTION for wrong in wrong.values()):
        not_applicable |= NO_FUNCTION
    return Row(
        name,
        call,
        {"student": MAP, "teacher": MAP2},
        {**maps, **wrong},
        pair_cells(call, MAP, MAP2, detaches=False, meta=False) | more,
        not_applicable,
    )


def adapted(name: str, result: Any) -> Callable[[], Any]:
    return partial(f.attention_transfer_loss, MAP, MAP2, **{name: lambda attention: result})


def result_cells() -> dict[str, Wrong]:
    right = {"spatial_adapter": (2, 1, 4, 5), "channel_adapter": (2, 3)}
    shapes = {
        "spatial_adapter": [(2, 4, 5), (2, 1, 2, 3), (2, 3, 4, 5), (1, 1, 4, 5)],
        "channel_adapter": [(2, 1), (2, 7), (2, 3, 1), (1, 3)],
    }
    cells = {}
    for name, shape in right.items():
        for s in shapes[name]:
            cells[f"{name} returns {s}"] = Wrong(
                "function's result", adapted(name, torch.ones(s)), ValueError, (name, shape, s)
            )
        for value in (None, 1.0, [1.0], torch.ones(shape).long(), torch.ones(shape).cfloat()):
            found = value.dtype if isinstance(value, Tensor) else type(value).__name__
            cells[f"{name} returns {shown(value)}"] = Wrong(
                "function's result", adapted(name, value), TypeError, (f"`{name}` must", found)
            )
        away = adapted(name, torch.ones(shape, device="meta"))
        cells[f"{name} returns meta"] = Wrong(
            "function's result", away, ValueError, (name, "`teacher`", "meta")
        )
    return cells


ATTENTION, ATTENTION2 = normal(2, 4, 5), normal(2, 4, 5)


def attention(right: Tensor) -> list[Wrong]:
    shapes = ((2, 5, 4), (2, 4, 6), (1, 4, 5), (2, 20), (2, 1, 5))
    beside = dict.fromkeys(shapes, tuple(right.shape))
    wrong = tensor(right, rank=((5,), ()), shape=beside, zero=(1, 2))
    left_out = Wrong("inf", poisoned(right, -INF), lambda mask: mask.view(-1)[-1] == 0)
    return [left_out if w.kind == "inf" and w.value.min() == -INF else w for w in wrong]


def mask_row(name: str, call: Callable[..., Any], options: Mapping[str, list[Wrong]]) -> Row:
    """Of the function, or of the module, which holds its options."""
    cells = pair_cells(call, ATTENTION, ATTENTION2, detaches=False, meta=False)
    for shape in ((), (2,), (2, 0)):
        both = partial(call, torch.ones(shape), torch.ones(shape))
        kind = "zero size" if 0 in shape else "rank"
        cells[f"both of shape {shape}"] = Wrong(kind, both, ValueError, (shape,))

    def weighted(student: Tensor, teacher: Tensor) -> Tensor:
        # The sum of a mask is a constant.
        return call(student, teacher) * torch.arange(40.0).reshape(2, 4, 5)

    cells["a teacher that requires a gradient"] = Wrong(
        "teacher's gradient",
        partial(teacher_gradients, weighted, ATTENTION, ATTENTION2),
        lambda found: found == [True, True],
    )
    wrong = {
        "student_attention": attention(ATTENTION),
        "teacher_attention": attention(ATTENTION2),
    }
    right = {"student_attention": ATTENTION, "teacher_attention": ATTENTION2}
    not_applicable = NO_FUNCTION | NO_MODEL | (NO_FLAG if options else NO_OPTION)
    return Row(name, call, right, {**wrong, **options}, cells, not_applicable)


THETA, PHI, G = normal(2, 3, 4, 5), normal(2, 3, 2, 5), normal(2, 6, 2, 5)
VALUES = normal(2, 6, 4, 5)
LOGITS, KEY_LOGITS = normal(2, 1, 4, 5), normal(2, 1, 2, 5)


def positions(right: Tensor, beside: Tensor, *shapes: tuple[int, ...]) -> list[Wrong]:
    found = dict.fromkeys(shapes, tuple(beside.shape))
    return tensor(right, rank=((2,), (2, 3)), shape=found, zero=(1, 2, 3))


def relation_cells(call: Callable[..., Any], **right: Tensor) -> dict[str, Wrong]:
    names = list(right)
    first = names[0]
    half = {**right, first: right[first].half()}
    wide = {**right, first: right[first].half().float()}
    return {
        f"{first} in float16": Wrong(
            "mixed dtypes", partial(call, **half), equals(partial(call, **wide), torch.float32)
        ),
        f"{first} in float64": Wrong(
            "mixed dtypes",
            partial(call, **{**right, first: right[first].double()}),
            equals(partial(call, **{k: v.double() for k, v in right.items()}), torch.float64),
        ),
        "an empty batch": Wrong(
            "zero size", partial(call, **{k: v[:0] for k, v in right.items()}), empty_or_zero
        ),
    }


def relation(name: str, theta: Tensor, phi: Tensor, **more: list[Wrong]) -> Row:
    call = getattr(f, name)
    right = {"theta": theta, "phi": phi, "g": G}
    width = phi.shape[1]
    wrong = {
        "theta": positions(theta, phi, (1, width, 4, 5), (2, 7, 4, 5)),
        "phi": [
            *positions(phi, theta, (1, width, 2, 5), (2, 7, 2, 5)),
            *(
                Wrong("shape", torch.ones(s), ValueError, (s, tuple(G.shape)))
                for s in ((2, width, 2, 4), (2, width, 10))
            ),
        ],
        "g": positions(G, phi, (1, 6, 2, 5), (2, 6, 5, 2), (2, 6, 10), (2, 6, 4, 5)),
        **more,
    }
    not_applicable = NO_TEACHER | NO_OPTION | NO_FUNCTION | NO_MODEL
    not_applicable -= NO_NUMBER if more else frozenset()
    return Row(name, call, right, wrong, relation_cells(call, **right), not_applicable)


TOKENS = normal(2, 13, 5)
PATCHES = featkd.PatchTokens(16, prefix=1)

FUNCTIONS = [
    one_map("spatial_attention"),
    one_map("channel_attention"),
    Row(
        "standardize",
        f.standardize,
        {"features": MAP},
        {"features": feature_map(MAP, alone=True), "over": CHOICE},
        {"an empty batch": Wrong("zero size", partial(f.standardize, MAP[:0]), empty_or_zero)},
        ONE_TENSOR | {"shape"} | NO_NUMBER | NO_FLAG | NO_FUNCTION | NO_MODEL,
    ),
    mask_row(
        "attention_mask",
        partial(f.attention_mask, temperature=0.5),
        {"temperature": ABOVE_0, "fusion": CHOICE},
    ),
    two_maps(
        "attention_transfer_loss",
        {
            "spatial_adapter": FUNCTION,
            "channel_adapter": FUNCTION,
            "absolute": FLAG,
            "reduction": CHOICE,
            "standardize": FLAG,
        },
        **result_cells(),
    ),
    two_maps(
        "attention_masked_loss",
        {
            "spatial_mask": tensor(
                ATTENTION.abs(),
                rank=((4, 5), (2, 1, 4, 5), (20,)),
                shape=dict.fromkeys(((2, 5, 4), (1, 4, 5), (2, 4, 6), (2, 1, 5)), (2, 4, 5)),
                optional=True,
            ),
            "channel_mask": tensor(
                normal(2, 3).abs(),
                rank=((3,), (2, 3, 1, 1)),
                shape=dict.fromkeys(((2, 1), (1, 3), (2, 7)), (2, 3)),
                optional=True,
            ),
            "reduction": CHOICE,
            "standardize": FLAG,
        },
    ),
    Row(
        "gaussian_relation",
        f.gaussian_relation,
        {"features": THETA, "g": VALUES},
        {
            "features": positions(THETA, VALUES, (1, 3, 4, 5), (2, 3, 5, 4), (2, 3, 20)),
            "g": positions(VALUES, THETA, (1, 6, 4, 5), (2, 6, 5, 4), (2, 6, 20)),
        },
        relation_cells(f.gaussian_relation, features=THETA, g=VALUES),
        NO_TEACHER | NO_OPTION | NO_FUNCTION | NO_MODEL,
    ),
    relation("embedded_gaussian_relation", THETA, PHI, scale=FINITE),
    relation("dot_product_relation", THETA, PHI),
    relation("concatenation_relation", LOGITS, KEY_LOGITS),
    Row(
        "non_local_loss",
        f.non_local_loss,
        {"student_relation": MAP, "teacher_relation": MAP2},
        {
            "student_relation": positions(MAP, MAP2, (1, 3, 4, 5), (2, 1, 4, 5), (2, 3, 5, 4)),
            "teacher_relation": positions(MAP2, MAP, (1, 3, 4, 5), (2, 1, 4, 5), (2, 3, 20)),
            "reduction": CHOICE,
            "standardize": FLAG,
        },
        pair_cells(f.non_local_loss, MAP, MAP2, detaches=False, meta=False),
        NO_NUMBER | NO_FUNCTION | NO_MODEL,
    ),
    Row(
        "from_channels_last",
        featkd.from_channels_last,
        {"features": MAP},
        {"features": feature_map(MAP, alone=True)},
        {
            "an empty batch": Wrong(
                "zero size", partial(featkd.from_channels_last, MAP[:0]), empty_or_zero
            )
        },
        ONE_TENSOR | {"shape"} | NO_OPTION | NO_FUNCTION | NO_MODEL,
    ),
    Row(
        "from_tokens",
        featkd.from_tokens,
        {"tokens": TOKENS, "size": (3, 4), "prefix": 1, "suffix": 0},
        {
            "tokens": tensor(
                TOKENS,
                rank=((13,), (13, 5), (2, 3, 4, 5)),
                shape=dict.fromkeys(((2, 12, 5), (2, 14, 5), (2, 5, 13)), "(B, 13, C)"),
                zero=(1, 2),
                alone=True,
            ),
            "size": [
                *(
                    Wrong("no number", size, TypeError, (repr(size),))
                    for size in (12, None, "3x4", (3,), (3, 4, 5), {3: 4}, TOKENS)
                ),
                *(Wrong("no number", (v, 4), TypeError, ("size[0]",)) for v in (3.0, "3", None)),
                *(Wrong("no number", (3, v), TypeError, ("size[1]",)) for v in (4.0, True)),
                Wrong("number", (0, 4), ValueError, ("`size[0]`", 0)),
                Wrong("number", (3, -4), ValueError, ("`size[1]`", -4)),
            ],
            "suffix": [
                *count(least=0),
                Wrong("no number", 1.0, TypeError),
                Wrong("no number", False, TypeError),
                Wrong("number", 2, ValueError, ("3 x 4 + 2", tuple(TOKENS.shape))),
            ],
            "prefix": [
                *count(least=0),
                Wrong("no number", 1.0, TypeError),
                Wrong("no number", False, TypeError),
                Wrong("number", 2, ValueError, ("2 + 3 x 4", tuple(TOKENS.shape))),
            ],
        },
        {
            "a size that the tokens do not have": Wrong(
                "number",
                partial(featkd.from_tokens, TOKENS, (4, 4), prefix=1),
                ValueError,
                ("`tokens`", "4 x 4", tuple(TOKENS.shape)),
            ),
            "an empty batch": Wrong(
                "zero size",
                partial(featkd.from_tokens, TOKENS[:0], (3, 4), prefix=1),
                empty_or_zero,
            ),
        },
        ONE_TENSOR | NO_STRING | NO_FLAG | NO_FUNCTION | NO_MODEL,
    ),
    Row(
        "PatchTokens",
        featkd.PatchTokens,
        {"patch_size": 16, "prefix": 1, "suffix": 0},
        {
            "patch_size": [
                *(wrong for wrong in count() if not isinstance(wrong.value, list)),
                *(
                    Wrong("no number", size, TypeError, (repr(size),))
                    for size in ([8], (14,), (14, 14, 3))
                ),
                Wrong("no number", (14.0, 14), TypeError, ("patch_size[0]",)),
                Wrong("no number", (14, None), TypeError, ("patch_size[1]",)),
                Wrong("number", (0, 14), ValueError, ("`patch_size[0]`", 0)),
                Wrong("number", (14, -1), ValueError, ("`patch_size[1]`", -1)),
            ],
            "prefix": count(least=0),
            "suffix": count(least=0),
        },
        {
            **{
                f"tokens={shown(wrong.value)}": Wrong(
                    wrong.kind,
                    partial(PATCHES, wrong.value, (48, 64)),
                    wrong.expected,
                    ("`tokens`", *wrong.mentions)
                    if wrong.expected is TypeError
                    else wrong.mentions,
                )
                for wrong in tensor(
                    TOKENS,
                    rank=((13,), (13, 5), (2, 3, 4, 5)),
                    shape=dict.fromkeys(((2, 12, 5), (2, 14, 5), (2, 5, 13)), "48 x 64 in patches"),
                    zero=(1, 2),
                    alone=True,
                )
            },
            **{
                f"image_size={size}": Wrong(
                    "no number", partial(PATCHES, TOKENS, size), TypeError, ("image_size",)
                )
                for size in (48, None, (48,), (48, 64, 3), (48.0, 64), TOKENS)
            },
            "no height": Wrong(
                "number", partial(PATCHES, TOKENS, (0, 64)), ValueError, ("`image_size[0]`", 0)
            ),
            "another image": Wrong(
                "number", partial(PATCHES, TOKENS, (64, 64)), ValueError, ("64 x 64", "1 + 4 x 4")
            ),
            "an empty batch": Wrong(
                "zero size", partial(PATCHES, TOKENS[:0], (48, 64)), empty_or_zero
            ),
        },
        ONE_TENSOR | NO_STRING | NO_FLAG | NO_FUNCTION | NO_MODEL,
    ),
]

# --- modules: what they are built of --------------------------------------------------------------

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


def refused(kind: str, error: type[Exception], call: Callable[..., Any], *mentions: Any) -> Wrong:
    return Wrong(kind, call, error, mentions)


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

# --- modules: what they are called with -----------------------------------------------------------

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
