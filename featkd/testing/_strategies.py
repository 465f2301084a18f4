"""What hypothesis draws: feature maps of any shape, layout and magnitude that shrink to few 0s."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from .._checks import require_choice, require_count, require_number

Counts = int | tuple[int, int]
Size = tuple[int, int]
T = TypeVar("T")

_CODES = st.integers(0, 2**32 - 1)

# Powers of 2, so that scaling rounds nothing. Their squares stay in the range of the dtype. Not so
# in float16, where a loss that squares in half precision must be seen to overflow.
_EXTREME = {
    torch.float64: 2.0**100,
    torch.float32: 2.0**30,
    torch.bfloat16: 2.0**30,
    torch.float16: 2.0**8,
}

_DIGITS = (0, 1, -1, 2, -2, 3, -3)  # from simple to less so


def _strided(x: Tensor) -> Tensor:
    return torch.stack([x, torch.full_like(x, math.nan)], dim=-1).flatten(-2)[..., ::2]


def _cropped(x: Tensor) -> Tensor:
    return F.pad(x, (2, 1, 1, 2), value=math.nan)[..., 1:-2, 2:-1]


#: The memory layouts by name. What lies between and around the elements is NaN, so that reading it
#: shows. `expanded` repeats the first image without a copy.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": _strided,
    "cropped": _cropped,
    "transposed": lambda x: x.mT.contiguous().mT,
    "batch_last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "expanded": lambda x: x[:1].expand_as(x),
}


def feature_maps(
    *,
    batch: Counts = (1, 3),
    channels: Counts = (1, 4),
    height: Counts = (1, 5),
    width: Counts = (1, 5),
    dtype: torch.dtype = torch.float64,
    layouts: Iterable[str] = ("contiguous",),
    magnitudes: Sequence[float] | None = None,
) -> SearchStrategy[Tensor]:
    """Feature maps `(B, C, H, W)`, H != W unless both are one fixed number.

    The values are normal, or a short list of integers between -3 and 3 repeated over the map, times
    a magnitude. There are zeros and ties among these. They shrink to zeros, then to small integers.

    Args:
        batch, channels, height, width: a number, or the least and the largest, at least 1.
        dtype: float64, float32, bfloat16 or float16.
        layouts: names from `LAYOUTS`.
        magnitudes: `None` is 1 and, by dtype, 2**100, 2**30, 2**30 or 2**8, and its inverse.

    Raises:
        TypeError: a count is no integer, or a layout no string.
        ValueError: a count, the dtype or a layout is none of those.

    Example:
        >>> import hypothesis
        >>> hypothesis.find(feature_maps(), lambda features: True)
        tensor([[[[0., 0.]]]], dtype=torch.float64)
    """

    def features(
        images: int, maps: int, size: Size, magnitude: float, code: int, layout: str
    ) -> Tensor:
        values = magnitude * _values(code, (images, maps, *size))
        return LAYOUTS[layout](values.to(dtype))

    return st.builds(
        features,
        _counts("batch", batch),
        _counts("channels", channels),
        _sizes(height, width),
        _magnitudes(magnitudes, dtype),
        _CODES,
        _layouts(layouts),
    )


def feature_pairs(
    *,
    batch: Counts = (1, 3),
    channels: Counts = (1, 4),
    teacher_channels: Counts | None = None,
    height: Counts = (1, 5),
    width: Counts = (1, 5),
    dtype: torch.dtype = torch.float64,
    layouts: Iterable[str] = ("contiguous",),
    magnitudes: Sequence[float] | None = None,
) -> SearchStrategy[tuple[Tensor, Tensor]]:
    """Features of student and teacher, of one batch, height, width and magnitude.

    Args:
        teacher_channels: as `channels`, drawn apart; `None`: the student's.
        batch, channels, height, width, dtype, layouts, magnitudes: as in :func:`feature_maps`;
            each of the two has a layout of its own.

    Raises:
        TypeError, ValueError: as in :func:`feature_maps`.

    Example:
        >>> import hypothesis
        >>> pairs = feature_pairs(channels=2, teacher_channels=(3, 4))
        >>> student, teacher = hypothesis.find(pairs, lambda pair: True)
        >>> student.shape, teacher.shape
        (torch.Size([1, 2, 1, 2]), torch.Size([1, 3, 1, 2]))
    """

    def pair(
        images: int,
        ours: int,
        theirs: int | None,
        size: Size,
        magnitude: float,
        codes: tuple[int, int],
        layouts: tuple[str, str],
    ) -> tuple[Tensor, Tensor]:
        student = magnitude * _values(codes[0], (images, ours, *size))
        teacher = magnitude * _values(codes[1], (images, theirs or ours, *size))
        return LAYOUTS[layouts[0]](student.to(dtype)), LAYOUTS[layouts[1]](teacher.to(dtype))

    names = _layouts(layouts)
    return st.builds(
        pair,
        _counts("batch", batch),
        _counts("channels", channels),
        st.none() if teacher_channels is None else _counts("teacher_channels", teacher_channels),
        _sizes(height, width),
        _magnitudes(magnitudes, dtype),
        st.tuples(_CODES, _CODES),
        st.tuples(names, names),
    )


def _values(code: int, shape: tuple[int, ...]) -> Tensor:
    """A small code is a list of digits to repeat, a larger one a seed: one number, so that normal
    numbers shrink to digits."""
    if code >= len(_DIGITS) ** 4:
        generator = torch.Generator().manual_seed(code)
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    numbers: list[int] = []
    while code or not numbers:
        code, digit = divmod(code, len(_DIGITS))
        numbers.append(_DIGITS[digit])
    count = math.prod(shape)
    repeated = torch.tensor(numbers, dtype=torch.float64).repeat(count)
    return repeated[:count].reshape(shape)


def _sizes(height: Counts, width: Counts) -> SearchStrategy[Size]:
    """`(H, W)` from small to large, H != W where there is a choice."""
    _counts("height", height)
    _counts("width", width)
    heights, widths = (range(least, most + 1) for least, most in map(_bounds, (height, width)))
    sizes = sorted(itertools.product(heights, widths), key=math.prod)
    return st.sampled_from([(h, w) for h, w in sizes if h != w] or sizes)


def _bounds(counts: Counts) -> tuple[int, int]:
    return counts if isinstance(counts, tuple) else (counts, counts)


def _counts(name: str, counts: Counts) -> SearchStrategy[int]:
    for count in counts if isinstance(counts, tuple) else (counts,):
        require_count(name, count)
    if isinstance(counts, tuple) and len(counts) != 2:
        raise ValueError(f"`{name}` must be the least and the largest count, got {counts}.")
    least, largest = _bounds(counts)
    if least > largest:
        raise ValueError(f"`{name}` must be the least and the largest count, got {counts}.")
    return st.integers(least, largest)


def _layouts(names: Iterable[str]) -> SearchStrategy[str]:
    names = _require_several("layouts", names)
    for name in names:
        require_choice("layouts", name, LAYOUTS)
    return st.sampled_from(names)


def _magnitudes(magnitudes: Iterable[float] | None, dtype: torch.dtype) -> SearchStrategy[float]:
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"`dtype` must be a torch.dtype, got {type(dtype).__name__}.")
    if dtype not in _EXTREME:
        raise ValueError(f"`dtype` must be one of {', '.join(map(str, _EXTREME))}, got {dtype}.")
    extreme = _EXTREME[dtype]
    if magnitudes is None:
        return st.sampled_from((1.0, extreme, 1 / extreme))
    magnitudes = _require_several("magnitudes", magnitudes)
    for magnitude in magnitudes:
        require_number("magnitudes", magnitude)
    return st.sampled_from(magnitudes)


def _require_several(name: str, values: Iterable[T]) -> list[T]:
    """At least one; a string is none."""
    if isinstance(values, str | Tensor) or not isinstance(values, Iterable):
        raise TypeError(f"`{name}` must be a list, got {type(values).__name__}.")
    if not (values := list(values)):
        raise ValueError(f"`{name}` must hold at least one item, got none.")
    return values
