"""The main job's `--resume` where the same names stand for other data, or other weights."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.detection import __main__ as job
from examples.detection.data import content_of_file
from tests.helpers.coco_folder import write_coco
from tests.helpers.deeppcb_folder import write_deeppcb
from tests.helpers.pasted_folder import cut_out, write_pasted


@pytest.fixture(autouse=True)
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_: Any) -> None:
        raise KeyboardInterrupt("training")

    monkeypatch.setattr(job, "train", train)


def start(*arguments: Any) -> Any:
    """What ends the job: 130 where it gets as far as training."""
    torch.set_num_threads(1)
    with pytest.raises(SystemExit) as stop:
        job.main([*map(str, arguments)])
    return stop.value.code


def refused(output: Path, *arguments: Any) -> str:
    """By `--resume`, in one line, and without a change in the run's folder."""
    before = {file.name: file.read_bytes() for file in output.iterdir()}
    said = start(*arguments, "--output", output, "--resume")
    assert {file.name: file.read_bytes() for file in output.iterdir()} == before
    head = f"--resume must keep what the run in {output} has read, got other "
    tail = ": give back what was there, choose another --output, or give --overwrite instead"
    assert said.startswith(head)
    assert said.endswith(tail)
    assert "\n" not in said
    return said.removeprefix(head).removesuffix(tail)


# --- COCO -----------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], Any]
CHANGES: dict[str, tuple[Change, str]] = {
    "a picture dropped": (
        lambda c: c["images"].pop(1),
        "pictures or boxes (5 pictures, 5 boxes for 6 pictures, 5 boxes)",
    ),
    "a box added": (
        lambda c: c["annotations"].append(c["annotations"][0] | {"id": 99}),
        "pictures or boxes (6 pictures, 6 boxes for 6 pictures, 5 boxes)",
    ),
    "a box moved": (lambda c: c["annotations"][2].update(bbox=[9, 9, 9, 9]), "pictures or boxes"),
    "a label": (lambda c: c["annotations"][2].update(category_id=3), "pictures or boxes"),
    "a box elsewhere": (lambda c: c["annotations"][1].update(image_id=1), "pictures or boxes"),
    "another order": (
        lambda c: [image.update(id=5 - image["id"]) for image in c["images"]],
        "pictures or boxes",
    ),
    "a class added": (
        lambda c: c["categories"].append({"id": 9, "name": "new"}),
        "classes (tall, wide, new for tall, wide)",
    ),
    "a class renamed": (
        lambda c: c["categories"][0].update(name="high"),
        "classes (high, wide for tall, wide)",
    ),
}


@pytest.fixture
def coco(tmp_path: Path) -> tuple[Path, list[Any]]:
    images, annotations = write_coco(tmp_path)
    return annotations, ["--data", "coco", "--images", images, "--annotations", annotations]


def changed(annotations: Path, change: Change) -> None:
    content = json.loads(annotations.read_text())
    change(content)
    annotations.write_text(json.dumps(content))


@pytest.mark.parametrize("case", CHANGES)
def test_other_annotations_are_refused_with_what_changed(
    case: str, coco: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    annotations, options = coco
    output, before = tmp_path / "run", annotations.read_text()
    assert start(*options, "--output", output) == 130
    change, text = CHANGES[case]
    changed(annotations, change)
    assert refused(output, *options) == text
    annotations.write_text(before)
    assert start(*options, "--output", output, "--resume") == 130


def test_annotations_that_say_the_same_are_gone_on_with(
    coco: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    annotations, options = coco
    assert start(*options, "--output", tmp_path / "run") == 130
    content = {"info": {"year": 2026}, **json.loads(annotations.read_text())}
    content["images"].reverse()
    annotations.write_text(json.dumps(content, indent=3))
    assert start(*options, "--output", tmp_path / "run", "--resume") == 130


def test_other_held_out_annotations_are_named_as_such(
    coco: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    images, annotations = write_coco(tmp_path / "val")
    options = [*coco[1], "--val-images", images, "--val-annotations", annotations]
    assert start(*options, "--output", tmp_path / "run") == 130
    changed(annotations, lambda c: c["annotations"].pop())
    text = "held-out pictures or boxes (6 pictures, 4 boxes for 6 pictures, 5 boxes)"
    assert refused(tmp_path / "run", *options) == text
    changed(coco[0], lambda c: c["annotations"][0].update(bbox=[9, 9, 9, 9]))
    assert refused(tmp_path / "run", *options) == f"training pictures or boxes, other {text}"


def test_a_run_of_before_that_noted_nothing_is_gone_on_with(
    coco: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    assert start(*coco[1], "--output", tmp_path / "run") == 130
    config = tmp_path / "run" / "config.json"
    content = json.loads(config.read_text())
    assert content.pop("read").keys() == {"classes", "pictures or boxes"}
    config.write_text(json.dumps(content))
    assert start(*coco[1], "--output", tmp_path / "run", "--resume") == 130


def test_a_finished_run_is_exported_whatever_its_data_are_now_but_for_the_classes(
    coco: tuple[Path, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(job, "export", lambda *_: print("exported"))
    output, (annotations, options) = tmp_path / "run", coco
    assert start(*options, "--output", output) == 130
    student = job.new_models(job.parse([*map(str, options)]), 3)["distilled"]
    torch.save(student.state_dict(), output / "student.pt")
    (output / "results.json").write_text("{}")
    changed(annotations, lambda c: c["annotations"].pop())
    arguments = [*options, "--output", output, "--resume", "--export", "torch"]
    job.main([*map(str, arguments)])
    assert capsys.readouterr().out.endswith("\nexported\n")
    changed(annotations, lambda c: c["categories"].append({"id": 9, "name": "new"}))
    text = "classes (tall, wide, new for tall, wide)"
    assert refused(output, *options, "--export", "torch") == text


# --- other data -----------------------------------------------------------------------------------


def test_other_boards_of_deeppcb_are_refused(tmp_path: Path) -> None:
    folder, output = write_deeppcb(tmp_path / "data"), tmp_path / "run"
    options = ["--data", "deeppcb", "--deeppcb", folder]
    assert start(*options, "--output", output) == 130
    assert start(*options, "--output", output, "--resume") == 130
    names = folder / "trainval.txt"
    lines = names.read_text().splitlines(keepends=True)
    names.write_text("".join(lines[:2]))
    text = "training pictures or boxes (2 pictures, 4 boxes for 3 pictures, 6 boxes)"
    assert refused(output, *options) == text
    names.write_text("".join(reversed(lines)))
    assert refused(output, *options) == "training pictures or boxes"
    names.write_text("".join(lines))
    (folder / "group1/1_not/004.txt").write_text("20 30 60 71 2\n290 400 330 440 6\n")
    assert refused(output, *options) == "held-out pictures or boxes"


def test_other_names_of_what_is_pasted_are_refused(tmp_path: Path) -> None:
    folder, output = write_pasted(tmp_path / "data"), tmp_path / "run"
    options = ["--data", "pasted", "--pasted", folder]
    options += ["--train-images", 4, "--held-out-images", 4]
    assert start(*options, "--output", output) == 130
    assert start(*options, "--output", output, "--resume") == 130
    cut_out((255, 0, 0)).save(folder / "cutouts/bird/two-3.png")
    assert "pictures or boxes (" in refused(output, *options)


def test_scenes_are_what_their_options_say(tmp_path: Path) -> None:
    assert start("--output", tmp_path) == 130
    read = json.loads((tmp_path / "config.json").read_text())["read"]
    assert read["classes"][0] == "disc, square, triangle, cross"
    assert len(read) == 1
    assert start("--output", tmp_path, "--resume") == 130


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "role"),
    [("teacher", "teacher"), ("teacher-weights", "teacher"), ("student-weights", "distilled")],
)
def test_other_weights_in_a_named_file_are_refused(
    name: str, role: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A given teacher is evaluated before any training.
    monkeypatch.setattr(job, "evaluate", lambda *_: {"map": 0.0})
    file, output = tmp_path / "weights.pt", tmp_path / "run"
    state = job.new_models(job.parse([]), 5)[role].state_dict()
    torch.save({key: value + 0 for key, value in state.items()}, file)
    options = [f"--{name}", file]
    assert start(*options, "--output", output) == 130
    os.utime(file, (1, 1))
    assert start(*options, "--output", output, "--resume") == 130
    size = file.stat().st_size
    torch.save({key: value + 1 for key, value in state.items()}, file)
    assert file.stat().st_size == size
    assert refused(output, *options) == f"weights of --{name}"
    torch.save({"model": state}, file)
    found = f"({file.stat().st_size:,} bytes for {size:,} bytes)"
    assert refused(output, *options) == f"weights of --{name} {found}"


def test_weights_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(job.JobError, match=f"--teacher {tmp_path} cannot be read: Is a directory"):
        content_of_file(tmp_path, "--teacher")
