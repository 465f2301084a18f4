"""The main job's student as a program: same boxes, or one line that says why there is none."""

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

from examples.detection import command_line
from examples.detection.__main__ import parse
from examples.detection.exporting import WAYS, export, exported, other_boxes
from examples.detection.models import new_detector
from examples.detection.processes import JobError
from examples.detection.run_folder import EXPORTED
from examples.detection.scenes import Scenes

EXPORTS = [
    ("torch", [], "a list of one float image 3 x 96 x 96"),
    ("onnx", [], "`image`, one float image 3 x 96 x 96"),
    ("onnx", ["--detector", "retinanet"], "`image`, one float image 3 x 96 x 96"),
    ("onnx", ["--detector", "faster_rcnn"], "`image`, one float image 3 x 96 x 96"),
]


@pytest.mark.parametrize(("way", "options", "takes"), EXPORTS)
def test_an_exported_student_finds_the_same_boxes(
    way: str, options: list[str], takes: str, tmp_path: Path, capfd: Any
) -> None:
    student = new_detector(parse(options), "student", 5).eval()
    if hasattr(student, "score_thresh"):
        student.score_thresh = 0.002  # random weights are sure of nothing
    held_out, file = Scenes(1, 3), tmp_path / EXPORTED[way]
    said = exported(student, held_out, way, tmp_path)
    count = sum(len(student([held_out[i][0] / 255])[0]["boxes"]) for i in range(3))
    assert count > 0
    assert said == f"{file}: takes {takes}; {count} of {count} boxes the same on 3 images"
    # Neither warnings by the hundred nor graphs.
    assert capfd.readouterr() == ("", "")
    image = held_out[2][0] / 255
    expected = student([image])[0]
    if way == "torch":
        found = torch.export.load(file).module()([image])[0]
    else:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_outputs()]
        assert set(names) == {"boxes", "labels", "scores"}
        values = session.run(None, {"image": image.numpy()})
        found = dict(zip(names, map(torch.from_numpy, values), strict=True))
    assert not other_boxes(expected, found, 0.1)


@pytest.mark.parametrize(
    ("way", "detector"), [("torch", "fcos"), ("torch", "retinanet"), ("onnx", "fcos")]
)
def test_a_program_takes_pictures_in_which_it_finds_nothing(
    way: str, detector: str, tmp_path: Path
) -> None:
    student = new_detector(parse(["--detector", detector]), "student", 5)
    student.score_thresh = 0.9
    said = exported(student, Scenes(1, 2), way, tmp_path)
    assert said.endswith("; neither finds a box on 2 images")


def test_a_student_that_does_not_export_says_why(tmp_path: Path, capfd: Any) -> None:
    options = parse(["--detector", "faster_rcnn"])
    student = new_detector(options, "student", 5)
    text = r"no student\.pt2: torch does not export this detector \([^\n]*\)$"
    with pytest.raises(JobError, match=text):
        export(student, Scenes(1, 1), ["torch"], tmp_path)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")
    with pytest.raises(JobError, match=text):
        export(student, Scenes(1, 1), ["torch", "onnx"], tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["student.onnx"]
    assert capfd.readouterr().out.startswith(str(tmp_path / "student.onnx"))


def test_onnx_without_its_packages_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(command_line, "find_spec", lambda name: name == "onnx" or None)
    parse(["--export", "torch"])
    with pytest.raises(SystemExit):
        parse(["--export", "torch", "onnx"])
    text = "--export onnx wants onnxruntime: pip install -e '.[onnx]'"
    assert capsys.readouterr().err.splitlines()[-1].endswith(text)


def test_results_differ_by_boxes_and_not_by_their_order() -> None:
    boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0], [1.0, 1.0, 8.0, 8.0]])
    ours = {"boxes": boxes, "scores": torch.tensor([0.5, 0.5]), "labels": torch.tensor([1, 2])}
    turned = {key: value.flip(0) for key, value in ours.items()}
    assert other_boxes(ours, turned, 0.1) == 0
    assert other_boxes(ours, turned | {"labels": ours["labels"]}, 0.1) == 2
    fewer, none = ({key: value[:n] for key, value in ours.items()} for n in (1, 0))
    assert other_boxes(ours, fewer, 0.1) == other_boxes(fewer, ours, 0.1) == 1
    assert other_boxes(ours, none, 0.1) == other_boxes(none, ours, 0.1) == 2
    assert other_boxes(ours, ours | {"boxes": boxes * float("nan")}, 0.1) == 2


def test_a_program_that_finds_other_boxes_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, student = 0, new_detector(parse([]), "student", 5).eval()

    def off_by_a_few(model: Any, image: torch.Tensor) -> Any:
        def program(image: torch.Tensor) -> Any:
            (found,) = model([image])
            found["boxes"][:count] += 9
            return found

        return b"program", "an image", program

    monkeypatch.setitem(WAYS, "torch", off_by_a_few)
    held_out = Scenes(1, 2)
    count = 2
    text = "no student.pt2: the exported program finds other boxes, 4 of 200"
    with pytest.raises(JobError, match=text):
        exported(student, held_out, "torch", tmp_path)
    assert not list(tmp_path.iterdir())
    count = 1
    said = exported(student, held_out, "torch", tmp_path)
    assert said.endswith("198 of 200 boxes the same on 2 images")
    assert (tmp_path / "student.pt2").read_bytes() == b"program"
