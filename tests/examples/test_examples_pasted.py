"""Photographs pasted on photographs: boxes, split, determinism, findings, and the fetching."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from examples.detection import fetch_pasted
from examples.detection.__main__ import main
from examples.detection.findings import DataError
from examples.detection.pasted import Pasted, extent, of_part, read_folder
from examples.detection.scenes import Scenes
from tests.helpers.pasted_folder import COLOURS, NAMES, cut_out, write_pasted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pasted(tmp_path_factory.mktemp("pasted"))


def inside(box: list[float], shown: torch.Tensor) -> torch.Tensor:
    left, top, right, bottom = map(int, box)
    return shown[top:bottom, left:right]


def test_boxes_are_the_extents_of_what_is_opaque(folder: Path) -> None:
    data = Pasted(read_folder(folder), "train", 0, 60)
    longer, counts, seen = [], set(), set()
    for image, target in data:
        counts.add(len(target["labels"]))
        left = image.clone()
        for box, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            part = inside(box, image[label - 1])
            # Half of 255, and a little less where colours were rounded; of the seam there are 60.
            for edge in (part[0], part[-1], part[:, 0], part[:, -1]):
                assert edge.max() > 120
            # Those of no class, which are blue, overlap nothing.
            assert inside(box, image[2]).max() < 60
            inside(box, left[label - 1])[:] = 0
            longer.append(max(part.shape))
            seen.add(data.classes[label])
        assert left[:2].max() < 135
        assert image[2].max() > 200
    assert seen == {*COLOURS}
    assert counts == {1, 2, 3, 4}
    assert 12 <= min(longer) < 20
    assert 50 < max(longer) <= 60


def test_an_extent_leaves_a_faint_seam_out() -> None:
    assert extent(cut_out((1, 2, 3))) == (25, 20, 65, 40)
    for alpha in (90, 0):
        assert extent(Image.new("RGBA", (7, 5), (0, 0, 0, alpha))) == (0, 0, 7, 5)


def test_an_item_is_like_a_scene_s_and_depends_on_seed_and_index_alone(folder: Path) -> None:
    pictures = read_folder(folder)
    first, again, other = (Pasted(pictures, "train", seed, 4) for seed in (3, 3, 4))
    image, target = first[2]
    scene, drawn = Scenes(0, 1)[0]
    assert image.shape == (3, 320, 320)
    assert type(image) is type(scene)
    assert image.dtype == scene.dtype
    assert target.keys() == drawn.keys()
    assert all(type(target[key]) is type(drawn[key]) for key in drawn)
    assert int(target["image_id"]) == 2
    assert torch.equal(image, again[2][0])
    assert torch.equal(target["boxes"], again[2][1]["boxes"])
    assert not torch.equal(image, other[2][0])
    assert not torch.equal(image, first[3][0])
    with pytest.raises(IndexError, match=r"must be in 0\.\.3, got 4"):
        first[4]


def test_pictures_of_one_name_are_all_in_training_or_all_in_the_test(folder: Path) -> None:
    pictures = read_folder(folder)
    assert pictures.kinds == ["bird", "coin"]
    for group in pictures.groups:
        train, test = ({file.stem for file in of_part(group, part)} for part in ("train", "test"))
        assert train | test == {*NAMES}
        assert not train & test
        assert len({name.split("-")[0] for name in test}) == 2
        assert len({"two-1", "two-2"} & test) != 1
    data = Pasted(pictures, "test", 0, 1)
    assert data.classes == ("background", "bird", "coin")
    assert [len(each) for each in data.cutouts] == [
        len(of_part(group, "test")) for group in (pictures.groups[2], *pictures.groups[:2])
    ]


def test_a_palette_has_transparent_parts_too(folder: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "copied")
    file = copied / "cutouts/bird/further/one.png"
    with Image.open(file) as picture:
        picture.quantize(4).save(file)
    with Image.open(file) as picture:
        assert picture.mode == "P"
    assert read_folder(copied).groups[0][2].name == "one.png"


def test_all_that_is_wrong_is_said_at_once(folder: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "copied")
    birds = copied / "cutouts/bird/further"
    (birds / "one.png").write_bytes(b"no picture")
    Image.new("RGB", (30, 30)).save(birds / "three.png")
    Image.new("RGBA", (30, 30)).save(birds / "four.png")
    mask = Image.new("L", (30, 30))
    mask.paste(1, (5, 5, 20, 20))
    Image.merge("RGBA", [mask] * 4).save(birds / "five.png")
    Image.new("RGB", (400, 300)).save(copied / "backgrounds/one.jpg")
    (copied / "cutouts/tool").mkdir()
    with pytest.raises(DataError) as error:
        read_folder(copied)
    expected = [
        f"{copied}: 6 to mend, nothing has been trained",
        "cutouts/bird/further/one.png: must be a whole picture that Pillow can read",
        "cutouts/bird/further/three.png: must have transparent parts and others, got none",
        "cutouts/bird/further/four.png: must have transparent parts and others, got nothing else",
        "five.png: must have transparent parts and others, got others 1 of 255 opaque at most",
        "backgrounds/one.jpg: must be 320 pixels wide and high, got 400 x 300",
        "cutouts/tool: must hold pictures whose names begin with two words or more",
    ]
    for text in expected:
        assert text in str(error.value)
    assert len(str(error.value).splitlines()) == len(expected)


def test_a_folder_of_something_else_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"got no cutouts in .*: python -m .*fetch_pasted makes"):
        read_folder(tmp_path)
    for name in ("cutouts", "distractors", "backgrounds"):
        (tmp_path / name).mkdir()
    with pytest.raises(DataError, match="cutouts: must hold a folder for each class"):
        read_folder(tmp_path)


def test_the_job_looks_at_it(folder: Path, capsys: Any) -> None:
    few = ["--train-images", "6", "--held-out-images", "4", "--batch-size", "2", "--size", "64"]
    main(["--data", "pasted", "--pasted", str(folder), *few, "--dry-run"])
    printed = capsys.readouterr().out
    assert "training: 6 pictures; of 6 of them:\n  width 320 to 320, height 320" in printed
    assert "boxes by class: bird " in printed
    assert "nothing has been written" in printed


def packages(share: Path) -> set[str]:
    """What the packages unpack, and the names of what is to be left out."""
    places = [*(each for group in fetch_pasted.CLASSES.values() for each in group)]
    kept = [f"{each.replace('*', 'us')}/{name}" for each in places for name in ("one", "two")]
    kept += [f"{each}/deep/{name}" for each in fetch_pasted.DISTRACTORS for name in ("one", "two")]
    out = ["animals/birds/cartoon/duck", "animals/mammals/hedgehog", "household/saw_mirror"]
    for name in [*kept, *out, "clothes/hat"]:
        file = share / f"tuxpaint/stamps/{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        cut_out((9, 9, 9)).save(file)
    for name in ("life", "free_by_Peter_Nerlich", "mate/nature/Dune", "mate/desktop/Stripes"):
        file = share / f"backgrounds/{name}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (400, 400)).save(file)
    for name in ("Kite", "Autumn"):
        images = share / f"wallpapers/{name}/contents/images"
        images.mkdir(parents=True)
        Image.new("RGB", (400, 400)).save(images / "2560x1600.jpg")
    (share / "doc/stamps").mkdir(parents=True)
    (share / "doc/stamps/copyright").write_text("GPL-2")
    return {"duck", "hedgehog", "saw_mirror", "hat", "free_by_Peter_Nerlich", "Stripes", "Autumn"}


def apt(folder: Path, download: str, unpack: str = "exit 1") -> str:
    """Programs of those names, for PATH."""
    folder.mkdir()
    for name, script in (("apt-get", download), ("dpkg-deb", unpack)):
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def test_what_is_fetched_is_what_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    left_out = packages(tmp_path / "unpacked/usr/share")
    unpack = f'[ "$1" = -x ] && cp -r {tmp_path}/unpacked "$3"'
    asked = f'[ "$*" = "download {" ".join(fetch_pasted.PACKAGES)}" ]'
    monkeypatch.setenv("PATH", apt(tmp_path / "bin", f"{asked} && touch all.deb", unpack))
    fetch_pasted.main([str(tmp_path / "made")])
    assert "made: 2 cutouts/bird, 4 cutouts/coin" in capsys.readouterr().out
    pictures = read_folder(tmp_path / "made")
    assert pictures.kinds == sorted(fetch_pasted.CLASSES)
    assert [file.stem for file in pictures.groups[-1]] == ["Dune", "Kite", "life"]
    assert not left_out & {file.stem for group in pictures.groups for file in group}
    assert (tmp_path / "made/licences/stamps").read_text() == "GPL-2"
    with pytest.raises(SystemExit, match="DIR must be a new folder or an empty one, got "):
        fetch_pasted.main([str(tmp_path / "made")])


def test_where_nothing_is_to_be_fetched_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = apt(tmp_path / "bin", "echo 'E: Unable to locate' >&2; exit 100")
    monkeypatch.setenv("PATH", path)
    said = r"^apt-get download failed: E: Unable to locate; `apt-get update` may help$"
    with pytest.raises(SystemExit, match=said):
        fetch_pasted.main([str(tmp_path / "made")])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"^there is no apt here: run this on Debian or Ubuntu,"):
        fetch_pasted.main([str(tmp_path / "made")])
    assert not (tmp_path / "made").exists()
