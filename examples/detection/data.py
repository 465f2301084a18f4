"""What `--data` names: pictures to train on, pictures held out, and the classes."""

import argparse
import os
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, Subset

from examples.detection.coco import CocoFolder
from examples.detection.command_line import HELD_OUT_SEED, option
from examples.detection.content import Content, seen
from examples.detection.deeppcb import DeepPCB
from examples.detection.findings import DataError
from examples.detection.pasted import Pasted, read_folder
from examples.detection.processes import JobError
from examples.detection.scenes import DENSE, SPARSE, Scenes

KINDS = {"scenes": DENSE, "sparse": SPARSE}
# COCO's small objects are under 32 pixels wide: a third of a scene of 96; tiles are at half size,
# and what is pasted has sides of 14 to 60.
AREA_SCALES = {"scenes": 2.0, "sparse": 2.0, "deeppcb": 2.0, "pasted": 2.0, "coco": 1.0}
# Options whose value may be a file of weights.
WEIGHT_FILES = ("teacher", "teacher_weights", "student_weights")
Data = tuple[Dataset[Any], Dataset[Any], tuple[str, ...]]


def load_data(options: argparse.Namespace) -> Data:
    """Training data, held-out data and the names of the classes, the background first."""
    if options.data in KINDS:
        kind = KINDS[options.data]
        data = Scenes(options.seed, options.train_images, kind=kind)
        # The held-out scenes are the same for all seeds.
        return data, Scenes(HELD_OUT_SEED, options.held_out_images, kind=kind), data.classes
    if options.data == "pasted":
        pictures = read_folder(options.pasted)
        pasted = Pasted(pictures, "train", options.seed, options.train_images)
        held = Pasted(pictures, "test", HELD_OUT_SEED, options.held_out_images)
        return pasted, held, pasted.classes
    if options.data == "deeppcb":
        parts = (DeepPCB(options.deeppcb, part, options.tile) for part in ("train", "test"))
        return *parts, DeepPCB.classes
    return load_coco(options)


def load_coco(options: argparse.Namespace) -> Data:
    data = read_coco(options.images, options.annotations)
    if options.val_images is not None:
        held_out = read_coco(options.val_images, options.val_annotations)
        if held_out.classes != data.classes:
            raise DataError("--val-annotations must have the categories of --annotations")
        if both := len(files_of(data) & files_of(held_out)):
            print(
                f"{options.val_annotations}: {both} of {len(held_out)} pictures are trained on "
                "too, so that their AP says nothing of new ones"
            )
        return data, held_out, data.classes
    tenth = range(0, len(data), 10)
    rest = [i for i in range(len(data)) if i % 10]
    print(f"held out: every tenth of the {len(data)} images")
    for part, indices in (("training", rest), ("held-out", tenth)):
        if not any(map(data.objects.count, indices)):
            raise DataError(
                f"the {part} images must hold at least one box, got none in {len(indices)} of "
                f"{options.annotations}: give --val-images and --val-annotations"
            )
    return Subset(data, rest), Subset(data, tenth), data.classes


def files_of(data: CocoFolder) -> set[str]:
    """Whatever way leads to them."""
    return {os.path.realpath(data.folder / file) for file in data.files}


def read_coco(images: Path, annotations: Path) -> CocoFolder:
    data = CocoFolder(images, annotations)
    for note in data.notes:
        print(note)
    return data


def content_of(options: argparse.Namespace, data: Data) -> dict[str, Content]:
    """What a run of these options reads, by what it is called."""
    training, held_out, classes = data
    parts = {"training pictures or boxes": training, "held-out pictures or boxes": held_out}
    if isinstance(training, Subset):
        parts = {"pictures or boxes": training.dataset}
    content = {"classes": seen(", ".join(classes[1:]), classes)}
    for name, part in parts.items():
        # Scenes are drawn as the options say.
        if hasattr(part, "content"):
            content[name] = part.content()
    for name in WEIGHT_FILES:
        if isinstance(file := getattr(options, name), Path):
            content[f"weights of {option(name)}"] = content_of_file(file, option(name))
    return content


def content_of_file(file: Path, named: str) -> Content:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise JobError(f"{named} {file} cannot be read: {error.strerror}") from error
    return seen(f"{len(content):,} bytes", content)
