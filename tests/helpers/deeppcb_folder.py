"""A small folder laid out as DeepPCB, or as a clone of its repository."""

from pathlib import Path

import numpy as np
from PIL import Image

# In pixels of the board: one in the first quarter, and one that the middle divides by 3 to 1.
BOXES = [(20, 30, 60, 70, 2), (290, 400, 330, 440, 6)]


def write_deeppcb(folder: Path, ending: str = ".png", boards: int = 3) -> Path:
    """Stripes with bright rectangles at `BOXES`; as a clone with `ending=".jpg"`."""
    root = folder / "PCBData" if ending == ".jpg" else folder
    for place, part in enumerate(("trainval.txt", "test.txt")):
        lines = []
        for i in range(place * boards, (place + 1) * boards):
            pixels = np.zeros((640, 640), np.uint8)
            pixels[:, ::8] = 255
            for left, top, right, bottom, _ in BOXES:
                pixels[top:bottom, left:right] = 255
            picture = Image.fromarray(pixels)
            stem = f"group1/1/{i:03}"
            (root / "group1/1").mkdir(parents=True, exist_ok=True)
            (root / "group1/1_not").mkdir(exist_ok=True)
            (picture.convert("1") if ending == ".png" else picture).save(
                root / f"{stem}_test{ending}", quality=95
            )
            if ending == ".jpg":
                Image.new("L", (640, 640)).save(root / f"{stem}_temp.jpg")
            rows = "".join(f"{' '.join(map(str, box))}\n" for box in BOXES)
            (root / f"group1/1_not/{i:03}.txt").write_text(rows)
            lines.append(f"{stem}.jpg group1/1_not/{i:03}.txt\n")
        (root / part).write_text("".join(lines))
    return folder
