"""A run's distiller: the loss of its method between two detectors of torchvision's classes."""

from collections.abc import Mapping, Sequence

from torch import nn

import featkd
from benchmarks.study.methods import METHODS
from benchmarks.study.methods.overhaul import move_last_relu
from benchmarks.study.remembered import Remember, RememberedTeacher, recall
from benchmarks.study.runs import Run
from benchmarks.study.variants import OF_BOXES, featkd_loss


def new_distiller(
    run: Run,
    student: nn.Module,
    teacher: nn.Module,
    layers: Mapping[str, tuple[str, str]],
    channels: Sequence[Mapping[str, int]],
    anchor_sizes: Mapping[str, Sequence[float]],
    remember: Remember | None = None,
) -> featkd.Distiller:
    """By level `layers`, the student's and the teacher's `channels`, and a detector's anchors.

    `remember(teacher, paths)` gives the teacher's features of the run's scenes.
    """
    loss = new_loss(run, channels, anchor_sizes)
    if run.method == "fgfi" or run.hyperparameters.get("masks") in OF_BOXES:
        loss.watch(student)
    if run.method == "overhaul":
        layers = {
            level: (ahead_of_last_relu(student, ours), ahead_of_last_relu(teacher, theirs))
            for level, (ours, theirs) in layers.items()
        }
    if remember is not None:
        features = remember(teacher, {level: theirs for level, (_, theirs) in layers.items()})
        layers = {level: (ours, f"levels.{level}") for level, (ours, _) in layers.items()}
        known = RememberedTeacher(features)
        return featkd.Distiller(student, known, loss, layers, teacher_forward=recall)
    return featkd.Distiller(student, teacher, loss, layers, shared_input="backbone")


def new_loss(
    run: Run, channels: Sequence[Mapping[str, int]], anchor_sizes: Mapping[str, Sequence[float]]
) -> nn.Module:
    if run.method == "featkd":
        return featkd_loss(*channels, steps=run.steps, **run.hyperparameters)
    settings = {name: value for name, value in run.hyperparameters.items() if name != "taps"}
    if run.method == "fgfi":
        settings["anchor_sizes"] = anchor_sizes
    return METHODS[run.method](*channels, **settings)


def ahead_of_last_relu(model: nn.Module, path: str) -> str:
    """The path of what enters the last ReLU of a ResNet's stage, which is moved for it."""
    stage = model.get_submodule(path)
    last = len(stage) - 1
    move_last_relu(stage)
    return f"{path}.{last}"
