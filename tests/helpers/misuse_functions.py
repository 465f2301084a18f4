"""Rows of the table of misuse: the functions."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

import featkd
from featkd import functional as f
from tests.helpers.misuse_kinds import (
    ABOVE_0,
    CHOICE,
    FINITE,
    FLAG,
    FUNCTION,
    INF,
    MAP,
    MAP2,
    NO_FLAG,
    NO_FUNCTION,
    NO_MODEL,
    NO_NUMBER,
    NO_OPTION,
    NO_STRING,
    NO_TEACHER,
    ONE_TENSOR,
    Row,
    Wrong,
    count,
    empty_or_zero,
    equals,
    feature_map,
    normal,
    poisoned,
    shown,
    tensor,
    tensors_in,
)


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
    one_map("attention_maps"),
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
