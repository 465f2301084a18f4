"""One run's models, and its training over all processes."""

import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision.models import detection
from tqdm import tqdm

from benchmarks.study.coco.runs import BACKBONE_WEIGHTS, Shape, file_name
from benchmarks.study.distiller import new_distiller
from benchmarks.study.runs import Run
from benchmarks.training_step import CHANNELS, LAYERS
from examples.detection.batches import batch_indices, collate, to_device
from examples.detection.checkpoints import Curve, load, save
from examples.detection.detectors import fpn_outputs, levels_of
from examples.detection.processes import world
from examples.detection.training import Alone, Settings, backward

EPOCHS, DECAYS, WARM_UP = 24, (16, 22), 500
# RetinaNet's, of the three levels.
ANCHOR_SIZES = {
    level: tuple(4 * stride * 2 ** (octave / 3) for octave in range(3))
    for level, stride in zip(LAYERS, (8, 16, 32), strict=True)
}


def new_detector(shape: Shape, seed: int, classes: int, size: int) -> nn.Module:
    """Of released weights, the backbone's alone or all, or of random ones."""
    name, weights = shape
    torch.manual_seed(seed)
    build = partial(getattr(detection, name), min_size=size, max_size=size * 1333 // 800)
    if weights in (None, BACKBONE_WEIGHTS):
        return build(weights=None, weights_backbone=weights, num_classes=classes)
    return build(weights=weights)


def new_model(run: Run, classes: int, device: torch.device) -> nn.Module:
    """A distiller, or the detector alone."""
    size = run.data.size
    if run.method == "teacher":
        return Alone(new_detector(run.teacher.shape, run.teacher.seed, classes, size))
    student = new_detector(run.student, run.seed, classes, size)
    if run.method == "none":
        return Alone(student)
    teacher = new_detector(run.teacher.shape, run.teacher.seed, classes, size).to(device)
    paths, channels = LAYERS, CHANNELS
    if run.taps == "fpn":
        paths = at_fpn(student)
        channels = dict.fromkeys(paths, student.backbone.out_channels)
    layers = {level: (path, path) for level, path in paths.items()}
    return new_distiller(run, student, teacher, layers, (channels, channels), ANCHOR_SIZES)


def at_fpn(model: nn.Module) -> dict[str, str]:
    """The outputs of the strides of `LAYERS`; an R-CNN's FPN has a finer one."""
    outputs = dict(zip(levels_of(model), fpn_outputs(model), strict=True))
    return {level: outputs[path] for level, path in LAYERS.items()}


def rate(step: int, steps: int) -> float:
    """Share of the learning rate: a warm-up, and a tenth from each of `DECAYS` of `EPOCHS` on."""
    warm_up = min(1.0, 0.001 + 0.999 * step / WARM_UP)
    return warm_up * 0.1 ** sum(step * EPOCHS >= epoch * steps for epoch in DECAYS)


def train(
    run: Run, model: nn.Module, data: Dataset[Any], settings: Settings, checkpoint: Path
) -> Curve:
    """As `training.train`, but by mmdetection's 2x schedule and without averaged weights."""
    rank, ranks = world()
    model.to(settings.device).train()
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad],
        settings.learning_rate,
        momentum=0.9,
        weight_decay=1e-4,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, run.steps))
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    curve, done = load(checkpoint, parts)
    stepped = DistributedDataParallel(model) if ranks > 1 else model
    indices = batch_indices(len(data), settings.batch_size, settings.seed, done, run.steps)
    loader = DataLoader(
        data, batch_sampler=indices, collate_fn=collate, num_workers=settings.workers
    )
    started = time.perf_counter() - curve.seconds
    bar = tqdm(loader, file_name(run), run.steps, initial=done, unit="step", disable=rank > 0)
    for step, batch in enumerate(bar, done + 1):
        torch.manual_seed((settings.seed * 1_000_003 + step) * ranks + rank)
        optimizer.zero_grad()
        losses, distillation = backward(stepped, to_device(batch, settings.device), settings)
        optimizer.step()
        schedule.step()
        curve.losses.append(sum(loss.item() for loss in losses.values()))
        curve.distillation.append(sum(loss.item() for loss in distillation.values()))
        total = curve.losses[-1] + curve.distillation[-1]
        if not math.isfinite(total):
            raise FloatingPointError(f"{file_name(run)}: the loss of step {step} is {total}")
        bar.set_postfix(loss=f"{curve.losses[-1]:.2f}", distil=f"{curve.distillation[-1]:.2f}")
        curve.seconds = time.perf_counter() - started
        if step % settings.checkpoint_every == 0 or step == run.steps:
            save(checkpoint, parts, curve, step)
    return curve
