"""Arguments on the device and in the dtype of the model that takes them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

# A model computes in these; the floating-point dtypes of 8 bits only store weights.
_COMPUTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def weights_of(model: nn.Module) -> Iterator[Tensor]:
    return (value for value in model.parameters() if value.dtype in _COMPUTED)


def home(model: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
    """Where all floating-point weights are, and their dtype; `None` where they disagree.

    Offloaded weights are on the meta device: hooks fetch them, and move the inputs too.
    """
    weights = list(weights_of(model))
    devices = {value.device for value in weights if not value.is_meta}
    dtypes = {value.dtype for value in weights}
    return (
        devices.pop() if len(devices) == 1 else None,
        dtypes.pop() if len(dtypes) == 1 else None,
    )


def placed(value: Any, device: torch.device | None, dtype: torch.dtype | None) -> Any:
    """Tensors moved and floating-point ones cast, in lists, tuples and mappings too.

    Other objects stay as they are, and so does a container in which nothing changes.
    """
    if _is_placed(value, device, dtype):
        return value
    if isinstance(value, Tensor):
        return value.to(device or value.device, _dtype_of(value, dtype))
    if isinstance(value, Mapping):
        items = {key: placed(item, device, dtype) for key, item in value.items()}
        if type(value) is dict or not isinstance(value, MutableMapping):
            return items
        changed: Any = copy.copy(value)
        for key, item in items.items():
            changed[key] = item
        return changed
    found = [placed(item, device, dtype) for item in value]
    if type(value) is list:
        return found
    if isinstance(value, list):
        changed = copy.copy(value)
        changed[:] = found
        return changed
    kind: Any = type(value)
    return kind(*found) if hasattr(value, "_fields") else kind(found)


def _is_placed(value: Any, device: torch.device | None, dtype: torch.dtype | None) -> bool:
    if isinstance(value, Tensor):
        here = device is None or value.device == device
        return here and value.dtype == _dtype_of(value, dtype)
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return all(_is_placed(item, device, dtype) for item in value)
    return True


def _dtype_of(value: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and value.dtype in _COMPUTED else value.dtype
