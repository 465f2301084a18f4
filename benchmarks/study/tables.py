"""Lines as tables in Markdown."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

from benchmarks.study.cells import (
    CELL,
    OTHER_METRICS,
    OURS,
    PLAIN,
    Interval,
    Row,
    cells,
    facts,
    interval,
    paired_gains,
    rows,
    setting,
    varying,
)
from benchmarks.study.runs import Line

HEADER = ("detector", "method", "setting", "AP", "gain", "n", *OTHER_METRICS.values(), "teacher AP")


def report(lines: Sequence[Line]) -> str:
    """A table in Markdown."""
    return table([HEADER, *map(entries, rows(lines))])


def table(body: list[tuple[str, ...]]) -> str:
    body.insert(1, ("---",) * len(body[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in body)


def entries(row: Row) -> tuple[str, ...]:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.1f}"

    gain, count = "", str(row.ap.n)
    if row.gain is not None:
        gain = row.gain.text("+")
        if row.gain.n < row.ap.n:
            count += f" ({row.gain.n} paired)"
    others = map(number, row.others.values())
    first = (row.detector, row.method, row.setting)
    return (*first, row.ap.text(), gain, count, *others, number(row.teacher_ap))


def contestants(
    lines: Sequence[Line], chosen: Mapping[tuple[str, str], dict[str, Any]]
) -> tuple[dict[str, list[Line]], dict[str, list[Line]]]:
    """By name the lines of featkd's settings, and those of the other methods.

    featkd's: the one `chosen` for each detector, and those that all detectors have.
    """
    ours = [line for line in lines if line["method"] == OURS]
    names = varying(ours)[OURS]
    tuned = [
        line for line in ours if line["hyperparameters"] == chosen.get((line["detector"], OURS))
    ]
    settings = {f"{OURS}, tuned for each detector": tuned} if tuned else {}
    detectors = {line["detector"] for line in ours}
    for everywhere in cells(ours, CELL[1:]):
        if {line["detector"] for line in everywhere} == detectors:
            name = ", ".join(filter(None, (OURS, setting(facts(everywhere[0]), names))))
            settings[name] = everywhere
    others: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        if line["method"] not in (OURS, "teacher"):
            others[line["method"]].append(line)
    return settings, others


def differences(lines: Iterable[Line], rivals: Iterable[Line]) -> dict[str, Interval]:
    """Of AP, paired by seed; by detector, and `"mean"` over them, whose interval is over seeds."""
    lines, rivals = list(lines), list(rivals)
    by_detector, by_seed = cells(lines, ("detector",)), cells(lines, ("seed",))
    gains = {own[0]["detector"]: paired_gains(own, rivals) for own in by_detector}
    each = [paired_gains(own, rivals) for own in by_seed]
    gains["mean"] = [mean(found) for found in each if len(found) == len(by_detector)]
    return {name: interval(found) for name, found in gains.items() if found}


def gains_by_method(
    ours: Mapping[str, list[Line]], others: Mapping[str, list[Line]]
) -> dict[str, dict[str, Interval]]:
    """Over the plain student, by detector and in the mean; by name of what is compared."""
    found = {
        name: differences(lines, others[PLAIN])
        for name, lines in (*ours.items(), *others.items())
        if name != PLAIN
    }
    places = {place for gains in found.values() for place in gains}
    for gains in found.values():
        if len(gains) < len(places):  # the mean over some detectors is none to compare
            del gains["mean"]
    return found


def gains_table(ours: Mapping[str, list[Line]], others: Mapping[str, list[Line]]) -> str:
    """A table: AP of each less the plain student's."""
    found = gains_by_method(ours, others)
    columns = list(dict.fromkeys(column for each in found.values() for column in each))
    return compared("method", columns, list(found.items()))


def comparison(ours: Mapping[str, list[Line]], others: Mapping[str, list[Line]]) -> str:
    """A table: AP of each featkd setting less that of every other method."""
    found = [
        (f"{name}: {place}", {rival: each.get(place) for rival, each in by_rival.items()})
        for name, lines in ours.items()
        for by_rival in [{rival: differences(lines, other) for rival, other in others.items()}]
        for place in next(iter(by_rival.values()))
    ]
    return compared("setting", list(others), found)


def against_first(lines: Iterable[Line]) -> str:
    """A table: AP of each featkd setting less that of the first, paired by seed."""
    ours = [line for line in lines if line["method"] == OURS]
    names = varying(ours)[OURS]
    first, *others = cells(ours)
    body = [
        (setting(facts(cell[0]), names), interval(paired_gains(cell, first)).text("+"))
        for cell in others
    ]
    return table([("setting", "AP less the first setting's"), *body])


def compared(
    first: str, columns: Sequence[str], found: Iterable[tuple[str, Mapping[str, Interval | None]]]
) -> str:
    body = [
        (name, *(each.text("+") if (each := values.get(column)) else "" for column in columns))
        for name, values in found
    ]
    return table([(first, *columns), *body])
