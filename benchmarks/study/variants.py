"""What the study asks and the library has no argument for: settings beside `Hyperparameters`.

- `taps="fpn"`: the FPN's outputs in place of the backbone's stages.
- `masks="live"`: L_AM's gradient flows into the masks too. `masks="spread"`: the temperature counts
  in standard deviations of each attention map. `masks="centred"`: attention is the magnitude of
  what a position's features differ by from the map's mean, channel by channel. `masks="boxes"`:
  the positions in true boxes alone, for which the loss is to `watch` the student; `masks="near"`:
  those of fine-grained imitation.
- `relation="tied"`: L_NLD's student is adapted first and goes through the teacher's relation.
- `unit="element"`: every term of a level over the root of its C H W, a root mean square.
  `unit="teacher"`: L_AM is half the mean squared difference in units of the deviation of each
  teacher's channel over the batch, where `standardize` has both sides at their own.
- `schedule="warm-up"`: the weight rises from 0 over the first fifth of the steps.
  `schedule="decay"`: it falls to 0 over all of them, as a cosine; `"cosine"`: to a tenth.
  `schedule="early end"`: it is 0 for the last tenth.
- `levels="positions"`: a level counts as its share of all levels' positions, in place of equally.
- `ratio=1.0`: the weights are those at which, before the first step, the terms' gradients come to
  this share of the detector's, each term's being equal; those of the setting say which terms.
  `total=1.0`: the weights of the setting, all times what brings the whole gradient there.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator

import featkd
from benchmarks.study.methods.fine_grained_imitation import SeenBoxes, anchors_of, imitation_mask

NAMES = ("taps", "masks", "relation", "unit", "schedule", "levels", "ratio", "total")
Channels = Mapping[str, int]
Features = Mapping[str, Tensor]
Losses = dict[str, Tensor]
Masks = tuple[Tensor, Tensor]


def split(settings: Mapping[str, Any]) -> tuple[featkd.Hyperparameters, dict[str, Any]]:
    """The library's hyperparameters, and the variants."""
    variants = {name: value for name, value in settings.items() if name in NAMES}
    others = {name: value for name, value in settings.items() if name not in NAMES}
    return featkd.Hyperparameters(**others), variants


def featkd_loss(student: Channels, teacher: Channels, steps: int, **settings: Any) -> nn.Module:
    """The overall loss with its variants; `taps` is the caller's affair."""
    hyperparameters, variants = split(settings)
    if variants.get("unit") == "element":
        loss: nn.Module = ByLevel(student, teacher, hyperparameters, over_root_of_elements)
    elif variants.get("levels") == "positions":
        loss = ByLevel(student, teacher, hyperparameters, by_positions)
    else:
        loss = featkd.FeatureDistillationLoss(student, teacher, hyperparameters=hyperparameters)
    of_boxes = OF_BOXES.get(variants.get("masks"))
    if of_boxes:
        seen = SeenBoxes()
        loss.watch = lambda student: student.transform.register_forward_hook(seen)
    for module in loss.modules():
        if isinstance(module, featkd.AttentionMaskedLoss) and "masks" in variants:
            masks = partial(box_masks, seen, of_boxes) if of_boxes else MASKS[variants["masks"]]
            module._masks = MethodType(masks, module)
        if isinstance(module, featkd.AttentionMaskedLoss) and variants.get("unit") == "teacher":
            module._distances = MethodType(in_teacher_units, module)
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


def inside(boxes: Tensor, image_size: tuple[int, int], height: int, width: int) -> Tensor:
    """`(height, width)`: whether a position's centre lies in a box."""
    y = (torch.arange(height, device=boxes.device) + 0.5)[:, None, None] * image_size[0] / height
    x = (torch.arange(width, device=boxes.device) + 0.5)[None, :, None] * image_size[1] / width
    left, top, right, bottom = boxes.unbind(1)
    return ((left <= x) & (x < right) & (top <= y) & (y < bottom)).any(2)


def near(boxes: Tensor, image_size: tuple[int, int], height: int, width: int) -> Tensor:
    """`(height, width)`: whether fine-grained imitation with the study's anchors takes it."""
    stride = image_size[0] // height
    generator = AnchorGenerator(((2.5 * stride, 3.5 * stride),), ((0.5, 1.0, 2.0),))
    strides = (stride, image_size[1] // width)
    return imitation_mask(anchors_of(generator, (height, width), strides, boxes.device), boxes, 0.5)


OF_BOXES = {"boxes": inside, "near": near}


def box_masks(
    seen: SeenBoxes,
    of_boxes: Callable[[Tensor, tuple[int, int], int, int], Tensor],
    loss: featkd.AttentionMaskedLoss,
    student: Tensor,
    adapted: Tensor,
    teacher: Tensor,
    maps: None,
) -> tuple[Tensor, None]:
    """`(B, H, W)` of mean 1 in each image, 0 where `of_boxes` is false."""
    size = teacher.shape[2:]
    within = torch.stack([of_boxes(boxes, seen.image_size, *size) for boxes in seen.boxes]).float()
    return within / within.mean((1, 2), keepdim=True).clamp(min=1 / size.numel()), None


def centred(features: Tensor) -> Tensor:
    return features - features.mean((2, 3), keepdim=True)


def in_teacher_units(
    loss: featkd.AttentionMaskedLoss, student: Tensor, teacher: Tensor, maps: None
) -> list[Tensor]:
    adapted, teacher = loss.adapter(student), teacher.float()
    mask, _ = loss._masks(student, adapted, teacher, maps)
    weight = 1.0 if mask is None else mask[:, None]
    unit = teacher.std((0, 2, 3), keepdim=True).clamp(min=1e-6)
    return [(weight * ((adapted - teacher) / unit).square()).mean((1, 2, 3)) / 2]


MASKS = {"live": live_masks, "spread": spread_masks, "centred": centred_masks}


def tie_relation(loss: featkd.NonLocalLoss) -> None:
    """In place."""
    adapter = nn.Conv2d(loss.student_channels, loss.teacher_channels, 1)
    loss.student_relation = nn.Sequential(adapter, loss.teacher_relation)
    loss.adapter = nn.Identity()


class ByLevel(nn.Module):
    """The sum of the levels' losses, each times its `factor(teacher_features, level)`."""

    def __init__(
        self,
        student: Channels,
        teacher: Channels,
        hyperparameters: featkd.Hyperparameters,
        factor: Callable[[Features, str], float],
    ) -> None:
        super().__init__()
        self.factor = factor
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
            factor = self.factor(teacher, level)
            for name, value in loss(student[level], teacher[level]).items():
                total[name] = total.get(name, 0) + factor * value
        return total


def over_root_of_elements(features: Features, level: str) -> float:
    """Of its C_T H W."""
    return 1 / math.sqrt(features[level][0].numel())


def by_positions(features: Features, level: str) -> float:
    """1 on the mean over levels."""
    counts = {name: each.shape[-2:].numel() for name, each in features.items()}
    return len(counts) * counts[level] / sum(counts.values())


def cosine(place: Tensor) -> Tensor:
    return (1 + torch.cos(math.pi * place)) / 2


# From the place in training, 0 to 1, to a factor.
SCHEDULES: dict[str, Callable[[Tensor], Tensor]] = {
    "warm-up": lambda place: (place / 0.2).clamp(max=1),
    "decay": cosine,
    "cosine": lambda place: 0.1 + 0.9 * cosine(place),
    "early end": lambda place: (place < 0.9).float(),
}


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
        factor = SCHEDULES[self.schedule](place)
        return {name: factor * value for name, value in self.loss(student, teacher).items()}


WEIGHTS = {
    "alpha": "loss_attention_transfer",
    "beta": "loss_attention_masked",
    "gamma": "loss_non_local",
}


def calibrate(
    distiller: featkd.Distiller,
    batch: Sequence[Any],
    ratio: float | None = None,
    total: float | None = None,
) -> None:
    """In place, from the gradients of one batch; one of both is given."""
    report, settings = distiller.train().report(*batch), distiller.loss.hyperparameters
    active = {weight: name for weight, name in WEIGHTS.items() if getattr(settings, weight)}
    if total is not None:
        factors = dict.fromkeys(active, total / report.distillation.gradient_ratio)
    else:
        shares = {term.name: term.gradient_ratio for term in report.terms}
        factors = {weight: ratio / len(active) / shares[name] for weight, name in active.items()}
    changes = {weight: getattr(settings, weight) * factor for weight, factor in factors.items()}
    distiller.loss.hyperparameters = replace(settings, **changes)
