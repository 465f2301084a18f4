"""Many properties at once, over pairs that hypothesis draws and shrinks."""

from __future__ import annotations

from collections.abc import Iterable

import hypothesis
from hypothesis.errors import NoSuchExample, UnsatisfiedAssumption
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from ._calls import Loss, Property, text
from ._gradients import (
    assert_descends,
    assert_finite_gradient_at_equality,
    assert_gradient_matches_finite_differences,
)
from ._strategies import feature_pairs
from ._values import (
    assert_batch_consistent,
    assert_channel_permutation_invariant,
    assert_layout_independent,
    assert_nan_is_not_hidden,
    assert_non_negative,
    assert_spatially_equivariant,
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
        AssertionError: a property does not hold, or the loss fails on a pair. The text names every
            property that broke, what was found, and the smallest pair.

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
    found = [_counterexample(loss, holds, pairs, settings) for holds in properties]
    if any(found):
        raise AssertionError("\n".join(filter(None, found)))


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
) -> str | None:
    last = ""  # hypothesis runs the smallest pair last

    def breaks(pair: tuple[Tensor, Tensor]) -> bool:
        nonlocal last
        finding = _finding(loss, holds, pair)
        last = finding or last
        return finding is not None

    try:
        student, teacher = hypothesis.find(pairs, breaks, settings=settings)
    except NoSuchExample:
        return None
    return f"{last}\n{_line('student', student)}\n{_line('teacher', teacher)}"


def _finding(loss: Loss, holds: Property, pair: tuple[Tensor, Tensor]) -> str | None:
    try:
        holds(loss, *pair)
    except UnsatisfiedAssumption:
        raise
    except AssertionError as error:
        return str(error)
    except Exception as error:
        name = getattr(getattr(holds, "func", holds), "__name__", type(holds).__name__)
        return f"{name}: the loss must not fail, got {type(error).__name__}: {error}"
    return None


def _line(side: str, x: Tensor) -> str:
    dtype = str(x.dtype).removeprefix("torch.")
    strides = "" if x.is_contiguous() else f" strides {x.stride()}"
    return f"  {side}: {dtype} {tuple(x.shape)}{strides} {text(x)}"
