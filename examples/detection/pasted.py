"""Photographs pasted on photographs: scene `i` is a pure function of the pictures and `(seed, i)`.

A folder holds `cutouts/KIND/`, whose pictures have transparent parts and are of one class,
`distractors/`, such pictures of no class, so that a seam tells nothing, and `backgrounds/`.
`python -m examples.detection.fetch_pasted DIR` makes one.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors

from examples.detection.content import Content, seen
from examples.detection.findings import DataError, Findings
from examples.detection.pictures import by, check_pictures, read_picture

SIZE = 320
TARGETS, DISTRACTORS = (1, 4), (2, 5)
SIDES = (14, 60)  # the longer side of what is pasted, log-uniformly
TURN = 20.0  # degrees
PLACEMENTS = 20  # tries before a picture is given up for want of room
PARTS = ("cutouts", "distractors", "backgrounds")
LEAST_OPAQUE = 64  # of 255; it is 1 in masks of 0 and 1, and rounding makes nothing of that
ENDINGS = {".png", ".jpg", ".jpeg", ".webp"}
# Of a picture, twice what a scene shows is kept.
CUTOUT_SIDE, BACKGROUND_SIDE = 2 * SIDES[1], 2 * SIZE
Box = tuple[int, int, int, int]


@dataclass
class Pictures:
    """By class their cut-outs, then those of no class, then the backgrounds."""

    kinds: list[str]
    groups: list[list[Path]]


class Pasted(Dataset[tuple[torch.Tensor, dict[str, Any]]]):
    """`length` scenes of `seed` from the pictures of `part`, `"train"` or `"test"`.

    An item is a uint8 image `(3, 320, 320)` and its target, as of :class:`Scenes`.
    """

    def __init__(self, pictures: Pictures, part: str, seed: int, length: int) -> None:
        chosen = [of_part(group, part) for group in pictures.groups]
        self.names = [[file.name for file in group] for group in chosen]
        *cutouts, distractors, backgrounds = chosen
        self.classes = ("background", *pictures.kinds)
        # By label; of label 0 are the distractors.
        self.cutouts = [list(map(cutout, group)) for group in (distractors, *cutouts)]
        self.backgrounds = list(map(background, backgrounds))
        self.seed = seed
        self.length = length

    def __len__(self) -> int:
        return self.length

    def content(self) -> Content:
        return seen(f"{sum(map(len, self.names))} pictures", self.names)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, Any]]:
        if not 0 <= index < self.length:
            raise IndexError(f"`index` must be in 0..{self.length - 1}, got {index}")
        image, boxes, labels = self.compose(np.random.default_rng((self.seed, index)))
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(SIZE, SIZE)),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "image_id": torch.tensor(index),
        }
        return tv_tensors.Image(torch.from_numpy(np.array(image)).permute(2, 0, 1)), target

    def compose(self, rng: np.random.Generator) -> tuple[Image.Image, list[Box], list[int]]:
        """The targets find room first; nothing overlaps, so that the order is not to be seen."""
        canvas = cropped(rng, self.backgrounds[rng.integers(len(self.backgrounds))])
        targets = rng.integers(*TARGETS, endpoint=True)
        wanted = [*rng.integers(1, len(self.cutouts), targets)]
        wanted += [0] * rng.integers(*DISTRACTORS, endpoint=True)
        taken: list[Box] = []
        boxes, labels = [], []
        for label in wanted:
            group = self.cutouts[label]
            piece = varied(rng, group[rng.integers(len(group))])
            if (place := free_place(rng, piece.size, taken)) is None:
                continue
            taken.append(place)
            canvas.paste(piece, place, piece)
            if label:
                left, top, right, bottom = extent(piece)
                x, y, *_ = place
                boxes.append((x + left, y + top, x + right, y + bottom))
                labels.append(int(label))
        return canvas, boxes, labels


def extent(picture: Image.Image) -> Box:
    """Of the pixels that are at least half as opaque as the most opaque one."""
    alpha = picture.getchannel("A")
    least = max(1, alpha.getextrema()[1] / 2)
    # Specks may be lost as a picture is made smaller: of nothing it is all.
    return alpha.point(lambda value: 255 * (value >= least)).getbbox() or (0, 0, *picture.size)


def varied(rng: np.random.Generator, picture: Image.Image) -> Image.Image:
    """Mirrored or not, turned a little, and of another size."""
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    turned = picture.rotate(rng.uniform(-TURN, TURN), Image.Resampling.BICUBIC, expand=True)
    turned = turned.crop(extent(turned))
    side = math.exp(rng.uniform(*np.log(SIDES)))
    width, height = (max(1, round(each * side / max(turned.size))) for each in turned.size)
    return turned.resize((width, height), Image.Resampling.BICUBIC)


def free_place(rng: np.random.Generator, size: tuple[int, int], taken: Sequence[Box]) -> Box | None:
    width, height = size
    for _ in range(PLACEMENTS):
        x, y = (int(rng.integers(SIZE - each + 1)) for each in size)
        place = (x, y, x + width, y + height)
        if all(
            place[0] >= right or place[2] <= left or place[1] >= bottom or place[3] <= top
            for left, top, right, bottom in taken
        ):
            return place
    return None


def cropped(rng: np.random.Generator, picture: Image.Image) -> Image.Image:
    """A square part, mirrored or not."""
    side = rng.integers(SIZE, min(picture.size), endpoint=True)
    x, y = (int(rng.integers(each - side + 1)) for each in picture.size)
    part = picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR, (x, y, x + side, y + side))
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else part


def cutout(file: Path) -> Image.Image:
    """What is to be seen of it, no larger than it will be wanted."""
    with Image.open(file) as picture:
        shown = picture.convert("RGBA")
    shown = shown.crop(extent(shown))
    shown.thumbnail((CUTOUT_SIDE, CUTOUT_SIDE))
    return shown


def background(file: Path) -> Image.Image:
    picture = read_picture(file, None)
    factor = max(1.0, min(picture.size) / BACKGROUND_SIDE)
    width, height = (round(each / factor) for each in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def of_part(files: Sequence[Path], part: str) -> list[Path]:
    """A quarter of the names is the test's; `lion.png` and `lion-2.png` are on one side."""
    names = sorted(
        {name_of(file) for file in files}, key=lambda name: sha256(name.encode()).digest()
    )
    test = names[: math.ceil(len(names) / 4)]
    return [file for file in files if (name_of(file) in test) == (part == "test")]


def name_of(file: Path) -> str:
    """Its first word, or else all of it."""
    word = re.search("[a-z]+", file.stem.lower())
    return word[0] if word else file.stem


def read_folder(folder: Path) -> Pictures:
    """All that is wrong with it is one :class:`DataError`; every picture is decoded for that."""
    if missing := [name for name in PARTS if not (folder / name).is_dir()]:
        raise DataError(
            f"`--pasted` must be a folder that holds {', '.join(PARTS)}, got no {missing[0]} in "
            f"{folder}: python -m examples.detection.fetch_pasted makes one"
        )
    kinds = sorted(each.name for each in (folder / PARTS[0]).iterdir() if each.is_dir())
    places = [*(f"{PARTS[0]}/{kind}" for kind in kinds), *PARTS[1:]]
    groups = [
        sorted(file for file in (folder / place).rglob("*") if file.suffix.lower() in ENDINGS)
        for place in places
    ]
    findings = Findings(folder)
    if not kinds:
        findings.add(PARTS[0], "must hold a folder for each class")
    for place, group in zip(places, groups, strict=True):
        if (names := len({*map(name_of, group)})) < 2:
            rule = "must hold pictures whose names begin with two words or more, to be split"
            findings.add(place, rule, str(names))
    files = [file for group in groups for file in group]
    for file, checked in zip(files, check_pictures(files, [None] * len(files)), strict=True):
        where = str(file.relative_to(folder))
        if checked.size is None:
            findings.add(where, checked.problem, checked.found)
        elif file in groups[-1]:
            if min(checked.size) < SIZE:
                findings.add(where, f"must be {SIZE} pixels wide and high", by(checked.size))
        elif problem := transparency(file):
            findings.add(where, "must have transparent parts and others", problem)
    findings.say()
    return Pictures(kinds, groups)


def transparency(file: Path) -> str:
    """What is wrong with that of a cut-out, if anything."""
    with Image.open(file) as picture:
        least, most = picture.convert("RGBA").getchannel("A").getextrema()
    others = f"others {most} of 255 opaque at most" if most < LEAST_OPAQUE else ""
    return "none" if least == 255 else "nothing else" if most == 0 else others
