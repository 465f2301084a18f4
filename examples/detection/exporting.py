"""The student as a program of `torch.export`, checked against the student itself."""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.ops import boxes as box_ops

from examples.detection.batches import collate
from examples.detection.checkpoints import replacing

LOOKED_AT = 16  # held-out images among which one of the first one's size checks the program


def export(student: nn.Module, held_out: Dataset[Any], file: Path) -> str:
    """Writes `file` for images of the first held-out one's size, or says why there is none."""
    images, _ = collate([held_out[i] for i in range(min(LOOKED_AT, len(held_out)))])
    alike = [image for image in images if image.shape == images[0].shape]
    model = copy.deepcopy(student).cpu().eval()
    try:
        with quiet(), mock.patch.object(box_ops, "batched_nms", suppressed):
            program = torch.export.export(model, ([alike[0]],), strict=False)
        difference = next(filter(None, differences(model, program.module(), alike)), None)
    # Whatever torch.export meets in a detector.
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]:.200}"
        return f"no {file.name}: torch.export does not take this detector ({reason})"
    if difference:
        return f"no {file.name}: the exported program finds other boxes ({difference})"
    with replacing(file) as whole:
        torch.export.save(program, whole)
    size = " x ".join(map(str, alike[0].shape))
    return f"{file}: takes a list of one float image {size}; same boxes on {len(alike)} images"


@contextmanager
def quiet() -> Iterator[None]:
    """torch.export logs the graph that it gives up."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def suppressed(boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float) -> Tensor:
    """torchvision's batched_nms for any number of boxes; its own asks how many, and none exports.

    Classes are moved apart, so that their boxes do not overlap.
    """
    reach = torch.cat([boxes.flatten(), boxes.new_zeros(1)]).max() + 1
    return box_ops.nms(boxes + (classes.to(boxes) * reach)[:, None], scores, threshold)


@torch.no_grad()
def differences(model: nn.Module, program: nn.Module, images: list[Tensor]) -> Iterator[str]:
    """What each image's results differ in: equal scores may come in another order."""
    for image in images:
        (ours,), (theirs,) = model([image]), program([image])
        yield difference(ours, theirs, 1e-3 * max(image.shape))


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor], pixels: float) -> str:
    if len(ours["boxes"]) != len(theirs["boxes"]):
        return f"{len(theirs['boxes'])} for {len(ours['boxes'])}"
    apart = (ours["boxes"][:, None] - theirs["boxes"]).abs().amax(2) > pixels
    apart |= (ours["scores"][:, None] - theirs["scores"]).abs() > 1e-3
    apart |= ours["labels"][:, None] != theirs["labels"]
    alone = int(apart.all(1).sum())
    return f"{alone} of {len(apart)} have none like them" if alone else ""
