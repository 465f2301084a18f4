"""Pictures as files hold them: what is read of one, and what can be wrong with it."""

import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from examples.detection.progress import Progress

Size = tuple[float, float]
ORIENTATION = 0x0112  # EXIF's tag; 1 is upright
QUARTER_TURNS = (5, 6, 7, 8)
LIMIT = 80_000_000  # pixels; Pillow warns of decompression bombs a little above
TOO_LARGE = f"must have at most {LIMIT:,} pixels: cut it into parts"
AMBIGUOUS = (
    "must be stored upright, or its size must say that the annotations are for it turned as its "
    "EXIF tag says: save it upright, or without the tag"
)


@dataclass
class Picture:
    """`size` is that of :func:`read_picture`'s result; `problem` says why there is none."""

    size: tuple[int, int] | None = None
    problem: str = ""
    found: str | None = None
    turned: bool = False
    deep: bool = False


def read_picture(file: Path, size: Size | None) -> Image.Image:
    """In RGB, of a picture that :func:`check_picture` has passed.

    `size` is the annotations'. Where it is that of the picture turned upright by its EXIF tag, the
    picture is turned. Of 16 bits the eight high ones are kept.
    """
    with Image.open(file) as picture:
        rgb = as_rgb(picture)
        turned = orientation(picture) in QUARTER_TURNS and size not in (None, picture.size)
        return ImageOps.exif_transpose(rgb) if turned else rgb


def as_rgb(picture: Image.Image) -> Image.Image:
    """With the EXIF tags of `picture`."""
    # Of a palette with transparency Pillow warns otherwise.
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    if not is_deep(picture):
        return picture.convert("RGB")
    scaled = Image.fromarray((np.asarray(picture).astype(np.uint32) >> 8).astype(np.uint8))
    scaled.info.update(picture.info)
    return scaled.convert("RGB")


def is_deep(picture: Image.Image) -> bool:
    """Whether it is grey of 16 bits, which old versions of Pillow call 32."""
    return picture.mode.startswith("I;16") or (picture.mode, picture.format) == ("I", "PNG")


def orientation(picture: Image.Image) -> int:
    try:
        return int(picture.getexif().get(ORIENTATION, 1))
    # What cannot be read turns nothing.
    except Exception:
        return 1


def check_picture(file: Path, size: Size | None) -> Picture:
    """Decodes the picture, which alone shows whether it is whole."""
    try:
        with Image.open(file) as picture:
            return look_at(picture, size)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return Picture(problem=TOO_LARGE)
    # Pillow's decoders raise errors of many kinds.
    except Exception as error:
        return Picture(problem="must be a whole picture that Pillow can read", found=str(error))


def look_at(picture: Image.Image, size: Size | None) -> Picture:
    stored, deep = picture.size, is_deep(picture)
    if stored[0] * stored[1] > LIMIT:
        return Picture(problem=TOO_LARGE, found=by(stored))
    if picture.mode in ("I", "F") and not deep:
        rule = "must have pixels of 8 or 16 bits: convert it"
        return Picture(problem=rule, found=f"Pillow's mode {picture.mode}")
    # A JPEG is decoded at an eighth of its size: all of its data are read, in half the time.
    picture.draft(None, (stored[0] // 8, stored[1] // 8))
    as_rgb(picture)
    # Pillow turns a TIFF itself as it decodes it, and takes the tag away.
    tag = orientation(picture)
    turned = tag in QUARTER_TURNS and size not in (None, stored)
    read = stored[::-1] if turned else stored
    if size not in (None, read):
        found = f"{by(stored)} in the file, {by(size)} in the annotations"
        return Picture(problem="must have the size that the annotations say", found=found)
    if tag in range(2, 9) and not turned:
        return Picture(problem=AMBIGUOUS, found=f"orientation {tag}")
    return Picture(read, turned=turned, deep=deep)


def by(size: Size) -> str:
    return f"{size[0]} x {size[1]}"


def check_pictures(files: Sequence[Path], sizes: Sequence[Size | None]) -> Iterator[Picture]:
    """Of each file in order, over all cores; COCO's 118,287 take three minutes of one."""
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Progress("reading every picture once", len(files), 0, "picture") as progress:
            for picture in pool.map(check_picture, files, sizes):
                progress.advance()
                yield picture
