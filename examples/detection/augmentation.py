"""What is changed at random in the pictures of a step."""

from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from examples.detection.processes import world

Batch = tuple[list[Tensor], list[dict[str, Any]]]
Target = dict[str, Any]
# What is left free beside a smaller picture: ImageNet's mean, which most models make 0.
GROUND = [0.485, 0.456, 0.406]
LEAST_SIDE = 1.0  # pixels, of what a box still shows


def drawn(seed: int, step: int, batch_size: int) -> Tensor:
    """Four numbers in [0, 1) for each of this rank's images.

    They depend on seed, step and place in the batch of all ranks alone, so that a resumed run's are
    those of an unbroken one.
    """
    rank, ranks = world()
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    flips = torch.rand(batch_size, 1, generator=generator)
    return torch.cat([flips, torch.rand(batch_size, 3, generator=generator)], 1)[rank::ranks]


def augmented(
    batch: Batch, draws: Tensor, flip: float, scale_jitter: tuple[float, float] | None
) -> Batch:
    """`flip` of the images mirrored, all of them scaled by a factor of that range, with boxes."""
    pairs = list(zip(*batch, strict=True))
    for i, (mirror, factor, *place) in enumerate(draws.tolist()):
        if scale_jitter is not None:
            low, high = scale_jitter
            pairs[i] = rescaled(*pairs[i], low + (high - low) * factor, place)
        if mirror < flip:
            pairs[i] = flipped(*pairs[i])
    images, targets = zip(*pairs, strict=True)
    return list(images), list(targets)


def flipped(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Left for right."""
    width, boxes = image.shape[-1], target["boxes"].clone()
    boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
    return image.flip(-1), {**target, "boxes": boxes}


def rescaled(
    image: Tensor, target: Target, factor: float, place: list[float]
) -> tuple[Tensor, Target]:
    """Large-scale jitter: objects `factor` times as large, in a picture of the same shape.

    Under 1 the picture shrinks into the upper left corner. Over 1 a part of `1 / factor` of its
    sides is cut out, at `place` of what there is to choose; the model makes it as large as any
    picture. Boxes of which less than a pixel is left are dropped.
    """
    height, width = image.shape[-2:]
    boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=(height, width))
    if factor < 1:
        size = [max(1, round(side * factor)) for side in (height, width)]
        free = [0, 0, width - size[1], height - size[0]]
        image = F.pad(F.resize(image, size, antialias=True), free, fill=GROUND)
        boxes = F.resize(boxes, size)
    else:
        size = [max(1, round(side / factor)) for side in (height, width)]
        choices = (height - size[0] + 1, width - size[1] + 1)
        corner = [int(x * choice) for x, choice in zip(place, choices, strict=True)]
        image, boxes = (F.crop(each, *corner, *size) for each in (image, boxes))
    boxes = boxes.as_subclass(Tensor)
    kept = (boxes[:, 2:] - boxes[:, :2] >= LEAST_SIDE).all(1)
    return image, {**target, "boxes": boxes[kept], "labels": target["labels"][kept]}
