"""A folder of images with COCO annotations, checked as a whole before any training."""

from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from examples.detection.coco_check import (
    Entry,
    area_of,
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

    `notes` says what was left out or changed: boxes of no area are; images without a box are kept
    as background. Crowds are no single objects: a target has them as `crowds`, and what is found
    there counts neither for nor against. All that is wrong with the file or its pictures is one
    :class:`DataError`; for that every picture is decoded once.
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
        crowds: dict[Any, list[Entry]] = {image: [] for image in order}
        for annotation in filter(has_area, checked.annotations):
            of_kind = objects if is_object(annotation) else crowds
            of_kind[annotation["image_id"]].append(annotation)
        self.objects, self.crowds = Boxes(objects, labels), Boxes(crowds, labels)
        self.notes = [f"{annotations}: {note}" for note in notes_of(checked, objects)]

    def __len__(self) -> int:
        return len(self.files)

    def content(self) -> Content:
        words = f"{len(self)} pictures, {len(self.objects.boxes)} boxes"
        parts = (*self.objects.content(), *self.crowds.content())
        return seen(words, self.files, self.sizes, *parts)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, Any]]:
        image = F.to_image(read_picture(self.folder / self.files[index], self.sizes[index]))
        canvas_size = tuple(image.shape[-2:])
        boxes, labels, area = self.objects.of(index, canvas_size)
        crowds, crowd_labels, crowd_area = self.crowds.of(index, canvas_size)
        of_crowds = {"crowds": crowds, "crowd_labels": crowd_labels, "crowd_area": crowd_area}
        return image, {"boxes": boxes, "labels": labels, "area": area, **of_crowds}


class Boxes:
    """The boxes of all images: few tensors, so that other processes are sent them soon."""

    def __init__(self, entries: dict[Any, list[Entry]], labels: dict[Any, int]) -> None:
        found = [annotation for each in entries.values() for annotation in each]
        boxes = [each["bbox"] for each in found]
        self.boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        self.labels = torch.tensor([labels[each["category_id"]] for each in found]).long()
        self.area = torch.tensor(list(map(area_of, found)), dtype=torch.float32)
        self.starts = [0, *accumulate(map(len, entries.values()))]

    def count(self, index: int) -> int:
        return self.starts[index + 1] - self.starts[index]

    def content(self) -> tuple[object, ...]:
        tensors = (self.boxes, self.labels, self.area)
        return self.starts, *(each.numpy().tobytes() for each in tensors)

    def of(self, index: int, canvas_size: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Corners, labels and areas of one image's."""
        part = slice(self.starts[index], self.starts[index + 1])
        xywh = tv_tensors.BoundingBoxes(self.boxes[part], format="XYWH", canvas_size=canvas_size)
        corners = F.convert_bounding_box_format(xywh, new_format="XYXY")
        return corners, self.labels[part], self.area[part]


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
        "crowds: background in training, and not judged": sum(
            bool(each.get("iscrowd")) and has_area(each) for each in known
        ),
        "boxes kept that reach over the edge of their picture": checked.reaching,
        "images without a box kept as background": sum(not each for each in objects.values()),
        "images turned upright by their EXIF tag, as their boxes are": sum(
            picture.turned for picture in pictures
        ),
        "images of 16 bits scaled to 8": sum(picture.deep for picture in pictures),
    }
    names = Counter(checked.categories.values())
    of_one_name = [name for name, count in names.items() if count > 1]
    shared = [f"several categories are called {', '.join(of_one_name)}"] if of_one_name else []
    return shared + [f"{count} {text}" for text, count in counts.items() if count]
