"""Walking a feature map in blocks of channels.

On CPU a fresh full-size temporary costs more than the arithmetic on it: page faults, then a trip to
memory and back. So the closed forms work block by block, in cache, and in place. On other devices,
and wherever a gradient's graph is being recorded, one block holds all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.autograd import forward_ad

# What of a map, or of numbers that each of its channels has, belongs to a block.
Part = Callable[[Tensor], Tensor]

_BLOCK_BYTES = 1 << 22


def in_forward_mode() -> bool:
    return forward_ad._current_level >= 0


def takes_closed_form() -> bool:
    """Reverse mode in eager does.

    The compiler fuses the plain formula; forward mode and the transforms of `torch.func` derive it.
    """
    if torch.compiler.is_compiling() or in_forward_mode():
        return False
    return not torch._C._are_functorch_transforms_active()


def pays(features: Tensor) -> bool:
    """Whether a closed form saves anything: a graph, or temporaries that leave the cache."""
    return features.requires_grad or features.numel() * features.element_size() > _BLOCK_BYTES


def _in_place() -> bool:
    if torch.compiler.is_compiling():
        return False
    return not (torch.is_grad_enabled() or torch._C._are_functorch_transforms_active())


def channel_blocks(features: Tensor, maps: int = 1) -> list[Part]:
    """Ranges of channels: 4 MiB of `maps` such as `features` each, and 16 with several threads.

    These wait for each other at every operation: so no more of those than plain torch makes.
    """
    size = maps * features.numel() * features.element_size()
    if size <= _BLOCK_BYTES or features.device.type != "cpu" or not _in_place():
        return [whole]
    axis = 1 - features.dim()  # from the end: what is known of each channel may be stacked
    channels = features.shape[axis]
    block_bytes = _BLOCK_BYTES * (4 if torch.get_num_threads() > 1 else 1)
    width = max(1, block_bytes * channels // size)
    return [
        partial(torch.narrow, dim=axis, start=start, length=min(width, channels - start))
        for start in range(0, channels, width)
    ]


def whole(x: Tensor) -> Tensor:
    return x


def map_blocks(
    features: Tensor, function: Callable[[Part], tuple[Tensor, ...]], maps: int = 1
) -> tuple[Tensor, ...]:
    """`function` of all blocks of channels: its results, each as one tensor of all channels."""
    first, *others = channel_blocks(features, maps)
    parts = function(first)
    if not others:
        return parts
    axis = 1 - features.dim()
    channels = features.shape[axis]
    results = tuple(x.new_empty(*x.shape[:axis], channels, *x.shape[axis + 1 :]) for x in parts)
    for part in (first, *others):
        parts = parts if part is first else function(part)
        for result, found in zip(results, parts, strict=True):
            part(result).copy_(found)
    return results


def product(features: Tensor, factors: Callable[[Part], tuple[Tensor, Tensor]]) -> Tensor:
    """A gradient of `features`: the product of both factors of each block, the first one fresh.

    Autograd casts it to the dtype of `features`, in which blocks are written at once.
    """
    first, *others = channel_blocks(features)
    a, b = factors(first)
    if torch._C._functorch.is_legacy_batchedtensor(b):  # `is_grads_batched`: nothing in place
        a, b = factors(whole) if others else (a, b)
        return a * b
    if not others:
        return scaled(a, b)
    result = torch.empty_like(features)
    torch.mul(a, b, out=first(result))
    for part in others:
        torch.mul(*factors(part), out=part(result))
    return result


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """`x * factor` for a fresh `x`, which it may overwrite."""
    return x.mul_(factor) if _in_place() else x * factor


def less(x: Tensor, y: Tensor) -> Tensor:
    """`x - y` for a fresh `x`, which it may overwrite."""
    return x.sub_(y) if _in_place() else x - y
