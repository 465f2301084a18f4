"""The document that is here is that of the lines that are here."""

import shutil
from pathlib import Path

import pytest

from benchmarks.study import document
from benchmarks.study.lines import LINES, read_lines


def test_the_tables_are_those_of_the_lines(tmp_path: Path) -> None:
    lines = Path(shutil.copy(LINES, tmp_path))
    document.write(lines)
    assert (tmp_path / "tables.md").read_text() == LINES.with_name("tables.md").read_text()
    drawn = {file.name for file in tmp_path.glob("*.png")}
    plots = ("gains", "gains_pictures", "gains_sparse", "overview", "sensitivity", "teachers")
    assert drawn == {f"{name}.png" for name in plots}


def test_no_line_is_no_document(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no line of a run in"):
        document.write(tmp_path / "lines.jsonl")


def test_a_setting_at_both_taps_is_in_the_overview_with_all_its_seeds() -> None:
    lines = read_lines(LINES)
    found = document.lines_of(document.TABLES["sparse"](lines), lines)
    panel = document.bars_of(document.contestants(found, {}))
    assert panel["featkd, STANDARDIZED"].n == panel["pkd"].n == 5


def test_the_taps_are_told_of_a_setting_that_has_both() -> None:
    methods = ["featkd", "featkd, taps fpn", "pkd, taps fpn", "overhaul"]
    bars = [document.bar_of(method, methods) for method in methods]
    assert bars == ["featkd, stages", "featkd", "pkd", "overhaul"]
