"""A teacher's features of pictures that are never augmented: computed once for all runs."""

import fcntl
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import featkd
from examples.detection.batches import collate
from examples.detection.checkpoints import write_atomically

Remember = Callable[[nn.Module, Mapping[str, str]], dict[str, Tensor]]


class RememberedTeacher(nn.Module):
    """`features` by level, `(images, C, H, W)`; a level is a module whose output can be tapped."""

    def __init__(self, features: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.features = features
        self.levels = nn.ModuleDict({level: nn.Identity() for level in features})

    def forward(self, indices: Tensor) -> None:
        for level, each in self.features.items():
            self.levels[level](each[indices.cpu()].to(indices.device))


def recall(
    teacher: RememberedTeacher, images: list[Tensor], targets: list[dict[str, Tensor]]
) -> None:
    teacher(torch.stack([target["image_id"] for target in targets]))


@torch.no_grad()
def remembered(
    teacher: nn.Module,
    paths: Mapping[str, str],
    *,
    data: Dataset[Any],
    seed: int | None,
    folder: Path,
    name: str,
) -> dict[str, Tensor]:
    """The features at `paths` by level, in bfloat16, from a file of `folder` that is made once.

    `name` says of which teacher, and `seed` of which `data`, if they depend on one.
    """
    mark = sha256(repr((name, seed, len(data), sorted(paths.items()))).encode()).hexdigest()
    file = folder / f"features-{mark[:12]}.pt"
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            write_atomically(file, computed(teacher.eval(), paths, data))
    return torch.load(file, mmap=True, weights_only=True)


def computed(teacher: nn.Module, paths: Mapping[str, str], data: Dataset[Any]) -> dict[str, Tensor]:
    device = next(teacher.parameters()).device
    found: dict[str, list[Tensor]] = {level: [] for level in paths}
    with featkd.FeatureTap(teacher, paths) as tap:
        for images, _ in DataLoader(data, batch_size=16, collate_fn=collate):
            with torch.autocast(device.type, torch.bfloat16):
                inside, _ = teacher.transform([image.to(device) for image in images])
                teacher.backbone(inside.tensors)
            for level, features in tap.pop().items():
                found[level].append(features.to(torch.bfloat16).cpu())
    return {level: torch.cat(batches) for level, batches in found.items()}
