"""Draws the figures of `results/*.json` beside them.

python -m benchmarks.plots
"""

import json
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.measure import RESULTS

Rows = list[dict[str, Any]]


def losses(rows: Rows, axes: plt.Axes) -> None:
    """Bars: how many times as fast as the plain formulas."""
    rows = [row for row in rows if row["form"] != "plain"]
    groups = list(dict.fromkeys((row["loss"], row["shape"]) for row in rows))
    forms = list(dict.fromkeys(row["form"] for row in rows))
    width = 0.8 / len(forms)
    for index, form in enumerate(forms):
        at = [groups.index((row["loss"], row["shape"])) for row in rows if row["form"] == form]
        height = [row["times plain"] for row in rows if row["form"] == form]
        axes.bar([x + index * width for x in at], height, width, label=form)
    axes.set_xticks(
        [x + 0.4 - width / 2 for x in range(len(groups))],
        [f"{loss}\n{shape.replace(' ', '')}" for loss, shape in groups],
        rotation=45,
        ha="right",
        fontsize=7,
    )
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.set_ylabel("times as fast as plain eager")
    axes.legend()


def relations(rows: Rows, axes: plt.Axes) -> None:
    """Lines: time over positions, for featkd and for the matrix of all pairs."""
    for index, kind in enumerate(dict.fromkeys(row["kind"] for row in rows)):
        for form, style in (("featkd", "o-"), ("matrix", "x:")):
            points = [row for row in rows if row["kind"] == kind and row["form"] == form]
            x, y = [row["positions"] for row in points], [row["ms"] for row in points]
            axes.plot(x, y, style, color=f"C{index}", label=f"{kind}, {form}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("positions H x W")
    axes.set_ylabel("forward and backward, ms")
    axes.legend(fontsize=7)


def main() -> None:
    for draw in (losses, relations):
        for file in sorted(RESULTS.glob(f"{draw.__name__}-*.json")):
            result = json.loads(file.read_text())
            figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
            draw(result["rows"], axes)
            made = result["provenance"]
            axes.set_title(f"{made['machine']}, torch {made['torch']}", fontsize=9)
            figure.savefig(file.with_suffix(".png"), dpi=120)
            plt.close(figure)
            print(file.with_suffix(".png"))


if __name__ == "__main__":
    main()
