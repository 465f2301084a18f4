"""A small folder of cut-outs, distractors and backgrounds, whose colours say what a pixel shows."""

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"bird": (255, 0, 0), "coin": (0, 255, 0)}
NAMES = ("one", "two-1", "two-2", "three", "four", "five")


def cut_out(colour: tuple[int, int, int], round_one: bool = False) -> Image.Image:
    """In the middle of 90 x 60 pixels 40 x 20 opaque ones, with a faint seam of 4 around them."""
    y, x = np.mgrid[-29.5:30, -44.5:45]
    distance = np.hypot(x / 2, y) - 10 if round_one else np.maximum(abs(x) - 20, abs(y) - 10)
    alpha = np.select([distance < 0, distance < 4], [255, 60], 0)
    pixels = np.full((60, 90, 4), (*colour, 0), np.uint8)
    pixels[..., 3] = alpha
    return Image.fromarray(pixels)


def write_pasted(folder: Path) -> Path:
    """Round red and square green ones, blue distractors, all on black."""
    groups = {f"cutouts/{kind}": colour for kind, colour in COLOURS.items()}
    for group, colour in (groups | {"distractors": (0, 0, 255)}).items():
        # As of a stamp's package, further folders say nothing.
        (folder / group / "further").mkdir(parents=True)
        for name in NAMES:
            picture = cut_out(colour, round_one=group.endswith("bird"))
            picture.save(folder / group / "further" / f"{name}.png")
    (folder / "backgrounds").mkdir()
    for name in NAMES:
        Image.new("RGB", (400, 330)).save(folder / "backgrounds" / f"{name}.jpg")
    return folder
