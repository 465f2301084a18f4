"""Adaptation layers (appendix B): the student's side of a comparison, trained and then thrown away.

They compute in at least float32 with autocast off, whatever the dtype of features and parameters.
Where the channel counts are equal they start as the identity: equal features start at loss 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._numerics import cast, full_precision, widened


class Conv2d(nn.Conv2d):
    """A convolution of odd `kernel_size` that keeps H x W."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        start_as_identity(self)

    def forward(self, input: Tensor) -> Tensor:
        with full_precision(input):
            input, weight = widened(input, self.weight)
            bias = self.bias if self.bias is None else cast(self.bias, weight.dtype)
            if torch.compiler.is_compiling() and input.device.type == "cpu":
                return as_product(input, weight, bias)
            return F.conv2d(input, weight, bias, padding=self.padding)


def as_product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution of odd size that keeps H x W, as a matrix product of each image.

    With a convolution in a graph for the CPU inductor copies every map to channels last.
    """
    images, _, height, width = input.shape
    channels, size = weight.shape[0], weight.shape[2]
    columns = input.flatten(2) if size == 1 else F.unfold(input, size, padding=size // 2)
    matrix = weight.flatten(1).expand(images, -1, -1)
    start = columns.new_zeros(1) if bias is None else bias[:, None]
    return torch.baddbmm(start, matrix, columns).view(images, channels, height, width)


class Linear(nn.Linear):
    """A linear layer on channel attention maps, `(B, C_S) -> (B, C_T)`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        start_as_identity(self)

    def forward(self, input: Tensor) -> Tensor:
        with full_precision(input):
            return F.linear(*widened(input, self.weight, self.bias))


class BatchNorm2d(nn.BatchNorm2d):
    """A batch normalisation that starts as a constant 0, its weight and its bias being 0.

    One value a channel is its own mean in training, so 0; it has no variance to put on record.
    """

    momentum: float
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        input, weight, bias = widened(input, self.weight, self.bias)
        if self.training and input.numel() == self.num_features:
            return (input - input) * weight[:, None, None] + bias[:, None, None]
        mean, variance = (cast(x, input.dtype) for x in (self.running_mean, self.running_var))
        result = F.batch_norm(
            input, mean, variance, weight, bias, self.training, self.momentum, self.eps
        )
        if self.training:
            self.num_batches_tracked.add_(1)
            if mean is not self.running_mean:  # else `batch_norm` has written there itself
                self.running_mean.copy_(mean)
                self.running_var.copy_(variance)
        return result


@torch.no_grad()
def start_as_identity(layer: nn.Conv2d | nn.Linear) -> None:
    """Zero bias; the identity where the layer keeps the channel count, else torch's own start."""
    if layer.bias is not None:
        layer.bias.zero_()
    if layer.weight.shape[0] != layer.weight.shape[1]:
        return
    if isinstance(layer, nn.Conv2d):
        nn.init.dirac_(layer.weight)
    else:
        nn.init.eye_(layer.weight)
