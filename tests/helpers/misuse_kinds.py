"""The kinds of misuse, and what is wrong in place of one argument of each kind.

A `Row` is one callable with right arguments, what is wrong in place of each, and the kinds that do
not apply to it.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

KINDS = {
    "no tensor": "None, a list, a string or a number in place of a tensor",
    "dtype": "integers, booleans, complex or 8-bit numbers in a tensor",
    "memory": "a sparse or a nested tensor",
    "rank": "too few or too many dimensions",
    "shape": "another shape than the other tensors', the module's or the rule's",
    "zero size": "no channel, height or width; an empty batch gives a value",
    "device": "tensors on two devices",
    "NaN": "NaN among the numbers: never hidden",
    "inf": "inf or -inf among the numbers: never hidden",
    "mixed dtypes": "a student of another precision than the teacher: computed in the wider one",
    "teacher's gradient": "a teacher that requires a gradient: constant in modules",
    "no number": "a string, None, a bool, a list or a tensor in place of a number",
    "number": "zero, negative, NaN, infinite or too large",
    "no string": "a number, a bool, None or a list in place of a string",
    "string": "not one of the choices",
    "no flag": "a number, a string or None in place of True or False",
    "no function": "what cannot be called",
    "function's result": "a function that was given returns what does not fit",
    "no module": "a string, None, a function or a class in place of a module",
    "levels": "missing, extra or misnamed levels or keys; no mapping where one belongs",
    "path": "unknown, malformed, or of another kind",
    "order": "a tap or a distiller used in another order than its own",
}

ERROR = r"`[\w.]+(\[[^`]*\])*` must .+, got .+\."
"""The text of every error: `` `name` must <rule>, got <found>. ``"""

Expected = type[Exception] | Callable[[Any], bool]


@dataclass(frozen=True)
class Cell:
    """One misuse: the exception and what its text mentions, or what holds for the value."""

    callable: str
    kind: str
    what: str
    call: Callable[[], Any]
    expected: Expected
    mentions: tuple[Any, ...] = ()

    def __str__(self) -> str:
        return f"{self.callable}-{self.kind}-{self.what}"


@dataclass(frozen=True)
class Wrong:
    """A value in place of a right argument, or (`call`) what is done in place of the right call."""

    kind: str
    value: Any
    expected: Expected
    mentions: tuple[Any, ...] = ()


def refused(kind: str, error: type[Exception], call: Callable[..., Any], *mentions: Any) -> Wrong:
    return Wrong(kind, call, error, mentions)


@dataclass(frozen=True, repr=False)
class Row:
    """One callable; `others` are further calls, without arguments, by description."""

    name: str
    call: Callable[..., Any]
    right: Mapping[str, Any]
    wrong: Mapping[str, list[Wrong]]
    others: Mapping[str, Wrong] = field(default_factory=dict)
    not_applicable: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        return self.name

    def cells(self) -> Iterator[Cell]:
        for name, wrongs in self.wrong.items():
            for wrong in wrongs:
                what = f"{name}={shown(wrong.value)}"
                call = partial(self.call, **{**self.right, name: wrong.value})
                named = (f"`{name}",) if isinstance(wrong.expected, type) else ()
                mentions = (*named, *wrong.mentions)
                yield Cell(self.name, wrong.kind, what, call, wrong.expected, mentions)
        for what, wrong in self.others.items():
            yield Cell(self.name, wrong.kind, what, wrong.value, wrong.expected, wrong.mentions)


def shown(value: Any) -> str:
    if isinstance(value, Tensor):
        if value.is_nested:
            return "nested"
        finite = not value.dtype.is_floating_point or value.is_meta or not value.numel()
        special = "" if finite else {0: "inf ", 1: "-inf ", 2: "NaN ", 3: ""}[_special(value)]
        return f"{special}{value.dtype} {tuple(value.shape)} {value.device} {value.layout}"
    text = repr(value)
    return text if len(text) < 60 and " at 0x" not in text else type(value).__name__


def _special(value: Tensor) -> int:
    if value.layout != torch.strided or value.dtype.itemsize < 2:
        return 3
    tests = (value.isposinf(), value.isneginf(), value.isnan())
    return next((index for index, test in enumerate(tests) if test.any()), 3)


# --- values ---------------------------------------------------------------------------------------

GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR)


MAP, MAP2, MAP_OF_2 = normal(2, 3, 4, 5), normal(2, 3, 4, 5), normal(2, 2, 4, 5)
NESTED = torch.nested.nested_tensor([normal(3, 4), normal(2, 4)], layout=torch.jagged)
NAN, INF = math.nan, math.inf


def poisoned(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x.view(-1)[-1] = value  # not a token of the prefix
    return x


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Mapping):
        return [x for item in value.values() for x in tensors_in(item)]
    if isinstance(value, list | tuple):
        return [x for item in value for x in tensors_in(item)]
    return [value] if isinstance(value, Tensor) else []


def not_hidden(result: Any) -> bool:
    """Something that is not finite in every tensor of the result."""
    found = tensors_in(result)
    return bool(found) and all(not bool(x.isfinite().all()) for x in found)


def empty_or_zero(result: Any) -> bool:
    """An empty batch gives the empty result, or a loss of 0."""
    return all(x.numel() == 0 or bool((x == 0).all()) for x in tensors_in(result))


def equals(call: Callable[[], Any], dtype: torch.dtype) -> Callable[[Any], bool]:
    """In `dtype`, and what `call` gives."""

    def holds(result: Any) -> bool:
        pairs = zip(tensors_in(result), tensors_in(call()), strict=True)
        return all(a.dtype == dtype and torch.allclose(a, b.to(dtype)) for a, b in pairs)

    return holds


# --- what is wrong in place of one argument -------------------------------------------------------


def kind_errors(kind: str, values: list[Any], error: type[Exception]) -> list[Wrong]:
    """Of another type, which the text names."""
    return [Wrong(kind, value, error, (type(value).__name__,)) for value in values]


def tensor(
    right: Tensor,
    *,
    rank: tuple[tuple[int, ...], ...],
    shape: Mapping[tuple[int, ...], Any] | None = None,
    zero: tuple[int, ...] = (),
    alone: bool = False,
    optional: bool = False,
) -> list[Wrong]:
    """`shape`: wrong ones, and the shape or the word that the text names besides; `zero`: the
    dimensions that may not be empty; `alone`: no other tensor beside it, whose device could differ.
    """
    wrong = kind_errors("no tensor", [[[1.0]], "features", 1.0, {}], TypeError)
    wrong += [] if optional else kind_errors("no tensor", [None], TypeError)
    for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn):
        wrong.append(Wrong("dtype", right.to(dtype), TypeError, (dtype,)))
    wrong.append(Wrong("memory", right.to_sparse(), TypeError, ("sparse",)))
    wrong.append(Wrong("memory", NESTED, TypeError, ("nested",)))
    wrong += [Wrong("rank", torch.ones(s), ValueError, (s,)) for s in rank]
    wrong += [
        Wrong("shape", torch.ones(s), ValueError, (s, beside))
        for s, beside in (shape or {}).items()
    ]
    for dimension in zero:
        empty = right.narrow(dimension, 0, 0)
        wrong.append(Wrong("zero size", empty, ValueError, (tuple(empty.shape),)))
    if not alone:
        wrong.append(Wrong("device", right.to("meta"), ValueError, ("cpu", "meta")))
    wrong.append(Wrong("NaN", poisoned(right, NAN), not_hidden))
    wrong += [Wrong("inf", poisoned(right, value), not_hidden) for value in (INF, -INF)]
    return wrong


def feature_map(
    right: Tensor, shape: Mapping[tuple[int, ...], Any] | None = None, **options: Any
) -> list[Wrong]:
    rank = ((), (3,), (2, 3), (3, 4, 5), (2, 3, 4, 5, 6))
    return tensor(right, rank=rank, shape=shape, zero=(1, 2, 3), **options)


NO_NUMBERS = ["0.5", True, [0.5], torch.tensor(0.5), 1j]


def number(*out_of_range: float, optional: bool = False) -> list[Wrong]:
    wrong = kind_errors("no number", NO_NUMBERS + [None] * (not optional), TypeError)
    values = (*out_of_range, NAN, INF, -INF, 10**400)
    return wrong + [Wrong("number", value, ValueError, (value,)) for value in values]


ABOVE_0 = number(0, 0.0, -1, -0.5)
AT_LEAST_0 = number(-1, -0.5)
FINITE = number()


def count(*, least: int = 1, optional: bool = False) -> list[Wrong]:
    values = ["8", 2.5, True, [8], torch.tensor(8)] + [None] * (not optional)
    wrong = kind_errors("no number", values, TypeError)
    for value in (*range(least - 1, -2, -1), 2**31, 10**400):
        wrong.append(Wrong("number", value, ValueError, (value,)))
    return wrong


def choice(*, optional: bool = False) -> list[Wrong]:
    wrong = kind_errors("no string", [1, True, ["mean"]] + [None] * (not optional), TypeError)
    return wrong + [Wrong("string", s, ValueError, (repr(s),)) for s in ("", "Mean", "bogus")]


def flag(*, optional: bool = False) -> list[Wrong]:
    values = [1, 0, "yes", torch.tensor(True)] + [None] * (not optional)
    return kind_errors("no flag", values, TypeError)


def function(*, optional: bool = True) -> list[Wrong]:
    values = ["conv", 1, MAP, [len]] + [None] * (not optional)
    return kind_errors("no function", values, TypeError)


MODULE = kind_errors("no module", ["net", None, print, nn.ReLU], TypeError)
CHOICE, FLAG, FUNCTION, COUNT, OPTIONAL_COUNT = (
    choice(),
    flag(),
    function(),
    count(),
    count(optional=True),
)

# --- the kinds that do not apply, by the reason ---------------------------------------------------

NO_TENSOR = frozenset(list(KINDS)[:11])  # it takes no tensor
ONE_TENSOR = frozenset({"device", "mixed dtypes", "teacher's gradient"})  # none beside it
NO_TEACHER = frozenset({"teacher's gradient"})
NO_NUMBER = frozenset({"no number", "number"})
NO_STRING = frozenset({"no string", "string"})
NO_FLAG = frozenset({"no flag"})
NO_FUNCTION = frozenset({"no function", "function's result"})
NO_MODULE = frozenset({"no module"})
NO_LEVELS = frozenset({"levels"})
NO_PATH = frozenset({"path"})
NO_ORDER = frozenset({"order"})
NO_MODEL = NO_MODULE | NO_LEVELS | NO_PATH | NO_ORDER
NO_OPTION = NO_NUMBER | NO_STRING | NO_FLAG
