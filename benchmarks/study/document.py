"""The document of all tables and its plots, from the lines."""

from collections.abc import Container
from pathlib import Path
from typing import Any

from benchmarks.study.cells import Interval, best
from benchmarks.study.lines import COLUMNS, MASK_COLUMNS, lines_of, pending, read_lines
from benchmarks.study.plan import TABLES, tap_runs
from benchmarks.study.plots import gains_plot, overview_plot, sensitivity_plot, teachers_plot
from benchmarks.study.runs import Line
from benchmarks.study.tables import (
    against_first,
    comparison,
    contestants,
    gains_by_method,
    gains_table,
    report,
)

Tuned = dict[tuple[str, str], dict[str, Any]]
# The tables that compare the methods: their plots, and their panels of the overview, each the mean
# of three detectors.
COMPARED = {
    "main": ("gains.png", "dense scenes, others tuned for each detector"),
    "sparse": ("gains_sparse.png", "sparse scenes, one setting each"),
    "pictures": ("gains_pictures.png", "photographs, one setting each"),
}
# Of a single detector: what is first is compared with the others.
ONE_DETECTOR = {
    "sensitivity",
    "choices",
    "teacher_relation",
    "scale_free",
    "schedules",
    "picture_terms",
    "ten_seeds",
}
# featkd's settings on every detector, each beside the plain student.
SETTINGS = {"mask", "true_boxes", "units", "picture_weights", "by_gradient"}
AT_FPN = ", taps fpn"


def write(file: Path) -> None:
    """`tables.md` and its plots beside the lines' file."""
    lines = read_lines(file)
    if not lines:
        raise SystemExit(f"no line of a run in {file}")
    panels: dict[str, dict[str, Interval]] = {}
    parts = ["# Study\n\n`python -m benchmarks.study tables` writes this file and its plots."]
    for name, table in TABLES.items():
        try:
            runs = table(lines)
        except LookupError:
            continue
        found = lines_of(runs, lines)
        if not found:
            continue
        left = len(pending(runs, lines))
        unfinished = f" {left} of its runs are not there yet." if left else ""
        parts.append(f"## {name}\n\n`python -m benchmarks.study run {name}`{unfinished}")
        parts.append(report(found))
        if name in ONE_DETECTOR:
            parts.append(against_first(found))
        if name == "masks":
            parts += ["Masks:", report([as_mask_line(line) for line in found])]
        if name in SETTINGS:
            parts.append(gains_table(*contestants(found, {})))
        if name in COMPARED:
            plot, panel = COMPARED[name]
            tuned = best(lines_of(tap_runs(lines), lines)) if name == "main" else {}
            rivals = contestants(found, tuned)
            parts += [
                "AP points over the plain student, same seeds:",
                gains_table(*rivals),
                "AP points of featkd less those of the others, same seeds:",
                comparison(*rivals),
            ]
            gains_plot(*rivals, file.with_name(plot))
            panels[panel] = bars_of(rivals)
            parts.append(f"![paired gains]({plot})")
        if name == "teachers":
            teachers_plot(found, file.with_name("teachers.png"))
            parts.append("![student over teacher](teachers.png)")
        if name == "sensitivity" and not left:
            sensitivity_plot(found, file.with_name("sensitivity.png"))
            parts.append("![AP over each hyperparameter](sensitivity.png)")
        if name == "tune":
            chosen = best(found).items()
            items = [f"- {detector}, {method}: {values}" for (detector, method), values in chosen]
            parts.append("\n".join(["Best by mean AP:\n", *items]))
    if len(panels) == len(COMPARED):
        overview_plot(panels, file.with_name("overview.png"))
    document = file.with_name("tables.md")
    document.write_text("\n\n".join(parts) + "\n")
    print(document)


def bars_of(rivals: tuple[dict[str, list[Line]], dict[str, list[Line]]]) -> dict[str, Interval]:
    """The mean gain of every method that has all its seeds."""
    found = gains_by_method(*rivals).items()
    gains = {method: each["mean"] for method, each in found if "mean" in each}
    most = max(gain.n for gain in gains.values())
    whole = {method: gain for method, gain in gains.items() if gain.n == most}
    return {bar_of(method, whole): gain for method, gain in whole.items()}


def bar_of(method: str, methods: Container[str]) -> str:
    """The taps are told only where a setting has both."""
    if f"{method}{AT_FPN}" in methods:
        return f"{method}, stages"
    return method.removesuffix(AT_FPN)


def as_mask_line(line: Line) -> Line:
    """With the masks' metrics in the place of the boxes'; none by size, none of the teacher."""
    ap = dict(zip(COLUMNS, (line[name] for name in MASK_COLUMNS), strict=False))
    return line | dict.fromkeys(COLUMNS) | ap | {"teacher_ap": None}
