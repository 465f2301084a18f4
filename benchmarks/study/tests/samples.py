"""Runs of a few steps and made-up lines for the tests."""

import json
from dataclasses import replace
from typing import Any

import torch

from benchmarks.study.lines import COLUMNS
from benchmarks.study.runs import Data, Run, Teacher, plain_run
from benchmarks.study.settings import CANDIDATES

CPU = torch.device("cpu")
DATA = Data(held_out_seed=7, train_images=16, held_out_images=4)
PLAIN = plain_run("fcos", 3, DATA, steps=2)
DISTILLED = replace(
    PLAIN,
    teacher=Teacher(shape=(6, 1, 32), steps=2),
    method="featkd",
    hyperparameters=CANDIDATES["featkd"][1],
)


def line_of(run: Run, ap: float, teacher_ap: float | None = None) -> dict[str, Any]:
    metrics = dict.fromkeys(COLUMNS, ap) | {"ap_s": None}
    return {**json.loads(run.identity), **metrics, "teacher_ap": teacher_ap}


def seeds(run: Run, *aps: float, teacher_ap: float | None = None) -> list[dict[str, Any]]:
    return [line_of(replace(run, seed=i), ap, teacher_ap) for i, ap in enumerate(aps)]
