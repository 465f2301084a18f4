"""A folder of generated scenes that is laid out as COCO's is, and the command's lines."""

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from examples.detection.scenes import CLASSES, Scenes

CPU = torch.device("cpu")
# Labels 1 to 4 of the scenes; COCO's ids have gaps too.
IDS = (1, 2, 3, 6)
SMALL = ["--weights", "none", "--size", "64", "--batch-size", "2", "--workers", "0"]
RETINANET = ["--detector", "retinanet_resnet50_fpn"]


def write_split(folder: Path, split: str, seed: int, count: int) -> None:
    """Scenes, some cut to other sizes; the second has no object and the first a crowd."""
    (folder / split).mkdir(parents=True)
    (folder / "annotations").mkdir(exist_ok=True)
    categories = [{"id": i, "name": name} for i, name in zip(IDS, CLASSES, strict=True)]
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": categories}
    scenes = Scenes(seed, count)
    for i in range(count):
        image, target = scenes[i]
        height, width = (96, 96) if i % 3 == 0 else (96, 72 + i) if i % 3 == 1 else (72 + i, 96)
        name = f"{i:012}.jpg"
        pixels = image.permute(1, 2, 0).numpy()[:height, :width]
        Image.fromarray(pixels).save(folder / split / name, quality=95)
        whole = {"id": 100 + i, "file_name": name, "height": height, "width": width}
        content["images"].append(whole)
        for box, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            x1, y1, x2, y2 = box[0], box[1], min(box[2], width), min(box[3], height)
            if i == 1 or x2 - x1 < 4 or y2 - y1 < 4:
                continue
            content["annotations"].append(annotation(100 + i, IDS[label - 1], x1, y1, x2, y2))
        if i == 0:
            content["annotations"].append(annotation(100, IDS[0], 0, 0, 60, 60) | {"iscrowd": 1})
    for i, each in enumerate(content["annotations"], 1):
        each["id"] = i
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def annotation(image: int, category: int, *corners: float) -> dict[str, Any]:
    x1, y1, x2, y2 = corners
    return {
        "image_id": image,
        "category_id": category,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]],
        "area": (x2 - x1) * (y2 - y1),
        "iscrowd": 0,
    }


def command(coco: Path, folder: Path, *arguments: str | Path) -> list[str]:
    files = ["--lines", folder / "lines.jsonl", "--output", folder / "runs"]
    return ["run", "--coco", str(coco), *SMALL, *map(str, (*files, *arguments))]


def lines_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "lines.jsonl").read_text().splitlines()]
