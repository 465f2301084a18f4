"""A run's models, rate and training."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torchvision.models import detection, get_model_weights, resnet50
from torchvision.ops.misc import FrozenBatchNorm2d

from benchmarks.study.coco.data import CocoSplit
from benchmarks.study.coco.runs import BACKBONE_WEIGHTS, DETECTORS, SETTINGS, Data
from benchmarks.study.coco.train import at_fpn, new_model, rate
from benchmarks.study.runs import Run, Teacher
from benchmarks.study.settings import CANDIDATES
from benchmarks.study.tests.coco.folder import CPU
from benchmarks.training_step import LAYERS
from examples.detection.batches import collate


def small_run(method: str, detector: str = "retinanet_resnet50_fpn") -> Run:
    data = Data(train_images=5, held_out_images=4, batch_size=2, size=64)
    plain = Run(detector, (detector, None), None, "none", 0, 1, data)
    if method == "none":
        return plain
    teacher = Teacher((DETECTORS[detector].teacher, None), 0, 0)
    settings = SETTINGS[method]
    return replace(plain, teacher=teacher, method=method, hyperparameters=settings)


@pytest.mark.parametrize("detector", DETECTORS)
def test_the_fpn_s_outputs_of_the_same_strides_are_distilled(detector: str) -> None:
    model = new_model(small_run("featkd", detector), 7, CPU)
    first = 1 if "rcnn" in detector else 0
    expected = [f"backbone[{i}]" for i in range(first, first + 3)]
    assert list(at_fpn(model.student).values()) == expected
    assert model.loss.channels == dict.fromkeys(LAYERS, (256, 256))


@pytest.mark.slow
def test_every_method_has_gradients_at_every_level_of_the_same_student(coco: Path) -> None:
    data = CocoSplit(coco, "train2017")
    batch = collate([data[0], data[2]])
    start = new_model(small_run("none"), data.classes, CPU).student.state_dict()
    for method in CANDIDATES:
        model = new_model(small_run(method), data.classes, CPU)
        state = model.student.state_dict()
        assert all(torch.equal(state[name], start[name]) for name in start)
        _, losses = model(*batch)
        sum(losses.values()).backward()
        for path in LAYERS.values():
            stage = model.student.get_submodule(path)
            assert all(p.grad.abs().sum() > 0 for p in stage.parameters() if p.dim() == 4)


def test_released_weights_come_from_the_folder_and_freeze_what_torchvision_freezes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = tmp_path / "checkpoints"
    files.mkdir()
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    torch.hub.set_dir(tmp_path)
    backbone = resnet50()
    torch.save(backbone.state_dict(), files / "resnet50-0676ba61.pth")
    name = DETECTORS["retinanet_resnet50_fpn"].teacher
    weights = get_model_weights(name).DEFAULT
    released = getattr(detection, name)(weights=None, weights_backbone=None)
    torch.save(released.state_dict(), files / Path(weights.url).name)

    run = small_run("featkd")
    run = replace(
        run,
        student=(run.detector, BACKBONE_WEIGHTS),
        teacher=replace(run.teacher, shape=(name, weights.name)),
    )
    model = new_model(run, 91, CPU)
    student, teacher = model.student, model.teacher
    body = student.backbone.body
    assert torch.equal(body.layer4[2].conv3.weight, backbone.layer4[2].conv3.weight)
    assert isinstance(body.layer4[2].bn3, FrozenBatchNorm2d)
    stages = {n.split(".")[0] for n, p in body.named_parameters() if p.requires_grad}
    assert stages == {"layer2", "layer3", "layer4"}
    state = released.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in teacher.state_dict().items())


def test_the_rate_warms_up_and_falls_after_epochs_16_and_22_of_24() -> None:
    rates = [rate(step, 24_000) for step in (0, 250, 500, 15_999, 16_000, 21_999)]
    assert rates == pytest.approx([0.001, 0.5005, 1, 1, 0.1, 0.1])
    assert rate(22_000, 24_000) == pytest.approx(0.01)
