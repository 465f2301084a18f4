"""The command line of the main job: what may be asked for, and what goes with what."""

import argparse
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import featkd
from examples.detection.detectors import COMPACT, STOCK

PRESETS = {
    "standardized": featkd.STANDARDIZED,
    "fpn_outputs": featkd.FPN_OUTPUTS,
    "normalized": featkd.NORMALIZED,
    "two_stage": featkd.TWO_STAGE,
    "one_stage": featkd.ONE_STAGE,
    "released_two_stage": featkd.RELEASED_TWO_STAGE,
    "released_one_stage": featkd.RELEASED_ONE_STAGE,
}
QUICK = {
    "teacher_steps": 12,
    "steps": 12,
    "train_images": 96,
    "held_out_images": 24,
    "evaluations": 2,
}
# Options that would do nothing without another: what they want, in words and as a test.
WANTS: dict[str, tuple[str, Callable[[argparse.Namespace], bool]]] = {
    **dict.fromkeys(
        ("images", "annotations", "val_images", "val_annotations"),
        ("--data coco", lambda options: options.data == "coco"),
    ),
    **dict.fromkeys(
        ("train_images", "held_out_images"),
        ("--data scenes", lambda options: options.data == "scenes"),
    ),
    "teacher_steps": ("no --teacher", lambda options: options.teacher is None),
    "overwrite": ("no --resume", lambda options: not options.resume),
}
# Scenes of seeds from here on are held out.
HELD_OUT_SEED = 2**32


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The description as it is, and each option's default."""


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        value = int(text)
        if value < least or (most is not None and value > most):
            limits = f"at least {least}" if most is None else f"in {least}..{most}"
            raise argparse.ArgumentTypeError(f"must be {limits}, got {value}")
        return value

    return whole_number


def rate(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be over 0 and finite, got {text}")
    return value


def new_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.detection",
        usage="%(prog)s [options]",
        description=description,
        formatter_class=Help,
    )
    add = parser.add_argument
    add("--detector", choices=(*COMPACT, *STOCK), default="fcos", help="of teacher and students")
    add("--preset", choices=PRESETS, default="standardized", help="the distillation loss's weights")
    add("--taps", choices=("fpn", "stages"), default="fpn", help="the FPN's outputs or its inputs")
    add("--data", choices=("scenes", "coco"), default="scenes", help="drawn, or a folder of yours")
    add("--images", type=Path, help="coco: folder of the training images")
    add("--annotations", type=Path, help="coco: annotation file of the training images")
    add("--val-images", type=Path, help="coco: folder of the held-out images")
    add("--val-annotations", type=Path, help="coco: their annotations; None: every tenth image")
    add("--teacher", type=Path, help="a teacher.pt of an earlier run; None: train one")
    add("--teacher-steps", type=whole(1), default=1000, help="of the teacher's training")
    add("--steps", type=whole(1), default=600, help="of each student")
    add("--batch-size", type=whole(1), default=8, help="over all processes")
    add("--learning-rate", type=rate, default=3e-3, help="at its highest")
    add("--size", type=whole(1), help="shorter side in the model; None: 96, stock detectors 800")
    add("--train-images", type=whole(1), default=4000, help="scenes: how many to train on")
    add("--held-out-images", type=whole(1), default=300, help="scenes: how many to evaluate on")
    add("--evaluations", type=whole(1), default=4, help="of the held-out images, in each training")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="cpu, cuda or cuda:N; with torchrun cpu or cuda")
    add("--amp", action="store_true", help="bfloat16 autocast")
    add("--compile", action="store_true", help="compile the backbones")
    add("--seed", type=whole(0, HELD_OUT_SEED - 1), default=0, help="of weights, data and order")
    add("--workers", type=whole(0), default=0, help="of the data loaders")
    add("--checkpoint-every", type=whole(1), default=100, help="steps")
    add("--output", type=Path, default=Path("runs/distill_detector"), help="folder of the run")
    add("--resume", action="store_true", help="go on with the run in --output, if there is one")
    add("--overwrite", action="store_true", help="replace the run in --output, if there is one")
    quick = ", ".join(f"{option(name)} {value}" for name, value in QUICK.items())
    add("--quick", action="store_true", help=f"a test of the path: defaults of {quick}")
    return parser


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse_options(description: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    """All options at their values; those that contradict each other or do nothing are errors."""
    parser = new_parser(description)
    defaults = vars(parser.parse_args([]))
    # argparse leaves alone what is there before, so that this tells what was given.
    blank = argparse.Namespace(**dict.fromkeys(defaults, None))
    given = {k: v for k, v in vars(parser.parse_args(arguments, blank)).items() if v is not None}
    quick = QUICK if "quick" in given else {}
    options = argparse.Namespace(**defaults | quick | given)
    for name in given:
        words, met = WANTS.get(name, ("", lambda options: True))
        if not met(options):
            parser.error(f"{option(name)} does nothing here: it wants {words}")
    if options.size is None:
        options.size = 800 if options.detector in STOCK else 96
    if options.data == "coco" and not (options.images and options.annotations):
        parser.error("--data coco wants --images DIR and --annotations FILE")
    if bool(options.val_images) != bool(options.val_annotations):
        parser.error("--val-images and --val-annotations go together")
    if options.teacher is not None and not options.teacher.is_file():
        parser.error(f"--teacher must be a file, got {options.teacher}")
    if (wrong := wrong_device(options.device)) is not None:
        parser.error(f"--device {options.device}: {wrong}")
    return options


def wrong_device(name: str) -> str | None:
    """Why there is no such device here, or None."""
    try:
        device = torch.device(name)
    except RuntimeError:
        return "torch knows no such device"
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return "torch finds no CUDA GPU here"
        if device.index is not None and "WORLD_SIZE" in os.environ:
            return "torchrun gives each process its GPU, so that it must be cuda"
        if device.index is not None and device.index >= torch.cuda.device_count():
            return f"there are {torch.cuda.device_count()} CUDA GPUs here, counted from 0"
        return None
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        return str(error).splitlines()[0]
    return None
