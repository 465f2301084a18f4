"""Intervals, gains and settings as by hand."""

import math
from dataclasses import replace

import pytest

from benchmarks.study.cells import best, best_everywhere, interval, paired_gains, rows
from benchmarks.study.settings import CANDIDATES, PRESETS, RELATIONS
from benchmarks.study.tables import report
from benchmarks.study.tests.samples import DATA, DISTILLED, PLAIN, line_of, seeds


def test_an_interval_is_student_s() -> None:
    # mean 3, s = sqrt(2.5), t_{0.975, 4} = 2.776445
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3
    assert found.half == pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-6)
    assert found.text("+") == "+3.00 ± 1.96"
    assert interval([2.0]).text() == "2.00"


def test_a_gain_is_paired_by_seed() -> None:
    lines = seeds(PLAIN, 0.40, 0.60) + seeds(DISTILLED, 0.43, 0.62, 0.90, teacher_ap=0.8)
    plain, distilled = rows(lines)
    assert plain.ap.mean == pytest.approx(50)
    assert plain.gain is None
    assert distilled.ap.mean == pytest.approx(65)
    # 3 and 2 points: mean 2.5, s = sqrt(1/2), t_{0.975, 1} = 12.706205
    assert distilled.gain.mean == pytest.approx(2.5)
    assert distilled.gain.half == pytest.approx(12.706205 / 2, rel=1e-6)
    assert distilled.gain.n == 2
    assert distilled.teacher_ap == pytest.approx(80)
    # 43, 62, 90: s = sqrt(559), t_{0.975, 2} = 4.302653
    written = report(lines).splitlines()
    assert written[0].startswith("| detector | method | setting | AP | gain | n | AP50 |")
    assert "| fcos | featkd |  | 65.00 ± 58.73 | +2.50 ± 6.35 | 3 (2 paired) | 65.0 |" in written[3]
    assert "|  |" in written[2]


def test_a_gain_has_no_partner_of_other_data_steps_or_detector() -> None:
    other = [replace(PLAIN, steps=9), replace(PLAIN, data=replace(DATA, held_out_seed=9))]
    other.append(replace(PLAIN, detector="retinanet"))
    (distilled,) = [line_of(DISTILLED, 0.5)]
    assert paired_gains([distilled], [line_of(run, 0.1) for run in other]) == []


def test_the_setting_says_what_differs_and_nothing_else() -> None:
    lines = []
    for settings in RELATIONS:
        lines += seeds(replace(DISTILLED, hyperparameters=settings), 0.5, teacher_ap=0.7)
    found = [row.setting for row in rows(lines)]
    kinds = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
    assert found == [f"kind {kind}" for kind in kinds]
    wider = replace(DISTILLED, teacher=replace(DISTILLED.teacher, shape=(8, 1, 32)))
    longer = replace(DISTILLED, teacher=replace(DISTILLED.teacher, steps=3))
    lines = seeds(DISTILLED, 0.5) + seeds(wider, 0.5) + seeds(longer, 0.5)
    found = [row.setting for row in rows(lines)]
    teachers = ("6-1-32 of 2 steps", "8-1-32 of 2 steps", "6-1-32 of 3 steps")
    assert found == [f"teacher {teacher}" for teacher in teachers]


def test_a_setting_at_its_default_is_left_out_where_something_else_is_said() -> None:
    lines = []
    for settings in PRESETS:
        lines += seeds(replace(DISTILLED, hyperparameters=settings), 0.5)
    found = {row.setting for row in rows(lines)}
    assert {"NORMALIZED", "NORMALIZED, temperature 0.5", "ONE_STAGE"} <= found
    assert "NORMALIZED, beta 16, temperature 2, masks spread" in found
    assert len(found) == len(PRESETS)


def test_the_best_candidate_has_the_highest_mean_over_its_seeds() -> None:
    first, second, third = (
        replace(DISTILLED, hyperparameters=each) for each in CANDIDATES["featkd"][:3]
    )
    lines = seeds(PLAIN, 0.99, 0.99) + seeds(first, 0.1, 0.9)
    lines += seeds(second, 0.55, 0.56) + seeds(third, 0.5, 0.5)
    assert best(lines) == {("fcos", "featkd"): second.hyperparameters}


def test_the_best_everywhere_is_what_all_detectors_have_and_gain_most_by() -> None:
    lines = []
    for weight, by_detector in {1.0: (0.5, 0.6), 4.0: (0.9, 0.1), 16.0: (0.99, None)}.items():
        run = replace(DISTILLED, method="pkd", hyperparameters={"weight": weight})
        for detector, ap in zip(("fcos", "retinanet"), by_detector, strict=True):
            if ap is not None:
                lines += seeds(replace(run, detector=detector), ap, ap)
    assert best_everywhere(lines) == {"pkd": {"weight": 1.0}}
