"""The study at full size, on a folder of generated scenes that is laid out as COCO's is."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models import detection, get_model_weights, resnet50
from torchvision.ops.misc import FrozenBatchNorm2d

from benchmarks.study.coco import runs as study_coco
from examples.scenes import CLASSES, Scenes

ROOT = Path(study_coco.__file__).parents[3]
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


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coco")
    write_split(folder, "train2017", 0, 6)
    write_split(folder, "val2017", 1, 4)
    return folder


def command(coco: Path, folder: Path, *arguments: str | Path) -> list[str]:
    files = ["--lines", folder / "lines.jsonl", "--output", folder / "runs"]
    return ["run", "--coco", str(coco), *SMALL, *map(str, (*files, *arguments))]


def lines_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "lines.jsonl").read_text().splitlines()]


DATA = study_coco.Data(train_images=117266, held_out_images=5000, batch_size=16, size=800)


def planned(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[study_coco.Run]:
    """What the command line asks for."""
    seen: list[Any] = []
    monkeypatch.setattr(study_coco, "run_all", seen.append)
    study_coco.main(["run", "--coco", "somewhere", *arguments])
    return study_coco.planned(seen[0], DATA)


# --- what is run ----------------------------------------------------------------------------------


def test_each_distilled_run_has_its_plain_student_and_its_teacher_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = planned(monkeypatch, "--method", *study_coco.METHODS, "--seeds", "0", "1")
    places = {run.identity: i for i, run in reversed(list(enumerate(runs)))}
    students = [run for run in runs if run.method != "teacher"]
    assert len({run.identity for run in students}) == len(students)
    assert len(students) == 2 * len(study_coco.DETECTORS) * len(study_coco.METHODS)
    for run in students:
        paired = replace(run, method="none", teacher=None, hyperparameters={})
        assert paired.identity in places
        if run.teacher:
            assert places[study_coco.teacher_of(run).identity] < places[run.identity]


def test_a_run_names_builders_weights_and_everything_else_that_decides_its_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["--detector", "fasterrcnn_resnet50_fpn", "--method", "printed"]
    teacher, run = planned(monkeypatch, *arguments)
    assert run.student == ("fasterrcnn_resnet50_fpn", "IMAGENET1K_V1")
    assert run.teacher.shape == ("fasterrcnn_resnet50_fpn_v2", "COCO_V1")
    assert (teacher.method, teacher.steps) == ("teacher", 0)
    assert run.steps == 175_899  # 24 epochs of 117266 images
    assert run.hyperparameters["temperature"] == 0.1
    assert study_coco.learning_rate(run) == 0.02
    halved = replace(run, data=replace(DATA, batch_size=8))
    assert study_coco.learning_rate(halved) == 0.01
    other = planned(monkeypatch, *arguments, "--teacher", "retinanet_resnet50_fpn_v2")[1]
    random = planned(monkeypatch, *arguments, "--weights", "none")[1]
    assert random.student[1] is random.teacher.shape[1] is None
    assert len({each.identity for each in (run, halved, other, random)}) == 4
    assert len({study_coco.file_name(each) for each in (run, halved, other, random)}) == 4


def test_every_default_teacher_is_better_than_the_student_that_torchvision_has_released() -> None:
    def ap(builder: str) -> float:
        return get_model_weights(builder).DEFAULT.meta["_metrics"]["COCO-val2017"]["box_map"]

    for name, detector in study_coco.DETECTORS.items():
        assert ap(detector.teacher) > ap(name)


def test_the_rate_warms_up_and_falls_after_epochs_16_and_22_of_24() -> None:
    rates = [study_coco.rate(step, 24_000) for step in (0, 250, 500, 15_999, 16_000, 21_999)]
    assert rates == pytest.approx([0.001, 0.5005, 1, 1, 0.1, 0.1])
    assert study_coco.rate(22_000, 24_000) == pytest.approx(0.01)


# --- data -----------------------------------------------------------------------------------------


def test_labels_are_category_ids_and_a_crowd_is_no_object(coco: Path) -> None:
    data = study_coco.CocoSplit(coco, "train2017", masks=True)
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
    data = study_coco.CocoSplit(coco, "train2017", masks=True)
    both = study_coco.WithMirrorImages(data)
    assert len(both) == 12
    (image, target), (mirrored, other) = both[2], both[8]
    assert torch.equal(mirrored, image.flip(-1))
    assert torch.equal(other["masks"], target["masks"].flip(-1))
    width = image.shape[-1]
    expected = [[width - x2, y1, width - x1, y2] for x1, y1, x2, y2 in target["boxes"].tolist()]
    assert other["boxes"].tolist() == expected
    assert torch.equal(other["labels"], target["labels"])


# --- evaluation -----------------------------------------------------------------------------------


class Oracle(nn.Module):
    """Says what it is given, image after image."""

    def __init__(self, results: Sequence[dict[str, torch.Tensor]]) -> None:
        super().__init__()
        self.results = iter(results)

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        return [next(self.results) for _ in images]


SETTINGS = study_coco.Settings(2, 0.01, 0, CPU, False, 0, 1, 0, 1.0)


def ground_truth(data: study_coco.CocoSplit) -> list[dict[str, torch.Tensor]]:
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
    data = study_coco.CocoSplit(coco, "val2017", masks=True)
    metrics = study_coco.evaluate(Oracle(ground_truth(data)), data, SETTINGS)
    assert list(metrics) == [*study_coco.COLUMNS, *(f"mask_{c}" for c in study_coco.COLUMNS)]
    assert metrics["ap"] == metrics["mask_ap"] == 1
    assert metrics["ap_l"] is None  # an object of 96 pixels squared
    moved = [found | {"boxes": found["boxes"] + 200} for found in ground_truth(data)]
    metrics = study_coco.evaluate(Oracle(moved), data, SETTINGS)
    assert (metrics["ap"], metrics["mask_ap"]) == (0, 1)
    blank = [found | {"masks": 0 * found["masks"]} for found in ground_truth(data)]
    metrics = study_coco.evaluate(Oracle(blank), data, SETTINGS)
    assert (metrics["ap"], metrics["mask_ap"]) == (1, 0)


def test_what_is_found_in_a_crowd_does_not_count(coco: Path) -> None:
    data = study_coco.CocoSplit(coco, "val2017", masks=True)
    found = [{k: v for k, v in each.items() if k != "masks"} for each in ground_truth(data)]
    for corner, ap in ((5.0, 1.0), (70.0, 0.9)):
        extra = {
            "boxes": torch.tensor([[corner, corner, corner + 9, corner + 9]]),
            "labels": torch.tensor([IDS[0]]),
            "scores": torch.tensor([2.0]),
        }
        first = {name: torch.cat([extra[name], found[0][name]]) for name in extra}
        metrics = study_coco.evaluate(Oracle([first, *found[1:]]), data, SETTINGS)
        assert (metrics["ap"] == 1) == (ap == 1)


def test_ranks_share_the_images_and_the_first_counts_them_all(
    coco: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = study_coco.CocoSplit(coco, "val2017", masks=True)
    sent: list[Any] = []

    def gather(found: Any, gathered: list[Any] | None) -> None:
        sent.append(found)
        if gathered is not None:
            gathered[:] = sent

    monkeypatch.setattr(study_coco.dist, "gather_object", gather)
    for rank, ap in ((1, None), (0, 1)):
        monkeypatch.setattr(study_coco, "world", lambda rank=rank: (rank, 2))
        share = Oracle(ground_truth(data)[rank::2])
        assert study_coco.evaluate(share, data, SETTINGS).get("ap") == ap
    assert all(sent)


def test_nothing_found_is_an_ap_of_zero(coco: Path) -> None:
    data = study_coco.CocoSplit(coco, "val2017")
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0), "scores": torch.zeros(0)}
    metrics = study_coco.evaluate(Oracle([nothing] * 4), data, SETTINGS)
    assert metrics == dict.fromkeys(study_coco.COLUMNS, 0)


# --- a run ----------------------------------------------------------------------------------------


def small_run(method: str, detector: str = "retinanet_resnet50_fpn") -> study_coco.Run:
    data = study_coco.Data(train_images=5, held_out_images=4, batch_size=2, size=64)
    plain = study_coco.Run(detector, (detector, None), None, "none", 0, 1, data)
    if method == "none":
        return plain
    teacher = study_coco.Teacher((study_coco.DETECTORS[detector].teacher, None), 0, 0)
    settings = study_coco.METHODS[method]
    return replace(plain, teacher=teacher, method=method, hyperparameters=settings)


@pytest.mark.parametrize("detector", study_coco.DETECTORS)
def test_the_fpn_s_outputs_of_the_same_strides_are_distilled(detector: str) -> None:
    model = study_coco.new_model(small_run("featkd", detector), 7, CPU)
    first = 1 if "rcnn" in detector else 0
    expected = [f"backbone[{i}]" for i in range(first, first + 3)]
    assert list(study_coco.at_fpn(model.student).values()) == expected
    assert model.loss.channels == dict.fromkeys(study_coco.LAYERS, (256, 256))


@pytest.mark.slow
def test_every_method_has_gradients_at_every_level_of_the_same_student(coco: Path) -> None:
    data = study_coco.CocoSplit(coco, "train2017")
    batch = study_coco.collate([data[0], data[2]])
    start = study_coco.new_model(small_run("none"), data.classes, CPU).student.state_dict()
    for method in study_coco.CANDIDATES:
        model = study_coco.new_model(small_run(method), data.classes, CPU)
        state = model.student.state_dict()
        assert all(torch.equal(state[name], start[name]) for name in start)
        _, losses = model(*batch)
        sum(losses.values()).backward()
        for path in study_coco.LAYERS.values():
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
    name = study_coco.DETECTORS["retinanet_resnet50_fpn"].teacher
    weights = get_model_weights(name).DEFAULT
    released = getattr(detection, name)(weights=None, weights_backbone=None)
    torch.save(released.state_dict(), files / Path(weights.url).name)

    run = small_run("featkd")
    run = replace(
        run,
        student=(run.detector, study_coco.BACKBONE_WEIGHTS),
        teacher=replace(run.teacher, shape=(name, weights.name)),
    )
    model = study_coco.new_model(run, 91, CPU)
    student, teacher = model.student, model.teacher
    body = student.backbone.body
    assert torch.equal(body.layer4[2].conv3.weight, backbone.layer4[2].conv3.weight)
    assert isinstance(body.layer4[2].bn3, FrozenBatchNorm2d)
    stages = {n.split(".")[0] for n, p in body.named_parameters() if p.requires_grad}
    assert stages == {"layer2", "layer3", "layer4"}
    state = released.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in teacher.state_dict().items())


def test_finished_runs_leave_lines_and_are_not_repeated(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    arguments = command(coco, tmp_path, *RETINANET, "--steps", "1")
    study_coco.main(arguments)
    lines = lines_in(tmp_path)
    assert [line["method"] for line in lines] == ["teacher", "none", "featkd"]
    teacher, plain, distilled = lines
    assert plain["student"] == distilled["student"] == ["retinanet_resnet50_fpn", None]
    assert distilled["teacher"]["shape"] == ["retinanet_resnet50_fpn_v2", None]
    assert distilled["teacher_ap"] == teacher["ap"]
    assert plain["teacher_ap"] is None
    assert plain["data"]["train_images"] == 5
    assert plain["data"] == distilled["data"]
    assert plain.keys() > {*study_coco.COLUMNS, "seconds", "device", "versions"}
    assert plain["seconds"] > 0
    suffixes = {file.name.partition(".")[2] for file in (tmp_path / "runs").iterdir()}
    assert suffixes == {"pt"}

    with monkeypatch.context() as idle:
        idle.setattr(study_coco, "perform", None)
        study_coco.main(arguments)
    assert lines_in(tmp_path) == lines
    study_coco.main(["tables", "--lines", str(tmp_path / "lines.jsonl")])
    table = (tmp_path / "tables.md").read_text()
    assert table.count("| retinanet_resnet50_fpn |") == 2


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = [*RETINANET, "--method", "featkd", "--steps", "2", "--checkpoint-every", "1"]
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    study_coco.main(command(coco, tmp_path / "whole", *more))
    kept = study_coco.save

    def save_and_die(*rest: Any) -> None:
        kept(*rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(study_coco, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            study_coco.main(command(coco, tmp_path / "killed", *more))
    assert [line["method"] for line in lines_in(tmp_path / "killed")] == ["teacher"]
    steps = []
    noted = study_coco.backward
    monkeypatch.setattr(study_coco, "backward", lambda *a: steps.append(a) or noted(*a))
    study_coco.main(command(coco, tmp_path / "killed", *more))
    assert len(steps) == 1
    (first,), (second,) = ((tmp_path / f / "runs").glob("*.pt") for f in ("whole", "killed"))
    whole, resumed = (torch.load(file, weights_only=True) for file in (first, second))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_loss_that_is_no_number_ends_the_run(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = {"classification": torch.tensor(float("nan"))}
    monkeypatch.setattr(study_coco, "backward", lambda *rest: (lost, {}))
    more = [*RETINANET, "--method", "none", "--steps", "1"]
    with pytest.raises(FloatingPointError, match="step 1 is nan"):
        study_coco.main(command(coco, tmp_path, *more))
    assert not (tmp_path / "lines.jsonl").exists()


def test_a_folder_that_is_not_coco_s_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--coco"):
        study_coco.main(command(tmp_path, tmp_path))


@pytest.mark.slow
def test_two_processes_perform_each_run_together_and_one_finds_nothing_left(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = command(coco, tmp_path, "--detector", "maskrcnn_resnet50_fpn", "--steps", "1")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, "-m", "benchmarks.study.coco", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    lines = lines_in(tmp_path)
    assert [line["method"] for line in lines] == ["teacher", "none", "featkd"]
    assert all(line["device"].startswith("2 x ") for line in lines)
    assert all(line["mask_ap"] is not None for line in lines)
    assert done.stdout.count(": AP ") == 3
    monkeypatch.setattr(study_coco, "perform", None)
    study_coco.main(arguments)
    assert lines_in(tmp_path) == lines
