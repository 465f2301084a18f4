"""The main job end to end, as a person starts it: its files, its resumption, its real data."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = ["--quick", "--teacher-steps", "4", "--steps", "4", "--checkpoint-every", "2"]
FILES = {"results.json", "curves.png", "attention.png", "detections.png", "teacher.pt"}


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, str(EXAMPLES / "distill_detector.py"), *map(str, arguments)]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command(*arguments), capture_output=True, text=True, env=environment)


def write_coco(folder: Path, count: int = 6) -> tuple[Path, Path]:
    """Bright rectangles on noise, two categories with gaps in their ids; one image has no box."""
    images = folder / "images"
    images.mkdir(parents=True)
    generator = np.random.default_rng(0)
    content = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 3, "name": "tall"}, {"id": 7, "name": "wide"}],
    }
    for i in range(count):
        pixels = generator.integers(0, 80, (80, 100, 3), dtype=np.uint8)
        tall = i % 2 == 0
        left, top, width, height = (10, 10, 20, 50) if tall else (30, 20, 50, 20)
        pixels[top : top + height, left : left + width] = 220
        Image.fromarray(pixels).save(images / f"{i}.png")
        content["images"].append({"id": i, "file_name": f"{i}.png", "width": 100, "height": 80})
        box = {"id": i + 1, "image_id": i, "category_id": 3 if tall else 7, "iscrowd": 0}
        box |= {"bbox": [left, top, width, height], "area": width * height}
        if i > 0:
            content["annotations"].append(box)
    file = folder / "annotations.json"
    file.write_text(json.dumps(content))
    return images, file


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One unbroken run."""
    folder = tmp_path_factory.mktemp("finished")
    done = run(*TINY, "--output", folder)
    assert done.returncode == 0, done.stderr
    assert "distilled - plain" in done.stdout
    return folder


@pytest.mark.slow
def test_the_job_leaves_table_pictures_and_results(finished: Path) -> None:
    assert {file.name for file in finished.iterdir()} >= FILES
    results = json.loads((finished / "results.json").read_text())
    assert set(results["runs"]) == {"teacher", "plain", "distilled"}
    assert len(results["runs"]["plain"]["losses"]) == 4
    assert results["parameters"]["teacher"] > 2 * results["parameters"]["distilled"]
    assert results["runs"]["distilled"]["distillation"][0] > 0
    assert set(results["runs"]["plain"]["distillation"]) == {0}


@pytest.mark.slow
def test_a_killed_job_resumes_to_the_same_result(finished: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(*TINY, "--output", tmp_path),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    while not (tmp_path / "plain.checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "results.json").exists()

    refused = run(*TINY, "--output", tmp_path)
    assert refused.returncode == 1
    assert "--resume" in refused.stderr
    other = run(*TINY, "--seed", "9", "--output", tmp_path, "--resume")
    assert other.returncode == 1
    assert "seed=9 for 0" in other.stderr

    done = run(*TINY, "--output", tmp_path, "--resume")
    assert done.returncode == 0, done.stderr
    for name in ("teacher.pt", "plain.pt", "distilled.pt"):
        whole = torch.load(finished / name, weights_only=True)
        resumed = torch.load(tmp_path / name, weights_only=True)
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    runs = [json.loads((f / "results.json").read_text())["runs"] for f in (finished, tmp_path)]
    for name in ("teacher", "plain", "distilled"):
        assert runs[0][name]["losses"] == runs[1][name]["losses"]
        assert runs[0][name]["evaluations"] == runs[1][name]["evaluations"]


@pytest.mark.slow
@pytest.mark.parametrize("detector", ["retinanet", "faster_rcnn"])
def test_a_coco_folder_with_a_given_teacher(detector: str, finished: Path, tmp_path: Path) -> None:
    images, annotations = write_coco(tmp_path)
    data = ["--data", "coco", "--images", images, "--annotations", annotations]
    first = run(*TINY, *data, "--detector", detector, "--output", tmp_path / "a", "--amp")
    assert first.returncode == 0, first.stderr
    assert "1 images without a box kept as background" in first.stdout
    teacher = ["--teacher", tmp_path / "a" / "teacher.pt"]
    held_out = ["--val-images", images, "--val-annotations", annotations]
    second = run(
        *TINY, *data, *held_out, *teacher, "--detector", detector, "--output", tmp_path / "b"
    )
    assert second.returncode == 0, second.stderr
    wrong = run(*TINY, "--teacher", tmp_path / "a" / "teacher.pt", "--output", tmp_path / "c")
    assert wrong.returncode == 1
    assert "--teacher" in wrong.stderr


@pytest.mark.slow
def test_two_processes_train_data_parallel(tmp_path: Path) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, *command(*TINY, "--output", tmp_path)[1:]],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("distilled - plain") == 1
    assert {file.name for file in tmp_path.iterdir()} >= FILES


BAD_DATA = {
    "no folder": (lambda i, a, c: i.rename(i.with_name("gone")), "`--images` must be a folder"),
    "no file": (lambda i, a, c: a.unlink(), "`--annotations` must be a file"),
    "no JSON": (lambda i, a, c: a.write_text("{"), "must be a COCO detection file"),
    "no key": (lambda i, a, c: a.write_text('{"images": []}'), "'categories'"),
    "no image": (lambda i, a, c: (i / "2.png").unlink(), "1 images of"),
    "no box": (lambda i, a, c: a.write_text(json.dumps(c | {"annotations": []})), "at least one"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_said_before_any_training(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from coco import CocoError, CocoFolder

    images, annotations = write_coco(tmp_path)
    spoil, text = BAD_DATA[case]
    spoil(images, annotations, json.loads(annotations.read_text()))
    with pytest.raises(CocoError, match=text):
        CocoFolder(images, annotations)


def test_boxes_of_no_area_are_left_out_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from coco import CocoFolder

    images, annotations = write_coco(tmp_path)
    content = json.loads(annotations.read_text())
    content["annotations"][0]["bbox"][2] = 0
    annotations.write_text(json.dumps(content))
    data = CocoFolder(images, annotations)
    assert data.notes[0].endswith("1 boxes of no area left out")
    assert data.notes[1].endswith("2 images without a box kept as background")
    assert data.classes == ("background", "tall", "wide")
    assert len(data[1][1]["boxes"]) == 0
    assert data[2][1]["boxes"].tolist() == [[10, 10, 30, 60]]
    assert data[2][1]["labels"].tolist() == [1]


def test_scenes_are_a_pure_function_of_seed_and_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from scenes import OBJECTS, Scenes

    first, second = Scenes(3, 10), Scenes(3, 10)
    image, target = first[7]
    again, _ = second[7]
    assert torch.equal(image, again)
    assert not torch.equal(image, Scenes(4, 10)[7][0])
    assert 1 <= len(target["labels"]) <= OBJECTS[1]
    boxes = target["boxes"]
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert boxes.min() >= 0
    assert boxes.max() <= 96
