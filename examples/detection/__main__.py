"""Trains a torchvision detector with and without feature distillation, side by side.

python -m examples.detection                     # generated scenes, two CPU cores
python -m examples.detection --quick             # the same path in a minute
python -m examples.detection --data coco --images DIR --annotations FILE
torchrun --nproc_per_node 2 --max-restarts 1 -m examples.detection
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset, Subset

import featkd
from examples.detection.checkpoints import Curve, load_teacher, write_atomically
from examples.detection.coco import CocoError, CocoFolder
from examples.detection.command_line import HELD_OUT_SEED, PRESETS, parse_options
from examples.detection.detectors import build, tapped
from examples.detection.processes import JobError, by_first_rank, join_processes, world
from examples.detection.report import write_report
from examples.detection.run_folder import RunFolder
from examples.detection.scenes import Scenes
from examples.detection.training import Alone, Settings, evaluate, train

STOPPED = 130  # what a shell says of a process that Ctrl-C has ended


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    return parse_options(__doc__, arguments)


def read_coco(images: Path, annotations: Path) -> CocoFolder:
    data = CocoFolder(images, annotations)
    for note in data.notes:
        print(note)
    return data


def load_data(options: argparse.Namespace) -> tuple[Dataset[Any], Dataset[Any], tuple[str, ...]]:
    """Training data, held-out data and the names of the classes, the background first."""
    if options.data == "scenes":
        data = Scenes(options.seed, options.train_images)
        # The held-out scenes are the same for all seeds.
        return data, Scenes(HELD_OUT_SEED, options.held_out_images), data.classes
    data = read_coco(options.images, options.annotations)
    if options.val_images is not None:
        held_out = read_coco(options.val_images, options.val_annotations)
        if held_out.classes != data.classes:
            raise CocoError("--val-annotations must have the categories of --annotations")
        return data, held_out, data.classes
    tenth = range(0, len(data), 10)
    rest = [i for i in range(len(data)) if i % 10]
    print(f"held out: every tenth of the {len(data)} images")
    for part, indices in (("training", rest), ("held-out", tenth)):
        if all(data.starts[i] == data.starts[i + 1] for i in indices):
            raise CocoError(
                f"the {part} images must hold at least one box, got none in {len(indices)} of "
                f"{options.annotations}: give --val-images and --val-annotations"
            )
    return Subset(data, rest), Subset(data, tenth), data.classes


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


def run_job(options: argparse.Namespace, folder: RunFolder, device: torch.device) -> None:
    """Everything that can be wrong is looked at before anything is removed or trained."""
    rank, ranks = world()
    if options.batch_size < ranks:
        raise JobError(f"--batch-size must be at least the {ranks} processes")
    state = by_first_rank(folder.take)
    if state == "finished":
        if rank == 0:
            print(f"the run in {folder.path} is finished: see its results.json")
        return
    data, held_out, classes = by_first_rank(lambda: load_data(options))
    teacher = new_detector(options, "teacher", len(classes)).to(device)
    if options.teacher is not None:
        load_teacher(teacher, options.teacher)
    student = new_detector(options, "student", len(classes))
    plain = new_detector(options, "student", len(classes))
    distiller = new_distiller(options, student, teacher)
    if state == "new":
        by_first_rank(folder.begin)

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
    if options.compile:
        for model in (teacher, student, plain):
            model.backbone.compile()

    def run(name: str, model: nn.Module, steps: int) -> Curve:
        # The compiler guards no hooks: the plain student's code would serve the tapped one too.
        torch.compiler.reset()
        checkpoint = folder.path / f"{name}.checkpoint.pt"
        return train(name, model, data, held_out, steps, settings, checkpoint)

    runs: dict[str, Curve] = {}
    if options.teacher is None:
        runs["teacher"] = run("teacher", Alone(teacher), options.teacher_steps)
    else:
        runs["teacher"] = Curve(evaluations=[(0, evaluate(teacher, held_out, settings))])
    runs["plain"] = run("plain", Alone(plain), options.steps)
    runs["distilled"] = run("distilled", distiller, options.steps)
    if rank == 0:
        models = {"teacher": teacher, "plain": plain, "distilled": student}
        for name, model in models.items():
            if not folder.is_given(f"{name}.pt"):
                write_atomically(folder.path / f"{name}.pt", model.state_dict())
        write_report(options, folder, runs, models, held_out, classes, device)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    try:
        device = join_processes(torch.device(options.device))
        with RunFolder(options) as folder:
            run_job(options, folder, device)
        if world()[1] > 1:
            dist.destroy_process_group()
    # Of what ends all processes, one speaks.
    except JobError as error:
        raise SystemExit(str(error) if world()[0] == 0 else 1) from error
    except KeyboardInterrupt as stop:
        if world()[0] == 0:
            print(f"{str(stop) or 'stopped'}; go on with --resume", file=sys.stderr)
        raise SystemExit(STOPPED) from stop


if __name__ == "__main__":
    main(sys.argv[1:])
