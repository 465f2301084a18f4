"""A run: its start, its taps, its resumption."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import featkd
from benchmarks.study import train
from benchmarks.study.cells import facts, rows
from benchmarks.study.document import as_mask_line
from benchmarks.study.lines import COLUMNS, MASK_COLUMNS
from benchmarks.study.remembered import RememberedTeacher, recall, remembered
from benchmarks.study.runs import Teacher, identity, teacher_of
from benchmarks.study.settings import CANDIDATES, NORMALIZED, settings_of
from benchmarks.study.tests.samples import CPU, DISTILLED, PLAIN, line_of
from benchmarks.study.train import new_model, perform
from examples.detection import training
from examples.detection.batches import collate
from examples.detection.deeppcb import DeepPCB
from examples.detection.detectors import BACKBONES
from examples.detection.lite0 import LITE0, lite0
from tests.helpers.deeppcb_folder import write_deeppcb
from tests.helpers.pasted_folder import write_pasted


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With the teacher's weights, as they start."""
    teacher = teacher_of(DISTILLED)
    weights = new_model(teacher, tmp_path, CPU).student.state_dict()
    torch.save(weights, tmp_path / f"{teacher.name}.pt")
    return tmp_path


def test_the_same_seed_gives_every_method_the_same_student(folder: Path) -> None:
    start = new_model(PLAIN, folder, CPU).student.state_dict()
    for method, (hyperparameters, *_) in CANDIDATES.items():
        run = replace(DISTILLED, method=method, hyperparameters=hyperparameters)
        model = new_model(run, folder, CPU)
        state = model.student.state_dict()
        assert list(state) == list(start)
        assert all(torch.equal(state[name], start[name]) for name in start)
    other = new_model(replace(PLAIN, seed=4), folder, CPU).student.state_dict()
    assert not torch.equal(other["backbone.body.conv1.weight"], start["backbone.body.conv1.weight"])


def test_adapters_are_drawn_by_the_run_s_seed(folder: Path) -> None:
    runs = DISTILLED, DISTILLED, replace(DISTILLED, seed=4)
    first, again, other = (new_model(run, folder, CPU).loss.state_dict() for run in runs)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_the_fpn_s_outputs_can_be_tapped(folder: Path) -> None:
    run = replace(DISTILLED, hyperparameters=settings_of(NORMALIZED) | {"taps": "fpn"})
    model = new_model(run, folder, CPU)
    assert model.loss.channels == dict.fromkeys(("p2", "p3", "p4"), (32, 32))
    settings = {"weight": 1.0, "taps": "fpn"}
    other = replace(run, method="fgfi", steps=1, hyperparameters=settings)
    assert perform(other, folder, "cpu")["hyperparameters"] == settings


def test_a_remembered_teacher_says_what_the_detector_finds_in_the_same_scene(
    tmp_path: Path,
) -> None:
    run = replace(DISTILLED, data=replace(DISTILLED.data, name="sparse"))
    teacher = new_model(teacher_of(run), tmp_path, CPU).student
    scenes = train.training_data(run)
    paths = {"c3": "backbone.body.layer2", "p1": "backbone[1]"}
    kept = {"data": scenes, "seed": run.seed, "folder": tmp_path, "name": "teacher"}
    features = remembered(teacher, paths, **kept)
    images, targets = collate([scenes[index] for index in (11, 4)])
    with featkd.FeatureTap(RememberedTeacher(features), ["levels.c3", "levels.p1"]) as tap:
        recall(tap.model, images, targets)
        found = tap.pop()
    with featkd.FeatureTap(teacher.eval(), paths) as tap, torch.no_grad():
        teacher(images)
        expected = tap.pop()
    for name, each in expected.items():
        # bfloat16 has 8 bits, and errors of several layers add up.
        error = (found[f"levels.{name}"] - each).norm() / each.norm()
        assert error < 0.02
    file = next(tmp_path.glob("features-*.pt"))
    file.rename(tmp_path / "other")
    torch.save(dict.fromkeys(paths, torch.zeros(())), file)
    assert remembered(teacher, paths, **kept)["c3"] == 0


@pytest.mark.parametrize("method", ["featkd", "overhaul"])
def test_a_run_on_sparse_scenes_has_a_line(tmp_path: Path, method: str) -> None:
    data = replace(DISTILLED.data, name="sparse")
    settings = CANDIDATES[method][1]
    run = replace(DISTILLED, method=method, data=data, hyperparameters=settings)
    perform(teacher_of(run), tmp_path, "cpu")
    assert perform(run, tmp_path, "cpu")["data"]["name"] == "sparse"


def test_a_run_on_real_pictures_takes_the_folder_s_two_lists(tmp_path: Path) -> None:
    pictures = write_deeppcb(tmp_path / "pictures")
    data = replace(DISTILLED.data, name="deeppcb", held_out_seed=0)
    run = replace(DISTILLED, data=data, hyperparameters=CANDIDATES["featkd"][1])
    folders = {"deeppcb": pictures}
    assert len(train.training_data(run, folders)) == 12
    assert {board.picture.name for board in train.held_out_data(run, folders).boards} == {
        board.picture.name for board in DeepPCB(pictures, "test").boards
    }
    perform(teacher_of(run), tmp_path, "cpu", folders)
    line = perform(run, tmp_path, "cpu", folders)
    assert facts(line)["scenes"] == "deeppcb"
    # One file for all seeds: the pictures are the same.
    perform(replace(run, seed=7), tmp_path, "cpu", folders)
    assert len(list(tmp_path.glob("features-*.pt"))) == 1


@pytest.mark.slow
def test_a_run_on_pasted_pictures_is_taught_by_imagenet_s_features(tmp_path: Path) -> None:
    folders = {"pasted": write_pasted(tmp_path / "pictures")}
    data = replace(DISTILLED.data, name="pasted", train_images=8)
    teacher = Teacher(LITE0, steps=1)
    settings = {"weight": 4.0, "taps": "fpn"}
    run = replace(
        DISTILLED, data=data, teacher=teacher, method="pkd", hyperparameters=settings, steps=1
    )
    perform(teacher_of(run), tmp_path, "cpu", folders)
    detector = train.trained(teacher_of(run), tmp_path)
    assert torch.equal(detector.backbone.body.stem[0].weight, lite0(imagenet=True).stem[0].weight)
    line = perform(run, tmp_path, "cpu", folders)
    assert facts(line)["teacher"] == "efficientnet_lite0 of 1 steps"
    new_model(replace(run, seed=7), tmp_path, CPU, folders)
    (features,) = tmp_path.glob("features-*.pt")
    shapes = [each.shape for each in torch.load(features, weights_only=True).values()]
    assert shapes == [(8, 64, 80, 80), (8, 64, 40, 40), (8, 64, 20, 20)]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_student_of_another_backbone_is_tapped_at_the_teacher_s_strides(
    folder: Path, backbone: str
) -> None:
    run = replace(DISTILLED, student=backbone)
    model = new_model(run, folder, CPU)
    assert [theirs for _, theirs in model.loss.channels.values()] == [12, 24, 48]
    assert facts(line_of(run, 0.5))["student"] == backbone


def test_a_line_of_mask_r_cnn_has_the_masks_metrics_and_becomes_a_row_of_them(
    tmp_path: Path,
) -> None:
    line = perform(replace(PLAIN, detector="mask_rcnn", steps=1), tmp_path, "cpu")
    assert {*MASK_COLUMNS} <= line.keys()
    line |= {"mask_ap": 0.25, "mask_ap50": 0.5, "mask_ap75": 0.125, "teacher_ap": None}
    (row,) = rows([as_mask_line(line)])
    assert row.ap.mean == 25
    assert row.others == {"ap50": 50, "ap75": 12.5, "ap_s": None, "ap_m": None, "ap_l": None}


def test_a_killed_run_goes_on_from_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = perform(PLAIN, tmp_path, "cpu")
    (tmp_path / f"{PLAIN.name}.checkpoint.pt").unlink()
    (tmp_path / f"{PLAIN.name}.pt").unlink()

    def kill(*rest: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(train, "evaluate", kill)
        with pytest.raises(KeyboardInterrupt):
            perform(PLAIN, tmp_path, "cpu")
    # Both steps are done: nothing is trained again.
    monkeypatch.setattr(training, "backward", kill)
    resumed = perform(PLAIN, tmp_path, "cpu")
    assert [resumed[name] for name in COLUMNS] == [whole[name] for name in COLUMNS]
    assert identity(resumed) == PLAIN.identity
    assert (tmp_path / f"{PLAIN.name}.pt").exists()
