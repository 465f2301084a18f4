"""A table is run once, and its teachers where they are missing."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.study import workers
from benchmarks.study.__main__ import main
from benchmarks.study.lines import COLUMNS
from benchmarks.study.plan import TABLES
from benchmarks.study.runs import identity, teacher_of
from benchmarks.study.tests.samples import DISTILLED, PLAIN, line_of
from benchmarks.study.workers import teachers_to_train


def test_a_teacher_is_trained_where_its_line_or_its_weights_are_missing(tmp_path: Path) -> None:
    teacher = teacher_of(DISTILLED)
    runs, lines = [PLAIN, DISTILLED, replace(DISTILLED, seed=4)], [line_of(teacher, 0.7)]
    assert teachers_to_train(runs, lines, tmp_path) == [teacher]
    (tmp_path / f"{teacher.name}.pt").touch()
    assert teachers_to_train(runs, lines, tmp_path) == []
    assert teachers_to_train(runs, [], tmp_path) == [teacher]
    assert teachers_to_train([PLAIN], [], tmp_path) == []


@pytest.mark.slow
def test_a_table_is_run_once_and_its_lines_become_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    lines_file = tmp_path / "results" / "lines.jsonl"
    broken = replace(DISTILLED, hyperparameters={"unknown": 1})
    table = [broken, PLAIN, DISTILLED]
    monkeypatch.setitem(TABLES, "attention", lambda lines: table)
    place = ["--lines", str(lines_file)]
    command = ["run", "attention", "--workers", "1", "--output", str(tmp_path / "runs"), *place]
    with pytest.raises(SystemExit, match="failed runs: 1"):
        main(command)
    assert f"{broken.name} failed" in capsys.readouterr().out
    table.remove(broken)
    written = lines_file.read_bytes()
    lines = {line["method"]: line for line in map(json.loads, written.splitlines())}
    assert list(lines) == ["teacher", "none", "featkd"]
    assert identity(lines["featkd"]) == DISTILLED.identity
    assert lines["featkd"]["teacher_ap"] == lines["teacher"]["ap"]
    assert lines["none"]["teacher_ap"] is lines["none"]["teacher"] is None
    assert lines["none"].keys() > {*COLUMNS, "seconds", "device", "versions"}
    left = {file.name for file in (tmp_path / "runs").glob("fcos-[!t]*")}
    assert left == {f"{PLAIN.name}.pt", f"{DISTILLED.name}.pt", f"{broken.name}.log"}

    with monkeypatch.context() as idle:
        idle.setattr(workers, "worker_pool", None)
        main(command)
    assert lines_file.read_bytes() == written

    main(["tables", *place])
    report = lines_file.with_name("tables.md").read_text()
    assert report.count("| fcos |") == 2
