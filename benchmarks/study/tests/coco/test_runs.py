"""What is run on COCO."""

from dataclasses import replace
from inspect import signature
from typing import Any

import pytest
from torchvision.models import get_model_weights

import featkd
from benchmarks.study.coco import __main__ as job
from benchmarks.study.coco.runs import DETECTORS, SETTINGS, Data, file_name, learning_rate, planned
from benchmarks.study.runs import Run, teacher_of

DATA = Data(train_images=117266, held_out_images=5000, batch_size=16, size=800)


def asked_for(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[Run]:
    """What the command line asks for."""
    seen: list[Any] = []
    monkeypatch.setattr(job, "run_all", seen.append)
    job.main(["run", "--coco", "somewhere", *arguments])
    return planned(seen[0], DATA)


def test_each_distilled_run_has_its_plain_student_and_its_teacher_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = asked_for(monkeypatch, "--method", *SETTINGS, "--seeds", "0", "1")
    places = {run.identity: i for i, run in reversed(list(enumerate(runs)))}
    students = [run for run in runs if run.method != "teacher"]
    assert len({run.identity for run in students}) == len(students)
    assert len(students) == 2 * len(DETECTORS) * len(SETTINGS)
    for run in students:
        paired = replace(run, method="none", teacher=None, hyperparameters={})
        assert paired.identity in places
        if run.teacher:
            assert places[teacher_of(run).identity] < places[run.identity]


def test_a_run_names_builders_weights_and_everything_else_that_decides_its_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["--detector", "fasterrcnn_resnet50_fpn", "--method", "printed"]
    teacher, run = asked_for(monkeypatch, *arguments)
    assert run.student == ("fasterrcnn_resnet50_fpn", "IMAGENET1K_V1")
    assert run.teacher.shape == ("fasterrcnn_resnet50_fpn_v2", "COCO_V1")
    assert (teacher.method, teacher.steps) == ("teacher", 0)
    assert run.steps == 175_899  # 24 epochs of 117266 images
    assert run.hyperparameters["temperature"] == 0.1
    assert learning_rate(run) == 0.02
    halved = replace(run, data=replace(DATA, batch_size=8))
    assert learning_rate(halved) == 0.01
    other = asked_for(monkeypatch, *arguments, "--teacher", "retinanet_resnet50_fpn_v2")[1]
    random = asked_for(monkeypatch, *arguments, "--weights", "none")[1]
    assert random.student[1] is random.teacher.shape[1] is None
    assert len({each.identity for each in (run, halved, other, random)}) == 4
    assert len({file_name(each) for each in (run, halved, other, random)}) == 4


def test_featkd_s_setting_is_the_loss_s_own_default_at_the_fpn() -> None:
    own = signature(featkd.FeatureDistillationLoss).parameters["hyperparameters"].default
    settings = dict(SETTINGS["featkd"])
    assert settings.pop("taps") == "fpn"
    assert featkd.Hyperparameters(**settings) == own


def test_every_default_teacher_is_better_than_the_student_that_torchvision_has_released() -> None:
    def ap(builder: str) -> float:
        return get_model_weights(builder).DEFAULT.meta["_metrics"]["COCO-val2017"]["box_map"]

    for name, detector in DETECTORS.items():
        assert ap(detector.teacher) > ap(name)
