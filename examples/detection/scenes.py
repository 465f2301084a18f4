"""Scenes for a detector, drawn from a seed: image `i` is a pure function of `(seed, i)`.

Four shapes are the classes. Colour, texture, angle and size say nothing of the class. Shapes are
bright or dark on a textured background in between. Strokes, soft blobs, striped patches and rings
are clutter of no class. Shapes overlap, but at least `MIN_VISIBLE` of each stays in sight.

Boxes cover 34 % of the pixels of `DENSE` scenes, and 3.5 % of `SPARSE` ones.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset
from torchvision import tv_tensors

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]
Window = tuple[slice, slice]

CLASSES = ("disc", "square", "triangle", "cross")
MIN_VISIBLE = 0.75
PLACEMENTS = 20  # tries before an object is given up for want of room


@dataclass(frozen=True)
class Kind:
    """How scenes are drawn: pixels a side, and from how many to how many of each thing.

    Radii are drawn log-uniformly, so that small and large objects are equally common.
    """

    size: int
    radii: tuple[float, float]
    objects: tuple[int, int]
    clutter: tuple[int, int]  # strokes and blobs
    patches: tuple[int, int]
    rings: tuple[int, int]
    noise: float


DENSE = Kind(96, (6.0, 30.0), (2, 6), (1, 4), patches=(0, 0), rings=(0, 0), noise=0.02)
SPARSE = Kind(160, (6.0, 14.0), (1, 4), (16, 28), patches=(3, 7), rings=(1, 4), noise=0.05)
SIZE = DENSE.size


def signed_distance(shape: str, u: Array, v: Array) -> Array:
    """Distance of each point to the shape of radius 1 around the origin, negative inside it."""
    radius, extent = np.hypot(u, v), np.maximum(np.abs(u), np.abs(v))
    match shape:
        case "disc":
            return radius - 1
        case "square":
            return extent - 0.85
        case "triangle":
            return np.maximum(np.abs(u) * 0.866 + v * 0.5, -v) - 0.55
        case "cross":
            return np.maximum(extent - 1, np.minimum(np.abs(u), np.abs(v)) - 0.3)
    raise ValueError(f"`shape` must be one of {CLASSES}, got {shape!r}")


def smooth_noise(rng: np.random.Generator, size: int, cells: int) -> Array:
    """`(size, size)` noise in -1..1 that varies over `cells` cells a side."""
    grid = rng.uniform(-1, 1, (cells + 1, cells + 1)).astype(np.float32)
    position = np.linspace(0, cells, size, endpoint=False, dtype=np.float32)
    cell = position.astype(np.intp)
    weight = position - cell
    rows = grid[cell] * (1 - weight[:, None]) + grid[cell + 1] * weight[:, None]
    return rows[:, cell] * (1 - weight) + rows[:, cell + 1] * weight


def background(rng: np.random.Generator, size: int) -> Array:
    """Coloured noise at a coarse and a fine scale, `(size, size, 3)`."""
    tone = rng.uniform(0.35, 0.65) + rng.uniform(-0.06, 0.06, 3)
    canvas = np.tile(tone.astype(np.float32), (size, size, 1))
    for cells, strength in ((4, 0.1), (24, 0.08)):
        canvas += smooth_noise(rng, size, cells)[..., None] * rng.uniform(-strength, strength, 3)
    return canvas


def window(size: int, centre: Array, reach: float) -> Window:
    """The part of a canvas of `size` within `reach` of `centre = (x, y)`."""
    low = np.clip(centre - reach, 0, size).astype(int)
    high = np.clip(centre + reach + 1, 0, size).astype(int)
    return slice(low[1], high[1]), slice(low[0], high[0])


def local_axes(place: Window, centre: Array, angle: float) -> tuple[Array, Array]:
    """Pixel coordinates in a frame at `centre`, turned by `angle`."""
    rows, columns = np.mgrid[place].astype(np.float32)
    x, y = columns - centre[0], rows - centre[1]
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return x * cos + y * sin, y * cos - x * sin


def paint(rng: np.random.Generator, canvas: Array, place: Window, coverage: Array) -> None:
    """Lays a colour with fine, coarse or no visible stripes over the canvas where covered."""
    brightness = rng.choice([0.3, 1.0])
    colour = rng.uniform(0, 1, 3)
    colour *= brightness / max(colour.max(), 0.01)
    tint = rng.uniform(-0.12, 0.12, 3)
    along, _ = local_axes(place, rng.uniform(0, len(canvas), 2), rng.uniform(0, np.pi))
    wave = np.sin(along * np.float32(2 * np.pi / rng.choice([9, 20, 60])))
    texture = (colour + wave[..., None] * tint).astype(np.float32)
    canvas[place] += coverage[..., None] * (texture - canvas[place])


def add_clutter(rng: np.random.Generator, canvas: Array) -> None:
    """Draws one stroke or one soft blob."""
    centre = rng.uniform(0, len(canvas), 2)
    place = window(len(canvas), centre, 30)
    along, across = local_axes(place, centre, rng.uniform(0, np.pi))
    if rng.random() < 0.5:
        length, thickness = rng.uniform(4, 25), rng.uniform(0.5, 1.5)
        beyond = np.maximum(np.abs(along) - length, 0)
        coverage = np.clip(thickness + 0.5 - np.hypot(beyond, across), 0, 1)
    else:
        long, wide = rng.uniform(3, 12, 2)
        coverage = np.exp(-((along / long) ** 2) - (across / wide) ** 2)
    paint(rng, canvas, place, coverage)


def add_patch(rng: np.random.Generator, canvas: Array) -> None:
    """Draws fine stripes over a part with soft edges."""
    centre = rng.uniform(0, len(canvas), 2)
    place = window(len(canvas), centre, 34)
    along, across = local_axes(place, centre, rng.uniform(0, np.pi))
    long, wide = rng.uniform(8, 22, 2)
    coverage = np.exp(-np.square((along / long) ** 2) - np.square((across / wide) ** 2))
    wave = np.sin(along * np.float32(2 * np.pi / rng.uniform(4, 10)))
    colour = rng.uniform(0.05, 0.3, 3).astype(np.float32)
    canvas[place] += (coverage * wave)[..., None] * colour


def add_ring(rng: np.random.Generator, canvas: Array) -> None:
    centre = rng.uniform(0, len(canvas), 2)
    place = window(len(canvas), centre, 18)
    radius, thickness = rng.uniform(5, 14), rng.uniform(0.5, 1.5)
    distance = np.hypot(*local_axes(place, centre, 0.0))
    paint(rng, canvas, place, np.clip(thickness + 0.5 - np.abs(distance - radius), 0, 1))


def place_object(
    rng: np.random.Generator, kind: Kind, shape: str, others: list[tuple[Mask, int]]
) -> tuple[Window, Array] | None:
    """Where one object lies and its coverage there, or None where it would hide another.

    `others` holds each earlier object's visible pixels and its area.
    """
    radius = np.exp(rng.uniform(*np.log(kind.radii)))
    for _ in range(PLACEMENTS):
        centre = rng.uniform(radius, kind.size - radius, 2)
        place = window(kind.size, centre, 1.2 * radius + 2)
        u, v = local_axes(place, centre, rng.uniform(-0.45, 0.45))
        coverage = np.clip(0.5 - signed_distance(shape, u / radius, v / radius) * radius, 0, 1)
        hides = coverage > 0.5
        if all(
            visible.sum() - visible[place][hides].sum() >= MIN_VISIBLE * area
            for visible, area in others
        ):
            return place, coverage
    return None


def draw_scene(
    seed: int, index: int, kind: Kind = DENSE
) -> tuple[NDArray[np.uint8], list[list[int]], list[int], NDArray[np.uint8]]:
    """Image `(size, size, 3)`, boxes `[x1, y1, x2, y2]` and labels, which count from 1.

    The last is a map `(size, size)` of which object is in sight, 1 for the first, 0 for none.
    """
    rng = np.random.default_rng((seed, index))
    canvas = background(rng, kind.size)
    clutter = ((add_clutter, kind.clutter), (add_patch, kind.patches), (add_ring, kind.rings))
    for add, counts in clutter:
        # Nothing is drawn from `rng` for what a kind has none of.
        for _ in range(rng.integers(*counts, endpoint=True) if any(counts) else 0):
            add(rng, canvas)
    boxes, labels = [], []
    others: list[tuple[Mask, int]] = []
    in_sight = np.zeros((kind.size, kind.size), np.uint8)
    for _ in range(rng.integers(*kind.objects, endpoint=True)):
        label = int(rng.integers(len(CLASSES)))
        if (placed := place_object(rng, kind, CLASSES[label], others)) is None:
            continue
        place, coverage = placed
        paint(rng, canvas, place, coverage)
        inside = np.zeros((kind.size, kind.size), bool)
        inside[place] = coverage > 0.5
        for visible, _ in others:
            visible &= ~inside
        others.append((inside, int(inside.sum())))
        in_sight[inside] = len(others)
        (rows,), (columns,) = inside.any(1).nonzero(), inside.any(0).nonzero()
        boxes.append([int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1])
        labels.append(label + 1)
    canvas += rng.normal(0, kind.noise, canvas.shape).astype(np.float32)
    return (np.clip(canvas, 0, 1) * 255).astype(np.uint8), boxes, labels, in_sight


class Scenes(Dataset[tuple[torch.Tensor, dict[str, Any]]]):
    """`length` scenes of `seed`, each as a uint8 image `(3, size, size)` and its target.

    `masks=True` adds each object's visible pixels, as in COCO; its box holds the hidden ones too.
    """

    classes = ("background", *CLASSES)

    def __init__(self, seed: int, length: int, masks: bool = False, kind: Kind = DENSE) -> None:
        self.kind = kind
        self.seed = seed
        self.length = length
        self.masks = masks
        self.drawn: dict[int, Any] = {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, Any]]:
        if not 0 <= index < self.length:
            raise IndexError(f"`index` must be in 0..{self.length - 1}, got {index}")
        if index not in self.drawn:
            self.drawn[index] = draw_scene(self.seed, index, self.kind)
        image, boxes, labels, in_sight = self.drawn[index]
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=image.shape[:2]),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "image_id": torch.tensor(index),
        }
        if self.masks:
            objects = np.arange(1, len(labels) + 1)[:, None, None]
            masks = torch.from_numpy((in_sight == objects).astype(np.uint8))
            target["masks"] = tv_tensors.Mask(masks)
        return tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1)), target
