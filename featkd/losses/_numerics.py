"""The precision in which the losses compute, the L2 norm per image, and its reductions."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ._options import Reduction


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The widest dtype among `tensors`, float32 at least."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Not by `to` where nothing is to be done: beside a small map that takes its time."""
    # An exported program may be given other dtypes, or run under autocast.
    idle = tensor.dtype == dtype and not torch.compiler.is_compiling()
    return tensor if idle else tensor.to(dtype)


def widened(*tensors: Tensor) -> list[Tensor]:
    """`tensors` in the widest dtype among them, float32 at least."""
    dtype = compute_dtype(*tensors)
    return [cast(tensor, dtype) for tensor in tensors]


def dtype_for_few(tensor: Tensor) -> torch.dtype:
    """float64 where the device has it: beside the features, few numbers cost little in it."""
    return torch.float64 if tensor.device.type in ("cpu", "cuda") else compute_dtype(tensor)


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
    # The meta device has no autocast. In eager, to enter the context outlasts a small product; an
    # exported program needs it, as it may run under autocast.
    idle = device == "meta" or not (
        torch.compiler.is_compiling() or torch.is_autocast_enabled(device)
    )
    return nullcontext() if idle else torch.autocast(device, enabled=False)


def norm_per_image(x: Tensor) -> Tensor:
    """`(B, ...) -> (B,)`: the L2 norm over all dimensions but the first; its gradient at 0 is 0."""
    # `vector_norm` adds one by one in float32: 1 % off at 10 million elements. `sum` adds by pairs.
    return root(x.square().sum(tuple(range(1, x.dim()))))


def root(energy: Tensor) -> Tensor:
    """The square root, with gradient 0 at 0, where its own is infinite."""
    zero = energy == 0
    return energy.masked_fill(zero, torch.inf).sqrt().masked_fill(zero, 0.0)


def relative_to(distances: Tensor, norms: Tensor) -> Tensor:
    """`distances / norms`, image by image; an image whose norm is 0 stays undivided."""
    return distances / norms.masked_fill(norms == 0, 1)


def reduced(distances: Tensor, reduction: Reduction) -> Tensor:
    """`(B,)` distances to what `reduction` asks for; an empty batch gives a differentiable 0."""
    if reduction == "none":
        return distances
    if reduction == "norm":
        return root(distances.square().sum())
    if reduction == "mean_square":
        distances = distances.square()
    if reduction == "sum" or distances.shape[0] == 0:  # the mean of no image would be NaN
        return distances.sum()
    return distances.mean()
