"""A small folder of pictures with COCO annotations."""

import json
from pathlib import Path

import numpy as np
from PIL import Image


def write_coco(folder: Path, count: int = 6) -> tuple[Path, Path]:
    """Bright rectangles on noise, two categories of ids 3 and 7; the second image has no box."""
    images = folder / "images"
    images.mkdir(parents=True)
    generator = np.random.default_rng(0)
    content = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 3, "name": "tall"}, {"id": 7, "name": "wide"}],
    }
    for i in range(count):
        pixels = generator.integers(0, 80, (80, 100, 3), dtype=np.uint8)
        tall = i % 2 == 0
        left, top, width, height = (10, 10, 20, 50) if tall else (30, 20, 50, 20)
        pixels[top : top + height, left : left + width] = 220
        Image.fromarray(pixels).save(images / f"{i}.png")
        content["images"].append({"id": i, "file_name": f"{i}.png", "width": 100, "height": 80})
        box = {"id": i + 1, "image_id": i, "category_id": 3 if tall else 7, "iscrowd": 0}
        box |= {"bbox": [left, top, width, height], "area": width * height}
        if i != 1:
            content["annotations"].append(box)
    file = folder / "annotations.json"
    file.write_text(json.dumps(content))
    return images, file
