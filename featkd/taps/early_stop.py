"""Leaves a model's forward once every tap has what it waits for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .hooks import ForwardLeft
from .tap import FeatureTap


@contextmanager
def stopped_after_last_capture(tap: FeatureTap) -> Iterator[None]:
    """Ends a call of the tap's model with the last capture; torch's modes are then as before.

    The exception leaves every `with` of the model by itself. A model may also set a mode by
    function call, to set it back further down: that is put back here.
    """
    store = tap._store
    devices = {"cpu"} | {value.device.type for value in tap.model.parameters()} - {"meta"}
    autocast = {
        device: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        for device in devices
    }
    cached = torch.is_autocast_cache_enabled()
    store.wanted = tap.calls
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            yield
    except ForwardLeft as left:
        # Of a distiller inside the teacher: not ours.
        if left.store is not store:
            raise
    finally:
        store.wanted = None
        for device, (enabled, dtype) in autocast.items():
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(cached)
