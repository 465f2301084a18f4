"""From the lines of `runs.py` to tables and plots: pure functions of a list of lines.

A cell of a table is what differs in nothing but its seed. AP is in points, 0 to 100.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from math import isfinite, nan, sqrt
from pathlib import Path
from statistics import mean, mode, stdev
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from scipy.stats import t

import featkd
from benchmarks.study.variants import NAMES, split

Line = dict[str, Any]
PLAIN, OURS = "none", "featkd"
VARIANTS = dict.fromkeys(NAMES, "") | {"taps": "stages"}
DEFAULTS = VARIANTS | {
    each.name: each.default
    for each in fields(featkd.Hyperparameters)
    if each.default is not MISSING
}
HYPERPARAMETERS = {each.name for each in fields(featkd.Hyperparameters)}
PRESETS = {
    name: asdict(value)
    for name, value in vars(featkd).items()
    if isinstance(value, featkd.Hyperparameters)
}
OTHER_METRICS = {"ap50": "AP50", "ap75": "AP75", "ap_s": "AP_S", "ap_m": "AP_M", "ap_l": "AP_L"}
CELL = ("detector", "student", "teacher", "method", "steps", "data", "hyperparameters")
HEADER = ("detector", "method", "setting", "AP", "gain", "n", *OTHER_METRICS.values(), "teacher AP")


class Interval(NamedTuple):
    """Mean of `n` values and half the width of its 95 % interval, `nan` for a single value."""

    mean: float
    half: float
    n: int

    def text(self, sign: str = "-") -> str:
        half = f" ± {self.half:.2f}" if isfinite(self.half) else ""
        return f"{self.mean:{sign}.2f}{half}"


@dataclass(frozen=True)
class Row:
    """One cell over its seeds; `gain` is the paired one over the plain student's."""

    detector: str
    method: str
    setting: str
    ap: Interval
    gain: Interval | None
    others: dict[str, float | None]
    teacher_ap: float | None


def interval(values: Sequence[float]) -> Interval:
    """By Student's t: `t_{0.975, n - 1} s / sqrt(n)`."""
    n = len(values)
    half = float(t.ppf(0.975, n - 1)) * stdev(values) / sqrt(n) if n > 1 else nan
    return Interval(mean(values), half, n)


def key(line: Line, *names: str) -> str:
    return json.dumps([line[name] for name in names], sort_keys=True)


def cells(lines: Iterable[Line], names: Sequence[str] = CELL) -> list[list[Line]]:
    """Lines that agree in `names`, by default in all but the seed; in order of their first."""
    groups: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        groups[key(line, *names)].append(line)
    return list(groups.values())


def paired_gains(lines: Iterable[Line], plain: Iterable[Line]) -> list[float]:
    """AP of each line less that of the plain student of its seed, where there is one.

    Or less that of another method's.
    """
    names = ("detector", "student", "seed", "steps", "data")
    partners = {key(line, *names): line["ap"] for line in plain}
    pairs = [(line["ap"], partners.get(key(line, *names))) for line in lines]
    return [100 * (ap - partner) for ap, partner in pairs if partner is not None]


def facts(line: Line) -> dict[str, Any]:
    """What a cell may differ in beside detector and method."""
    shapes = {"student": line["student"], "teacher": line["teacher"] and line["teacher"]["shape"]}
    # A line leaves out what is at its default.
    settings = {"taps": "stages"} | line["hyperparameters"]
    if line["method"] == OURS:
        hyperparameters, variants = split(settings)
        settings = asdict(hyperparameters) | VARIANTS | variants
    shown = {
        name: shape if isinstance(shape, str) else "-".join(map(str, shape))
        for name, shape in shapes.items()
        if shape
    }
    if line["teacher"]:
        shown["teacher"] += f" of {line['teacher']['steps']} steps"
    return shown | settings


def varying(lines: Iterable[Line]) -> dict[str, list[str]]:
    """By method, the names of the facts in which its cells differ."""
    by_method: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        by_method[line["method"]].append(facts(line))
    return {
        method: [name for name in found[0] if any(each[name] != found[0][name] for each in found)]
        for method, found in by_method.items()
    }


def rows(lines: Sequence[Line]) -> list[Row]:
    lines = [line for line in lines if line["method"] != "teacher"]
    plain = [line for line in lines if line["method"] == PLAIN]
    names = varying(lines)
    result = []
    for cell in cells(lines):
        first = cell[0]
        method, own = first["method"], facts(first)
        gains = [] if method == PLAIN else paired_gains(cell, plain)
        result.append(
            Row(
                first["detector"],
                method,
                setting(own, names[method]),
                interval([100 * line["ap"] for line in cell]),
                interval(gains) if gains else None,
                {name: mean_of(cell, name) for name in OTHER_METRICS},
                mean_of(cell, "teacher_ap"),
            )
        )
    return sorted(result, key=lambda row: row.detector)


def setting(own: dict[str, Any], names: list[str]) -> str:
    """Of what varies, what is not at its default, or else all of it.

    Or featkd's nearest preset and what differs from it, where that is shorter.
    """
    changed = [name for name in names if own[name] != DEFAULTS.get(name)] or names
    texts = [listed(own, changed)]
    if own.keys() >= HYPERPARAMETERS and HYPERPARAMETERS & set(names):
        others = [name for name in changed if name not in HYPERPARAMETERS]
        for preset, values in PRESETS.items():
            differing = [name for name, value in values.items() if own[name] != value]
            texts.append(", ".join(filter(None, [preset, listed(own, differing + others)])))
    return min(texts, key=len)


def listed(own: dict[str, Any], names: Iterable[str]) -> str:
    return ", ".join(f"{name} {text(own[name])}" for name in names)


def text(value: float | bool | str) -> str:
    return f"{value:g}" if type(value) is float else str(value)


def mean_of(lines: Iterable[Line], name: str) -> float | None:
    values = [100 * line[name] for line in lines if line[name] is not None]
    return mean(values) if values else None


def best(lines: Iterable[Line]) -> dict[tuple[str, str], dict[str, Any]]:
    """By detector and method, the hyperparameters of the highest mean AP."""
    chosen: dict[tuple[str, str], tuple[float, dict[str, Any]]] = {}
    for cell in cells(lines):
        place = cell[0]["detector"], cell[0]["method"]
        ap = mean(line["ap"] for line in cell)
        if cell[0]["hyperparameters"] and (place not in chosen or ap > chosen[place][0]):
            chosen[place] = ap, cell[0]["hyperparameters"]
    return {place: hyperparameters for place, (_, hyperparameters) in chosen.items()}


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
            settings[f"{OURS}, {setting(facts(everywhere[0]), names)}"] = everywhere
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


def gains_table(ours: Mapping[str, list[Line]], others: Mapping[str, list[Line]]) -> str:
    """A table: AP of each less the plain student's."""
    found = {
        name: differences(lines, others[PLAIN])
        for name, lines in (*ours.items(), *others.items())
        if name != PLAIN
    }
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


def sweeps(lines: Iterable[Line]) -> dict[str, list[tuple[Any, list[Line]]]]:
    """By name of a hyperparameter its values, ascending, and their cells.

    The others stand at what most cells have.
    """
    lines = [line for line in lines if line["method"] == OURS]
    found = [(facts(cell[0]), cell) for cell in cells(lines)]
    names = varying(lines).get(OURS, [])
    usual = {name: mode(own[name] for own, _ in found) for name in names}
    return {
        name: sorted(
            (
                (own[name], cell)
                for own, cell in found
                if all(own[other] == usual[other] for other in names if other != name)
            ),
            key=lambda point: point[0],
        )
        for name in names
    }


def sensitivity_plot(lines: Sequence[Line], file: Path) -> None:
    """AP over each hyperparameter, the others fixed; the plain student's as a line."""
    found = sweeps(lines)
    plain = interval([100 * line["ap"] for line in lines if line["method"] == PLAIN])
    figure = Figure(figsize=(9, 3), layout="constrained")
    grid = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, (name, points) in zip(grid, found.items(), strict=True):
        aps = [interval([100 * line["ap"] for line in cell]) for _, cell in points]
        values = [value for value, _ in points]
        means, halves = [each.mean for each in aps], [each.half for each in aps]
        axes.errorbar(values, means, halves, fmt="o-", capsize=3)
        axes.axhline(plain.mean, color="gray", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xlabel(name)
    grid[0].set_ylabel("AP; gray: the plain student's")
    figure.savefig(file, dpi=120)


def gains_plot(
    ours: Mapping[str, list[Line]], others: Mapping[str, list[Line]], file: Path
) -> None:
    """Gains over the plain student with their intervals; featkd's as squares."""
    series = [
        (name, marker, differences(lines, others[PLAIN]))
        for marker, group in (("s", ours), ("o", others))
        for name, lines in group.items()
        if name != PLAIN
    ]
    places = list(dict.fromkeys(place for _, _, gains in series for place in gains))
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    for index, (name, marker, gains) in enumerate(series):
        shift = 0.7 * ((index + 0.5) / len(series) - 0.5)
        at = [places.index(place) + shift for place in gains]
        means, halves = (
            [each.mean for each in gains.values()],
            [each.half for each in gains.values()],
        )
        axes.errorbar(at, means, halves, fmt=marker, capsize=3, label=name)
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.set_xticks(range(len(places)), places)
    axes.set_ylabel("gain over the plain student, AP points")
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(file, dpi=120)


def teachers_plot(lines: Sequence[Line], file: Path) -> None:
    """A student's AP over its teacher's; the plain student's as a line."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for index, row in enumerate(rows(lines)):
        colour = f"C{index}"
        if row.teacher_ap is None:
            axes.axhline(row.ap.mean, color="gray", linewidth=0.8, label="plain student")
        else:
            axes.errorbar(
                row.teacher_ap,
                row.ap.mean,
                row.ap.half,
                fmt="o",
                capsize=3,
                color=colour,
                label=f"{row.method}, {row.setting}",
            )
    axes.set_xlabel("teacher's AP")
    axes.set_ylabel("student's AP")
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(file, dpi=120)
