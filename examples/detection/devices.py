"""Which devices there are."""

import os

import torch


def wrong_device(name: str) -> str | None:
    """Why there is no such device here, or None."""
    try:
        device = torch.device(name)
    except RuntimeError:
        return "torch knows no such device"
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return "torch finds no CUDA GPU here"
        if device.index is not None and "WORLD_SIZE" in os.environ:
            return "torchrun gives each process its GPU, so that it must be cuda"
        if device.index is not None and device.index >= torch.cuda.device_count():
            return f"there are {torch.cuda.device_count()} CUDA GPUs here, counted from 0"
        return None
    try:
        torch.zeros(1, device=device).cpu()
    # What torch raises for a kind of device that it was not built for, by kind, in long texts.
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        return str(error).splitlines()[0].split(". ")[0]
    return None
