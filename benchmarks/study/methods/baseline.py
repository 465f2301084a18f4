"""What the compared methods share: levels, adapters and their sum.

Written from the papers' formulas. "Paper" and "chosen" in a docstring say what is whose. For all:
computed in at least float32, the teacher's features constant, adapters that start as featkd's do
(`featkd/losses/_adapters.py`), the mean over images, the sum over levels.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from featkd.losses._adapters import Conv2d
from featkd.losses._level import admit

Channels = Mapping[str, int]
Features = Mapping[str, Tensor]


def regressor(student_channels: int, teacher_channels: int) -> nn.Module:
    return Conv2d(student_channels, teacher_channels, 1)


def regressor_where_needed(student_channels: int, teacher_channels: int) -> nn.Module:
    equal = student_channels == teacher_channels
    return nn.Identity() if equal else regressor(student_channels, teacher_channels)


class Baseline(nn.Module):
    """`{name: weight * (distance(adapter(S), T), summed over the levels)}`.

    Args: channels C_S and C_T by level. Shape: student `(B, C_S, H, W)`, teacher `(B, C_T, H, W)`,
    by level.
    """

    name: str  # of the method, in the runs and of its entry
    adapter = staticmethod(regressor)

    def __init__(
        self, student_channels: Channels, teacher_channels: Channels, *, weight: float
    ) -> None:
        super().__init__()
        require_levels("teacher_channels", teacher_channels, student_channels)
        self.weight = weight
        self.channels = {
            level: (student_channels[level], teacher_channels[level]) for level in student_channels
        }
        self.adapters = nn.ModuleDict(
            {level: self.adapter(*pair) for level, pair in self.channels.items()}
        )

    def distance(self, level: str, student: Tensor, teacher: Tensor) -> Tensor:
        """The method's own part: every method defines it."""
        raise NotImplementedError

    def forward(self, student_features: Features, teacher_features: Features) -> dict[str, Tensor]:
        names = ("student_features", "teacher_features")
        for name, features in zip(names, (student_features, teacher_features), strict=True):
            require_levels(name, features, self.channels)
        total: Any = 0
        for level, channels in self.channels.items():
            pair = student_features[level], teacher_features[level]
            student, teacher = map(wide, admit(*pair, channels, None, None))
            total = total + self.distance(level, self.adapters[level](student), teacher)
        return {self.name: self.weight * total}


def require_levels(name: str, values: Mapping[str, Any], levels: Mapping[str, Any]) -> None:
    if set(values) != set(levels):
        raise ValueError(f"`{name}` must have the levels {list(levels)}, got {list(values)}.")


def wide(features: Tensor) -> Tensor:
    return features.to(torch.promote_types(features.dtype, torch.float32))
