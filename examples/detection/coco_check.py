"""What a COCO annotation file must be: every entry is asked, and all findings are said at once."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples.detection.findings import DataError, Findings

LISTS = ("images", "annotations", "categories")
# Pixels. In float32 thinner boxes may vanish as they are mirrored and scaled, and detectors raise.
LEAST_SIDE = 1 / 16
Entry = dict[str, Any]


class Missing:
    def __repr__(self) -> str:
        return "nothing"


MISSING = Missing()


def read_file(annotations: Path) -> dict[str, list[Entry]]:
    if not annotations.is_file():
        raise DataError(f"`--annotations` must be a file, got {annotations}")
    try:
        content = json.loads(annotations.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{annotations} must be a COCO detection file: {error!r:.200}") from error
    lists = content if isinstance(content, dict) else {}
    absent = ", ".join(repr(name) for name in LISTS if not isinstance(lists.get(name), list))
    if absent:
        raise DataError(f"{annotations} must be a COCO detection file, got no list under {absent}")
    return {name: content[name] for name in LISTS}


def by_id(content: dict[str, list[Entry]], kind: str, findings: Findings) -> dict[Any, Entry]:
    """The entries of one list by their ids; those without a usable one are findings."""
    kept: dict[Any, Entry] = {}
    counts: Counter[Any] = Counter()
    for place, entry in enumerate(content[kind]):
        identity = entry.get("id", MISSING) if isinstance(entry, dict) else MISSING
        if not is_id(identity):
            rule = "`id` must be a whole number or a string"
            findings.add(f"{kind}[{place}]", rule, repr(identity))
            continue
        counts[identity] += 1
        kept.setdefault(identity, entry)
    for identity, count in counts.items():
        if count > 1:
            rule = f"`id` must be of one entry of {kind} alone"
            findings.add(f"id {identity!r}", rule, f"{count} of them")
    if len({type(identity) for identity in counts}) > 1:
        first = {type(identity): identity for identity in reversed(counts)}
        rule = "`id` must be numbers or strings throughout"
        findings.add(kind, rule, " and ".join(map(repr, first.values())))
    return kept


def is_id(value: Any) -> bool:
    return type(value) in (int, str)


def check_categories(content: dict[str, list[Entry]], findings: Findings) -> dict[Any, str]:
    """Names by id."""
    categories = by_id(content, "categories", findings)
    for identity, category in categories.items():
        if not isinstance(name := category.get("name", MISSING), str):
            findings.add(f"category {identity!r}", "`name` must be a string", repr(name))
    return {identity: category.get("name", "") for identity, category in categories.items()}


def check_images(
    images: Path, content: dict[str, list[Entry]], findings: Findings
) -> dict[Any, Entry]:
    """The images whose file is there, by id."""
    found = {}
    of_file: dict[Path, Any] = {}
    for identity, image in by_id(content, "images", findings).items():
        where, name = f"image {identity!r}", image.get("file_name", MISSING)
        if not isinstance(name, str):
            findings.add(where, "`file_name` must be a string", repr(name))
            continue
        where = f"{where} ({name})"
        # As written: a link in the folder may lead where it likes.
        file = Path(os.path.normpath(name))
        if file.is_absolute() or os.pardir in file.parts:
            findings.add(where, f"`file_name` must lie in {images}")
        # Of a name that no file can have it says so; Path raises.
        elif not os.path.isfile(images / file):  # noqa: PTH113
            findings.add(where, f"`file_name` must be a file in {images}")
        elif file in of_file:
            findings.add(
                where, "`file_name` must be of one image alone", f"image {of_file[file]!r} too"
            )
        elif not is_size(image):
            size = " and ".join(repr(image.get(side, MISSING)) for side in ("width", "height"))
            findings.add(where, "`width` and `height` must be numbers of pixels", size)
        else:
            of_file[file] = identity
            found[identity] = image
    return found


def is_size(image: Entry) -> bool:
    """Absent is a size too: the file's own."""
    sides = [image[side] for side in ("width", "height") if side in image]
    return len(sides) in (0, 2) and all(is_number(side) and side > 0 for side in sides)


def is_number(value: Any) -> bool:
    # JSON's numbers may be NaN, infinite, or too large for a float.
    return type(value) in (int, float) and -1e9 < value < 1e9


def check_annotations(
    content: dict[str, list[Entry]], categories: dict[Any, str], findings: Findings
) -> list[tuple[str, Entry]]:
    """Those with an image, a category and a box of four numbers, and how to speak of each."""
    by_id(content, "annotations", findings)
    files = {
        image["id"]: image.get("file_name")
        for image in content["images"]
        if isinstance(image, dict) and is_id(image.get("id"))
    }
    usable = []
    for place, entry in enumerate(content["annotations"]):
        if not isinstance(entry, dict):
            continue
        where = f"annotations[{place}]"
        if "id" in entry:
            where = f"annotation {entry['id']!r:.40}"
        image = entry.get("image_id")
        if is_id(image) and image in files:
            where += f" ({files[image]})"
        problems = list(wrong_with(entry, files, categories))
        for rule, found in problems:
            findings.add(where, rule, repr(found))
        if not problems:
            usable.append((where, entry))
    return usable


def wrong_with(
    entry: Entry, images: dict[Any, Any], categories: dict[Any, str]
) -> Iterator[tuple[str, Any]]:
    """Each rule that an annotation breaks, and what was found."""
    for key, known in (("image_id", images), ("category_id", categories)):
        if not is_id(identity := entry.get(key, MISSING)) or identity not in known:
            yield f"`{key}` must be the id of an entry", identity
    if (crowd := entry.get("iscrowd", 0)) not in (0, 1):
        yield "`iscrowd` must be 0 or 1", crowd
    box = entry.get("bbox", MISSING)
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        yield "`bbox` must be a list of four finite numbers", box
    elif min(box[2:]) < 0:
        yield "`bbox` must have no negative width or height", box
    elif min(box[2:]) > 0 and max(box) <= 1:
        yield "`bbox` must be in pixels, and this looks like shares of the picture", box


def has_area(annotation: Entry) -> bool:
    return bool(min(annotation["bbox"][2:]) >= LEAST_SIDE)


def area_of(annotation: Entry) -> float:
    """The object's own, which tells small from large, where it is given; else its box's."""
    _, _, width, height = annotation["bbox"]
    own = annotation.get("area")
    return float(own) if is_number(own) and own > 0 else float(width * height)


def is_object(annotation: Entry) -> bool:
    return has_area(annotation) and not annotation.get("iscrowd")


def share_inside(box: list[float], size: tuple[int, int]) -> float:
    """Of the box's area, that which lies in the picture."""
    left, top, width, height = box
    across = min(left + width, size[0]) - max(left, 0)
    down = min(top + height, size[1]) - max(top, 0)
    return max(across, 0) * max(down, 0) / (width * height)
