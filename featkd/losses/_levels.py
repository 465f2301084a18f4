"""The names of levels, and what is given for each of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import nn

SINGLE_LEVEL = "features"
T = TypeVar("T")


def level_names(channels: int | Mapping[str, int]) -> tuple[str, ...]:
    if not isinstance(channels, Mapping):
        if not isinstance(channels, int):
            found = type(channels).__name__
            raise TypeError(
                "`student_channels` must be an integer or a mapping from level to one, "
                f"got {found}."
            )
        return (SINGLE_LEVEL,)
    for level in channels:
        if not isinstance(level, str):
            found = type(level).__name__
            raise TypeError(f"`student_channels` must have strings for level names, got {found}.")
    # ModuleDict takes no name that is empty or one of its own attributes'.
    taken = [name for name in channels if not name or "/" in name or hasattr(nn.ModuleDict(), name)]
    if taken or not channels:
        raise ValueError(
            "`student_channels` must have at least one level, none with a '/' or named like an "
            f"attribute of nn.ModuleDict, got {list(channels)}."
        )
    return tuple(channels)


def per_level(name: str, value: T | Mapping[str, T], levels: tuple[str, ...]) -> Mapping[str, T]:
    if isinstance(value, Mapping):
        return require_levels(name, value, levels)
    return dict.fromkeys(levels, value)


def require_levels(name: str, values: Mapping[str, T], levels: tuple[str, ...]) -> Mapping[str, T]:
    if set(values) != set(levels):
        raise ValueError(f"`{name}` must have the levels {list(levels)}, got {list(values)}.")
    return values


def module_name(level: str) -> str:
    """A module's name holds no dot; a level's may, where it is a path."""
    return level.replace(".", "/")
