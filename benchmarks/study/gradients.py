"""How strong distillation is while the student trains: its gradient's norm over the detector's.

python -m benchmarks.study gradients

The recommended preset at the FPN's outputs, one student a detector and kind of scenes, by the steps
that it has behind it. Prints a table and writes `results/gradients.json`.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

import featkd
from benchmarks.measure import provenance
from benchmarks.study.lines import RESULTS
from benchmarks.study.plan import MAIN_SEEDS, SCENES, TUNED_ON
from benchmarks.study.runs import Run, distilled, plain_run
from benchmarks.study.settings import FPN, STANDARDIZED
from benchmarks.study.tables import table
from benchmarks.study.train import new_model, settings_for, training_data
from examples.detection.training import train

AFTER = (0, 10, 30, 100, 300, 590)


class Watched(nn.Module):
    """A distiller with the ratio of each step of `AFTER` that it has come to."""

    def __init__(self, distiller: featkd.Distiller) -> None:
        super().__init__()
        self.distiller = distiller
        self.steps = 0
        self.ratios: dict[int, float | None] = {}

    @property
    def student(self) -> nn.Module:
        return self.distiller.student

    def forward(self, *batch: Any) -> tuple[Any, dict[str, Tensor]]:
        if self.training:
            if self.steps in AFTER:
                ratio = self.distiller.report(*batch).distillation.gradient_ratio
                self.ratios[self.steps] = ratio
            self.steps += 1
        return self.distiller(*batch)


def ratios(run: Run, folder: Path) -> dict[int, float | None]:
    """By the number of steps behind it."""
    watched = Watched(new_model(run, folder, torch.device("cpu")))
    data, settings = training_data(run), settings_for(run, torch.device("cpu"))
    with TemporaryDirectory() as own:
        train(run.name, watched, data, data, run.steps, settings, Path(own) / "checkpoint.pt")
    return watched.ratios


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "gradients",
        help="the distillation's gradient beside the detector's, while a student trains",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("runs/study"), help="of `run`")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.set_defaults(command=write_gradients)


def write_gradients(options: argparse.Namespace) -> None:
    found, body = [], []
    for data, teachers in SCENES:
        for detector in TUNED_ON:
            plain = plain_run(detector, MAIN_SEEDS[0], data)
            (run,) = distilled(plain, {"featkd": [STANDARDIZED | FPN]}, teachers)
            by_step = ratios(run, options.output)
            found.append({"detector": detector, "scenes": data.name, "ratios": by_step})
            body.append((detector, data.name, *(f"{by_step[step]:.2f}" for step in AFTER)))
    content = {"provenance": provenance(torch.device("cpu")), "found": found}
    (options.results / "gradients.json").write_text(json.dumps(content, indent=1) + "\n")
    print(table([("detector", "scenes", *map(str, AFTER)), *body]))
