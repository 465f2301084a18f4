"""Walking a feature map in blocks of channels.

On CPU a fresh full-size temporary costs more than the arithmetic on it (page faults, then a trip to
memory and back), so the closed forms work block by block, in cache. On other devices, and wherever
a gradient's graph is being recorded, one block holds all.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

_BLOCK_BYTES = 1 << 21


def takes_closed_form() -> bool:
    """Reverse mode in eager does; the compiler fuses the plain formula, forward mode derives it."""
    return not torch.compiler.is_compiling() and forward_ad._current_level < 0


def channel_blocks(features: Tensor) -> list[slice]:
    """Ranges of channels, about 2 MiB of `features` each."""
    channels = features.shape[1]
    width = channels
    if features.device.type == "cpu" and not torch.is_grad_enabled():
        bytes_per_channel = features[:, :1].numel() * features.element_size()
        width = max(1, _BLOCK_BYTES // max(bytes_per_channel, 1))
    return [slice(start, min(start + width, channels)) for start in range(0, channels, width)]


def map_blocks(features: Tensor, function: Callable[[slice], Tensor]) -> Tensor:
    """The results of `function` for all blocks of channels, as one tensor."""
    first, *others = channel_blocks(features)
    part = function(first)
    if not others:
        return part
    result = part.new_empty(features.shape)
    result[:, first] = part
    for block in others:
        result[:, block] = function(block)
    return result
