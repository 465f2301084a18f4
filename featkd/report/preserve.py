"""A trial forward that leaves modules and random numbers as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def preserved(*models: nn.Module) -> Iterator[None]:
    """Keeps buffers, modes, and the random numbers of Python, of torch and of the GPUs in use."""
    modules = [module for model in models for module in model.modules()]
    modes = [module.training for module in modules]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    tensors = [value for model in models for value in model.parameters()]
    gpus = {value.device for value in tensors if value.is_cuda}
    numbers = random.getstate()
    try:
        with torch.random.fork_rng(devices=list(gpus)):
            yield
    finally:
        random.setstate(numbers)
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer
                buffer.copy_(value)
