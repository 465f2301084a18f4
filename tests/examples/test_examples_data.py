"""The main job on a user's own pictures: what is wrong with them is said, what is right is read."""

import json
import struct
import zlib
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.coco_folder import write_coco

NAN, HUGE = float("nan"), 10**400


@pytest.fixture
def folder(tmp_path: Path) -> tuple[Path, Path]:
    return write_coco(tmp_path)


def change(annotations: Path, kind: str, place: int, **values: Any) -> None:
    """Of one entry; `...` takes the key away."""
    content = json.loads(annotations.read_text())
    content[kind][place] |= values
    for key in [key for key, value in values.items() if value is ...]:
        del content[kind][place][key]
    annotations.write_text(json.dumps(content))


def read(images: Path, annotations: Path) -> Any:
    from examples.detection.coco import CocoFolder

    return CocoFolder(images, annotations)


def what_is_wrong(images: Path, annotations: Path) -> str:
    from examples.detection.findings import DataError

    with pytest.raises(DataError) as error:
        read(images, annotations)
    return str(error.value)


# --- the file as a whole --------------------------------------------------------------------------

BAD_FILES = {
    "no folder": (lambda i, a, c: i.rename(i.with_name("gone")), "`--images` must be a folder"),
    "no file": (lambda i, a, c: a.unlink(), "`--annotations` must be a file"),
    "no JSON": (lambda i, a, c: a.write_text("{"), "must be a COCO detection file"),
    "no text": (lambda i, a, c: a.write_bytes(b"\xff\xfe"), "must be a COCO detection file"),
    "a list": (lambda i, a, c: a.write_text("[]"), "got no list under 'images'"),
    "no key": (lambda i, a, c: a.write_text('{"images": []}'), "'annotations', 'categories'"),
    "no image": (lambda i, a, c: (i / "2.png").unlink(), r"image 2 \(2.png\): `file_name` must be"),
    "no box": (lambda i, a, c: a.write_text(json.dumps(c | {"annotations": []})), "at least one"),
    "no entry": (lambda i, a, c: a.write_text(json.dumps(c | {"images": [3]})), r"images\[0\]"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_data_is_said_before_any_training(case: str, folder: tuple[Path, Path]) -> None:
    from examples.detection.findings import DataError

    images, annotations = folder
    spoil, text = BAD_FILES[case]
    spoil(images, annotations, json.loads(annotations.read_text()))
    with pytest.raises(DataError, match=text):
        read(images, annotations)


# --- its entries ----------------------------------------------------------------------------------

A = "annotations"
# The first annotation has the id 1 and is of the image 0, the second 3 and of 2.
BAD_ENTRIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "one id for two": (A, {"id": 3}, "id 3: `id` must be of one entry of annotations alone"),
    "two images of an id": ("images", {"id": 1}, "id 1: `id` must be of one entry of images"),
    "two categories of an id": ("categories", {"id": 7}, "id 7: `id` must be of one entry of cat"),
    "two images of a file": ("images", {"file_name": "./1.png"}, "must be of one image alone"),
    "no id": (A, {"id": ...}, "annotations[0]: `id` must be a whole number or a string"),
    "no image id": ("images", {"id": ...}, "images[0]: `id` must be a whole number or a string"),
    "an id of another kind": (A, {"id": "1"}, "numbers or strings throughout, got 3 and '1'"),
    "an image of no kind": ("images", {"id": "0"}, "`image_id` must be the id of an entry, got 0"),
    "a list as an id": ("images", {"id": [0]}, "must be a whole number or a string, got [0]"),
    "true as an id": ("images", {"id": True}, "must be a whole number or a string, got True"),
    "unknown image": (A, {"image_id": 99}, "annotation 1: `image_id` must be the id of an entry"),
    "a list as an image": (A, {"image_id": [0]}, "`image_id` must be the id of an entry"),
    "unknown category": (A, {"category_id": 5}, "annotation 1 (0.png): `category_id` must be"),
    "no name": ("categories", {"name": ...}, "category 3: `name` must be a string, got nothing"),
    "a number as a name": ("categories", {"name": 3}, "category 3: `name` must be a string"),
    "no file name": ("images", {"file_name": ...}, "image 0: `file_name` must be a string"),
    "a number as a file": ("images", {"file_name": 7}, "`file_name` must be a string, got 7"),
    "outside": ("images", {"file_name": "../annotations.json"}, "`file_name` must lie in"),
    "by a way": ("images", {"file_name": "a/../../b.png"}, "`file_name` must lie in"),
    "absolute": ("images", {"file_name": "/etc/hostname"}, "`file_name` must lie in"),
    "the folder": ("images", {"file_name": "."}, "`file_name` must be a file in"),
    "another size": ("images", {"width": 80, "height": 100}, "100 x 80 in the file, 80 x 100 in"),
    "half a size": ("images", {"width": ...}, "`width` and `height` must be numbers of pixels"),
    "size as a string": ("images", {"width": "100"}, "got '100' and 80"),
    "no box": (A, {"bbox": ...}, "annotation 1 (0.png): `bbox` must be a list of four finite"),
    "box as a string": (A, {"bbox": "1, 2, 3, 4"}, "must be a list of four finite numbers"),
    "strings in a box": (A, {"bbox": ["1", 2, 3, 4]}, "must be a list of four finite numbers"),
    "three numbers": (A, {"bbox": [1, 2, 3]}, "must be a list of four finite numbers"),
    "no number": (A, {"bbox": [1, 2, NAN, 4]}, "must be a list of four finite numbers, got [1, 2"),
    "infinite": (A, {"bbox": [1, 2, float("inf"), 4]}, "must be a list of four finite numbers"),
    "beyond floats": (A, {"bbox": [1, 2, HUGE, 4]}, "must be a list of four finite numbers"),
    "negative": (A, {"bbox": [30, 20, -5, 4]}, "`bbox` must have no negative width or height"),
    "shares": (A, {"bbox": [0.1, 0.2, 0.3, 0.9]}, "`bbox` must be in pixels"),
    "far outside": (
        A,
        {"bbox": [300, 20, 9, 9]},
        "must lie in its picture, got [300, 20, 9, 9] in",
    ),
    "corners": (A, {"bbox": [60, 20, 95, 70]}, "must lie in its picture"),
    "a crowd as a string": (A, {"iscrowd": "0"}, "`iscrowd` must be 0 or 1, got '0'"),
}


@pytest.mark.parametrize("case", BAD_ENTRIES)
def test_a_bad_entry_is_named(case: str, folder: tuple[Path, Path]) -> None:
    images, annotations = folder
    kind, values, text = BAD_ENTRIES[case]
    change(annotations, kind, 0, **values)
    said = what_is_wrong(images, annotations)
    assert str(annotations) in said
    assert text in said


NAMES = ("x", "", "\0", "\ud800", "x" * 5000)
VALUES = (None, True, *NAMES, -1, 0, 0.5, NAN, HUGE, [], [1], {}, {"id": 1})


def test_whatever_stands_in_an_entry_is_no_traceback(folder: tuple[Path, Path]) -> None:
    from examples.detection.findings import DataError

    images, annotations = folder
    whole = annotations.read_text()
    read_well, said = 0, []
    for kind in ("images", "annotations", "categories"):
        for key in json.loads(whole)[kind][0]:
            for value in VALUES:
                annotations.write_text(whole)
                change(annotations, kind, 0, **{key: value})
                try:
                    data = read(images, annotations)
                except DataError as error:
                    said.append(str(error))
                else:
                    read_well += 1
                    assert data.objects.boxes.isfinite().all()
                    assert (data.objects.area > 0).all()
    assert all(text.startswith(str(annotations)) for text in said)
    # Among them the areas: a box has one of its own.
    assert read_well >= len(VALUES)


def test_all_that_is_wrong_is_said_together_and_a_few_of_each_kind(tmp_path: Path) -> None:
    images, annotations = write_coco(tmp_path, count=12)
    for place in range(9):
        change(annotations, "annotations", place, bbox=[NAN, 0, 1, 1])
    change(annotations, "categories", 1, name=None)
    (images / "11.png").write_bytes(b"no picture")
    said = what_is_wrong(images, annotations).splitlines()
    assert said[0] == f"{annotations}: 11 to mend, nothing has been trained"
    assert sum("`bbox` must" in line for line in said) == 5
    assert "  and 4 more like this" in said
    assert sum("category 7: `name`" in line or "image 11 (11.png)" in line for line in said) == 2


def test_boxes_belong_to_their_images_whatever_the_order_of_the_entries(
    folder: tuple[Path, Path],
) -> None:
    images, annotations = folder
    content = json.loads(annotations.read_text())
    content["annotations"].reverse()
    content["images"].reverse()
    annotations.write_text(json.dumps(content))
    data = read(images, annotations)
    for index, (image, target) in enumerate(data):
        assert len(target["boxes"]) == (index != 1)
        for left, top, right, bottom in target["boxes"].int().tolist():
            assert (image[:, top:bottom, left:right] == 220).all()
        assert target["labels"].tolist() == [1 + index % 2] * (index != 1)


def test_boxes_of_no_area_are_left_out_and_counted(folder: tuple[Path, Path]) -> None:
    images, annotations = folder
    change(annotations, "annotations", 0, bbox=[10, 10, 0, 50])
    data = read(images, annotations)
    assert data.notes[0].endswith("1 boxes of no area left out")
    assert data.notes[1].endswith("2 images without a box kept as background")
    assert data.classes == ("background", "tall", "wide")
    assert len(data[0][1]["boxes"]) == 0
    assert data[2][1]["boxes"].tolist() == [[10, 10, 30, 60]]
    assert data[2][1]["labels"].tolist() == [1]


@pytest.mark.parametrize("width", [2.8e-14, 1e-6, 1e-3, 0.06])
def test_a_box_that_vanishes_in_float32_is_one_of_no_area(
    width: float, folder: tuple[Path, Path]
) -> None:
    images, annotations = folder
    for bbox in ([60.3, 20, width, 30], [60.3, 20, 30, width], [60.3, 20, 1e-200, 1e-200]):
        change(annotations, "annotations", 0, bbox=bbox)
        data = read(images, annotations)
        assert data.notes[0].endswith("1 boxes of no area left out")
        assert data[0][1]["boxes"].shape == (0, 4)


@pytest.mark.parametrize("side", [96, 640, 65_535, 131_071])
def test_the_thinnest_box_outlives_mirroring_and_scaling_at_any_place(side: int) -> None:
    from torchvision.models.detection.transform import resize_boxes

    from examples.detection.augmentation import flipped
    from examples.detection.coco_check import LEAST_SIDE, has_area

    # With half of it inside, a box may reach as far over an edge as the picture is wide.
    left = torch.linspace(-side, side, 100_003).tolist()
    bboxes = [[x, 3.0, LEAST_SIDE, 4.0] for x in left]
    assert all(has_area({"bbox": bbox}) for bbox in bboxes)
    boxes = torch.tensor(bboxes)
    boxes[:, 2:] += boxes[:, :2]
    mirrored = flipped(torch.empty(3, 1, side), {"boxes": boxes})[1]["boxes"]
    for each in (boxes, mirrored):
        for size in (96, 320, 1333):
            scaled = resize_boxes(each, [8, side], [8, size])
            assert (scaled[:, 2:] > scaled[:, :2]).all()


def test_a_box_that_reaches_over_the_edge_is_kept_and_counted(folder: tuple[Path, Path]) -> None:
    images, annotations = folder
    change(annotations, "annotations", 0, bbox=[60, 20, 60, 70])
    data = read(images, annotations)
    assert data.notes[0].endswith("1 boxes kept that reach over the edge of their picture")
    assert data[0][1]["boxes"].tolist() == [[60, 20, 120, 90]]


def test_crowds_are_no_objects_and_counted(folder: tuple[Path, Path]) -> None:
    images, annotations = folder
    before = sum(len(target["boxes"]) for _, target in read(images, annotations))
    change(annotations, "annotations", 0, iscrowd=1)
    data = read(images, annotations)
    assert data.notes[0].endswith("1 crowds: background in training, and not judged")
    assert sum(len(target["boxes"]) for _, target in data) == before - 1
    assert sum(len(target["crowds"]) for _, target in data) == 1


def test_ap_on_a_folder_is_that_of_cocos_own_evaluation(
    folder: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With crowds, and with areas that are other than the boxes'."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    from examples.detection.__main__ import parse
    from examples.detection.parts import new_settings
    from examples.detection.training import evaluate

    images, annotations = folder
    change(annotations, "annotations", 0, iscrowd=1)
    change(annotations, "annotations", 1, area=2000.5)  # of middle size, its box is small
    change(annotations, "annotations", 2, area=0)
    data = read(images, annotations)
    generator = torch.Generator().manual_seed(0)
    truth = json.loads(annotations.read_text())
    found: dict[int, list[Any]] = {}
    for each in truth["annotations"]:
        left, top, width, height = each["bbox"]
        for near in range(4):
            shift = 12 * torch.rand(2, generator=generator) * (near > 0)
            box = [left + shift[0].item(), top + shift[1].item(), width, height]
            score = torch.rand(1, generator=generator).item()
            label = [3, 7].index(each["category_id"]) + 1
            found.setdefault(each["image_id"], []).append((box, score, label))

    class Finds(torch.nn.Module):
        """What lies near the boxes of each picture, in their order."""

        def __init__(self) -> None:
            super().__init__()
            self.seen = 0

        def forward(self, pictures: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
            results = []
            for _ in pictures:
                each = found.get(self.seen, [])
                self.seen += 1
                boxes = torch.tensor([box for box, _, _ in each]).reshape(-1, 4)
                boxes[:, 2:] += boxes[:, :2]
                scores = torch.tensor([score for _, score, _ in each])
                labels = torch.tensor([label for _, _, label in each]).long()
                results.append({"boxes": boxes, "scores": scores, "labels": labels})
            return results

    options = ["--data", "coco", "--images", str(images), "--annotations", str(annotations)]
    ours = evaluate(Finds(), data, new_settings(parse(options), torch.device("cpu")))

    with redirect_stdout(StringIO()):
        for each in truth["annotations"]:
            each["area"] = each["area"] or each["bbox"][2] * each["bbox"][3]
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        detections = [
            {"image_id": i, "category_id": [3, 7][label - 1], "bbox": box, "score": score}
            for i, each in found.items()
            for box, score, label in each
        ]
        evaluation = COCOeval(coco, coco.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    expected = evaluation.stats[:6].tolist()
    names = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
    assert [ours[name] for name in names] == pytest.approx(expected, abs=1e-6)
    assert 0 < ours["map"] < 1


def test_a_byte_order_mark_and_categories_of_one_name(folder: tuple[Path, Path]) -> None:
    images, annotations = folder
    change(annotations, "categories", 0, name="wide")
    annotations.write_text(annotations.read_text(), encoding="utf-8-sig")
    assert read(images, annotations).notes[0].endswith("several categories are called wide")


def test_a_split_without_a_box_on_one_side_is_refused(folder: tuple[Path, Path]) -> None:
    from examples.detection.__main__ import load_data, parse
    from examples.detection.findings import DataError

    images, annotations = folder
    change(annotations, "annotations", 0, iscrowd=1)
    options = ["--data", "coco", "--images", str(images), "--annotations", str(annotations)]
    with pytest.raises(DataError, match="the held-out images must hold at least one box"):
        load_data(parse(options))
    content = json.loads(annotations.read_text())
    content["images"], content["annotations"] = content["images"][2:3], content["annotations"][1:2]
    annotations.write_text(json.dumps(content))
    with pytest.raises(DataError, match="the training images must hold at least one box"):
        load_data(parse(options))


def test_held_out_pictures_that_are_trained_on_are_counted_in_one_line(
    folder: tuple[Path, Path], tmp_path: Path, capsys: Any
) -> None:
    from examples.detection.__main__ import load_data, parse

    images, annotations = folder
    options = ["--data", "coco", "--images", str(images), "--annotations", str(annotations)]

    def said(val_images: Path, val_annotations: Path) -> list[str]:
        held_out = ["--val-images", str(val_images), "--val-annotations", str(val_annotations)]
        load_data(parse([*options, *held_out]))
        printed = capsys.readouterr().out.splitlines()
        return [line for line in printed if "images without a box" not in line]

    text = "{}: {} of 6 pictures are trained on too, so that their AP says nothing of new ones"
    assert said(images, annotations) == [text.format(annotations, 6)]
    # The same names are other pictures, and links lead to the same ones.
    val_images, val_annotations = write_coco(tmp_path / "val")
    assert said(val_images, val_annotations) == []
    for name in ("0.png", "3.png"):
        (val_images / name).unlink()
        (val_images / name).symlink_to(images / name)
    assert said(val_images, val_annotations) == [text.format(val_annotations, 2)]
    (tmp_path / "link").symlink_to(images)
    assert said(tmp_path / "link", val_annotations) == [text.format(val_annotations, 6)]


# --- its pictures ---------------------------------------------------------------------------------


def half_bright(width: int = 100, height: int = 80) -> Image.Image:
    """Its right half is white."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, width // 2 :] = 255
    return Image.fromarray(pixels)


def with_orientation(tag: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = tag
    return exif.tobytes()


@pytest.mark.parametrize("ending", ["jpg", "png"])
@pytest.mark.parametrize(("tag", "white"), [(6, "bottom"), (8, "top"), (5, "bottom"), (7, "top")])
def test_a_picture_is_turned_as_its_exif_tag_says_where_its_annotations_are(
    ending: str, tag: int, white: str, folder: tuple[Path, Path]
) -> None:
    images, annotations = folder
    half_bright().save(images / f"t.{ending}", exif=with_orientation(tag))
    size = {"file_name": f"t.{ending}", "width": 80, "height": 100}
    change(annotations, "images", 2, **size)
    data = read(images, annotations)
    assert any(
        note.endswith("1 images turned upright by their EXIF tag, as their boxes are")
        for note in data.notes
    )
    image = data[2][0]
    assert image.shape == (3, 100, 80)
    top, bottom = image[:, :45].float().mean(), image[:, 55:].float().mean()
    assert (top, bottom) == pytest.approx((255, 0) if white == "top" else (0, 255), abs=2)


@pytest.mark.parametrize("tag", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("sized", [True, False])
def test_a_tag_of_which_the_size_says_nothing_is_refused(
    tag: int, sized: bool, folder: tuple[Path, Path]
) -> None:
    images, annotations = folder
    half_bright().save(images / "2.png", exif=with_orientation(tag))
    if not sized:
        change(annotations, "images", 2, width=..., height=...)
    said = what_is_wrong(images, annotations)
    assert "image 2 (2.png): must be stored upright" in said
    assert f"got orientation {tag}" in said


def test_sixteen_bits_become_eight(folder: tuple[Path, Path]) -> None:
    images, annotations = folder
    values = np.full((80, 100), 65535, np.uint16)
    values[:, :50] = 32768
    Image.fromarray(values).save(images / "2.png")
    data = read(images, annotations)
    assert any(note.endswith("1 images of 16 bits scaled to 8") for note in data.notes)
    image = data[2][0]
    assert image.dtype == torch.uint8
    assert image.shape == (3, 80, 100)
    assert image[:, :, :50].unique().tolist() == [128]
    assert image[:, :, 50:].unique().tolist() == [255]


def truncated(images: Path) -> None:
    half_bright().save(images / "2.jpg", quality=95)
    whole = (images / "2.jpg").read_bytes()
    (images / "2.png").write_bytes(whole[: len(whole) * 2 // 3])


def header_of_300_megapixels(images: Path) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", 20_000, 15_000, 8, 2, 0, 0, 0)
    picture = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )
    (images / "2.png").write_bytes(picture)


BAD_PICTURES = {
    "no picture": (lambda i: (i / "2.png").write_bytes(b"x"), "must be a whole picture"),
    "empty": (lambda i: (i / "2.png").write_bytes(b""), "must be a whole picture"),
    "truncated": (truncated, "must be a whole picture that Pillow can read, got image file is tr"),
    "too large": (header_of_300_megapixels, "must have at most 80,000,000 pixels"),
    "floats": (
        lambda i: Image.fromarray(np.zeros((80, 100), np.float32)).save(i / "2.png", "TIFF"),
        "must have pixels of 8 or 16 bits: convert it, got Pillow's mode F",
    ),
    "another size": (lambda i: half_bright(90, 80).save(i / "2.png"), "90 x 80 in the file, 100 x"),
}


@pytest.mark.parametrize("case", BAD_PICTURES)
def test_a_bad_picture_is_named(case: str, folder: tuple[Path, Path]) -> None:
    images, annotations = folder
    spoil, text = BAD_PICTURES[case]
    spoil(images)
    said = what_is_wrong(images, annotations)
    assert "image 2 (2.png): must" in said
    assert text in said
