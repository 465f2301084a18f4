"""The parts of a run, from its options."""

import argparse
import math
from collections.abc import Iterable

import torch
from torch import nn

import featkd
from examples.detection.checkpoints import load_teacher
from examples.detection.command_line import PRESETS
from examples.detection.data import AREA_SCALES
from examples.detection.detectors import tapped
from examples.detection.models import new_detector
from examples.detection.training import Settings


def new_distiller(
    options: argparse.Namespace, student: nn.Module, teacher: nn.Module
) -> featkd.Distiller:
    layers, channels = tapped(student, teacher, options.taps, options.size)
    loss = featkd.FeatureDistillationLoss(*channels, hyperparameters=PRESETS[options.preset])
    return featkd.Distiller(student, teacher, loss, layers, shared_input="backbone")


def new_models(options: argparse.Namespace, classes: int) -> dict[str, nn.Module]:
    """By the names of their runs; both students have one start."""
    roles = {"teacher": "teacher", "plain": "student", "distilled": "student"}
    models = {name: new_detector(options, role, classes) for name, role in roles.items()}
    if options.teacher is not None:
        load_teacher(models["teacher"], options.teacher)
    return models


def compile_backbones(models: Iterable[nn.Module], device: torch.device) -> None:
    # With channels last, torch 2.14's narrow strided convolutions write beyond their memory.
    options = {"layout_optimization": False} if device.type == "cpu" else None
    for model in models:
        model.get_submodule("backbone").compile(options=options)


def new_settings(options: argparse.Namespace, device: torch.device) -> Settings:
    return Settings(
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.seed,
        device=device,
        amp=options.amp,
        workers=options.workers,
        checkpoint_every=options.checkpoint_every,
        evaluations=options.evaluations,
        area_scale=1.0 if options.tile == "full" else AREA_SCALES[options.data],
        flip=options.flip,
        scale_jitter=options.scale_jitter,
    )


def steps_of(options: argparse.Namespace, pictures: int) -> dict[str, int]:
    """Of each training; a batch may hold the end of one epoch and the start of the next."""

    def steps(count: int, epochs: float | None) -> int:
        return count if epochs is None else math.ceil(epochs * pictures / options.batch_size)

    student = steps(options.steps, options.epochs)
    if options.teacher is not None:
        return {"plain": student, "distilled": student}
    teacher = steps(options.teacher_steps, options.teacher_epochs)
    return {"teacher": teacher, "plain": student, "distilled": student}


def budget(steps: dict[str, int], batch_size: int, pictures: int) -> str:
    """What is going to be trained; the first ten steps of each tell the time."""
    few = steps.get("teacher", math.inf) < steps["plain"]
    note = "; the teacher trains for fewer steps: see --teacher-epochs" if few else ""
    parts = [
        f"{name} {count:,} ({count * batch_size / pictures:.1f} epochs)"
        for name, count in steps.items()
    ]
    return f"steps of {batch_size} of {pictures:,} pictures: {', '.join(parts)}{note}"
