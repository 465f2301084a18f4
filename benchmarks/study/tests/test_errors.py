"""Kinds of error: TIDE is fed rightly, on cases worked by hand; tables and files of the command."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.study.__main__ import main
from benchmarks.study.errors import COLUMNS, errors_of, report, rows_by_column
from benchmarks.study.lines import COLUMNS as METRICS
from benchmarks.study.lines import append_line
from benchmarks.study.plan import TABLES
from benchmarks.study.runs import Data, Run, Teacher, distilled, plain_run
from benchmarks.study.settings import CANDIDATES
from benchmarks.study.train import held_out_data, new_detector, trained
from examples.detection import training
from examples.detection.deeppcb import DeepPCB
from examples.detection.scenes import Scenes
from tests.helpers.deeppcb_folder import write_deeppcb

CPU = torch.device("cpu")
BOX, PART, ELSEWHERE = (10, 10, 30, 50), (10, 10, 30, 22), (60, 60, 90, 80)
Objects = list[tuple[int, tuple[int, ...]]]
Detections = list[tuple[int, float, tuple[int, ...]]]


class Answers(nn.Module):
    """A detector that has found this in the images to come."""

    def __init__(self, found: list[dict[str, Tensor]]) -> None:
        super().__init__()
        self.found = iter(found)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return [next(self.found) for _ in images]


def data_of(*images: Objects) -> list[tuple[Tensor, dict[str, Tensor]]]:
    blank = torch.zeros(3, 96, 96, dtype=torch.uint8)
    return [
        (
            blank,
            {
                "boxes": torch.tensor([box for _, box in objects]).float().reshape(-1, 4),
                "labels": torch.tensor([label for label, _ in objects], dtype=torch.int64),
            },
        )
        for objects in images
    ]


def found_of(*images: Detections) -> list[dict[str, Tensor]]:
    return [
        {
            "boxes": torch.tensor([box for *_, box in each]).float().reshape(-1, 4),
            "labels": torch.tensor([label for label, *_ in each], dtype=torch.int64),
            "scores": torch.tensor([score for _, score, _ in each]),
        }
        for each in images
    ]


# --- what TIDE is fed -----------------------------------------------------------------------------

# The first two images hold an object of class 1 and of class 2, each found at 0.9; then a third.
# AP at 101 recalls, mean of both classes: half of the objects found alone give 51 of 101.
FOUND = [[(1, 0.9, BOX)], [(2, 0.9, BOX)]]
HALF, REST = 5100 / 101 / 2, 5000 / 101 / 2
CASES = {
    "all is right": ((1, BOX), [(1, 0.5, BOX)], {"AP50": 100}),
    "nothing is found": ((1, BOX), [], {"AP50": 50 + HALF, "Miss": REST}),
    "a wrong class": ((1, BOX), [(2, 0.5, BOX)], {"AP50": 50 + HALF, "Cls": REST}),
    "a wrong box": ((1, BOX), [(1, 0.5, PART)], {"AP50": 50 + HALF, "Loc": REST}),
    # Class 2 has its wrong one ahead of its right one: 50, and 100 without it.
    "wrong class and box": (
        (1, BOX),
        [(2, 0.95, PART)],
        {"AP50": 25 + HALF, "Both": 25, "Miss": REST},
    ),
    "nothing is there": (
        (1, BOX),
        [(2, 0.95, ELSEWHERE)],
        {"AP50": 25 + HALF, "Bkg": 25, "Miss": REST},
    ),
    # Class 2: right, wrong, right; 51 recalls at 1 and 50 at 2 / 3.
    "a second box": (
        (2, BOX),
        [(2, 0.5, BOX)],
        {"AP50": 100 - 50 / 101 * 100 / 3 / 2, "Dupe": 50 / 101 * 100 / 3 / 2},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_kind_of_error_takes_the_points_worked_by_hand(case: str) -> None:
    third, found, expected = CASES[case]
    second = [*FOUND[1], (2, 0.8, BOX)] if case == "a second box" else FOUND[1]
    data = data_of([(1, BOX)], [(2, BOX)], [third])
    model = Answers(found_of(FOUND[0], second, found))
    errors = errors_of(model, data, CPU)
    assert tuple(errors) == COLUMNS
    assert errors == pytest.approx(dict.fromkeys(COLUMNS, 0) | expected)


def test_what_is_found_in_an_image_without_an_object_counts() -> None:
    data = data_of([(1, BOX)], [])
    model = Answers(found_of([(1, 0.5, BOX)], [(1, 0.9, BOX)]))
    errors = errors_of(model, data, CPU)
    assert errors == pytest.approx(dict.fromkeys(COLUMNS, 0) | {"AP50": 50, "Bkg": 50})


def test_ap50_is_that_of_the_study() -> None:
    data = Scenes(3, 40)
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(len(data)):
        target = data[i][1]
        labels = target["labels"].repeat(2)
        boxes = target["boxes"].as_subclass(Tensor).repeat(2, 1)
        wrong = torch.rand(len(labels), generator=generator) < 0.2
        found.append(
            {
                "boxes": boxes + 3 * torch.randn(boxes.shape, generator=generator),
                "labels": torch.where(wrong, labels % 4 + 1, labels),
                "scores": torch.rand(len(labels), generator=generator),
            }
        )
    settings = training.Settings(8, 1e-3, 0, CPU, False, 0, 1, 0, 2.0)
    expected = training.evaluate(Answers(found), data, settings)["map_50"]
    errors = errors_of(Answers(found), data, CPU)
    assert 0.3 < expected < 0.7
    # Where recall is a round number, the two round its 101 bars to other sides.
    assert errors["AP50"] == pytest.approx(100 * expected, abs=0.5)


# --- runs, table and files ------------------------------------------------------------------------

DATA = Data(held_out_seed=7, train_images=16, held_out_images=3)
TEACHER = Teacher(shape=(6, 1, 32), steps=2)


def runs_of(detector: str, seed: int) -> list[Run]:
    plain = plain_run(detector, seed, DATA, steps=2)
    settings = {"featkd": CANDIDATES["featkd"][:1], "pkd": CANDIDATES["pkd"][:1]}
    return [plain, *distilled(plain, settings, [TEACHER])]


def line_of(run: Run, **errors: float) -> dict[str, Any]:
    metrics = dict.fromkeys(METRICS, 0.5)
    line = {**json.loads(json.dumps(asdict(run))), **metrics, "teacher_ap": 0.7}
    return line | {"errors": dict.fromkeys(COLUMNS, 10.0) | errors}


def test_changes_are_paired_by_seed() -> None:
    lines = []
    for seed, (before, after) in enumerate([(4.0, 1.0), (8.0, 6.0)]):
        plain, distilled, _ = runs_of("fcos", seed)
        lines += [line_of(plain, Cls=before), line_of(distilled, Cls=after)]
    table = rows_by_column(lines)
    plain, distilled = table["Cls"]
    assert (plain.ap.mean, plain.gain) == (pytest.approx(6), None)
    assert distilled.ap.mean == pytest.approx(3.5)
    # -3 and -2: 12.706 standard errors of 0.5
    assert distilled.gain == pytest.approx((-2.5, 6.353, 2), abs=1e-3)
    head, _, first, second = report(table).splitlines()
    assert head.endswith("| AP50 | Cls | Loc | Both | Dupe | Bkg | Miss |")
    assert "| none |  | 2 | 10.00 | 6.00 | 10.00 |" in first
    assert "| featkd |  | 2 | 10.00 (+0.00 ± 0.00) | 3.50 (-2.50 ± 6.35) | 10.00" in second


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of a study of two detectors, three methods and two seeds, its weights as they start."""
    runs = [run for d in ("fcos", "faster_rcnn") for seed in (0, 1) for run in runs_of(d, seed)]
    unfinished = plain_run("fcos", 2, DATA, steps=2)
    monkeypatch.setitem(TABLES, "tiny", lambda lines: [*runs, unfinished])
    for run in runs:
        append_line(tmp_path / "lines.jsonl", line_of(run))
        student = new_detector(run, "student", run.student)
        torch.save(student.state_dict(), tmp_path / f"{run.name}.pt")
    places = {"--lines": "lines.jsonl", "--output": "", "--results": ""}
    options = [word for name, place in places.items() for word in (name, str(tmp_path / place))]
    return ["errors", "--table", "tiny", "--device", "cpu", *options]


def test_the_command_takes_the_finished_runs_chosen_and_leaves_table_and_plot(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*command, "--methods", "none", "featkd"])
    content = json.loads((tmp_path / "errors_tiny.json").read_text())
    found = [(run["detector"], run["seed"], run["method"]) for run in content["runs"]]
    assert len(found) == len(set(found)) == 2 * 2 * 2
    assert {method for *_, method in found} == {"none", "featkd"}
    assert all(tuple(run["errors"]) == COLUMNS for run in content["runs"])
    assert {"featkd", "torch", "commit"} <= content["provenance"].keys()
    assert (tmp_path / "errors_tiny.png").stat().st_size > 10_000
    assert capsys.readouterr().out.count("| featkd |") == 2
    main([*command, "--detector", "fcos"])
    content = json.loads((tmp_path / "errors_tiny.json").read_text())
    assert len(content["runs"]) == 3 * 2


@pytest.mark.parametrize(("name", "kind"), [("sparse", Scenes), ("deeppcb", DeepPCB)])
def test_the_images_are_those_that_the_run_is_evaluated_on(
    name: str, kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = plain_run("fcos", 0, replace(DATA, name=name), steps=2)
    monkeypatch.setitem(TABLES, "tiny", lambda lines: [run])
    append_line(tmp_path / "lines.jsonl", line_of(run))
    torch.save(new_detector(run, "student", run.student).state_dict(), tmp_path / f"{run.name}.pt")
    seen = []

    def errors(model: nn.Module, data: Any, device: torch.device) -> dict[str, float]:
        seen.append(data)
        return dict.fromkeys(COLUMNS, 1.0)

    monkeypatch.setattr("benchmarks.study.errors.errors_of", errors)
    pictures = write_deeppcb(tmp_path / "pictures")
    places = {"--lines": "lines.jsonl", "--output": "", "--results": "", "--deeppcb": "pictures"}
    options = [word for name, place in places.items() for word in (name, str(tmp_path / place))]
    main(["errors", "--table", "tiny", "--device", "cpu", *options])
    (data,) = seen
    assert data is held_out_data(run, {"deeppcb": pictures})
    assert isinstance(data, kind)
    if name == "deeppcb":
        with pytest.raises(SystemExit, match="tiny wants --deeppcb DIR"):
            main(["errors", "--table", "tiny", *options[:-2]])


def test_a_student_has_the_weights_of_its_run(command: list[str], tmp_path: Path) -> None:
    run = runs_of("fcos", 0)[1]
    weights = torch.load(tmp_path / f"{run.name}.pt", weights_only=True)
    moved = {name: value + 1 for name, value in weights.items()}
    torch.save(moved, tmp_path / f"{run.name}.pt")
    loaded = trained(run, tmp_path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in moved.items())


def test_what_is_missing_is_said_before_any_evaluation(command: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no such run of tiny"):
        main([*command, "--detector", "retinanet"])
    name = runs_of("fcos", 1)[0].name
    (tmp_path / f"{name}.pt").unlink()
    with pytest.raises(SystemExit, match=f"no weights in .*{name}"):
        main(command)
    (tmp_path / "lines.jsonl").write_text("")
    with pytest.raises(SystemExit, match="main wants `run tune` finished"):
        main([*command, "--table", "main"])
