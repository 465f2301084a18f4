"""Fine-grained feature imitation: Wang et al. (CVPR 2019)."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import box_iou

from benchmarks.study.methods.baseline import Baseline, Channels, Features
from featkd.losses._adapters import Conv2d


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
        anchors = anchors_of(self.anchors[level], grid, stride, student.device)
        mask = torch.stack([imitation_mask(anchors, boxes, self.psi) for boxes in self.seen.boxes])
        square = (student - teacher).square().sum(1)
        if mask.shape != square.shape:
            raise ValueError(f"`seen.boxes` must be of {len(square)} images, got {len(mask)}.")
        return (square * mask).sum() / (2 * mask.sum().clamp(min=1))


def anchors_of(
    generator: AnchorGenerator, grid: Sequence[int], stride: Sequence[int], device: torch.device
) -> Tensor:
    """`(H, W, K, 4)`: the K anchors of each position of an H x W `grid`."""
    generator.set_cell_anchors(torch.float32, device)
    (flat,) = generator.grid_anchors([grid], [stride])
    return flat.view(*grid, -1, 4)


def imitation_mask(anchors: Tensor, boxes: Tensor, psi: float) -> Tensor:
    """Positions `(H, W)` with an anchor whose IoU with a box is over `psi` times the box's largest.

    `anchors (H, W, K, 4)`, `boxes (G, 4)`.
    """
    iou = box_iou(boxes, anchors.flatten(0, 2))
    near = iou > psi * iou.amax(1, keepdim=True)
    return near.any(0).view(anchors.shape[:3]).any(2)


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
