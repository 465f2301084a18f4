"""One run: a compact detector of the scenes trained, alone or distilled, and evaluated."""

from contextlib import redirect_stderr
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import nn

from benchmarks.study.distiller import new_distiller
from benchmarks.study.lines import COLUMNS, MASK_COLUMNS, circumstances
from benchmarks.study.remembered import remembered
from benchmarks.study.runs import Line, Run, teacher_of
from examples.detection.checkpoints import write_atomically
from examples.detection.detectors import MASK_RCNN, Shape, build, tapped
from examples.detection.scenes import DENSE, SPARSE, Scenes
from examples.detection.training import MASK_METRICS, METRICS, Alone, Settings, evaluate, train

KINDS = {"scenes": DENSE, "sparse": SPARSE}
# By level RetinaNet's and Faster R-CNN's own anchors; FCOS, which has none, gets the same.
ANCHOR_SIZES = ((10, 14), (20, 28), (40, 56))

# A worker draws the scenes of a seed once, and the held-out ones: runs go seed by seed.
scenes = lru_cache(maxsize=3)(Scenes)


def new_detector(run: Run, role: str, shape: Shape | str) -> nn.Module:
    torch.manual_seed(run.seed)
    kind, classes = KINDS[run.data.name], len(Scenes.classes)
    return build(run.detector, role, classes, kind.size, shape, small_objects=kind is SPARSE)


def new_model(run: Run, folder: Path, device: torch.device) -> nn.Module:
    """A distiller, or the detector alone."""
    if run.method == "teacher":
        return Alone(new_detector(run, "teacher", run.teacher.shape))
    student = new_detector(run, "student", run.student)
    if run.method == "none":
        return Alone(student)
    # By the run's own seed, from which the adapters are drawn too.
    teacher = new_detector(run, "teacher", run.teacher.shape)
    load_weights(teacher, teacher_of(run), folder)
    layers, channels = tapped(student, teacher, run.taps, KINDS[run.data.name].size)
    teacher.to(device)
    anchor_sizes = dict(zip(layers, ANCHOR_SIZES, strict=True))
    remember = None
    if run.data.name == "sparse":
        data = training_scenes(run)
        remember = partial(remembered, data=data, folder=folder, name=teacher_of(run).name)
    return new_distiller(run, student, teacher, layers, channels, anchor_sizes, remember)


def training_scenes(run: Run) -> Scenes:
    with_masks = run.detector == MASK_RCNN
    return scenes(run.seed, run.data.train_images, with_masks, KINDS[run.data.name])


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


def perform(run: Run, folder: Path, device_type: str) -> Line:
    """Trains and evaluates; goes on from the run's checkpoint. Its weights stay in `folder`.

    Its bar and its warnings go to a log there.
    """
    with (folder / f"{run.name}.log").open("a") as log, redirect_stderr(log):
        return line_of(run, folder, torch.device(device_type))


def line_of(run: Run, folder: Path, device: torch.device) -> Line:
    settings = Settings(
        batch_size=8,
        learning_rate=3e-3,
        seed=run.seed,
        device=device,
        amp=run.data.name == "sparse",
        workers=0,
        checkpoint_every=100,
        evaluations=0,
        # COCO's small objects are under 32 pixels wide: a third of a scene of 96.
        area_scale=2.0,
    )
    model = new_model(run, folder, device)
    data = training_scenes(run)
    held_out = scenes(run.data.held_out_seed, run.data.held_out_images, data.masks, data.kind)
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
