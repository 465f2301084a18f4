"""Pictures, objects and mirror images."""

import json
from pathlib import Path

import torch

from benchmarks.study.coco.data import CocoSplit, WithMirrorImages


def test_labels_are_category_ids_and_a_crowd_is_no_object(coco: Path) -> None:
    data = CocoSplit(coco, "train2017", masks=True)
    assert data.classes == 7
    content = json.loads((coco / "annotations" / "instances_train2017.json").read_text())
    for index, (image, target) in enumerate(data):
        known = [a for a in content["annotations"] if a["image_id"] == 100 + index]
        known = [a for a in known if not a["iscrowd"]]
        assert target["image_id"] == 100 + index
        assert target["labels"].tolist() == [a["category_id"] for a in known]
        x, y, width, height = torch.tensor([a["bbox"] for a in known]).reshape(-1, 4).T
        corners = torch.stack([x, y, x + width, y + height], 1)
        assert torch.equal(target["boxes"].as_subclass(torch.Tensor), corners.float())
        assert target["masks"].shape == (len(known), *image.shape[-2:])
        assert target["masks"].sum((1, 2)).tolist() == (width * height).tolist()
    assert data.with_objects() == [0, 2, 3, 4, 5]


def test_a_mirror_image_has_its_boxes_and_masks_mirrored(coco: Path) -> None:
    data = CocoSplit(coco, "train2017", masks=True)
    both = WithMirrorImages(data)
    assert len(both) == 12
    (image, target), (mirrored, other) = both[2], both[8]
    assert torch.equal(mirrored, image.flip(-1))
    assert torch.equal(other["masks"], target["masks"].flip(-1))
    width = image.shape[-1]
    expected = [[width - x2, y1, width - x1, y2] for x1, y1, x2, y2 in target["boxes"].tolist()]
    assert other["boxes"].tolist() == expected
    assert torch.equal(other["labels"], target["labels"])
