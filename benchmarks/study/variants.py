"""What the study asks and the library has no argument for: settings beside `Hyperparameters`.

- `taps="fpn"`: the FPN's outputs in place of the backbone's stages.
- `masks="live"`: L_AM's gradient flows into the masks too. `masks="spread"`: the temperature counts
  in standard deviations of each attention map. `masks="centred"`: attention is the magnitude of
  what a position's features differ by from the map's mean, channel by channel.
- `relation="tied"`: L_NLD's student is adapted first and goes through the teacher's relation.
- `unit="element"`: every term of a level over the root of its C H W, a root mean square.
- `schedule="warm-up"`: the weight rises from 0 over the first fifth of the steps.
  `schedule="decay"`: it falls to 0 over all of them, as a cosine.
"""

import math
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

import featkd

NAMES = ("taps", "masks", "relation", "unit", "schedule")
Channels = Mapping[str, int]
Features = Mapping[str, Tensor]
Losses = dict[str, Tensor]
Masks = tuple[Tensor, Tensor]


def split(settings: Mapping[str, Any]) -> tuple[featkd.Hyperparameters, dict[str, str]]:
    """The library's hyperparameters, and the variants."""
    variants = {name: value for name, value in settings.items() if name in NAMES}
    others = {name: value for name, value in settings.items() if name not in NAMES}
    return featkd.Hyperparameters(**others), variants


def featkd_loss(student: Channels, teacher: Channels, steps: int, **settings: Any) -> nn.Module:
    """The overall loss with its variants; `taps` is the caller's affair."""
    hyperparameters, variants = split(settings)
    if variants.get("unit") == "element":
        loss: nn.Module = PerElement(student, teacher, hyperparameters)
    else:
        loss = featkd.FeatureDistillationLoss(student, teacher, hyperparameters=hyperparameters)
    for module in loss.modules():
        if isinstance(module, featkd.AttentionMaskedLoss) and "masks" in variants:
            module._masks = MethodType(MASKS[variants["masks"]], module)
        if isinstance(module, featkd.NonLocalLoss) and "relation" in variants:
            tie_relation(module)
    if "schedule" in variants:
        loss = Scheduled(loss, variants["schedule"], steps)
    return loss


def live_masks(
    loss: featkd.AttentionMaskedLoss, student: Tensor, adapted: Tensor, teacher: Tensor, maps: None
) -> Masks:
    return (
        featkd.attention_mask(
            featkd.spatial_attention(student),
            featkd.spatial_attention(teacher),
            temperature=loss.temperature,
        ),
        featkd.attention_mask(
            featkd.channel_attention(adapted),
            featkd.channel_attention(teacher),
            temperature=loss.temperature,
        ),
    )


@torch.no_grad()
def spread_masks(
    loss: featkd.AttentionMaskedLoss, student: Tensor, adapted: Tensor, teacher: Tensor, maps: None
) -> Masks:
    def mask(*maps: Tensor) -> Tensor:
        return featkd.attention_mask(*map(standard, maps), temperature=loss.temperature)

    return (
        mask(featkd.spatial_attention(student), featkd.spatial_attention(teacher)),
        mask(featkd.channel_attention(adapted), featkd.channel_attention(teacher)),
    )


def standard(attention: Tensor) -> Tensor:
    """Over its own standard deviation, image by image; a constant map as it is."""
    spread = attention.flatten(1).std(1)
    spread = torch.where(spread > 0, spread, 1)
    return attention / spread.view(-1, *[1] * (attention.dim() - 1))


@torch.no_grad()
def centred_masks(
    loss: featkd.AttentionMaskedLoss, student: Tensor, adapted: Tensor, teacher: Tensor, maps: None
) -> Masks:
    student, adapted, teacher = map(centred, (student, adapted, teacher))

    def mask(*maps: Tensor) -> Tensor:
        return featkd.attention_mask(*maps, temperature=loss.temperature)

    return (
        mask(featkd.spatial_attention(student), featkd.spatial_attention(teacher)),
        mask(featkd.channel_attention(adapted), featkd.channel_attention(teacher)),
    )


def centred(features: Tensor) -> Tensor:
    return features - features.mean((2, 3), keepdim=True)


MASKS = {"live": live_masks, "spread": spread_masks, "centred": centred_masks}


def tie_relation(loss: featkd.NonLocalLoss) -> None:
    """In place."""
    adapter = nn.Conv2d(loss.student_channels, loss.teacher_channels, 1)
    loss.student_relation = nn.Sequential(adapter, loss.teacher_relation)
    loss.adapter = nn.Identity()


class PerElement(nn.Module):
    """Every term of a level over the root of its C_T H W."""

    def __init__(
        self, student: Channels, teacher: Channels, hyperparameters: featkd.Hyperparameters
    ) -> None:
        super().__init__()
        self.levels = nn.ModuleDict(
            {
                level: featkd.FeatureDistillationLoss(
                    student[level], teacher[level], hyperparameters=hyperparameters
                )
                for level in student
            }
        )

    def forward(self, student: Features, teacher: Features) -> Losses:
        total: Losses = {}
        for level, loss in self.levels.items():
            for name, value in loss(student[level], teacher[level]).items():
                share = value / math.sqrt(teacher[level][0].numel())
                total[name] = total.get(name, 0) + share
        return total


class Scheduled(nn.Module):
    """The losses of `loss` times the factor of this training step."""

    def __init__(self, loss: nn.Module, schedule: str, steps: int) -> None:
        super().__init__()
        self.loss = loss
        self.schedule = schedule
        self.steps = steps
        self.register_buffer("done", torch.zeros(()))

    def forward(self, student: Features, teacher: Features) -> Losses:
        place = self.done / self.steps
        if self.training:
            self.done += 1
        if self.schedule == "warm-up":
            factor = (place / 0.2).clamp(max=1)
        else:
            factor = (1 + torch.cos(math.pi * place)) / 2
        return {name: factor * value for name, value in self.loss(student, teacher).items()}
