"""The README's Python, run as it stands, with small detectors in place of the stock ones."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torchvision.models import detection

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*trainable_backbone_layers:UserWarning")
def test_the_code_blocks_run_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    for name in ("fcos_resnet50_fpn", "retinanet_resnet50_fpn"):
        small = partial(getattr(detection, name), min_size=64, max_size=64)
        monkeypatch.setattr(detection, name, small)
    images = [torch.rand(3, 64, 64) for _ in range(2)]
    boxes = torch.tensor([[5.0, 5.0, 40.0, 50.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor([1])}] * 2
    names = {"loader": [(images, targets)]}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 5
    assert names["total"].isfinite()
    assert set(names["match"].layers) >= {"c3", "c4", "c5"}
    assert 0 < names["masked"] <= 2  # 1 - correlation
