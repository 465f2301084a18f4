"""A trial forward that leaves modules and random numbers as they were."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn.parameter import is_lazy


@contextmanager
def preserved(*models: nn.Module) -> Iterator[None]:
    """Keeps buffers, modes, and the random numbers of Python, NumPy, torch and the GPUs in use.

    What is compiled runs as it is written.
    """
    modules = [module for model in models for module in model.modules()]
    modes = [module.training for module in modules]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in modules
        for name, buffer in module._buffers.items()
        # What a first forward fills stays: its model may remember elsewhere that it is.
        if buffer is not None and not is_lazy(buffer)
    ]
    tensors = [value for model in models for value in model.parameters()]
    gpus = {value.device for value in tensors if value.is_cuda}
    numbers = random.getstate()
    numpy = sys.modules.get("numpy")
    of_numpy = numpy and numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=list(gpus)), _uncompiled():
            yield
    finally:
        random.setstate(numbers)
        if numpy:
            numpy.random.set_state(of_numpy)
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for module, name, buffer, value in buffers:
            module._buffers[name] = buffer
            _restore(buffer, value)


def _uncompiled() -> AbstractContextManager[None]:
    """One graph takes no more hooks, and its backward frees what a second one needs."""
    set_stance = getattr(torch.compiler, "set_stance", None)  # from torch 2.6 on
    return set_stance("force_eager") if set_stance else nullcontext()


def _restore(buffer: Tensor, value: Tensor) -> None:
    """In place, as others may hold the buffer: a graph that awaits its backward, as it was."""
    if buffer.layout == torch.strided and 0 in buffer.stride():  # expanded: nobody can write there
        return
    if buffer.is_inference():  # it has no version
        as_it_was: AbstractContextManager[Any] = torch.inference_mode()
    else:
        as_it_was = _unsafe_preserve_version_counter(buffer)
    with as_it_was, torch.no_grad():
        if buffer.shape != value.shape:  # an observer of quantisation resizes its own
            buffer.resize_(value.shape)
        buffer.copy_(value)
