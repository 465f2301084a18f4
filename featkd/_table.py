"""Tables of text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


def times(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))
