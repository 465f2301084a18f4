"""Lines as plots."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mode
from typing import Any

from matplotlib.figure import Figure

from benchmarks.study.cells import OURS, PLAIN, Interval, cells, facts, interval, rows, varying
from benchmarks.study.runs import Line
from benchmarks.study.tables import gains_by_method


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
    series = gains_by_method(ours, others)
    places = list(dict.fromkeys(place for gains in series.values() for place in gains))
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    for index, (name, gains) in enumerate(series.items()):
        shift = 0.7 * ((index + 0.5) / len(series) - 0.5)
        at = [places.index(place) + shift for place in gains]
        means, halves = (
            [each.mean for each in gains.values()],
            [each.half for each in gains.values()],
        )
        axes.errorbar(at, means, halves, fmt="s" if name in ours else "o", capsize=3, label=name)
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.set_xticks(range(len(places)), places)
    axes.set_ylabel("gain over the plain student, AP points")
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(file, dpi=120)


READABLE = {
    "fitnets": "FitNets",
    "at": "attention transfer",
    "fgfi": "fine-grained imitation",
    "overhaul": "feature overhaul",
    "cwd": "CWD",
    "pkd": "PKD",
    "featkd, STANDARDIZED, temperature 8, masked_attention spatial": "featkd, with a spatial mask",
    "featkd, temperature 8, masked_attention spatial": "featkd, with a spatial mask",
}


def overview_plot(panels: Mapping[str, Mapping[str, Interval]], file: Path) -> None:
    """By panel the gains of a method over the plain student, one bar a method, the best on top."""
    figure = Figure(figsize=(1 + 4.5 * len(panels), 3.2), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, gains) in zip(grid, panels.items(), strict=True):
        ordered = sorted(gains.items(), key=lambda item: item[1].mean)
        names = [READABLE.get(name, name) for name, _ in ordered]
        means, halves = [each.mean for _, each in ordered], [each.half for _, each in ordered]
        colours = ["C0" if name.startswith(OURS) else "silver" for name in names]
        axes.barh(names, means, xerr=halves, color=colours, capsize=3)
        axes.axvline(0, color="gray", linewidth=0.8)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("gain in AP points")
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
