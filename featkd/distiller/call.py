"""A model's call, or the caller's in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def called(
    forward: Callable[..., object] | None, model: nn.Module, *args: Any, **kwargs: Any
) -> object:
    return model(*args, **kwargs) if forward is None else forward(model, *args, **kwargs)
