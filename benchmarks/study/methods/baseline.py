"""The methods that the paper compares with or builds on, each a loss for `featkd.Distiller`.

Written from the papers' formulas. "Paper" and "chosen" in a docstring say what is whose. For all:
computed in at least float32, the teacher's features constant, adapters that start as featkd's do
(`featkd/adapters.py`), the mean over images, the sum over levels.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.resnet import Bottleneck
from torchvision.ops import box_iou

from featkd.adapters import Conv2d, prepare_pair

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

    name: str
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
        raise NotImplementedError

    def forward(self, student_features: Features, teacher_features: Features) -> dict[str, Tensor]:
        names = ("student_features", "teacher_features")
        for name, features in zip(names, (student_features, teacher_features), strict=True):
            require_levels(name, features, self.channels)
        total: Any = 0
        for level, channels in self.channels.items():
            pair = student_features[level], teacher_features[level]
            student, teacher = map(wide, prepare_pair(*pair, channels, resize=None))
            total = total + self.distance(level, self.adapters[level](student), teacher)
        return {self.name: self.weight * total}


def require_levels(name: str, values: Mapping[str, Any], levels: Mapping[str, Any]) -> None:
    if set(values) != set(levels):
        raise ValueError(f"`{name}` must have the levels {list(levels)}, got {list(values)}.")


def wide(features: Tensor) -> Tensor:
    return features.to(torch.promote_types(features.dtype, torch.float32))


class FitNets(Baseline):
    """`1/2 mean (r(S) - T)^2`: hints.

    Romero et al. (ICLR 2015), section 2.2; the hint on the backbone of Chen et al. (NeurIPS 2017).
    Paper: a convolution `r` at any channel counts. Chosen: 1x1 (Chen et al.), the mean over
    elements in place of the sum, and one stage of training in place of two.
    """

    name = "fitnets"

    def distance(self, level: str, student: Tensor, teacher: Tensor) -> Tensor:
        return F.mse_loss(student, teacher) / 2


class AttentionTransfer(Baseline):
    """`1/2 ||Q_S / ||Q_S|| - Q_T / ||Q_T|| ||` with the map `Q = sum_c A_c^2`, `(B, H * W)`.

    Zagoruyko & Komodakis (ICLR 2017), section 3.1; `weight` is the paper's beta. Paper: squares
    (p = 2 in the map), L2 norms, no adapter. (The released code has the mean of the squared
    difference in place of its norm.)
    """

    name = "at"
    adapter = nn.Identity  # which takes, and drops, any arguments

    def distance(self, level: str, student: Tensor, teacher: Tensor) -> Tensor:
        ours, theirs = (F.normalize(x.square().sum(1).flatten(1)) for x in (student, teacher))
        return torch.linalg.vector_norm(ours - theirs, dim=1).mean() / 2


class SeenBoxes:
    """A forward hook on the `transform` of torchvision's detectors: the boxes of one training step.

    The transform resizes boxes with their images: they lie in the coordinates of `image_size`, the
    `(H, W)` of the batch that enters the backbone.
    """

    boxes: Sequence[Tensor] | None = None
    image_size: tuple[int, int] = (0, 0)

    def __call__(self, transform: nn.Module, args: Any, output: Any) -> None:
        images, targets = output
        self.image_size = tuple(images.tensors.shape[-2:])
        self.boxes = None if targets is None else [target["boxes"] for target in targets]


class FineGrainedImitation(Baseline):
    """`1 / (2 N_p) sum_ij I_ij sum_c (a(S) - T)_cij^2` with `N_p = sum_ij I_ij`.

    Wang et al. (CVPR 2019), sections 3.1 (:func:`imitation_mask`) and 3.2. The mask needs the
    ground truth: call `loss.watch(student)` once, or set `loss.seen.boxes` (an image's are `(G, 4)`
    as x1, y1, x2, y2) and `loss.seen.image_size` before each step, which uses the boxes up.

    `anchor_sizes` by level in pixels of `image_size`, `aspect_ratios` height / width, at each of
    these the sizes; centres at multiples of the stride, as torchvision's. Paper: mask, `psi = 0.5`,
    a convolution `a` at any channel counts. Chosen: 3x3 without a ReLU behind it; `N_p` over the
    batch; a level's largest IoU is among its own anchors; no box, no loss.
    """

    name = "fgfi"
    adapter = staticmethod(partial(Conv2d, kernel_size=3))

    def __init__(
        self,
        student_channels: Channels,
        teacher_channels: Channels,
        *,
        weight: float,
        anchor_sizes: Mapping[str, Sequence[float]],
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        psi: float = 0.5,
    ) -> None:
        super().__init__(student_channels, teacher_channels, weight=weight)
        self.psi = psi
        self.anchors = {
            level: AnchorGenerator((tuple(anchor_sizes[level]),), (tuple(aspect_ratios),))
            for level in self.channels
        }
        self.seen = SeenBoxes()

    def watch(self, student: nn.Module) -> RemovableHandle:
        """Takes each step's boxes from the student, a detector of torchvision's."""
        return student.transform.register_forward_hook(self.seen)

    def forward(self, student_features: Features, teacher_features: Features) -> dict[str, Tensor]:
        if self.seen.boxes is None:
            raise RuntimeError("`seen.boxes` must be set before each step, got none: see `watch`.")
        losses = super().forward(student_features, teacher_features)
        self.seen.boxes = None
        return losses

    def distance(self, level: str, student: Tensor, teacher: Tensor) -> Tensor:
        grid = student.shape[-2:]
        stride = [whole // part for whole, part in zip(self.seen.image_size, grid, strict=True)]
        generator = self.anchors[level]
        generator.set_cell_anchors(torch.float32, student.device)
        (flat,) = generator.grid_anchors([grid], [stride])
        anchors = flat.view(*grid, -1, 4)
        mask = torch.stack([imitation_mask(anchors, boxes, self.psi) for boxes in self.seen.boxes])
        square = (student - teacher).square().sum(1)
        if mask.shape != square.shape:
            raise ValueError(f"`seen.boxes` must be of {len(square)} images, got {len(mask)}.")
        return (square * mask).sum() / (2 * mask.sum().clamp(min=1))


def imitation_mask(anchors: Tensor, boxes: Tensor, psi: float) -> Tensor:
    """Positions `(H, W)` with an anchor whose IoU with a box is over `psi` times the box's largest.

    `anchors (H, W, K, 4)`, `boxes (G, 4)`.
    """
    iou = box_iou(boxes, anchors.flatten(0, 2))
    near = iou > psi * iou.amax(1, keepdim=True)
    return near.any(0).view(anchors.shape[:3]).any(2)


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
    block's index (0 in `examples/detectors.py`), is the sum that enters the ReLU. The network
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


class ChannelWiseDistillation(Baseline):
    """`tau^2 / C_T sum_c KL(softmax_HW(T_c / tau) || softmax_HW(S_c / tau))`: CWD.

    Shu et al. (ICCV 2021), section 3.2. Paper: all of it, the 1x1 convolution only where channel
    counts differ included; `temperature` is tau, 4 in the released code.
    """

    name = "cwd"
    adapter = staticmethod(regressor_where_needed)

    def __init__(
        self,
        student_channels: Channels,
        teacher_channels: Channels,
        *,
        weight: float,
        temperature: float = 4.0,
    ) -> None:
        super().__init__(student_channels, teacher_channels, weight=weight)
        self.temperature = temperature

    def distance(self, level: str, student: Tensor, teacher: Tensor) -> Tensor:
        tau = self.temperature
        ours, theirs = (F.log_softmax(x.flatten(2) / tau, 2) for x in (student, teacher))
        divergence = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(2)
        return tau**2 * divergence.mean()


class PearsonDistillation(Baseline):
    """`1/2 mean (n(S) - n(T))^2 = 1 - mean_c r_c`, r Pearson's correlation by channel: PKD.

    Cao et al. (NeurIPS 2022), section 3: `n` gives each channel the mean 0 and the standard
    deviation 1 over batch and positions. Paper: equal channel counts without an adapter. Chosen: a
    1x1 convolution where they differ; 1e-8 is added to the variance (the released code adds 1e-6 to
    the standard deviation), so that a constant channel becomes 0.
    """

    name = "pkd"
    adapter = staticmethod(regressor_where_needed)

    def distance(self, level: str, student: Tensor, teacher: Tensor) -> Tensor:
        ours, theirs = (
            F.batch_norm(x, None, None, training=True, eps=1e-8) for x in (student, teacher)
        )
        return F.mse_loss(ours, theirs) / 2
