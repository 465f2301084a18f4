"""The distillation's gradient while a student trains: at the steps named, and nothing changed."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.study import gradients
from benchmarks.study.gradients import Watched
from benchmarks.study.runs import teacher_of
from benchmarks.study.settings import FPN, STANDARDIZED
from benchmarks.study.tests.samples import CPU, DISTILLED
from benchmarks.study.train import new_model, perform, settings_for, training_data
from examples.detection.training import train


def test_a_watched_run_is_the_run_with_a_ratio_at_the_steps_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = replace(DISTILLED, hyperparameters=STANDARDIZED | FPN)
    weights = new_model(teacher_of(run), tmp_path, CPU).student.state_dict()
    torch.save(weights, tmp_path / f"{teacher_of(run).name}.pt")
    monkeypatch.setattr(gradients, "AFTER", (1,))
    watched = Watched(new_model(run, tmp_path, CPU))
    data = training_data(run)
    train("watched", watched, data, data, run.steps, settings_for(run, CPU), tmp_path / "own.pt")
    assert list(watched.ratios) == [1]
    assert watched.ratios[1] > 0
    perform(run, tmp_path, "cpu")
    expected = torch.load(tmp_path / f"{run.name}.pt", weights_only=True)
    found = watched.student.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
