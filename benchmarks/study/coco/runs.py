"""The runs on COCO: detectors, teachers, and the settings of each method."""

import argparse
import math
from dataclasses import dataclass, replace
from hashlib import sha256

from torchvision.models import detection, get_model_weights, list_models

import featkd
from benchmarks.study.coco.data import HELD_OUT, TRAIN
from benchmarks.study.runs import Run, Teacher, teacher_of
from benchmarks.study.settings import (
    CANDIDATES,
    FPN,
    LOSES_AT_FPN,
    NEEDS_RELU,
    STANDARDIZED,
    settings_of,
)

BACKBONE_WEIGHTS = "IMAGENET1K_V1"
# A builder of torchvision's, and its weights' name or None.
Shape = tuple[str, str | None]


@dataclass(frozen=True)
class Detector:
    """A student; the learning rate is that of 16 images a step and goes with their number."""

    learning_rate: float
    teacher: str
    printed: featkd.Hyperparameters


DETECTORS = {
    "fasterrcnn_resnet50_fpn": Detector(0.02, "fasterrcnn_resnet50_fpn_v2", featkd.TWO_STAGE),
    "retinanet_resnet50_fpn": Detector(0.01, "retinanet_resnet50_fpn_v2", featkd.ONE_STAGE),
    # Released FCOS weights, 39.2 AP, are behind RetinaNet's 41.5; features know no families.
    "fcos_resnet50_fpn": Detector(0.01, "retinanet_resnet50_fpn_v2", featkd.ONE_STAGE),
    "maskrcnn_resnet50_fpn": Detector(0.02, "maskrcnn_resnet50_fpn_v2", featkd.TWO_STAGE),
}
TEACHERS = [name for name in list_models(module=detection) if "resnet50_fpn" in name]
# The baselines' weights lie within the range of the small study, and the taps are its own: nothing
# here is tuned on COCO.
SETTINGS = {
    "none": {},
    "printed": {},
    **{
        method: candidates[1] | ({} if method in LOSES_AT_FPN | NEEDS_RELU else FPN)
        for method, candidates in CANDIDATES.items()
    },
    "featkd": STANDARDIZED | FPN,
}


@dataclass(frozen=True)
class Data:
    """`size` is that of the shorter side inside the detectors."""

    train_images: int
    held_out_images: int
    batch_size: int
    size: int
    name: str = f"COCO {TRAIN}, {HELD_OUT}"


def planned(options: argparse.Namespace, data: Data) -> list[Run]:
    """Teachers, to be evaluated alone, then seed by seed every method of every detector."""
    steps = options.steps or math.ceil(options.epochs * data.train_images / data.batch_size)
    students = []
    for seed in options.seeds:
        for name in options.detector:
            shape = (name, options.weights and BACKBONE_WEIGHTS)
            plain = Run(name, shape, None, "none", seed, steps, data)
            for method in options.method:
                students.append(plain if method == "none" else distilled(plain, method, options))
    return [*(teacher_of(run) for run in students if run.teacher), *students]


def distilled(plain: Run, method: str, options: argparse.Namespace) -> Run:
    builder = options.teacher or DETECTORS[plain.detector].teacher
    weights = options.weights and get_model_weights(builder).DEFAULT.name
    settings = SETTINGS[method]
    if method == "printed":
        method, settings = "featkd", settings_of(DETECTORS[plain.detector].printed)
    teacher = Teacher((builder, weights), seed=0, steps=0)
    return replace(plain, teacher=teacher, method=method, hyperparameters=settings)


def file_name(run: Run) -> str:
    mark = sha256(run.identity.encode()).hexdigest()[:12]
    return f"{run.detector}-{run.method}-{run.seed}-{mark}"


def learning_rate(run: Run) -> float:
    return DETECTORS[run.detector].learning_rate * run.data.batch_size / 16
