"""A folder of images with COCO annotations, checked before any training."""

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.datasets import CocoDetection
from torchvision.transforms.v2 import functional as F


class CocoError(ValueError):
    """What is wrong with the data, in words for the person who started the job."""


class CocoFolder(Dataset[tuple[torch.Tensor, dict[str, Any]]]):
    """Images and targets of a COCO annotation file; `classes` and labels count from the background.

    `notes` says what was left out: boxes of no area, and crowds, which are no single objects;
    images without a box are kept as background.
    """

    def __init__(self, images: Path, annotations: Path) -> None:
        content = read_annotations(images, annotations)
        self.files = CocoDetection(images, annotations)
        categories = sorted(content["categories"], key=lambda category: category["id"])
        self.classes = ("background", *(category["name"] for category in categories))
        self.labels = {category["id"]: i for i, category in enumerate(categories, 1)}
        flat = sum(not has_area(annotation) for annotation in content["annotations"])
        crowds = sum(bool(a.get("iscrowd")) and has_area(a) for a in content["annotations"])
        boxed = {a["image_id"] for a in content["annotations"] if is_object(a)}
        empty = sum(image["id"] not in boxed for image in content["images"])
        self.notes = []
        if flat:
            self.notes.append(f"{annotations}: {flat} boxes of no area left out")
        if crowds:
            self.notes.append(f"{annotations}: {crowds} crowds left out")
        if empty:
            self.notes.append(f"{annotations}: {empty} images without a box kept as background")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, Any]]:
        picture, annotations = self.files[index]
        image = F.to_image(picture.convert("RGB"))
        kept = [annotation for annotation in annotations if is_object(annotation)]
        boxes = torch.tensor([annotation["bbox"] for annotation in kept], dtype=torch.float32)
        xywh = tv_tensors.BoundingBoxes(
            boxes.reshape(-1, 4), format="XYWH", canvas_size=tuple(image.shape[-2:])
        )
        target = {
            "boxes": F.convert_bounding_box_format(xywh, new_format="XYXY"),
            "labels": torch.tensor([self.labels[a["category_id"]] for a in kept]).long(),
        }
        return image, target


def has_area(annotation: dict[str, Any]) -> bool:
    _, _, width, height = annotation["bbox"]
    return bool(width > 0 and height > 0)


def is_object(annotation: dict[str, Any]) -> bool:
    return has_area(annotation) and not annotation.get("iscrowd")


def is_image(file: Path) -> bool:
    """Whether the header can be read; the pixels are not decoded."""
    try:
        with Image.open(file):
            return True
    except OSError:
        return False


def read_annotations(images: Path, annotations: Path) -> dict[str, Any]:
    """The content of the annotation file, or a :class:`CocoError` that says what to mend."""
    if not images.is_dir():
        raise CocoError(f"`--images` must be a folder, got {images}")
    if not annotations.is_file():
        raise CocoError(f"`--annotations` must be a file, got {annotations}")
    try:
        content: dict[str, Any] = json.loads(annotations.read_text())
        names = {image["id"]: image["file_name"] for image in content["images"]}
        categories = {category["id"] for category in content["categories"]}
        used = [
            (a["image_id"], a["category_id"], len([float(number) for number in a["bbox"]]))
            for a in content["annotations"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise CocoError(f"{annotations} must be a COCO detection file: {error!r:.200}") from error
    missing = [name for name in names.values() if not (images / name).is_file()]
    if missing:
        some = ", ".join(missing[:3])
        raise CocoError(f"{len(missing)} images of {annotations} are not in {images}: {some} ...")
    broken = [name for name in names.values() if not is_image(images / name)]
    if broken:
        some = ", ".join(broken[:3])
        raise CocoError(f"{len(broken)} files of {annotations} are no images: {some} ...")
    if any(image not in names for image, _, _ in used):
        raise CocoError(f"{annotations} has annotations of images that it does not list")
    if any(category not in categories or length != 4 for _, category, length in used):
        raise CocoError(f"{annotations} has boxes of unknown categories or not of four numbers")
    if not any(is_object(annotation) for annotation in content["annotations"]):
        raise CocoError(f"{annotations} must hold at least one box with an area, got none")
    return content
