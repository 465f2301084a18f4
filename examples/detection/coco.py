"""A folder of images with COCO annotations, checked as a whole before any training."""

from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from examples.detection.coco_check import (
    Entry,
    check_annotations,
    check_categories,
    check_images,
    has_area,
    is_object,
    read_file,
    share_inside,
)
from examples.detection.content import Content, seen
from examples.detection.findings import DataError, Findings
from examples.detection.pictures import Picture, Size, check_pictures, read_picture

# Of a box's area in its picture. Some data sets guess what goes on behind the edge.
LEAST_INSIDE = 0.5
NEARLY_INSIDE = 0.95


class CocoFolder(Dataset[tuple[torch.Tensor, dict[str, Any]]]):
    """Images and targets of a COCO annotation file; `classes` and labels count from the background.

    `notes` says what was left out or changed: boxes of no area, and crowds, which are no single
    objects; images without a box are kept as background. All that is wrong with the file or its
    pictures is one :class:`DataError`; for that every picture is decoded once.
    """

    def __init__(self, images: Path, annotations: Path) -> None:
        checked = read_annotations(images, annotations)
        order = sorted(checked.images)
        self.folder = images
        self.files = [checked.images[i]["file_name"] for i in order]
        self.sizes = [size_of(checked.images[i]) for i in order]
        self.classes = ("background", *(name for _, name in sorted(checked.categories.items())))
        labels = {category: i for i, category in enumerate(sorted(checked.categories), 1)}
        objects: dict[Any, list[Entry]] = {image: [] for image in order}
        for annotation in filter(is_object, checked.annotations):
            objects[annotation["image_id"]].append(annotation)
        found = [annotation for each in objects.values() for annotation in each]
        # Few tensors rather than many lists, so that other processes are sent them soon.
        self.boxes = torch.tensor([each["bbox"] for each in found], dtype=torch.float32)
        self.labels = torch.tensor([labels[each["category_id"]] for each in found])
        self.starts = [0, *accumulate(map(len, objects.values()))]
        self.notes = [f"{annotations}: {note}" for note in notes_of(checked, objects)]

    def __len__(self) -> int:
        return len(self.files)

    def content(self) -> Content:
        words = f"{len(self)} pictures, {len(self.boxes)} boxes"
        tensors = (each.numpy().tobytes() for each in (self.boxes, self.labels))
        return seen(words, self.files, self.sizes, self.starts, *tensors)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, Any]]:
        image = F.to_image(read_picture(self.folder / self.files[index], self.sizes[index]))
        part = slice(self.starts[index], self.starts[index + 1])
        xywh = tv_tensors.BoundingBoxes(
            self.boxes[part], format="XYWH", canvas_size=tuple(image.shape[-2:])
        )
        target = {
            "boxes": F.convert_bounding_box_format(xywh, new_format="XYXY"),
            "labels": self.labels[part],
        }
        return image, target


@dataclass
class Checked:
    """A COCO file in which nothing is wrong, and its pictures, by their ids.

    `reaching` counts the boxes that go on behind the edge of their picture.
    """

    images: dict[Any, Entry]
    pictures: dict[Any, Picture]
    annotations: list[Entry]
    categories: dict[Any, str]
    reaching: int


def read_annotations(images: Path, annotations: Path) -> Checked:
    """The content of the annotation file, or a :class:`DataError` that says what to mend."""
    if not images.is_dir():
        raise DataError(f"`--images` must be a folder, got {images}")
    content = read_file(annotations)
    findings = Findings(annotations)
    categories = check_categories(content, findings)
    present = check_images(images, content, findings)
    usable = check_annotations(content, categories, findings)
    files = [images / image["file_name"] for image in present.values()]
    seen = check_pictures(files, list(map(size_of, present.values())))
    pictures = dict(zip(present, seen, strict=True))
    for identity, picture in pictures.items():
        if picture.problem:
            where = f"image {identity!r} ({present[identity]['file_name']})"
            findings.add(where, picture.problem, picture.found)
    reaching = 0
    for where, annotation in filter(lambda each: has_area(each[1]), usable):
        size = pictures.get(annotation["image_id"], Picture()).size
        share = 1.0 if size is None else share_inside(annotation["bbox"], size)
        reaching += share < NEARLY_INSIDE
        if share < LEAST_INSIDE:
            rule = "`bbox`, in pixels of left, top, width and height, must lie in its picture"
            findings.add(where, rule, f"{annotation['bbox']} in {size[0]} x {size[1]}")
    findings.say()
    if not any(is_object(annotation) for _, annotation in usable):
        raise DataError(f"{annotations} must hold at least one box with an area, got none")
    kept = [annotation for _, annotation in usable]
    return Checked(present, pictures, kept, categories, reaching)


def size_of(image: Entry) -> Size | None:
    return (image["width"], image["height"]) if "width" in image else None


def notes_of(checked: Checked, objects: dict[Any, list[Entry]]) -> list[str]:
    known = checked.annotations
    pictures = checked.pictures.values()
    counts = {
        "boxes of no area left out": sum(not has_area(each) for each in known),
        "crowds left out": sum(bool(each.get("iscrowd")) and has_area(each) for each in known),
        "boxes kept that reach over the edge of their picture": checked.reaching,
        "images without a box kept as background": sum(not each for each in objects.values()),
        "images turned upright by their EXIF tag, as their boxes are": sum(
            picture.turned for picture in pictures
        ),
        "images of 16 bits scaled to 8": sum(picture.deep for picture in pictures),
    }
    return [f"{count} {text}" for text, count in counts.items() if count]
