"""One run: a compact detector of the scenes trained, alone or distilled, and evaluated."""

from contextlib import redirect_stderr
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from benchmarks.study.distiller import new_distiller
from benchmarks.study.folders import Folders
from benchmarks.study.lines import COLUMNS, MASK_COLUMNS, circumstances
from benchmarks.study.remembered import remembered
from benchmarks.study.runs import BOARDS, FOLDERS, PASTED, Line, Run, teacher_of
from benchmarks.study.variants import calibrate
from examples.detection.batches import collate, to_device
from examples.detection.checkpoints import write_atomically
from examples.detection.data import AREA_SCALES, KINDS
from examples.detection.deeppcb import DeepPCB
from examples.detection.detectors import MASK_RCNN, Shape, build, keep_anchors_exact, tapped
from examples.detection.fetch_pasted import CLASSES
from examples.detection.lite0 import LAST, start_from_imagenet
from examples.detection.pasted import SIZE, Pasted, read_folder
from examples.detection.scenes import Scenes
from examples.detection.training import MASK_METRICS, METRICS, Alone, Settings, evaluate, train

SIZES = {name: kind.size for name, kind in KINDS.items()} | {BOARDS: 160, PASTED: SIZE}
COUNTS = dict.fromkeys(KINDS, len(Scenes.classes)) | {
    BOARDS: len(DeepPCB.classes),
    PASTED: 1 + len(CLASSES),
}
# By level RetinaNet's and Faster R-CNN's own anchors; FCOS, which has none, gets the same.
ANCHOR_SIZES = ((10, 14), (20, 28), (40, 56))

BATCH = 8

# A worker draws the scenes of a seed once, and the held-out ones: runs go seed by seed.
scenes = lru_cache(maxsize=3)(Scenes)
boards = lru_cache(DeepPCB)


@lru_cache
def pasted(folder: Path, part: str, seed: int, length: int) -> Pasted:
    return Pasted(read_folder(folder), part, seed, length)


def new_detector(run: Run, role: str, shape: Shape | str) -> nn.Module:
    torch.manual_seed(run.seed)
    name = run.data.name
    small = name in ("sparse", BOARDS)
    detector = build(run.detector, role, COUNTS[name], SIZES[name], shape, small_objects=small)
    if shape in LAST:
        start_from_imagenet(detector.backbone.body, shape)
    return keep_anchors_exact(detector)


def new_model(
    run: Run, folder: Path, device: torch.device, pictures: Folders | None = None
) -> nn.Module:
    """A distiller, or the detector alone."""
    if run.method == "teacher":
        return Alone(new_detector(run, "teacher", run.teacher.shape))
    student = new_detector(run, "student", run.student)
    if run.method == "none":
        return Alone(student)
    # By the run's own seed, from which the adapters are drawn too.
    teacher = new_detector(run, "teacher", run.teacher.shape)
    load_weights(teacher, teacher_of(run), folder)
    layers, channels = tapped(student, teacher, run.taps, SIZES[run.data.name])
    teacher.to(device)
    anchor_sizes = dict(zip(layers, ANCHOR_SIZES, strict=True))
    remember = None
    if run.data.name != "scenes":
        data, seed = training_data(run, pictures), None if run.data.name in FOLDERS else run.seed
        name = teacher_of(run).name
        remember = partial(remembered, data=data, seed=seed, folder=folder, name=name)
    distiller = new_distiller(run, student, teacher, layers, channels, anchor_sizes, remember)
    wanted = {name: run.hyperparameters.get(name) for name in ("ratio", "total")}
    if any(wanted.values()):
        data = training_data(run, pictures)
        batch = to_device(collate([data[i] for i in range(BATCH)]), device)
        calibrate(distiller.to(device), batch, **wanted)
    return distiller


def training_data(run: Run, pictures: Folders | None = None) -> Dataset[Any]:
    if run.data.name == BOARDS:
        return boards(pictures[BOARDS], "train")
    if run.data.name == PASTED:
        return pasted(pictures[PASTED], "train", 0, run.data.train_images)
    with_masks = run.detector == MASK_RCNN
    return scenes(run.seed, run.data.train_images, with_masks, KINDS[run.data.name])


def held_out_data(run: Run, pictures: Folders | None) -> Dataset[Any]:
    seed, images = run.data.held_out_seed, run.data.held_out_images
    if run.data.name == BOARDS:
        return boards(pictures[BOARDS], "test")
    if run.data.name == PASTED:
        return pasted(pictures[PASTED], "test", seed, images)
    with_masks = run.detector == MASK_RCNN
    return scenes(seed, images, with_masks, KINDS[run.data.name])


def load_weights(detector: nn.Module, run: Run, folder: Path) -> None:
    """Those that `run` has left."""
    weights = torch.load(folder / f"{run.name}.pt", map_location="cpu", weights_only=True)
    detector.load_state_dict(weights)


def trained(run: Run, folder: Path) -> nn.Module:
    """The detector that `run` has left."""
    teaches = run.method == "teacher"
    shape = run.teacher.shape if teaches else run.student
    detector = new_detector(run, "teacher" if teaches else "student", shape)
    load_weights(detector, run, folder)
    return detector


def perform(run: Run, folder: Path, device_type: str, pictures: Folders | None = None) -> Line:
    """Trains and evaluates; goes on from the run's checkpoint. Its weights stay in `folder`.

    Its bar and its warnings go to a log there.
    """
    with (folder / f"{run.name}.log").open("a") as log, redirect_stderr(log):
        return line_of(run, folder, torch.device(device_type), pictures)


def settings_for(run: Run, device: torch.device) -> Settings:
    return Settings(
        batch_size=BATCH,
        learning_rate=3e-3,
        seed=run.seed,
        device=device,
        amp=run.data.name != "scenes",
        workers=0,
        checkpoint_every=100,
        evaluations=0,
        area_scale=AREA_SCALES[run.data.name],
    )


def line_of(run: Run, folder: Path, device: torch.device, pictures: Folders | None) -> Line:
    settings = settings_for(run, device)
    model = new_model(run, folder, device, pictures)
    data, held_out = training_data(run, pictures), held_out_data(run, pictures)
    checkpoint = folder / f"{run.name}.checkpoint.pt"
    curve = train(run.name, model, data, held_out, run.steps, settings, checkpoint)
    metrics = evaluate(model.student, held_out, settings)
    write_atomically(folder / f"{run.name}.pt", model.student.state_dict())
    # The evaluator says -1 where no held-out object has the size.
    values = [metrics[name] if metrics[name] >= 0 else None for name in METRICS]
    masks = [metrics[name] for name in MASK_METRICS if name in metrics]
    return {
        **asdict(run),
        **dict(zip(COLUMNS, values, strict=True)),
        **dict(zip(MASK_COLUMNS, masks, strict=False)),
        **circumstances(curve.seconds, device),
    }
