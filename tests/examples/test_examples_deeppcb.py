"""The reader of DeepPCB: tiles and boxes of both layouts, and every finding at once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from examples.detection.deeppcb import DeepPCB
from examples.detection.findings import DataError
from examples.detection.scenes import Scenes
from tests.helpers.deeppcb_folder import write_deeppcb


@pytest.mark.parametrize("ending", [".png", ".jpg"])
def test_tiles_are_quarters_at_half_size(ending: str, tmp_path: Path) -> None:
    data = DeepPCB(write_deeppcb(tmp_path, ending), "train")
    assert len(data) == 12
    tiles = [data[i] for i in range(4)]
    assert [target["boxes"].tolist() for _, target in tiles] == [
        [[10, 15, 30, 35]],
        [],
        # The middle, 320, divides it: three quarters are in this tile.
        [[145, 40, 160, 60]],
        [],
    ]
    assert [target["labels"].tolist() for _, target in tiles] == [[2], [], [6], []]
    assert [int(target["image_id"]) for _, target in tiles] == [0, 1, 2, 3]
    image, target = tiles[0]
    assert image.shape == (3, 160, 160)
    assert (image[:, 16:34, 11:29] > 240).all()
    assert image[:, 60:].float().mean() == pytest.approx(255 / 8, abs=3)
    scene, drawn = Scenes(0, 1)[0]
    assert type(image) is type(scene)
    assert image.dtype == scene.dtype
    assert target.keys() == drawn.keys()
    assert all(type(target[key]) is type(drawn[key]) for key in drawn)


def test_a_tile_in_full_is_the_picture(tmp_path: Path) -> None:
    data = DeepPCB(write_deeppcb(tmp_path), "train", "full")
    assert len(data) == 3
    image, target = data[1]
    assert image.shape == (3, 640, 640)
    assert target["boxes"].tolist() == [[20, 30, 60, 70], [290, 400, 330, 440]]
    assert target["labels"].tolist() == [2, 6]
    assert (image[:, 400:440, 290:330] == 255).all()
    assert image[0, 100:110, :16].unique(dim=0).tolist() == [[255, *[0] * 7] * 2]


def test_the_parts_are_the_published_lists(tmp_path: Path) -> None:
    write_deeppcb(tmp_path)
    train, test = (DeepPCB(tmp_path, part) for part in ("train", "test"))
    files = [{board.picture.name for board in data.boards} for data in (train, test)]
    assert files[0] == {"000_test.png", "001_test.png", "002_test.png"}
    assert not files[0] & files[1]
    assert train.classes[0] == "background"
    assert len(train.classes) == 7
    with pytest.raises(IndexError, match=r"must be in 0\.\.11, got 12"):
        train[12]
    assert sum(1 for _ in train) == 12


def broken(folder: Path) -> list[str]:
    """All that can be wrong with a folder, and what is said of each."""
    names = folder / "trainval.txt"
    names.write_text(f"{names.read_text()}one\na/a/7.jpg a/a_not/7.txt\n")
    (folder / "group1/1/000_test.png").write_bytes(b"no picture")
    Image.new("L", (100, 100)).save(folder / "group1/1/001_test.png")
    (folder / "group1/1_not/002.txt").write_text("1 2 3\n1 2 3 4 9\n9 9 3 4 1\n1 2 x 4 1\n\n")
    return [
        "trainval.txt: 9 to mend, nothing has been trained",
        "line 4: must be a picture and its boxes' file, got 'one'",
        "line 5: the picture must be there, got no a/a/7_test.jpg or .png",
        "line 5: the boxes' file must be there, got no a/a_not/7.txt",
        "group1/1_not/002.txt, line 1: must be five whole numbers, x1 y1 x2 y2 kind, got '1 2 3'",
        "group1/1_not/002.txt, line 4: must be five whole numbers",
        "group1/1_not/002.txt, line 2: the kind must be in 1..6, got 9",
        "group1/1_not/002.txt, line 3: a box must have an area",
        "group1/1/000_test.png: must be a whole picture that Pillow can read",
        "group1/1/001_test.png: the boxes must lie in their picture, got 100 x 100",
    ]


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    expected = broken(write_deeppcb(tmp_path))
    with pytest.raises(DataError) as error:
        DeepPCB(tmp_path, "train")
    for text in expected:
        assert text in str(error.value)
    assert len(str(error.value).splitlines()) == len(expected)


def lone(folder: Path, change: Any) -> str:
    change(folder)
    with pytest.raises(DataError) as error:
        DeepPCB(folder, "train")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_that_is_no_deeppcb_is_one_line(tmp_path: Path) -> None:
    assert lone(tmp_path / "no", lambda _: None).startswith("`--deeppcb` must be a folder, got")
    said = lone(tmp_path, lambda _: None)
    assert said.startswith("`--deeppcb` must hold trainval.txt, or PCBData/trainval.txt: ")
    write_deeppcb(tmp_path, boards=1)
    said = lone(tmp_path, lambda f: (f / "group1/1_not/000.txt").write_text(""))
    assert said.endswith("must name a picture with a defect, got none")


def test_a_side_that_no_float_holds_is_a_finding(tmp_path: Path) -> None:
    write_deeppcb(tmp_path, boards=1)
    (tmp_path / "group1/1_not/000.txt").write_text(f"20 30 1{'0' * 400} 70 2\n")
    with pytest.raises(DataError, match=r"line 1: a box must have an area, and sides in 0\.\.80,0"):
        DeepPCB(tmp_path, "train")


def test_an_empty_target_has_the_shape_that_detectors_want(tmp_path: Path) -> None:
    _, target = DeepPCB(write_deeppcb(tmp_path), "train")[1]
    assert target["boxes"].shape == (0, 4)
    assert target["boxes"].dtype == torch.float32
    assert target["labels"].dtype == torch.int64
