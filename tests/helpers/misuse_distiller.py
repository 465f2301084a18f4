"""Rows of the table of misuse: distillers, their report and what finds the layers."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import featkd
from tests.helpers.misuse_kinds import (
    FLAG,
    FUNCTION,
    INF,
    KINDS,
    MODULE,
    NAN,
    NO_FUNCTION,
    NO_LEVELS,
    NO_MODULE,
    NO_OPTION,
    NO_ORDER,
    NO_PATH,
    NO_STRING,
    NO_TENSOR,
    Row,
    Wrong,
    empty_or_zero,
    equals,
    kind_errors,
    not_hidden,
    poisoned,
    refused,
)
from tests.helpers.misuse_modules import BY_LEVEL, TOTAL
from tests.helpers.misuse_taps import (
    ALIAS_OPTIONS,
    IMAGE,
    PATHS,
    STUDENT,
    TEACHER,
    Constant,
    Inner,
    TwoHeads,
)


def distiller(
    student: nn.Module = STUDENT,
    teacher: nn.Module = TEACHER,
    loss: nn.Module = TOTAL,
    layers: Any = None,
    **options: Any,
) -> featkd.Distiller:
    layers = {"c1": "body"} if layers is None else layers
    return featkd.Distiller(student, teacher, loss, layers, **options)


def step(*, image: Tensor = IMAGE, **options: Any) -> Callable[[], Any]:
    """The losses of one step; the models keep no hooks."""

    def run() -> Any:
        made = distiller(**options)
        try:
            return made(image)[1]
        finally:
            made._student_tap.remove()
            made._teacher_tap.remove()

    return run


def teacher_parameter_gradients() -> list[bool]:
    teacher = TwoHeads(2)
    sum(step(teacher=teacher)().values()).backward()
    return [value.requires_grad and value.grad is None for value in teacher.parameters()]


def converted(student: Any = None, teacher: Any = None, **options: Any) -> Callable[[], Any]:
    return step(convert={"c1": (student, teacher)}, **options)


def at_two_levels(**options: Any) -> Callable[[], Any]:
    paths = {"c3": "body", "c4": "body.1"}
    return step(loss=BY_LEVEL, layers=paths, **options)


class TakesTwo(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = TwoHeads(width).body

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        return self.body(image) * mask


TAKES_TWO = {
    "student": nn.ModuleDict({"part": TakesTwo(3)}),
    "teacher": nn.ModuleDict({"part": TakesTwo(2)}),
}
FROZEN = TwoHeads(3).requires_grad_(False)
CONVERT = [
    Wrong("levels", {"c9": None}, ValueError, ("c9",)),
    Wrong("levels", print, TypeError, ("builtin",)),
    Wrong("no function", {"c1": None}, TypeError, ("`convert['c1']`",)),
    Wrong("no function", {"c1": ("NHWC", None)}, TypeError, ("`convert['c1']`", "str")),
    Wrong("no function", {"c1": (None, None, None)}, TypeError, ("`convert['c1']`",)),
]
DISTILLER = Row(
    "Distiller",
    distiller,
    {},
    {
        "student": [
            *MODULE,
            Wrong("no module", TEACHER, ValueError, ("`teacher`", "same")),
            Wrong("no module", nn.DataParallel(STUDENT), TypeError, ("DataParallel",)),
        ],
        "teacher": [
            *MODULE,
            Wrong("no module", STUDENT, ValueError, ("`teacher`", "same")),
            Wrong("no module", nn.DataParallel(TEACHER), TypeError, ("DataParallel",)),
        ],
        "loss": MODULE,
        "layers": [
            *kind_errors("levels", [["body"], "body", 5], TypeError),
            Wrong("levels", {"c1": "body", "c2": "twice"}, ValueError, ("levels of `loss`",)),
            Wrong("levels", {4: "body"}, TypeError, ("4: 'body'",)),
            *(Wrong("path", {"c1": p}, error, (m,)) for p, (error, m) in PATHS.items()),
            Wrong("path", {"c1": ("body", "bodi")}, ValueError, ("'body'",)),
            Wrong("path", {"c1": ("body",) * 3}, TypeError, ("layers['c1']",)),
        ],
        "shared_input": [
            Wrong("path", 1, TypeError, ("1",)),
            Wrong("path", ("body",) * 3, TypeError),
            Wrong("path", "bodi", ValueError, ("`shared_input`", "'body'")),
            Wrong("path", ("body", "bodi"), ValueError, ("`shared_input`", "'body'")),
            Wrong("path", "twice", ValueError, ("`layers['c1']`", "'twice'", "'body'")),
        ],
        "convert_input": FUNCTION,
        "student_forward": FUNCTION,
        "teacher_forward": FUNCTION,
        "early_stop": FLAG,
        "calls": [
            *ALIAS_OPTIONS,
            Wrong("no number", {"c1": 1.0}, TypeError, ("`calls['c1']`", "float")),
            Wrong("number", {"c1": 0}, ValueError, ("`calls['c1']`", 0)),
        ],
        "convert": CONVERT,
    },
    {
        "shared_input beside teacher_forward": refused(
            "path",
            ValueError,
            partial(distiller, shared_input="body", teacher_forward=print),
            "`shared_input`",
            "`teacher_forward`",
        ),
        "calls that the loss has no levels for": refused(
            "levels",
            ValueError,
            partial(distiller, calls={"c1": 2}),
            "levels of `loss`",
            "c1[1]",
        ),
        "convert_input without shared_input": refused(
            "path", ValueError, partial(distiller, convert_input=print), "`shared_input`", "None"
        ),
        "a shared_input that takes two arguments": refused(
            "path",
            ValueError,
            partial(distiller, layers={"c1": "part.body"}, shared_input="part", **TAKES_TWO),
            "`shared_input`",
            "'part'",
            "image and mask",
            "'part.body'",
        ),
    },
    NO_TENSOR | NO_STRING | NO_ORDER | {"function's result"},
)
LEVEL = "student_features"


def returned(value: Any, *mentions: Any) -> Wrong:
    call = step(loss=Constant(value), layers={"c1": "body"})
    return refused("function's result", TypeError, call, "`loss` must return", *mentions)


STEP = Row(
    "Distiller.forward",
    distiller().forward,
    {},
    {},
    {
        "the student's tap does not fire": refused(
            "order",
            RuntimeError,
            step(layers={"c1": ("never", "body")}),
            "'never'",
            "'c1'",
            "got 0",
        ),
        "the teacher's tap does not fire": refused(
            "order",
            RuntimeError,
            step(layers={"c1": ("body", "never")}),
            "'never'",
            "'c1'",
            "got 0",
        ),
        "a tapped module runs twice": refused(
            "order", RuntimeError, step(layers={"c1": ("twice", "body")}), "'twice'", "got 2"
        ),
        "teacher_forward does not call the teacher": refused(
            "function's result",
            RuntimeError,
            step(teacher_forward=lambda teacher, image: None),
            "'body'",
            "got 0",
        ),
        "convert_input returns None": refused(
            "function's result",
            TypeError,
            step(shared_input="body", convert_input=lambda image: None),
            "`convert_input`",
            "NoneType",
        ),
        "student_forward does not call the student": refused(
            "function's result",
            RuntimeError,
            step(student_forward=lambda student, image: None),
            "'body'",
            "got 0",
        ),
        "a loss of the student's own name": refused(
            "function's result",
            ValueError,
            step(
                loss=Constant({"loss_box": torch.ones(())}),
                student_forward=lambda student, image: {"loss_box": student(image).sum()},
            ),
            "`loss`",
            "'loss_box'",
        ),
        "a frozen student": refused("order", RuntimeError, step(student=FROZEN), "'c1'", "frozen"),
        "the loss returns a tensor": returned(torch.ones(()), "Tensor"),
        "the loss returns None": returned(None, "NoneType"),
        "the loss returns numbers": returned({"a": 1.0}, "float", "'a'"),
        "convert returns None": refused(
            "function's result", TypeError, converted(lambda x: None), "`convert['c1']`", "NoneType"
        ),
        "convert returns a list": refused(
            "no tensor", TypeError, converted(None, lambda x: [x]), "`convert['c1']`", "list"
        ),
        "integers": refused("dtype", TypeError, converted(None, Tensor.long), "torch.int64"),
        "a sparse map": refused("memory", TypeError, converted(None, Tensor.to_sparse), "sparse"),
        "tokens": refused(
            "rank",
            ValueError,
            converted(lambda x: x.flatten(2).mT),
            LEVEL,
            (2, 24, 3),
            "from_tokens",
            "`convert`",
        ),
        "channels last": refused(
            "shape",
            ValueError,
            converted(lambda x: x.permute(0, 2, 3, 1)),
            LEVEL,
            (2, 4, 6, 3),
            "from_channels_last",
            "`convert`",
        ),
        "another size": refused(
            "shape", ValueError, converted(lambda x: x[..., 1:]), (2, 3, 4, 5), "`resize`"
        ),
        "another size at a level": refused(
            "shape",
            ValueError,
            at_two_levels(convert={"c4": (lambda x: x[..., 1:], None)}),
            "`student_features['c4']`",
            (2, 3, 4, 5),
            (2, 2, 4, 6),
        ),
        "a teacher of another batch": refused(
            "shape",
            ValueError,
            step(teacher_forward=lambda teacher, image: teacher(image[:1])),
            (1, 2, 4, 6),
            (2, 3, 4, 6),
        ),
        "other channels": refused(
            "shape", ValueError, step(student=TwoHeads(5)), LEVEL, 3, (2, 5, 4, 6)
        ),
        "no width": refused("zero size", ValueError, converted(lambda x: x[..., :0]), (2, 3, 4, 0)),
        "an empty batch": Wrong("zero size", step(image=IMAGE[:0]), empty_or_zero),
        "a teacher without values": refused(
            "device",
            ValueError,
            step(
                teacher=TwoHeads(2).to("meta"),
                teacher_forward=lambda teacher, image: teacher(image.to("meta")),
            ),
            "`layers['c1']`",
            "meta",
        ),
        "NaN in the image": Wrong("NaN", step(image=poisoned(IMAGE, NAN)), not_hidden),
        "NaN in the student's features": Wrong("NaN", converted(lambda x: x * NAN), not_hidden),
        "inf in the teacher's features": Wrong(
            "inf", converted(None, lambda x: x + INF), not_hidden
        ),
        "a teacher in float64": Wrong(
            "mixed dtypes",
            step(
                teacher=copy.deepcopy(TEACHER).double(),
                teacher_forward=lambda teacher, image: teacher(image.double()),
            ),
            equals(step(), torch.float64),
        ),
        "a teacher that requires a gradient": Wrong(
            "teacher's gradient", teacher_parameter_gradients, all
        ),
        "a level that the loss does not know": refused(
            "levels",
            ValueError,
            step(loss=Inner(BY_LEVEL)),
            "`student_features`",
            "c1",
        ),
    },
    NO_OPTION | NO_MODULE | NO_PATH | {"no function"},
)


def report(optimizer: Any = None, **options: Any) -> Any:
    return distiller(**options).report(IMAGE, optimizer=optimizer)


class NoInput(nn.Module):
    def forward(self) -> float:
        return 1.0


ON_META = {"student": TwoHeads(3).to("meta"), "teacher": TwoHeads(2).to("meta")}
META_LOSS = copy.deepcopy(TOTAL).to("meta")
REPORT = Row(
    "Distiller.report",
    report,
    {},
    {"optimizer": kind_errors("no module", ["SGD", 5, [], STUDENT], TypeError)},
    {
        "a distiller without values": refused(
            "device",
            ValueError,
            lambda: distiller(**ON_META, loss=META_LOSS).report(IMAGE.to("meta")),
            "`distiller`",
            "meta",
        ),
        "the student's tap does not fire": refused(
            "order", RuntimeError, partial(report, layers={"c1": ("never", "body")}), "got 0"
        ),
    },
    (NO_TENSOR - {"device"}) | NO_OPTION | NO_FUNCTION | NO_LEVELS | NO_PATH,
)
MATCHED = featkd.match_layers(STUDENT.body, TEACHER.body, IMAGE)
FOUND = [
    Row(
        "match_layers",
        lambda student, teacher: featkd.match_layers(student, teacher, IMAGE),
        {"student": STUDENT, "teacher": TEACHER},
        {
            side: [*MODULE, Wrong("no module", nn.Flatten(), ValueError, (f"`{side}`", "got none"))]
            for side in ("student", "teacher")
        },
        {
            "an image without height": refused(
                "zero size",
                ValueError,
                lambda: featkd.match_layers(nn.Tanh(), nn.Tanh(), IMAGE[:, :, :0]),
                "`student`",
            ),
            "a flat input": refused(
                "rank",
                ValueError,
                lambda: featkd.match_layers(nn.Tanh(), nn.Tanh(), IMAGE[0]),
                "`student`",
            ),
            "integers": refused(
                "dtype",
                ValueError,
                lambda: featkd.match_layers(nn.Identity(), nn.Identity(), IMAGE.long()),
                "`student`",
            ),
            "no input": refused(
                "no tensor",
                ValueError,
                lambda: featkd.match_layers(NoInput(), NoInput()),
                "`student`",
            ),
        },
        (NO_TENSOR - {"zero size", "rank", "dtype", "no tensor"})
        | NO_OPTION
        | NO_FUNCTION
        | NO_LEVELS
        | NO_PATH
        | NO_ORDER,
    ),
    Row(
        "LayerMatch.select",
        lambda levels: MATCHED.select(levels),
        {"levels": "c1"},
        {
            "levels": [
                *kind_errors("no string", [1, None, ["c1"], True], TypeError),
                Wrong("levels", "c9", ValueError, ("'c1'", "'c9'")),
                Wrong("levels", "", ValueError, ("''",)),
            ]
        },
        not_applicable=frozenset(KINDS) - {"no string", "levels"},
    ),
]
DISTILLERS = [DISTILLER, STEP, REPORT, *FOUND]
