"""COCO's metrics of what is found, by one process and by several."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.study.coco import evaluation
from benchmarks.study.coco.data import CocoSplit
from benchmarks.study.coco.evaluation import evaluate
from benchmarks.study.lines import COLUMNS
from benchmarks.study.tests.coco.folder import CPU, IDS
from examples.detection.training import Settings

SETTINGS = Settings(2, 0.01, 0, CPU, False, 0, 1, 0, 1.0)


class Oracle(nn.Module):
    """Says what it is given, image after image."""

    def __init__(self, results: Sequence[dict[str, torch.Tensor]]) -> None:
        super().__init__()
        self.results = iter(results)

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        return [next(self.results) for _ in images]


def ground_truth(data: CocoSplit) -> list[dict[str, torch.Tensor]]:
    """As a detector of torchvision's would find it."""
    return [
        {
            "boxes": target["boxes"].as_subclass(torch.Tensor),
            "labels": target["labels"],
            "scores": torch.ones(len(target["labels"])),
            "masks": target["masks"].as_subclass(torch.Tensor)[:, None].float(),
        }
        for _, target in data
    ]


def test_the_ground_truth_has_the_full_ap_and_displaced_boxes_or_masks_have_none(
    coco: Path,
) -> None:
    data = CocoSplit(coco, "val2017", masks=True)
    metrics = evaluate(Oracle(ground_truth(data)), data, SETTINGS)
    assert list(metrics) == [*COLUMNS, *(f"mask_{c}" for c in COLUMNS)]
    assert metrics["ap"] == metrics["mask_ap"] == 1
    assert metrics["ap_l"] is None  # an object of 96 pixels squared
    moved = [found | {"boxes": found["boxes"] + 200} for found in ground_truth(data)]
    metrics = evaluate(Oracle(moved), data, SETTINGS)
    assert (metrics["ap"], metrics["mask_ap"]) == (0, 1)
    blank = [found | {"masks": 0 * found["masks"]} for found in ground_truth(data)]
    metrics = evaluate(Oracle(blank), data, SETTINGS)
    assert (metrics["ap"], metrics["mask_ap"]) == (1, 0)


def test_what_is_found_in_a_crowd_does_not_count(coco: Path) -> None:
    data = CocoSplit(coco, "val2017", masks=True)
    found = [{k: v for k, v in each.items() if k != "masks"} for each in ground_truth(data)]
    for corner, ap in ((5.0, 1.0), (70.0, 0.9)):
        extra = {
            "boxes": torch.tensor([[corner, corner, corner + 9, corner + 9]]),
            "labels": torch.tensor([IDS[0]]),
            "scores": torch.tensor([2.0]),
        }
        first = {name: torch.cat([extra[name], found[0][name]]) for name in extra}
        metrics = evaluate(Oracle([first, *found[1:]]), data, SETTINGS)
        assert (metrics["ap"] == 1) == (ap == 1)


def test_ranks_share_the_images_and_the_first_counts_them_all(
    coco: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = CocoSplit(coco, "val2017", masks=True)
    sent: list[Any] = []

    def gather(found: Any, gathered: list[Any] | None) -> None:
        sent.append(found)
        if gathered is not None:
            gathered[:] = sent

    monkeypatch.setattr(evaluation.dist, "gather_object", gather)
    for rank, ap in ((1, None), (0, 1)):
        monkeypatch.setattr(evaluation, "world", lambda rank=rank: (rank, 2))
        share = Oracle(ground_truth(data)[rank::2])
        assert evaluate(share, data, SETTINGS).get("ap") == ap
    assert all(sent)


def test_nothing_found_is_an_ap_of_zero(coco: Path) -> None:
    data = CocoSplit(coco, "val2017")
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0), "scores": torch.zeros(0)}
    metrics = evaluate(Oracle([nothing] * 4), data, SETTINGS)
    assert metrics == dict.fromkeys(COLUMNS, 0)
