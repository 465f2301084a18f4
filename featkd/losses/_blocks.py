"""Walking a feature map in blocks of channels.

On CPU a fresh full-size temporary costs more than the arithmetic on it: page faults, then a trip to
memory and back. So the closed forms work block by block, in cache, and in place. On other devices,
and wherever a gradient's graph is being recorded, one block holds all.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

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


def channel_blocks(features: Tensor, maps: int = 1) -> list[slice]:
    """Ranges of channels: 4 MiB of `maps` such as `features` each, and 16 with several threads.

    These wait for each other at every operation: so no more of those than plain torch makes.
    """
    channels = features.shape[1]
    width = channels
    size = maps * features.numel() * features.element_size()
    if size > _BLOCK_BYTES and features.device.type == "cpu" and _in_place():
        block_bytes = _BLOCK_BYTES * (4 if torch.get_num_threads() > 1 else 1)
        width = max(1, block_bytes * channels // size)
    return [slice(start, min(start + width, channels)) for start in range(0, channels, width)]


def map_blocks(
    features: Tensor, function: Callable[[slice], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """`function` of all blocks of channels: its results, each as one tensor of all channels."""
    first, *others = channel_blocks(features)
    parts = function(first)
    if not others:
        return parts
    channels = features.shape[1]
    results = tuple(x.new_empty((x.shape[0], channels, *x.shape[2:])) for x in parts)
    for block in (first, *others):
        parts = parts if block is first else function(block)
        for result, part in zip(results, parts, strict=True):
            result[:, block] = part
    return results


def product(features: Tensor, factors: Callable[[slice], tuple[Tensor, Tensor]]) -> Tensor:
    """A gradient of `features`: the product of both `factors` of each block.

    Autograd casts it to the dtype of `features`, in which blocks are written at once.
    """
    first, *others = channel_blocks(features)
    a, b = factors(first)
    if not others:
        return a * b
    if torch._C._functorch.is_legacy_batchedtensor(b):  # `is_grads_batched`: no `out=` there
        a, b = factors(slice(None))
        return a * b
    result = torch.empty_like(features)
    torch.mul(a, b, out=result[:, first])
    for block in others:
        torch.mul(*factors(block), out=result[:, block])
    return result


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """`x * factor` for a fresh `x`, which it may overwrite."""
    return x.mul_(factor) if _in_place() else x * factor


def less(x: Tensor, y: Tensor) -> Tensor:
    """`x - y` for a fresh `x`, which it may overwrite."""
    return x.sub_(y) if _in_place() else x - y
