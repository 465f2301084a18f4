"""Many properties at once, over pairs that hypothesis draws and shrinks."""

from __future__ import annotations

from collections.abc import Iterable

import hypothesis
import torch
from hypothesis.errors import Flaky, NoSuchExample, UnsatisfiedAssumption
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from ._calls import Loss, Property, text, value_of
from ._gradients import (
    assert_descends,
    assert_finite_gradient_at_equality,
    assert_gradient_matches_finite_differences,
)
from ._invariances import (
    assert_channel_permutation_invariant,
    assert_layout_independent,
    assert_spatially_equivariant,
)
from ._strategies import feature_pairs
from ._values import (
    assert_batch_consistent,
    assert_nan_is_not_hidden,
    assert_non_negative,
    assert_zero_at_equality,
)

#: What any loss should keep, whatever adapters it has and whatever it detaches.
LOSS: tuple[Property, ...] = (
    assert_non_negative,
    assert_batch_consistent,
    assert_layout_independent,
    assert_nan_is_not_hidden,
)

#: What a distance of feature maps keeps besides. Adapters, convolutions and detached masks take
#: some of it away: list what is left.
DISTANCE: tuple[Property, ...] = (
    *LOSS,
    assert_zero_at_equality,
    assert_finite_gradient_at_equality,
    assert_channel_permutation_invariant,
    assert_spatially_equivariant,
    assert_gradient_matches_finite_differences,
    assert_descends,
)


_ONE_VALUE = "check: the loss must give one value for one pair"


def check(
    loss: Loss,
    properties: Iterable[Property] = DISTANCE,
    *,
    pairs: SearchStrategy[tuple[Tensor, Tensor]] | None = None,
    settings: hypothesis.settings | None = None,
) -> None:
    """Search for features of student and teacher that break a property; report the smallest found.

    Args:
        loss: `(student, teacher) -> Tensor`, a scalar or `(B,)`, deterministic.
        properties: assertions of this package, or others `(loss, student, teacher)` of your own;
            `functools.partial` gives one options.
        pairs: where the features come from; `None` is `feature_pairs()`.
        settings: hypothesis's; `None` is the loaded profile, without its deadline.

    Raises:
        AssertionError: a property does not hold, or the loss fails on a pair, or differs from call
            to call. The text names every property that broke, what was found, and the smallest
            pair; the exception of a loss that fails is its cause.

    Example:
        >>> from featkd import non_local_loss
        >>> check(non_local_loss, [assert_zero_at_equality, assert_batch_consistent])
        >>> check(lambda s, t: (s - t).sum().abs(), [assert_batch_consistent])
        Traceback (most recent call last):
        AssertionError: assert_batch_consistent: the loss of ... must be their mean ..., got ...
          student: float64 (1, 1, 1, 2) [...]
          teacher: float64 (1, 1, 1, 2) [...]
    """
    properties = _require_arguments(loss, properties, pairs, settings)
    if settings is None:
        settings = hypothesis.settings(deadline=None)
    pairs = feature_pairs() if pairs is None else pairs
    # A loss that does not run, or differs from call to call, would break them all.
    unusable = _counterexample(loss, _gives_one_value, pairs, settings)
    others = () if unusable else properties
    found = [unusable, *(_counterexample(loss, holds, pairs, settings) for holds in others)]
    if found := [each for each in found if each is not None]:
        raise AssertionError("\n".join(said for said, _ in found)) from found[-1][1]


def _gives_one_value(loss: Loss, student: Tensor, teacher: Tensor) -> None:
    once, again = (value_of(loss, student, teacher) for _ in range(2))
    if not torch.equal(once.nan_to_num(), again.nan_to_num()):
        raise AssertionError(f"{_ONE_VALUE}, got {text(once)}, then {text(again)}.")


def _require_arguments(
    loss: object, properties: object, pairs: object, settings: object
) -> tuple[Property, ...]:
    if not callable(loss):
        raise TypeError(f"`loss` must be callable, got {type(loss).__name__}.")
    if not isinstance(properties, Iterable) or isinstance(properties, Tensor):
        found = type(properties).__name__
        raise TypeError(f"`properties` must be a list of assertions, got {found}.")
    properties = tuple(properties)
    for holds in properties:
        if not callable(holds):
            raise TypeError(f"`properties` must hold assertions, got {type(holds).__name__}.")
    if not properties:
        raise ValueError("`properties` must hold at least one assertion, got none.")
    if not isinstance(pairs, SearchStrategy | None):
        found = type(pairs).__name__
        raise TypeError(f"`pairs` must be a hypothesis strategy or None, got {found}.")
    if not isinstance(settings, hypothesis.settings | None):
        found = type(settings).__name__
        raise TypeError(f"`settings` must be hypothesis.settings or None, got {found}.")
    return properties


def _counterexample(
    loss: Loss,
    holds: Property,
    pairs: SearchStrategy[tuple[Tensor, Tensor]],
    settings: hypothesis.settings,
) -> tuple[str, Exception | None] | None:
    """What broke with the smallest pair, and the exception of the loss where it was one."""
    last: tuple[str, Exception | None] = ("", None)  # hypothesis runs the smallest pair last

    def breaks(pair: tuple[Tensor, Tensor]) -> bool:
        nonlocal last
        finding = _finding(loss, holds, pair)
        last = finding or last
        return finding is not None

    try:
        student, teacher = hypothesis.find(pairs, breaks, settings=settings)
    except NoSuchExample:
        return None
    except Flaky:
        return f"{_ONE_VALUE}, got a finding that did not come again: {last[0]}", None
    return f"{last[0]}\n{_line('student', student)}\n{_line('teacher', teacher)}", last[1]


def _finding(
    loss: Loss, holds: Property, pair: tuple[Tensor, Tensor]
) -> tuple[str, Exception | None] | None:
    try:
        holds(loss, *pair)
    except UnsatisfiedAssumption:
        raise
    except AssertionError as error:
        return str(error), None
    except Exception as error:
        name = getattr(getattr(holds, "func", holds), "__name__", type(holds).__name__)
        name = "check" if holds is _gives_one_value else name
        return f"{name}: the loss must not fail, got {type(error).__name__}: {error}", error
    return None


def _line(side: str, x: Tensor) -> str:
    dtype = str(x.dtype).removeprefix("torch.")
    strides = "" if x.is_contiguous() else f" strides {x.stride()}"
    return f"  {side}: {dtype} {tuple(x.shape)}{strides} {text(x)}"
