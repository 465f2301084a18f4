"""Which images make the batch of a step, and how they become one."""

from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from examples.detection.processes import world


def batch_indices(
    length: int, batch_size: int, seed: int, first: int, last: int
) -> list[list[int]]:
    """This rank's images at steps `first` to `last`; all ranks' together depend on seed and step.

    Steps run over the ends of epochs, so that no batch is short. Where the batch size is no
    multiple of the ranks, the first ranks have an image more: see `training.backward`.
    """
    rank, ranks = world()
    orders: dict[int, list[int]] = {}

    def image(position: int) -> int:
        epoch, place = divmod(position, length)
        if epoch not in orders:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            orders[epoch] = torch.randperm(length, generator=generator).tolist()
        return orders[epoch][place]

    starts = range(first * batch_size, last * batch_size, batch_size)
    return [[image(start + i) for i in range(rank, batch_size, ranks)] for start in starts]


def collate(
    samples: list[tuple[Tensor, dict[str, Any]]],
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    images = [
        F.to_dtype(image, torch.float32, scale=True).as_subclass(Tensor) for image, _ in samples
    ]
    return images, [{k: v.as_subclass(Tensor) for k, v in target.items()} for _, target in samples]


def to_device(batch: tuple[list[Tensor], list[dict[str, Tensor]]], device: torch.device) -> Any:
    images, targets = batch
    moved = [{k: v.to(device) for k, v in target.items()} for target in targets]
    return [image.to(device) for image in images], moved
