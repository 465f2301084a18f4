"""What lines say: cells, their intervals over seeds and their paired gains; pure functions.

A cell is what differs in nothing but its seed. AP is in points, 0 to 100.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from math import isfinite, nan, sqrt
from statistics import mean, stdev
from typing import Any, NamedTuple

from scipy.stats import t

import featkd
from benchmarks.study.runs import Line
from benchmarks.study.settings import NORMALIZED
from benchmarks.study.variants import NAMES, split

PLAIN, OURS = "none", "featkd"
VARIANTS = dict.fromkeys(NAMES, "") | {"taps": "stages"}
DEFAULTS = (
    VARIANTS
    | {"scenes": "dense"}
    | {
        each.name: each.default
        for each in fields(featkd.Hyperparameters)
        if each.default is not MISSING
    }
)
HYPERPARAMETERS = {each.name for each in fields(featkd.Hyperparameters)}
PRESETS = {"NORMALIZED": asdict(NORMALIZED)} | {
    name: asdict(value)
    for name, value in vars(featkd).items()
    if isinstance(value, featkd.Hyperparameters)
}
OTHER_METRICS = {"ap50": "AP50", "ap75": "AP75", "ap_s": "AP_S", "ap_m": "AP_M", "ap_l": "AP_L"}
CELL = ("detector", "student", "teacher", "method", "steps", "data", "hyperparameters")


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
    shapes["scenes"] = {"scenes": "dense"}.get(line["data"]["name"], line["data"]["name"])
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
    return shown | {"steps": line["steps"]} | settings


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


def best_everywhere(lines: Iterable[Line]) -> dict[str, dict[str, Any]]:
    """By method, of what all detectors have, the hyperparameters of the highest mean AP."""
    lines = [line for line in lines if line["hyperparameters"]]
    detectors = {line["detector"] for line in lines}
    chosen: dict[str, tuple[float, dict[str, Any]]] = {}
    for cell in cells(lines, ("method", "hyperparameters")):
        method, ap = cell[0]["method"], mean(line["ap"] for line in cell)
        everywhere = {line["detector"] for line in cell} == detectors
        if everywhere and (method not in chosen or ap > chosen[method][0]):
            chosen[method] = ap, cell[0]["hyperparameters"]
    return {method: hyperparameters for method, (_, hyperparameters) in chosen.items()}
