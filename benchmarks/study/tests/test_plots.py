"""Sweeps hold one hyperparameter's values; plots are drawn of little."""

from dataclasses import replace
from math import nan
from pathlib import Path

from benchmarks.study.cells import Interval
from benchmarks.study.plots import (
    gains_plot,
    overview_plot,
    sensitivity_plot,
    sweeps,
    teachers_plot,
)
from benchmarks.study.settings import SENSITIVITY
from benchmarks.study.tables import contestants
from benchmarks.study.tests.samples import DISTILLED, PLAIN, seeds


def test_a_sweep_changes_one_hyperparameter_alone() -> None:
    lines = []
    for settings in SENSITIVITY:
        lines += seeds(replace(DISTILLED, hyperparameters=settings), 0.5)
    found = sweeps(lines)
    values = {name: [value for value, _ in points] for name, points in found.items()}
    assert values == {
        "alpha": [1.75e-5, 7e-5, 28e-5],
        "beta": [1e-3, 4e-3, 16e-3],
        "gamma": [1.75e-5, 7e-5, 28e-5],
        "temperature": [0.5, 1.0, 2.0, 4.0, 16.0],
    }
    assert [cell[0]["hyperparameters"]["beta"] for _, cell in found["beta"]] == values["beta"]


def test_the_plots_are_drawn_even_of_single_seeds(tmp_path: Path) -> None:
    lines = seeds(PLAIN, 0.4) + seeds(DISTILLED, 0.5, teacher_ap=0.7)
    gains_plot(*contestants(lines, {}), tmp_path / "gains.png")
    teachers_plot(lines, tmp_path / "teachers.png")
    overview_plot({"scenes": {"pkd": Interval(3.0, nan, 1)}}, tmp_path / "overview.png")
    swept = seeds(PLAIN, 0.4)
    for settings in SENSITIVITY:
        swept += seeds(replace(DISTILLED, hyperparameters=settings), 0.5)
    sensitivity_plot(swept, tmp_path / "sensitivity.png")
    for name in ("gains.png", "teachers.png", "sensitivity.png", "overview.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
