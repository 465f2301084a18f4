"""Comparisons of settings and methods as by hand."""

from dataclasses import replace

from benchmarks.study.cells import interval
from benchmarks.study.settings import CHOICES, FPN_OUTPUTS, TWO_STAGE_AT_FPN
from benchmarks.study.tables import against_first, comparison, contestants, gains_table
from benchmarks.study.tests.samples import DISTILLED, PLAIN, seeds


def test_settings_are_compared_with_the_first_seed_by_seed() -> None:
    first, sharper = (
        replace(DISTILLED, hyperparameters=settings) for settings in (TWO_STAGE_AT_FPN, CHOICES[2])
    )
    lines = seeds(PLAIN, 0.1, 0.2) + seeds(first, 0.3, 0.5) + seeds(sharper, 0.2, 0.2)
    assert against_first(lines).splitlines()[2:] == [
        f"| TWO_STAGE | {interval([-10, -30]).text('+')} |"
    ]


def test_the_comparison_is_paired_by_seed_and_detector() -> None:
    rival = replace(DISTILLED, method="pkd", hyperparameters={"weight": 1.0})
    fcos = seeds(PLAIN, 0.3, 0.4) + seeds(rival, 0.5, 0.5) + seeds(DISTILLED, 0.6, 0.6)
    lines = fcos + [
        line | {"detector": "retinanet", "ap": line["ap"] + shift}
        for line in fcos
        for shift in [0.1 if line["method"] == "featkd" else 0.0]
    ]
    rivals = contestants(lines, {})
    found = [row.split(" | ") for row in comparison(*rivals).splitlines()]
    assert found[0] == ["| setting", "none", "pkd |"]
    # 30 and 20 points: mean 25, s = sqrt(50), t_{0.975, 1} = 12.706205
    assert found[2] == ["| featkd: fcos", "+25.00 ± 63.53", "+10.00 ± 0.00 |"]
    assert found[3] == ["| featkd: retinanet", "+35.00 ± 63.53", "+20.00 ± 0.00 |"]
    assert found[4] == ["| featkd: mean", "+30.00 ± 63.53", "+15.00 ± 0.00 |"]
    gains = [row.split(" | ") for row in gains_table(*rivals).splitlines()]
    assert gains[0] == ["| method", "fcos", "retinanet", "mean |"]
    assert gains[2] == ["| featkd", "+25.00 ± 63.53", "+35.00 ± 63.53", "+30.00 ± 63.53 |"]
    assert gains[3] == ["| pkd", "+15.00 ± 63.53", "+15.00 ± 63.53", "+15.00 ± 63.53 |"]
    # A method that a detector lacks has no mean to be compared.
    one_less = [line for line in lines if (line["detector"], line["method"]) != ("fcos", "pkd")]
    gains = [row.split(" | ") for row in gains_table(*contestants(one_less, {})).splitlines()]
    assert gains[3] == ["| pkd", "", "+15.00 ± 63.53", " |"]
    # A seed that a detector lacks is in no mean over the detectors.
    without = [line for line in lines if (line["detector"], line["seed"]) != ("fcos", 1)]
    fewer = comparison(*contestants(without, {}))
    assert "| featkd: mean | +35.00 | +15.00 |" in fewer


def test_the_contestants_are_what_all_detectors_have_and_what_was_chosen_for_each() -> None:
    elsewhere = replace(DISTILLED, detector="retinanet")
    alone = replace(elsewhere, hyperparameters=FPN_OUTPUTS)
    plain = seeds(PLAIN, 0.4) + seeds(replace(PLAIN, detector="retinanet"), 0.4)
    lines = plain + seeds(DISTILLED, 0.5) + seeds(elsewhere, 0.5) + seeds(alone, 0.6)
    chosen = {("fcos", "featkd"): DISTILLED.hyperparameters}
    chosen["retinanet", "featkd"] = FPN_OUTPUTS
    ours, others = contestants(lines, chosen)
    assert [[line["ap"] for line in each] for each in ours.values()] == [[0.5, 0.6], [0.5, 0.5]]
    assert next(iter(ours)) == "featkd, tuned for each detector"
    assert others == {"none": plain}
