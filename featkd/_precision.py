"""The losses compute in at least float32 with autocast off, on tensors that autograd takes."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The widest dtype among `tensors`, float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor is not None:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def savable(tensor: Tensor) -> Tensor:
    """`tensor`; a copy where it was made under `inference_mode`, as autograd saves no such one.

    The compiler does not ask: what it saves is its own choice, and its error says what to do.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return tensor
    return tensor.clone() if tensor.is_inference() else tensor


def full_precision(tensor: Tensor) -> Any:
    """A context in which matrix products and convolutions on `tensor`'s device are not autocast."""
    device = tensor.device.type
    # The meta device has no autocast.
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
