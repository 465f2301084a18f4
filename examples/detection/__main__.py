"""Trains a torchvision detector with and without feature distillation, side by side.

python -m examples.detection                     # generated scenes, two CPU cores
python -m examples.detection --quick             # the same path in a minute
python -m examples.detection --data coco --images DIR --annotations FILE
torchrun --nproc_per_node 2 --max-restarts 1 -m examples.detection
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset, Subset

import featkd
from examples.detection.coco import CocoError, CocoFolder
from examples.detection.detectors import COMPACT, STOCK, build, tapped
from examples.detection.report import write_report
from examples.detection.scenes import Scenes
from examples.detection.training import (
    Alone,
    Curve,
    Settings,
    evaluate,
    join_processes,
    train,
    world,
    write_atomically,
)

PRESETS = {
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
# Scenes that no weight or setting was chosen on.
HELD_OUT_SEED = 2**32
# What may differ between an interrupted run and its resumption.
FREE = {"resume", "workers", "checkpoint_every", "output"}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.detection",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--detector", choices=(*COMPACT, *STOCK), default="fcos")
    add("--preset", choices=PRESETS, default="fpn_outputs", help="the distillation loss's weights")
    add("--taps", choices=("fpn", "stages"), default="fpn", help="the FPN's outputs or its inputs")
    add("--data", choices=("scenes", "coco"), default="scenes")
    add("--images", type=Path, help="coco: folder of the training images")
    add("--annotations", type=Path, help="coco: annotation file of the training images")
    add("--val-images", type=Path, help="coco: folder of the held-out images")
    add("--val-annotations", type=Path, help="coco: their annotations; default: every tenth image")
    add("--teacher", type=Path, help="a teacher.pt of an earlier run, in place of training one")
    add("--teacher-steps", type=int, default=1000)
    add("--steps", type=int, default=600, help="of each student")
    add("--batch-size", type=int, default=8, help="over all processes")
    add("--learning-rate", type=float, default=3e-3)
    add("--size", type=int, help="shorter side inside the model; default 96, stock detectors 800")
    add("--train-images", type=int, default=4000, help="scenes: how many to train on")
    add("--held-out-images", type=int, default=300, help="scenes: how many to evaluate on")
    add("--evaluations", type=int, default=4, help="of the held-out images, during each training")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--amp", action="store_true", help="bfloat16 autocast")
    add("--compile", action="store_true", help="compile the backbones")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=0, help="of the data loaders")
    add("--checkpoint-every", type=int, default=100, help="steps")
    add("--output", type=Path, default=Path("runs/distill_detector"))
    add("--resume", action="store_true", help="go on with the run in --output, if there is one")
    add("--quick", action="store_true", help="a handful of steps and images: a test of the path")
    if parser.parse_args(arguments).quick:
        parser.set_defaults(**QUICK)
    options = parser.parse_args(arguments)
    if options.size is None:
        options.size = 800 if options.detector in STOCK else 96
    if options.data == "coco" and not (options.images and options.annotations):
        parser.error("--data coco wants --images DIR and --annotations FILE")
    if bool(options.val_images) != bool(options.val_annotations):
        parser.error("--val-images and --val-annotations go together")
    if options.teacher is not None and not options.teacher.is_file():
        parser.error(f"--teacher must be a file, got {options.teacher}")
    return options


def load_data(options: argparse.Namespace) -> tuple[Dataset[Any], Dataset[Any], tuple[str, ...]]:
    """Training data, held-out data and the names of the classes, the background first."""
    if options.data == "scenes":
        data = Scenes(options.seed, options.train_images)
        # The held-out scenes are the same for all seeds.
        return data, Scenes(HELD_OUT_SEED, options.held_out_images), data.classes
    data = CocoFolder(options.images, options.annotations)
    for note in data.notes:
        print(note)
    if options.val_images is None:
        held_out = range(0, len(data), 10)
        rest = [i for i in range(len(data)) if i % 10]
        print(f"held out: every tenth of the {len(data)} images")
        return Subset(data, rest), Subset(data, held_out), data.classes
    held_out_data = CocoFolder(options.val_images, options.val_annotations)
    if held_out_data.classes != data.classes:
        raise CocoError("--val-annotations must have the categories of --annotations")
    return data, held_out_data, data.classes


def open_output(options: argparse.Namespace) -> None:
    """Notes the configuration, or compares it with that of the run to go on with."""
    chosen = {k: str(v) for k, v in sorted(vars(options).items()) if k not in FREE}
    file = options.output / "config.json"
    # torchrun starts the processes again with the same arguments when one of them has died.
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if (options.resume or restarted) and file.exists():
        before = json.loads(file.read_text())
        changed = [k for k in chosen if before.get(k) != chosen[k]]
        if changed:
            raise SystemExit(
                f"--resume must keep the settings of the run in {options.output}, got "
                + ", ".join(f"{k}={chosen[k]} for {before.get(k)}" for k in changed)
            )
        return
    if options.resume:
        print(f"no run in {options.output} to go on with: starting one")
    if file.exists() and not (options.output / "results.json").exists():
        raise SystemExit(
            f"{options.output} holds an unfinished run: go on with --resume, or choose --output"
        )
    options.output.mkdir(parents=True, exist_ok=True)
    for old in (*options.output.glob("*.pt"), options.output / "results.json"):
        old.unlink(missing_ok=True)
    file.write_text(json.dumps(chosen, indent=2))


def new_detector(options: argparse.Namespace, role: str, classes: int) -> nn.Module:
    """The same start for each seed and role, whatever was drawn before."""
    torch.manual_seed(options.seed)
    return build(options.detector, role, classes, options.size)


def new_distiller(
    options: argparse.Namespace, student: nn.Module, teacher: nn.Module
) -> featkd.Distiller:
    layers, channels = tapped(student, teacher, options.taps, options.size)
    loss = featkd.FeatureDistillationLoss(*channels, hyperparameters=PRESETS[options.preset])
    return featkd.Distiller(student, teacher, loss, layers, shared_input="backbone")


def load_teacher(teacher: nn.Module, file: Path) -> None:
    try:
        teacher.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise SystemExit(f"--teacher {file} must fit --detector and the data: {first}") from error


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    device = join_processes(torch.device(options.device))
    rank, ranks = world()
    if options.batch_size < ranks:
        raise SystemExit(f"--batch-size must be at least the {ranks} processes")
    try:
        data, held_out, classes = load_data(options)
    except CocoError as error:
        raise SystemExit(str(error)) from error
    if rank == 0:
        open_output(options)
    if ranks > 1:
        dist.barrier()
    settings = Settings(
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.seed,
        device=device,
        amp=options.amp,
        workers=options.workers,
        checkpoint_every=options.checkpoint_every,
        evaluations=options.evaluations,
        # COCO's small objects are under 32 pixels wide: a third of a scene of 96.
        area_scale=2.0 if options.data == "scenes" else 1.0,
    )

    teacher = new_detector(options, "teacher", len(classes)).to(device)
    student = new_detector(options, "student", len(classes))
    plain = new_detector(options, "student", len(classes))
    distiller = new_distiller(options, student, teacher)
    if options.compile:
        for model in (teacher, student, plain):
            model.backbone.compile()

    def run(name: str, model: nn.Module, steps: int) -> Curve:
        # The compiler guards no hooks: the plain student's code would serve the tapped one too.
        torch.compiler.reset()
        checkpoint = options.output / f"{name}.checkpoint.pt"
        return train(name, model, data, held_out, steps, settings, checkpoint)

    runs: dict[str, Curve] = {}
    if options.teacher is None:
        runs["teacher"] = run("teacher", Alone(teacher), options.teacher_steps)
    else:
        load_teacher(teacher, options.teacher)
        runs["teacher"] = Curve(evaluations=[(0, evaluate(teacher, held_out, settings))])
    runs["plain"] = run("plain", Alone(plain), options.steps)
    runs["distilled"] = run("distilled", distiller, options.steps)
    if rank == 0:
        models = {"teacher": teacher, "plain": plain, "distilled": student}
        for name, model in models.items():
            write_atomically(options.output / f"{name}.pt", model.state_dict())
        write_report(options, runs, models, held_out, classes, device)
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
