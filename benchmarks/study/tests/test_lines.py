"""A run is known by its JSON; a line is whole or cut off, and the last one counts."""

import json
from dataclasses import replace
from pathlib import Path

from benchmarks.study.lines import append_line, lines_of, pending, read_lines
from benchmarks.study.runs import identity, teacher_of
from benchmarks.study.tests.samples import DATA, DISTILLED, PLAIN, line_of


def test_a_run_is_known_by_its_json_and_a_teacher_s_weights_by_its_training() -> None:
    assert identity(json.loads(json.dumps(line_of(DISTILLED, 0.5)))) == DISTILLED.identity
    assert replace(DISTILLED, seed=4).identity != DISTILLED.identity
    teacher = teacher_of(DISTILLED)
    elsewhere = replace(teacher, data=replace(DATA, held_out_seed=8))
    assert elsewhere.identity != teacher.identity
    assert elsewhere.name == teacher.name
    assert replace(teacher, steps=3).name != teacher.name


def test_a_half_written_line_is_cut_off_and_its_run_is_pending(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    assert read_lines(file) == []
    append_line(file, line_of(PLAIN, 0.4))
    whole = file.read_bytes()
    append_line(file, line_of(DISTILLED, 0.5, 0.7))
    file.write_bytes(file.read_bytes()[:-40])
    lines = read_lines(file)
    assert lines == [line_of(PLAIN, 0.4)]
    assert file.read_bytes() == whole
    assert pending([PLAIN, DISTILLED, DISTILLED], lines) == [DISTILLED]
    append_line(file, line_of(DISTILLED, 0.5, 0.7))
    assert pending([PLAIN, DISTILLED], read_lines(file)) == []


def test_the_last_of_two_lines_of_a_run_counts(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    for ap in (0.4, 0.6):
        append_line(file, line_of(PLAIN, ap))
    assert [line["ap"] for line in read_lines(file)] == [0.6]


def test_a_table_s_lines_are_in_the_order_of_its_runs() -> None:
    lines = [line_of(run, 0.5) for run in (DISTILLED, replace(PLAIN, seed=9), PLAIN)]
    found = lines_of([PLAIN, replace(PLAIN, seed=8), DISTILLED], lines)
    assert [line["method"] for line in found] == ["none", "featkd"]
