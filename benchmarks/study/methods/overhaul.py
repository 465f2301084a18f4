"""The overhaul of feature distillation: Heo et al. (ICCV 2019)."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from benchmarks.study.methods.baseline import Baseline, Channels, regressor


def normed_regressor(student_channels: int, teacher_channels: int) -> nn.Module:
    convolution = regressor(student_channels, teacher_channels)
    convolution.bias = None  # the normalisation has its own
    return nn.Sequential(convolution, nn.BatchNorm2d(teacher_channels))


class FeatureOverhaul(Baseline):
    """`2^(l - L) sum_chw d(r(S), max(T, m_c))` at level l of L, from shallow to deep.

    Heo et al. (ICCV 2019), section 3: the partial distance `d(s, t)` is 0 where `s <= t <= 0`, else
    `(s - t)^2`; `max` is the margin ReLU, `m_c = E[T_c | T_c < 0]`. Paper: both; `r` is a 1x1
    convolution and batch normalisation; taps before the ReLU. Released code: the levels' factors.

    `margins` by level `(C_T,)`, as by :func:`margin_of_norm` (the released code's way); `None`: the
    mean of the negative responses in all training steps so far, this one included, which fits any
    tap; 0 for a channel that has had none.

    Taps: :func:`move_last_relu` opens the place before the ReLU of a ResNet's stages; blocks of
    torchvision's MobileNets end in no ReLU. Behind a ReLU there is nothing negative: m_c = 0.
    """

    name = "overhaul"
    adapter = staticmethod(normed_regressor)

    def __init__(
        self,
        student_channels: Channels,
        teacher_channels: Channels,
        *,
        weight: float,
        margins: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(student_channels, teacher_channels, weight=weight)
        self.margins = nn.ModuleDict(
            {
                level: Margin(count, None if margins is None else margins[level])
                for level, (_, count) in self.channels.items()
            }
        )
        last = len(self.channels) - 1
        self.factors = {level: 2.0 ** (i - last) for i, level in enumerate(self.channels)}

    def distance(self, level: str, student: Tensor, teacher: Tensor) -> Tensor:
        target = torch.maximum(teacher, self.margins[level](teacher))
        counted = (student > target) | (target > 0)
        square = (student - target).square() * counted
        return self.factors[level] * square.sum((1, 2, 3)).mean()


class Margin(nn.Module):
    """`m_c` as `(C, 1, 1)`: `known`, or the mean of the negative responses so far."""

    def __init__(self, channels: int, known: Tensor | None) -> None:
        super().__init__()
        self.fixed = known is not None
        # Sums over a whole training outgrow float32.
        start = torch.zeros(channels) if known is None else known.detach()
        self.register_buffer("total", start.double())
        self.register_buffer("count", torch.full((channels,), float(self.fixed)).double())

    def forward(self, teacher: Tensor) -> Tensor:
        if self.training and not self.fixed:
            self.total += teacher.clamp(max=0).sum((0, 2, 3))
            self.count += (teacher < 0).sum((0, 2, 3))
        return (self.total / self.count.clamp(min=1)).to(teacher.dtype)[:, None, None]


def margin_of_norm(norm: nn.Module) -> Tensor:
    """`E[x | x < 0]`, `(C,)`, of what a batch normalisation puts out, `x ~ N(bias, weight^2)`.

    As released, -3 |weight| where no more than 1 in 1,000 are negative.
    """
    mean, std = norm.bias.detach().double(), norm.weight.detach().double().abs()
    negative = torch.special.ndtr(-mean / std)
    density = torch.exp(-((mean / std) ** 2) / 2) / math.sqrt(2 * math.pi)
    return torch.where(negative > 1e-3, mean - std * density / negative, -3 * std)


def move_last_relu(stage: nn.Sequential) -> None:
    """Moves the last ReLU of a torchvision ResNet's stage out of its last block, in place.

    After `move_last_relu(model.backbone.body.layer2)` the path `backbone.body.layer2.N`, N the last
    block's index (0 in the main job's), is the sum that enters the ReLU. The network
    computes the same, and its `state_dict()` has the same keys.
    """
    block = stage[-1]
    # A block calls its one ReLU module behind each of these, and then at the end.
    for norm in (block.bn1, block.bn2) if isinstance(block, Bottleneck) else (block.bn1,):
        norm.register_forward_hook(rectified)
    block.relu = nn.Identity()
    stage.append(nn.ReLU())


def rectified(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.relu()
