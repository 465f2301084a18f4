"""What is changed at random in the pictures of a step."""

import torch
from torch import Tensor

from examples.detection.processes import world

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]


def flipped(batch: Batch, share: float, seed: int, step: int, batch_size: int) -> Batch:
    """This rank's images, `share` of them mirrored left for right, with their boxes.

    Which ones depends on seed, step and place in the batch of all ranks alone, so that a resumed
    run's are those of an unbroken one.
    """
    images, targets = [], []
    rank, ranks = world()
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    draws = torch.rand(batch_size, generator=generator)[rank::ranks].tolist()
    for image, target, draw in zip(*batch, draws, strict=True):
        if draw < share:
            width, boxes = image.shape[-1], target["boxes"].clone()
            boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
            image, target = image.flip(-1), {**target, "boxes": boxes}
        images.append(image)
        targets.append(target)
    return images, targets
