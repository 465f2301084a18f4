"""COCO's own metrics of boxes and masks, detected by all processes."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as rle
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision.ops import box_convert
from tqdm import tqdm

from benchmarks.study.coco.data import CocoSplit
from benchmarks.study.lines import COLUMNS
from examples.detection.batches import collate
from examples.detection.processes import world
from examples.detection.training import Settings

Detection = dict[str, Any]


@torch.no_grad()
def evaluate(model: nn.Module, data: CocoSplit, settings: Settings) -> dict[str, float | None]:
    """COCO's own metrics; those of masks, `mask_ap` and so on, where the model finds masks.

    Every rank detects in its share of the images, and the first alone has the metrics.
    """
    rank, ranks = world()
    model.to(settings.device).eval()
    share = Subset(data, range(rank, len(data), ranks))
    loader = DataLoader(share, batch_size=2, collate_fn=collate, num_workers=settings.workers)
    found: list[Detection] = []
    for images, targets in tqdm(loader, "evaluation", unit="batch", disable=rank > 0):
        results = model([image.to(settings.device) for image in images])
        for target, result in zip(targets, results, strict=True):
            found += detections(int(target["image_id"]), result)
    if ranks > 1:
        gathered: list[Any] = [None] * ranks
        dist.gather_object(found, gathered if rank == 0 else None)
        if rank > 0:
            return {}
        found = [each for part in gathered for each in part]
    metrics = coco_metrics(data.annotations, without("segmentation", found), "bbox")
    if found and "segmentation" in found[0]:
        # Beside a box, the evaluator would take a mask's size from it.
        values = coco_metrics(data.annotations, without("bbox", found), "segm")
        metrics |= {f"mask_{name}": value for name, value in values.items()}
    return metrics


def detections(image: int, result: dict[str, Tensor]) -> list[Detection]:
    """In COCO's form."""
    result = {name: value.cpu() for name, value in result.items()}
    boxes = box_convert(result["boxes"], "xyxy", "xywh").tolist()
    columns = {"category_id": result["labels"].tolist(), "score": result["scores"].tolist()}
    columns["bbox"] = boxes
    if "masks" in result:
        planes = (result["masks"] > 0.5).squeeze(1).permute(1, 2, 0)
        columns["segmentation"] = rle.encode(np.asfortranarray(planes.numpy().astype(np.uint8)))
    rows = zip(*columns.values(), strict=True)
    return [{"image_id": image, **dict(zip(columns, row, strict=True))} for row in rows]


def without(name: str, rows: Iterable[Detection]) -> list[Detection]:
    return [{key: value for key, value in row.items() if key != name} for row in rows]


def coco_metrics(annotations: Path, found: list[Detection], kind: str) -> dict[str, float | None]:
    if not found:
        # Of which old evaluators make an error.
        return dict.fromkeys(COLUMNS, 0.0)
    truth = COCO(annotations)
    evaluation = COCOeval_faster(truth, truth.loadRes(found), kind)
    evaluation.run()
    # The evaluator says -1 where no held-out object has the size.
    values = [float(value) if value >= 0 else None for value in evaluation.stats]
    return dict(zip(COLUMNS, values, strict=False))
