"""Rows of the table of misuse: taps, and the models that are tapped."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

import featkd
from tests.helpers.misuse_kinds import (
    FLAG,
    KINDS,
    NO_ORDER,
    NO_STRING,
    NO_TENSOR,
    Row,
    Wrong,
    kind_errors,
    normal,
    refused,
)


class TwoHeads(nn.Module):
    """A body that runs, a head that runs twice, and one that does not run."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.Tanh())
        self.twice = nn.Conv2d(width, width, 1)
        self.never = nn.Conv2d(width, width, 1)
        self.several = Several()

    def forward(self, image: Tensor) -> Tensor:
        features = self.body(image)
        self.several(features)
        return self.twice(self.twice(features))


class Several(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"low": x, "none": None}


IMAGE = normal(2, 3, 8, 12)
STUDENT, TEACHER = TwoHeads(3), TwoHeads(2)


class Constant(nn.Module):
    """A loss that returns `value`, whatever the features."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, student: Any, teacher: Any) -> Any:
        return self.value


class Inner(nn.Module):
    """A loss of one's own, which a distiller cannot ask for its levels."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, student: Any, teacher: Any) -> Any:
        return self.loss(student, teacher)


def tapped(
    layers: Any, *, forwards: int = 1, pops: int = 1, model: nn.Module = STUDENT, **options: Any
) -> Callable[[], Any]:
    """What a tap gives that is popped after some forwards."""

    def run() -> Any:
        tap = featkd.FeatureTap(model, layers, **options)
        try:
            with tap:
                for _ in range(forwards):
                    model(IMAGE)
                return [tap.pop() for _ in range(pops)]
        finally:
            tap.remove()

    return run


def entered_twice() -> None:
    with featkd.FeatureTap(STUDENT, ["body"]) as tap, tap:
        pass


def called_outside() -> None:
    tap = featkd.FeatureTap(STUDENT, ["body"])
    STUDENT(IMAGE)
    tap.pop()


def removed() -> None:
    with featkd.FeatureTap(STUDENT, ["body"]) as tap:
        tap.remove()
        STUDENT(IMAGE)
        tap.pop()


def changed_in_place() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True))
    tapped(["0"], model=model, clone=False)()


def frozen() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))
    model[0].requires_grad_(False)
    tapped(["0"], model=model)()


ALIASES = {"c1": "body", "c2": "body.0"}
PATHS: dict[Any, tuple[type[Exception], Any]] = {
    "bodi": (ValueError, "'body'"),
    "body.9": (ValueError, "'body.0'"),
    "body[0": (ValueError, "'body[0'"),
    "body[]": (ValueError, "'body[]'"),
    "body:output": (ValueError, "'body:output'"),
    4: (TypeError, "4"),
    None: (TypeError, "None"),
}
ALIAS_OPTIONS = [
    Wrong("levels", {"c9": 2}, ValueError, ("c9",)),
    Wrong("levels", 5, TypeError, ("int",)),
    Wrong("levels", [("c1", 2)], TypeError, ("list",)),
]
TAP = Row(
    "FeatureTap",
    featkd.FeatureTap,
    {"model": STUDENT, "layers": ALIASES},
    {
        "model": [
            *kind_errors("no module", ["net", None, print, nn.DataParallel(STUDENT)], TypeError),
            Wrong("no module", nn.ReLU, TypeError, ("type",)),
        ],
        "layers": [
            *(Wrong("path", {"c1": p}, error, (m,)) for p, (error, m) in PATHS.items()),
            *kind_errors("levels", ["body", {"body"}, None, 5], TypeError),
            Wrong("path", [nn.ReLU()], TypeError, ("ReLU",)),
            Wrong("levels", {4: "body"}, TypeError, ("4: 'body'",)),
            Wrong("levels", [], ValueError, ("[]",)),
            Wrong("levels", {}, ValueError, ("[]",)),
            Wrong("levels", ["body", "body"], ValueError, ("'body'",)),
        ],
        "clone": FLAG,
        "calls": [
            *ALIAS_OPTIONS,
            Wrong("no number", {"c1": 1.0}, TypeError, ("`calls['c1']`", "float")),
            Wrong("number", {"c1": 0}, ValueError, ("`calls['c1']`", 0)),
        ],
        "convert": [
            *ALIAS_OPTIONS,
            Wrong("no function", {"c1": "NHWC"}, TypeError, ("`convert['c1']`", "str")),
            Wrong("no function", {"c1": None}, TypeError, ("`convert['c1']`", "NoneType")),
        ],
    },
    {
        "convert returns None": refused(
            "function's result",
            TypeError,
            tapped(ALIASES, convert={"c1": lambda features: None}),
            "`convert['c1']`",
            "NoneType",
        ),
        "an item that is not there": refused(
            "path", ValueError, tapped(["several[high]"]), "[high]", "low"
        ),
        "no tensor at the path": refused(
            "path", ValueError, tapped(["several[none]"]), "NoneType", "several"
        ),
        "several outputs": refused("path", ValueError, tapped(["several"]), "dict", "several[KEY]"),
    },
    NO_TENSOR | NO_STRING | NO_ORDER,
)


def orders(name: str, **cells: Callable[[], Any]) -> Row:
    """A method without arguments: only its place in the order can be wrong."""
    others = {
        what.replace("_", " "): refused("order", RuntimeError, call) for what, call in cells.items()
    }
    return Row(name, lambda: None, {}, {}, others, frozenset(KINDS) - NO_ORDER)


TAPS = [
    TAP,
    orders("FeatureTap.__enter__", entered_twice=entered_twice),
    orders(
        "FeatureTap.pop",
        no_forward=tapped(["body"], forwards=0),
        a_second_pop=tapped(["body"], pops=2),
        two_forwards=tapped(["body"], forwards=2),
        a_module_that_does_not_run=tapped(["never"]),
        a_module_that_runs_twice=tapped(["twice"]),
        fewer_calls_than_said=tapped(["body"], calls={"body": 2}),
        a_forward_outside_the_block=called_outside,
        a_change_in_place=changed_in_place,
        a_frozen_part=frozen,
    ),
    orders("FeatureTap.remove", a_forward_after_it=removed),
]
