"""DeepPCB (Tang et al. 2019): photographs of circuit boards with six kinds of small defects.

https://github.com/tangsanli5201/DeepPCB, as it is cloned, or a copy of its `PCBData` whose pictures
are PNG in place of JPEG. A picture of 640 pixels gives four tiles, its quarters at half size, or
one in full.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from examples.detection.content import Content, seen
from examples.detection.findings import DataError, Findings
from examples.detection.pictures import LIMIT, check_pictures

LISTS = {"train": "trainval.txt", "test": "test.txt"}
KINDS = ("open", "short", "mousebite", "spur", "copper", "pin-hole")
ENDINGS = (".jpg", ".png")
# Of a tile, how many are beside each other in a picture, which is made smaller by as much.
TILES = {"quarter": 2, "full": 1}
# Of a defect's area that a tile must show; of what it shows less the target says nothing.
LEAST_SHOWN = 0.5


@dataclass
class Board:
    """A picture, the boxes of its defects in its own pixels, `(N, 4)`, and their labels."""

    picture: Path
    boxes: Tensor
    labels: Tensor


class DeepPCB(Dataset[tuple[Tensor, dict[str, Any]]]):
    """Tiles of the list `part`, `"train"` or `"test"`; those without a defect are kept.

    An item is a uint8 image, `(3, 160, 160)` for the tile `"quarter"` and `(3, 640, 640)` for
    `"full"`, and its target, as of :class:`Scenes`. All that is wrong with the folder is one error;
    for that every picture is decoded once.
    """

    classes = ("background", *KINDS)

    def __init__(self, folder: Path, part: str, tile: str = "quarter") -> None:
        self.boards = read_boards(folder, part)
        self.side = TILES[tile]
        self.reduced: dict[int, Image.Image] = {}

    def __len__(self) -> int:
        return self.side**2 * len(self.boards)

    def content(self) -> Content:
        boards = [(b.picture.name, b.boxes.tolist(), b.labels.tolist()) for b in self.boards]
        words = f"{len(boards)} pictures, {sum(len(b.boxes) for b in self.boards)} boxes"
        return seen(words, boards)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        if not 0 <= index < len(self):
            raise IndexError(f"`index` must be in 0..{len(self) - 1}, got {index}")
        board, place = divmod(index, self.side**2)
        if board not in self.reduced:
            with Image.open(self.boards[board].picture) as picture:
                self.reduced[board] = picture.convert("L").reduce(self.side)
        reduced = self.reduced[board]
        # Of an odd number of pixels the last is left out.
        width, height = reduced.width // self.side, reduced.height // self.side
        left, top = width * (place % self.side), height * (place // self.side)
        tile = np.asarray(reduced.crop((left, top, left + width, top + height)))
        boxes, labels = self.in_tile(board, (left, top, left + width, top + height))
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
            "labels": labels,
            "image_id": torch.tensor(index),
        }
        return tv_tensors.Image(torch.from_numpy(tile.copy()).expand(3, -1, -1)), target

    def in_tile(self, board: int, tile: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
        """What a part `(left, top, right, bottom)` of the reduced picture shows of its boxes."""
        boxes = self.boards[board].boxes / self.side
        low, high = torch.tensor(tile[:2] * 2), torch.tensor(tile[2:] * 2)
        shown = boxes.clamp(low, high)
        kept = area(shown) >= LEAST_SHOWN * area(boxes)
        return shown[kept] - low, self.boards[board].labels[kept]


def area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).prod(1)


def read_boards(folder: Path, part: str) -> list[Board]:
    """What the list names, or a :class:`DataError` that says what to mend."""
    if not folder.is_dir():
        raise DataError(f"`--deeppcb` must be a folder, got {folder}")
    # Of a clone the data are in a folder of their own.
    root = next((r for r in (folder, folder / "PCBData") if (r / LISTS[part]).is_file()), None)
    if root is None:
        raise DataError(f"`--deeppcb` must hold {LISTS[part]}, or PCBData/{LISTS[part]}: {folder}")
    findings = Findings(root / LISTS[part])
    boards = []
    for number, line in enumerate((root / LISTS[part]).read_text("utf-8").splitlines(), 1):
        if line.strip() and (board := read_board(root, line, f"line {number}", findings)):
            boards.append(board)
    checked = check_pictures([board.picture for board in boards], [None] * len(boards))
    for board, picture in zip(boards, checked, strict=True):
        where = str(board.picture.relative_to(root))
        if picture.size is None:
            findings.add(where, picture.problem, picture.found)
        elif len(board.boxes) and (board.boxes > torch.tensor(picture.size * 2)).any():
            size = f"{picture.size[0]} x {picture.size[1]}"
            findings.add(where, "the boxes must lie in their picture", size)
    findings.say()
    if not any(len(board.boxes) for board in boards):
        raise DataError(f"{findings.annotations} must name a picture with a defect, got none")
    return boards


def read_board(root: Path, line: str, where: str, findings: Findings) -> Board | None:
    """`group/group/1.jpg group/group_not/1.txt` stands for the picture `group/group/1_test.jpg`."""
    names = line.split()
    if len(names) != 2:
        findings.add(where, "must be a picture and its boxes' file", repr(line))
        return None
    stem = root / names[0].removesuffix(".jpg")
    files = [stem.with_name(f"{stem.name}_test{ending}") for ending in ENDINGS]
    picture = next((file for file in files if file.is_file()), None)
    if picture is None:
        found = f"no {files[0].relative_to(root)} or .png"
        findings.add(where, "the picture must be there", found)
    if not (root / names[1]).is_file():
        findings.add(where, "the boxes' file must be there", f"no {names[1]}")
        return None
    rows = read_rows(root / names[1], names[1], findings)
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 5)
    return picture and Board(picture, table[:, :4], table[:, 4].long())


def read_rows(file: Path, name: str, findings: Findings) -> list[list[int]]:
    """`x1 y1 x2 y2 kind` a line, of which those that are no box are findings."""
    rows = []
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        findings.add(name, "the boxes' file must be text", str(error))
        return rows
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            row = [int(word) for word in line.replace(",", " ").split()]
        except ValueError:
            row = []
        if len(row) != 5:
            findings.add(where, "must be five whole numbers, x1 y1 x2 y2 kind", repr(line))
        elif not 1 <= row[4] <= len(KINDS):
            findings.add(where, f"the kind must be in 1..{len(KINDS)}", str(row[4]))
        elif not (0 <= row[0] < row[2] <= LIMIT and 0 <= row[1] < row[3] <= LIMIT):
            rule = f"a box must have an area, and sides in 0..{LIMIT:,}"
            findings.add(where, rule, repr(line))
        else:
            rows.append(row)
    return rows
