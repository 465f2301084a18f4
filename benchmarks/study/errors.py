"""Kinds of error before and after distillation, of the students that `run` has trained.

python -m benchmarks.study errors --table main --detector fcos --methods none featkd

TIDE (Bolya et al., ECCV 2020; the package tidecv) says how many points AP at IoU 0.5 would rise if
no detection had an error of one kind: Cls, the class is wrong; Loc, the box; Both; Dupe, a second
box on an object; Bkg, a box on no object; Miss, an object without a box. Less is better.

Prints a table and writes `results/errors.json` and its plot, of another table than `main` under
its name: `errors_pictures.json`.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tidecv
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from benchmarks.measure import provenance
from benchmarks.study.cells import PLAIN, Row, rows
from benchmarks.study.folders import add_folders, folders_for
from benchmarks.study.lines import LINES, RESULTS, lines_of, read_lines
from benchmarks.study.plan import TABLES
from benchmarks.study.runs import Line, Run
from benchmarks.study.tables import table
from benchmarks.study.train import held_out_data, trained
from examples.detection.batches import collate, to_device

KINDS = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")
COLUMNS = ("AP50", *KINDS)
CHOICES = ("table", "detector", "methods", "device")
KEPT = ("detector", "method", "seed", "hyperparameters", "student", "teacher", "steps", "data")


@torch.no_grad()
def errors_of(model: nn.Module, data: Dataset[Any], device: torch.device) -> dict[str, float]:
    """AP at IoU 0.5 and what each kind of error takes from it, in points, by the boxes."""
    truth, found = tidecv.Data("truth"), tidecv.Data("found")
    image = 0
    for batch in DataLoader(data, batch_size=16, collate_fn=collate):
        images, targets = to_device(batch, device)
        for target, result in zip(targets, model.eval()(images), strict=True):
            # TIDE goes through the images of the truth: one without an object counts too.
            truth.add_image(image, str(image))
            for box, label in zip(corner_and_size(target["boxes"]), target["labels"], strict=True):
                truth.add_ground_truth(image, int(label), box)
            detections = (result["labels"].tolist(), result["scores"].tolist())
            for *each, box in zip(*detections, corner_and_size(result["boxes"]), strict=True):
                found.add_detection(image, *each, box)
            image += 1
    # What `tidecv.TIDE` makes too, which sets matplotlib's style for the whole process.
    run = tidecv.TIDERun(truth, found, 0.5, 0.1, tidecv.TIDE.BOX, truth.max_dets)
    by_kind = {kind.short_name: points for kind, points in run.fix_main_errors().items()}
    return {"AP50": run.ap, **{kind: by_kind[kind] for kind in KINDS}}


def corner_and_size(boxes: torch.Tensor) -> list[list[float]]:
    return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist()


def chosen_runs(
    lines: Iterable[Line],
    table: str,
    detectors: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
) -> list[Run]:
    """Those of the table that have a line; `None` stands for all."""
    return [
        run
        for run in TABLES[table](lines)
        if (detectors is None or run.detector in detectors)
        and (methods is None or run.method in methods)
        and lines_of([run], lines)
    ]


def rows_by_column(lines: Sequence[Line]) -> dict[str, list[Row]]:
    """For AP50 and each kind what :func:`cells.rows` says of AP: means, paired changes."""
    return {
        column: rows([line | {"ap": line["errors"][column] / 100} for line in lines])
        for column in COLUMNS
    }


def report(columns: dict[str, list[Row]]) -> str:
    """A table in Markdown: means, and in brackets the paired change to the plain student."""
    body = [("detector", "method", "setting", "n", *COLUMNS)]
    for cell in zip(*columns.values(), strict=True):
        first = cell[0]
        place = (first.detector, first.method, first.setting, str(first.ap.n))
        body.append((*place, *map(entry, cell)))
    return table(body)


def entry(row: Row) -> str:
    change = f" ({row.gain.text('+')})" if row.gain is not None else ""
    return f"{row.ap.mean:.2f}{change}"


def plot(columns: dict[str, list[Row]], file: Path) -> None:
    """By detector: the points that each kind takes, and below their paired changes."""
    detectors = list(dict.fromkeys(row.detector for row in columns["AP50"]))
    figure = Figure(figsize=(1 + 4.5 * len(detectors), 6), layout="constrained")
    axes = figure.subplots(2, len(detectors), sharex="col", sharey="row", squeeze=False)
    for (means, changes), detector in zip(axes.T, detectors, strict=True):
        own = [[row for row in columns[kind] if row.detector == detector] for kind in KINDS]
        cells = list(zip(*own, strict=True))
        for index, cell in enumerate(cells):
            at = [x + 0.8 * ((index + 0.5) / len(cells) - 0.5) for x in range(len(KINDS))]
            label = " ".join(filter(None, (cell[0].method, cell[0].setting)))
            colour = "gray" if cell[0].method == PLAIN else f"C{index}"
            heights = [row.ap.mean for row in cell]
            means.bar(at, heights, 0.8 / len(cells), color=colour, label=label)
            gains = [row.gain for row in cell]
            if None not in gains:
                middle, half = [gain.mean for gain in gains], [gain.half for gain in gains]
                changes.errorbar(at, middle, half, fmt="o", capsize=3, color=colour)
        means.set_title(detector)
        means.legend(fontsize=8)
        changes.axhline(0, color="gray", linewidth=0.8)
        changes.set_xticks(range(len(KINDS)), KINDS)
    axes[0, 0].set_ylabel("points of AP50 that the errors take")
    axes[1, 0].set_ylabel("paired change to the plain student")
    figure.savefig(file, dpi=120)


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "errors",
        help="kinds of error of the trained students",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--table", choices=TABLES, default="main")
    parser.add_argument("--detector", nargs="+", help="default: all of the table")
    parser.add_argument("--methods", nargs="+", help="`none` for the plain student; default: all")
    parser.add_argument("--output", type=Path, default=Path("runs/study"), help="of `run`")
    parser.add_argument("--lines", type=Path, default=LINES, help="the runs' lines")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_folders(parser)
    parser.set_defaults(command=write_errors)


def write_errors(options: argparse.Namespace) -> None:
    lines, device = read_lines(options.lines), torch.device(options.device)
    try:
        runs = chosen_runs(lines, options.table, options.detector, options.methods)
    except LookupError as error:
        raise SystemExit(f"{options.table} {error.args[0]}") from error
    if not runs:
        raise SystemExit(f"no such run of {options.table} has a line in {options.lines}")
    folders = folders_for(runs, options)
    lost = [run.name for run in runs if not (options.output / f"{run.name}.pt").exists()]
    if lost:
        raise SystemExit(f"no weights in {options.output} of {lost}")
    results = []
    for run in tqdm(runs, unit="run"):
        data = held_out_data(run, folders)
        errors = errors_of(trained(run, options.output).to(device), data, device)
        results.append(lines_of([run], lines)[0] | {"errors": errors})
    columns = rows_by_column(results)
    content = {
        "arguments": {name: str(getattr(options, name)) for name in CHOICES},
        "tidecv": tidecv.__version__,
        "provenance": provenance(device),
        "runs": [{name: line[name] for name in (*KEPT, "errors")} for line in results],
    }
    name = "errors" if options.table == "main" else f"errors_{options.table}"
    file = options.results / f"{name}.json"
    file.write_text(json.dumps(content, indent=1) + "\n")
    plot(columns, file.with_suffix(".png"))
    print(report(columns))
