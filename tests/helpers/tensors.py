"""Reproducible tensors, their gradients and what is compared."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Reproducible normal numbers, the same in every dtype up to rounding."""
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def tensor(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(actual: Tensor, expected: Any, tolerance: float = 1e-10) -> None:
    """Equal up to `tolerance` times the larger of 1 and the largest expected value."""
    expected = torch.as_tensor(
        np.asarray(expected.detach() if isinstance(expected, Tensor) else expected)
    )
    size = max([1.0, *expected.double().abs().flatten().tolist()])
    torch.testing.assert_close(
        actual.detach().double(), expected.double(), rtol=0, atol=tolerance * size, equal_nan=True
    )


def leaves(tensors):
    """Leaves of the same values that need a gradient: a mapping of them, or a list."""
    if isinstance(tensors, Mapping):
        return dict(zip(tensors, leaves(tensors.values()), strict=True))
    return [value.detach().clone().requires_grad_() for value in tensors]


def trained(module):
    return [p for p in module.parameters() if p.requires_grad]


def gradients(value, inputs):
    return torch.autograd.grad(value.sum(), inputs, allow_unused=True, materialize_grads=True)


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation made; not views."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        sizes = [output.numel() for output in outputs if isinstance(output, Tensor)]
        if not function.is_view:
            self.elements = max([self.elements, *sizes])
        return result
