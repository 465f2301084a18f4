"""Rows of the table of misuse: `featkd.testing`."""

import inspect
from collections.abc import Callable
from typing import Any

import hypothesis
import torch
from torch import Tensor

from featkd import testing
from tests.helpers.misuse_kinds import (
    AT_LEAST_0,
    CHOICE,
    COUNT,
    INF,
    MAP,
    MAP2,
    NAN,
    NO_FLAG,
    NO_FUNCTION,
    NO_MODEL,
    NO_NUMBER,
    NO_OPTION,
    NO_STRING,
    NO_TENSOR,
    Row,
    Wrong,
    feature_map,
    function,
    kind_errors,
    refused,
)


def distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Of the means over the channels, whose numbers may differ."""
    difference = student.mean(1) - teacher.detach().mean(1)
    return torch.linalg.vector_norm(difference, dim=(1, 2)).mean()


def assertion(name: str, **options: list[Wrong]) -> Row:
    """Of a loss that keeps the property."""
    call = getattr(testing, name)
    alike = inspect.getsource(call).count("same_channels=True")
    shapes = {s: tuple(MAP.shape) for s in ((1, 3, 4, 5), (2, 3, 5, 4), (2, 3, 4, 6))}
    shapes |= {(2, 1, 4, 5): tuple(MAP.shape)} if alike else {}
    # What NaN and inf do is for the loss to say.
    maps = {
        side: [w for w in feature_map(x, shapes) if w.kind not in ("NaN", "inf")]
        for side, x in (("student", MAP), ("teacher", MAP2))
    }
    right = {"student": MAP.double(), "teacher": MAP2.double()}

    def of(loss: Any) -> Callable[[], Any]:
        return lambda: call(loss, **right)

    empty = {"student": MAP[:0], "teacher": MAP2[:0]}
    meta = {"student": MAP.to("meta"), "teacher": MAP2.to("meta")}
    others = {
        "an empty batch": refused(
            "zero size", ValueError, lambda: call(distance, **empty), "`student`", (0, 3, 4, 5)
        ),
        "no values": refused("device", ValueError, lambda: call(distance, **meta), "meta"),
        "the loss returns None": refused(
            "function's result", TypeError, of(lambda s, t: None), "`loss`", "NoneType"
        ),
        "the loss returns a number": refused(
            "function's result", TypeError, of(lambda s, t: 1.0), "`loss`", "float"
        ),
        "the loss returns integers": refused(
            "function's result", TypeError, of(lambda s, t: distance(s, t).long()), "torch.int64"
        ),
    }
    not_applicable = NO_MODEL | NO_FLAG | {"NaN", "inf", "mixed dtypes", "teacher's gradient"}
    for kinds, words in ((NO_NUMBER, "tolerance"), (NO_STRING, "reduction")):
        not_applicable |= frozenset() if words in options else kinds
    loss = {"loss": function(optional=False)}
    return Row(
        name, call, {"loss": distance, **right}, {**loss, **maps, **options}, others, not_applicable
    )


def counts() -> list[Wrong]:
    wrong = [w for w in COUNT if w.value != [8]]
    wrong += kind_errors("no number", [[1, 3]], TypeError)
    wrong += [Wrong("no number", (1, 2.5), TypeError, ("float",))]
    return wrong + [
        Wrong("number", value, ValueError, (found,))
        for value, found in (((3, 1), (3, 1)), ((0, 1), 0), ((1, 2, 3), (1, 2, 3)), ((), ()))
    ]


SIZES = dict.fromkeys(("batch", "channels", "height", "width"), counts())
STRATEGY = {
    **SIZES,
    "dtype": [
        *kind_errors("dtype", ["float32", None, 32, [torch.float32]], TypeError),
        Wrong("dtype", torch.int64, ValueError, ("torch.int64",)),
        Wrong("dtype", torch.complex64, ValueError, ("torch.complex64",)),
    ],
    "layouts": [
        *kind_errors("no string", ["contiguous", 5, None], TypeError),
        Wrong("no string", [5], TypeError, ("int",)),
        Wrong("string", ["bogus"], ValueError, ("'bogus'",)),
        Wrong("string", [], ValueError, ("none",)),
    ],
    "magnitudes": [
        *kind_errors("no number", ["1", 5.0], TypeError),
        Wrong("no number", ["1"], TypeError, ("str",)),
        Wrong("no number", [None], TypeError, ("NoneType",)),
        Wrong("number", [NAN], ValueError, ("nan",)),
        Wrong("number", [1.0, INF], ValueError, ("inf",)),
        Wrong("number", [], ValueError, ("none",)),
    ],
}
DRAWN = (NO_TENSOR - {"dtype"}) | NO_FLAG | NO_FUNCTION | NO_MODEL
NONE_DRAWN = NO_TENSOR | NO_OPTION | NO_MODEL
FEW = hypothesis.settings(max_examples=5, database=None, deadline=None)


def check(*, settings: Any = None, **given: Any) -> None:
    """In few examples where nothing else is said."""
    testing.check(settings=FEW if settings is None else settings, **given)


TESTING = [
    assertion("assert_zero_at_equality", tolerance=AT_LEAST_0),
    assertion("assert_non_negative"),
    assertion("assert_batch_consistent", reduction=CHOICE),
    assertion("assert_channel_permutation_invariant"),
    assertion("assert_spatially_equivariant"),
    assertion("assert_layout_independent"),
    assertion("assert_nan_is_not_hidden"),
    assertion("assert_finite_gradient_at_equality"),
    assertion("assert_gradient_reaches_student_only"),
    assertion("assert_gradient_matches_finite_differences"),
    assertion("assert_descends"),
    Row("feature_maps", testing.feature_maps, {}, STRATEGY, not_applicable=DRAWN),
    Row(
        "feature_pairs",
        testing.feature_pairs,
        {},
        {**STRATEGY, "teacher_channels": [w for w in counts() if w.value is not None]},
        not_applicable=DRAWN,
    ),
    Row(
        "check",
        check,
        {"loss": distance, "properties": [testing.assert_non_negative], "settings": FEW},
        {
            "loss": function(optional=False),
            "properties": [
                *kind_errors("no function", [5, None, MAP, distance], TypeError),
                Wrong("no function", [5], TypeError, ("int",)),
                Wrong("no function", ["assert_descends"], TypeError, ("str",)),
                Wrong("no function", [], ValueError, ("none",)),
            ],
            "pairs": kind_errors("no function", [5, (MAP, MAP), testing.feature_pairs], TypeError),
            "settings": kind_errors("no function", [5, {"max_examples": 5}], TypeError),
        },
        {
            # Its own errors too are a finding about the loss.
            "the loss returns None": refused(
                "function's result",
                AssertionError,
                lambda: testing.check(
                    lambda s, t: None, [testing.assert_non_negative], settings=FEW
                ),
                "`loss` must return a tensor",
                "NoneType",
            ),
        },
        NONE_DRAWN,
    ),
]
