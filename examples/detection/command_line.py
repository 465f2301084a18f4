"""The command line of the main job: what may be asked for, and what goes with what."""

import argparse
import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

import featkd
from examples.detection.deeppcb import TILES
from examples.detection.detectors import COMPACT, STOCK
from examples.detection.devices import wrong_device
from examples.detection.lite0 import LAST, packages
from examples.detection.models import (
    BUILDERS,
    FIXED_SIZES,
    MOBILENETS,
    NAMES,
    RESNETS,
    STARTS,
    cannot_start,
    name_of,
)
from examples.detection.models import COMPACT as COMPACT_NAMES
from examples.detection.processes import JobError
from examples.detection.run_folder import EXPORTED

PRESETS = {
    "standardized": featkd.STANDARDIZED,
    "fpn_outputs": featkd.FPN_OUTPUTS,
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
    "output": Path("runs/quick"),
}
# Data made as they are asked for.
MADE = ("scenes", "sparse", "pasted")
# Folders of data that have an option of their own.
FOLDERS = ("deeppcb", "pasted")
# Pictures' sides where those are of one size; else a compact model takes a scene's.
SIDES = {"sparse": 160, "deeppcb": 160, "pasted": 320}
ONNX = ("onnx", "onnxruntime")
# Options that would do nothing without another: what they want, in words and as a test.
WANTS: dict[str, tuple[str, Callable[[argparse.Namespace], object]]] = {
    **dict.fromkeys(
        ("images", "annotations", "val_images", "val_annotations"),
        ("--data coco", lambda options: options.data == "coco"),
    ),
    **dict.fromkeys(
        ("train_images", "held_out_images"),
        (f"--data {', '.join(MADE)}", lambda options: options.data in MADE),
    ),
    **dict.fromkeys(
        ("deeppcb", "tile"), ("--data deeppcb", lambda options: options.data == "deeppcb")
    ),
    "pasted": ("--data pasted", lambda options: options.data == "pasted"),
    **dict.fromkeys(
        ("flip", "scale_jitter"),
        ("--data coco or deeppcb", lambda options: options.data not in MADE),
    ),
    "detector": (
        "a model that is no whole detector of torchvision",
        lambda options: {options.student, options.teacher_model} - {*BUILDERS},
    ),
    **dict.fromkeys(
        ("teacher_steps", "teacher_epochs", "teacher_weights"),
        ("no --teacher", lambda options: options.teacher is None),
    ),
    "overwrite": ("no --resume", lambda options: not options.resume),
}
# Scenes of seeds from here on are held out.
HELD_OUT_SEED = 2**32


def listed(names: Iterable[str]) -> str:
    return textwrap.fill(", ".join(names), 90, initial_indent="    ", subsequent_indent="    ")


EPILOG = f"""MODEL is one of
  a compact network under --detector:
{listed(COMPACT_NAMES)}
  a backbone of torchvision, with an FPN under --detector at full size:
{listed((*RESNETS, *MOBILENETS))}
  a whole detector of torchvision:
{listed(BUILDERS)}
The run's folder gets results.json, three pictures, teacher.pt, plain.pt and student.pt (each a
state dict), and what --export asks for. --dry-run goes with any other options."""


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


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be in 0..1, got {text}")
    return value


def start(text: str) -> str | Path:
    """Where weights come from: a word, or a file."""
    return text if text in STARTS else Path(text)


def new_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.detection",
        usage="%(prog)s [options]",
        description=description,
        epilog=EPILOG,
        formatter_class=Help,
    )
    add = parser.add_argument_group("models").add_argument
    add("--detector", choices=(*COMPACT, *STOCK), default="fcos", help="of teacher and students")
    add("--student", metavar="MODEL", choices=NAMES, help="None: that of --detector; see below")
    add("--teacher-model", metavar="MODEL", choices=NAMES, help="likewise, of the teacher")
    weights = "none, imagenet, coco (torchvision's own) or a file, to train on from"
    add("--student-weights", type=start, default="none", help=weights)
    add("--teacher-weights", type=start, default="none", help=weights)
    add("--teacher", type=Path, help="a trained teacher.pt, to use as it is; None: train one")
    add("--preset", choices=PRESETS, default="standardized", help="the distillation loss's weights")
    add("--taps", choices=("fpn", "stages"), default="fpn", help="the FPN's outputs or its inputs")
    add = parser.add_argument_group("data").add_argument
    kinds = (
        "drawn, drawn with small objects, photographs pasted on photographs, a COCO folder of "
        "yours, or DeepPCB's"
    )
    add("--data", choices=(*MADE, "coco", "deeppcb"), default="scenes", help=kinds)
    add("--images", type=Path, help="coco: folder of the training images")
    add("--annotations", type=Path, help="coco: annotation file of the training images")
    add("--val-images", type=Path, help="coco: folder of the held-out images")
    add("--val-annotations", type=Path, help="coco: their annotations; None: every tenth image")
    add("--deeppcb", type=Path, help="deeppcb: its folder, a clone or its PCBData")
    tile = "deeppcb: quarters of its pictures at half size, or pictures in full"
    add("--tile", choices=TILES, default="quarter", help=tile)
    add("--pasted", type=Path, help="pasted: its folder, which fetch_pasted makes")
    made = f"{', '.join(MADE)}: how many to"
    add("--train-images", type=whole(1), default=4000, help=f"{made} train on")
    add("--held-out-images", type=whole(1), default=300, help=f"{made} evaluate on")
    flip = "of the images mirrored in training; None: 0.5, those made as they are asked for 0"
    add("--flip", type=share, help=flip)
    jitter = "each training image by a factor of this range, as torchvision does: 0.1 2"
    add("--scale-jitter", type=rate, nargs=2, metavar=("LOW", "HIGH"), help=jitter)
    size = "shorter side in the model; None: the data's, 96 of coco, torchvision's models 800"
    add("--size", type=whole(1), help=size)
    group = parser.add_argument_group("training")
    add = group.add_argument
    either = group.add_mutually_exclusive_group().add_argument
    either("--teacher-steps", type=whole(1), default=1000, help="of the teacher's training")
    either("--teacher-epochs", type=rate, help="of it, in place of steps")
    either = group.add_mutually_exclusive_group().add_argument
    either("--steps", type=whole(1), default=600, help="of each student")
    either("--epochs", type=rate, help="likewise, in place of steps")
    add("--batch-size", type=whole(1), default=8, help="over all processes")
    highest = "at its highest; None: 0.003, with models of torchvision 0.0002"
    add("--learning-rate", type=rate, help=highest)
    add("--evaluations", type=whole(1), default=4, help="of the held-out images, in each training")
    add = parser.add_argument_group("the run").add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="cpu, cuda or cuda:N; with torchrun cpu or cuda")
    add("--amp", action="store_true", help="bfloat16 autocast")
    add("--compile", action="store_true", help="compile the backbones")
    add("--seed", type=whole(0, HELD_OUT_SEED - 1), default=0, help="of weights, data and order")
    add("--workers", type=whole(0), default=0, help="of the data loaders")
    add("--checkpoint-every", type=whole(1), default=100, help="steps")
    add("--output", type=Path, default=Path("runs/distill_detector"), help="folder of the run")
    looks = "look at data, models, one step's gradients, time and memory; write nothing"
    add("--dry-run", action="store_true", help=looks)
    ways = "write the student as student.pt2 of torch.export or as student.onnx too"
    add("--export", nargs="+", choices=EXPORTED, metavar="WAY", help=f"{ways}: torch, onnx or both")
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
    models = {role: name_of(options, role) for role in ("student", "teacher")}
    compact = COMPACT_NAMES.keys() >= {*models.values()}
    if options.learning_rate is None:
        options.learning_rate = 3e-3 if compact else 2e-4
    if options.flip is None:
        options.flip = 0.0 if options.data in MADE else 0.5
    if options.scale_jitter and options.scale_jitter[0] > options.scale_jitter[1]:
        parser.error(
            "--scale-jitter wants LOW first: {:g} is over {:g}".format(*options.scale_jitter)
        )
    fixed = {FIXED_SIZES[name] for name in models.values() if name in FIXED_SIZES}
    if len(fixed) > 1:
        parser.error(f"{' and '.join(models.values())} take images of one size each, and not one")
    if fixed and options.size not in (None, *fixed):
        parser.error(f"--size must be {min(fixed)}, which one of the models has fixed")
    if options.size is None:
        small = 640 if options.tile == "full" else SIDES.get(options.data, 96)
        options.size = min(fixed, default=small if compact else 800)
    for role, name in models.items():
        weights = getattr(options, f"{role}_weights")
        if why := cannot_start(name, weights):
            parser.error(f"--{role}-weights {weights} {why}; the {role} is {name}")
    if not LAST.keys().isdisjoint(models.values()):
        try:
            packages()
        except JobError as error:
            parser.error(str(error))
    if options.data in FOLDERS and not getattr(options, options.data):
        parser.error(f"--data {options.data} wants --{options.data} DIR")
    if options.data == "coco" and not (options.images and options.annotations):
        parser.error("--data coco wants --images DIR and --annotations FILE")
    if bool(options.val_images) != bool(options.val_annotations):
        parser.error("--val-images and --val-annotations go together")
    if options.teacher is not None and not options.teacher.is_file():
        parser.error(
            f"--teacher must be a file, got {options.teacher}; --teacher-model takes a model's name"
        )
    absent = [name for name in ONNX if not find_spec(name)]
    if absent and "onnx" in (options.export or ()):
        parser.error(f"--export onnx wants {' and '.join(absent)}: pip install -e '.[onnx]'")
    if (wrong := wrong_device(options.device)) is not None:
        parser.error(f"--device {options.device}: {wrong}")
    return options
