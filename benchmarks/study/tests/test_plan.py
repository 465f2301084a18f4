"""The tables' runs are paired, and nothing reported has chosen a setting."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.study.__main__ import main
from benchmarks.study.methods import METHODS
from benchmarks.study.plan import (
    PASTED_SCENES,
    TABLES,
    main_runs,
    pasted_runs,
    picture_runs,
    sparse_runs,
    tap_runs,
    tune_runs,
)
from benchmarks.study.runs import Teacher, teacher_of
from benchmarks.study.settings import (
    ATTENTION,
    CANDIDATES,
    NEAR_BOXES,
    PRESETS,
    RELATIONS,
    SENSITIVITY,
    UNTUNED,
    settings_of,
)
from benchmarks.study.tests.samples import PLAIN, line_of
from benchmarks.study.variants import split
from examples.detection.lite0 import LITE0_SHORT

CHOOSING = {"tune", "taps", "presets", "open", "mask"}


def chosen_lines() -> list[dict[str, Any]]:
    """Weight 4 is the best on FCOS; the FPN's outputs on Faster R-CNN, the backbone's on FCOS."""
    lines = []
    for run in tune_runs([]):
        lines.append(line_of(run, 0.6 if run.hyperparameters.get("weight") == 4.0 else 0.1))
    for run in tap_runs(lines):
        fpn = run.hyperparameters.get("taps") == "fpn"
        lines.append(line_of(run, 0.6 if fpn == (run.detector == "faster_rcnn") else 0.1))
    return lines


@pytest.mark.parametrize("table", sorted(TABLES.keys() - {"quick"}))
def test_every_distilled_run_has_a_plain_student_beside_it(table: str) -> None:
    runs = TABLES[table](chosen_lines())
    assert len({run.identity for run in runs}) == len(runs)
    plain = {run.identity for run in runs if run.method == "none"}
    for run in runs:
        paired = replace(run, method="none", teacher=None, hyperparameters={})
        assert paired.identity in plain


def test_every_method_is_tuned_with_as_many_candidates() -> None:
    assert set(CANDIDATES) == {"featkd", *METHODS}
    assert {len(candidates) for candidates in CANDIDATES.values()} == {5}


def test_the_main_table_wants_the_tables_before_it_and_takes_the_best_of_them() -> None:
    lines = chosen_lines()
    with pytest.raises(LookupError, match="`run tune` finished first: 1 of its runs"):
        main_runs([*lines[:1], *lines[2:]])
    with pytest.raises(LookupError, match="`run taps` finished first: 1 of its runs"):
        main_runs(lines[:-1])
    runs = main_runs(lines)
    # The recommended preset is in Faster R-CNN's rows twice, at both taps.
    assert len(runs) == (15 + 14 + 14) * 5
    ours = [run.hyperparameters for run in runs if run.method == "featkd"]
    for everywhere in UNTUNED:
        assert ours.count(everywhere) >= 3 * 5
    others = {run.method: run.hyperparameters for run in runs if run.detector == "faster_rcnn"}
    assert others["pkd"] == {"weight": 4.0, "taps": "fpn"}
    assert "taps" not in others["overhaul"]
    others = {run.method: run.hyperparameters for run in runs if run.detector == "retinanet"}
    assert others["pkd"] == {"weight": 4.0}


def test_on_sparse_scenes_a_method_has_one_setting_for_all_detectors() -> None:
    lines = chosen_lines()
    with pytest.raises(LookupError, match="`run taps` finished first: 1 of its runs"):
        sparse_runs(lines[:-1])
    runs = sparse_runs(lines)
    assert len(runs) == (1 + 7 + 6) * 3 * 5
    assert {run.data.name for run in runs} == {"sparse"}
    for method in METHODS:
        settings = [run.hyperparameters for run in runs if run.method == method]
        assert all(each == settings[0] for each in settings)
    # At the backbone's stages two of three detectors are better in the made-up lines.
    assert {tuple(run.hyperparameters) for run in runs if run.method == "pkd"} == {("weight",)}


def test_on_real_pictures_the_settings_are_those_of_sparse_scenes_and_one_told_boxes() -> None:
    lines = chosen_lines()
    runs, sparse = picture_runs(lines), sparse_runs(lines)
    assert len(runs) == (1 + 8 + 6) * 3 * 5
    assert {run.data.name for run in runs} == {"deeppcb"}
    settings, known = (
        {(run.method, str(run.hyperparameters)) for run in table} for table in (runs, sparse)
    )
    assert known < settings
    assert settings - known == {("featkd", str(NEAR_BOXES))}


def test_on_pasted_pictures_four_methods_have_one_teacher_of_imagenet_s_features() -> None:
    runs = pasted_runs(chosen_lines())
    short = [run for run in runs if run.student == LITE0_SHORT]
    assert len(runs) == 4 * 5 + len(short) == 4 * 5 + 2 * 3
    assert {(run.detector, run.data) for run in runs} == {("fcos", PASTED_SCENES)}
    assert {run.method for run in runs} == {"none", "featkd", "pkd", "fitnets"}
    assert {run.method for run in short} == {"none", "featkd"}
    assert {teacher_of(run).name for run in runs if run.teacher} == {
        teacher_of(replace(runs[1], seed=9)).name
    }


def test_a_table_of_pictures_wants_their_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = replace(PLAIN, data=PASTED_SCENES)
    monkeypatch.setitem(TABLES, "pasted", lambda lines: [run])
    command = ["run", "pasted", "--lines", str(tmp_path / "lines.jsonl")]
    with pytest.raises(SystemExit, match=r"^pasted wants --pasted DIR, which python -m .* makes$"):
        main([*command, "--deeppcb", str(tmp_path)])


def test_at_the_fpn_a_baseline_that_gains_there_is_tried_with_three_weights() -> None:
    tried: dict[str, set[float]] = {}
    for run in tap_runs(chosen_lines()):
        if run.hyperparameters.get("taps") == "fpn":
            tried.setdefault(run.method, set()).add(run.hyperparameters.get("weight"))
    assert tried.pop("featkd") == {None}
    assert tried.pop("at") == {4.0}
    assert tried.pop("fgfi") == {0.0005, 0.002, 0.008}
    assert tried == {name: {1.0, 4.0, 16.0} for name in ("fitnets", "cwd", "pkd")}


def test_nothing_reported_is_on_seeds_or_scenes_that_chose_a_setting() -> None:
    lines = chosen_lines()
    runs = {name: TABLES[name](lines) for name in TABLES.keys() - {"quick"}}
    choosing = [run for name in CHOOSING for run in runs.pop(name)]
    reporting = [run for each in runs.values() for run in each]
    reported, chosen = ({run.seed for run in each} for each in (reporting, choosing))
    assert not reported & chosen
    assert Teacher().seed not in reported | chosen
    held_out = [{run.data.held_out_seed for run in each} for each in (reporting, choosing)]
    assert not held_out[0] & held_out[1]


def test_a_line_leaves_out_defaults_alone() -> None:
    for settings in (*RELATIONS, *ATTENTION, *SENSITIVITY, *PRESETS):
        whole, variants = split(settings)
        assert settings_of(whole) | variants == settings
    assert ATTENTION[0]["masked_attention"] == "spatial"
    assert "masked_attention" not in ATTENTION[2]
