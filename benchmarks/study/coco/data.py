"""COCO's pictures and objects, and their mirror images."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as rle
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.datasets import CocoDetection
from torchvision.ops import box_convert
from torchvision.transforms.v2 import functional as F

from examples.detection.coco import is_object, size_of
from examples.detection.pictures import read_picture

TRAIN, HELD_OUT = "train2017", "val2017"


class CocoSplit(Dataset[tuple[Tensor, dict[str, Any]]]):
    """Labels are the file's category ids, as torchvision's released weights count them."""

    def __init__(self, folder: Path, split: str, masks: bool = False) -> None:
        self.annotations = folder / "annotations" / f"instances_{split}.json"
        self.folder = folder / split
        self.files = CocoDetection(self.folder, self.annotations)
        self.classes = max(self.files.coco.getCatIds()) + 1
        self.masks = masks

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        listed = self.files.coco
        entry = listed.imgs[self.files.ids[index]]
        image = F.to_image(read_picture(self.folder / entry["file_name"], size_of(entry)))
        objects = [each for each in listed.imgToAnns[entry["id"]] if is_object(each)]
        boxes = torch.tensor([each["bbox"] for each in objects]).reshape(-1, 4)
        size = tuple(image.shape[-2:])
        target = {
            "image_id": torch.tensor(self.files.ids[index]),
            "boxes": tv_tensors.BoundingBoxes(
                box_convert(boxes.float(), "xywh", "xyxy"), format="XYXY", canvas_size=size
            ),
            "labels": torch.tensor([each["category_id"] for each in objects]).long(),
        }
        if self.masks:
            shapes = [rle.decode(self.files.coco.annToRLE(each)) for each in objects]
            stacked = np.stack(shapes) if shapes else np.zeros((0, *size), np.uint8)
            target["masks"] = tv_tensors.Mask(torch.from_numpy(stacked))
        return image, target

    def with_objects(self) -> list[int]:
        found = self.files.coco.imgToAnns
        return [i for i, name in enumerate(self.files.ids) if any(map(is_object, found[name]))]


coco_split = cache(CocoSplit)


class WithMirrorImages(Dataset[tuple[Tensor, dict[str, Any]]]):
    """`data` and then the same mirrored, so that a flip is a matter of the index alone."""

    def __init__(self, data: Dataset[Any]) -> None:
        self.data = data

    def __len__(self) -> int:
        return 2 * len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        mirrored, place = divmod(index, len(self.data))
        image, target = self.data[place]
        if not mirrored:
            return image, target
        visual = {k: F.horizontal_flip(v) for k, v in target.items() if k in ("boxes", "masks")}
        return F.horizontal_flip(image), target | visual
