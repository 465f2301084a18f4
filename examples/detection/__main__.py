"""Trains a torchvision detector with and without feature distillation, side by side.

python -m examples.detection                     # generated scenes, two CPU cores
python -m examples.detection --quick             # the same path in a minute
python -m examples.detection --data coco --images DIR --annotations FILE --dry-run
python -m examples.detection --detector retinanet --student resnet18 --teacher-model resnet50
torchrun --nproc_per_node 2 --max-restarts 1 -m examples.detection
"""

import argparse
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from examples.detection.checkpoints import Curve, write_atomically
from examples.detection.command_line import parse_options
from examples.detection.data import content_of, load_data
from examples.detection.detectors import tapped
from examples.detection.dry_run import dry_run
from examples.detection.exporting import export
from examples.detection.parts import (
    budget,
    compile_backbones,
    new_distiller,
    new_models,
    new_settings,
    steps_of,
)
from examples.detection.processes import JobError, by_first_rank, join_processes, world
from examples.detection.report import write_report
from examples.detection.run_folder import CONFIG, WEIGHTS, RunFolder
from examples.detection.training import Alone, evaluate, train

STOPPED = 130  # what a shell says of a process that Ctrl-C has ended


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    return parse_options(__doc__, arguments)


def run_job(options: argparse.Namespace, folder: RunFolder, device: torch.device) -> None:
    """Everything that can be wrong is looked at before anything is removed or trained."""
    rank, ranks = world()
    if options.batch_size < ranks:
        raise JobError(f"--batch-size must be at least the {ranks} processes")
    state = by_first_rank(folder.take)
    if state == "finished":
        if rank == 0:
            print(f"the run in {folder.path} is finished: see its results.json")
            export_again(options, folder)
        return
    loaded = by_first_rank(lambda: load_data(options))
    data, held_out, classes = loaded
    content = by_first_rank(lambda: content_of(options, loaded))
    # Before the models, which other classes would not fit.
    if state == "unfinished":
        by_first_rank(lambda: folder.compare_read(content))
    models = new_models(options, len(classes))
    teacher, plain, student = models.values()
    layers, _ = tapped(student, teacher, options.taps, options.size)
    distiller = new_distiller(options, student, teacher)
    teacher.to(device)
    if state == "new":
        by_first_rank(lambda: folder.begin(content))

    settings, steps = new_settings(options, device), steps_of(options, len(data))
    if rank == 0:
        print(budget(steps, options.batch_size, len(data)))
    if options.compile:
        compile_backbones(models.values(), device)

    def run(name: str, model: nn.Module) -> Curve:
        # The compiler guards no hooks: the plain student's code would serve the tapped one too.
        torch.compiler.reset()
        checkpoint = folder.path / f"{name}.checkpoint.pt"
        return train(name, model, data, held_out, steps[name], settings, checkpoint)

    runs: dict[str, Curve] = {}
    if options.teacher is None:
        runs["teacher"] = run("teacher", Alone(teacher))
    else:
        metrics = evaluate(teacher, held_out, settings)
        if rank == 0:
            print(f"teacher: held-out AP {metrics['map']:.3f}")
        runs["teacher"] = Curve(evaluations=[(0, metrics)])
    runs["plain"] = run("plain", Alone(plain))
    runs["distilled"] = run("distilled", distiller)
    if rank == 0:
        for name, model in models.items():
            file = WEIGHTS[name]
            if not folder.is_given(file):
                state = {key: value.cpu() for key, value in model.state_dict().items()}
                write_atomically(folder.path / file, state)
        write_report(options, folder, runs, models, layers, held_out, classes, device)
        export(student, held_out, options.export or (), folder.path)


def export_again(options: argparse.Namespace, folder: RunFolder) -> None:
    """The student of a finished run, in the ways that are asked for now."""
    if not options.export:
        return
    weights = folder.path / WEIGHTS["distilled"]
    if not weights.exists():
        raise JobError(f"--export wants {weights}, which is gone")
    loaded = load_data(options)
    _, held_out, classes = loaded
    # Other pictures of the same classes will do.
    folder.compare_read({"classes": content_of(options, loaded)["classes"]})
    student = new_models(options, len(classes))["distilled"]
    student.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    export(student, held_out, options.export, folder.path)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    try:
        device = join_processes(torch.device(options.device))
        if options.dry_run:
            dry_run(options, device)
            return
        with RunFolder(options) as folder:
            run_job(options, folder, device)
        if world()[1] > 1:
            dist.destroy_process_group()
    # Of what ends all processes, one speaks.
    except JobError as error:
        raise SystemExit(str(error) if world()[0] == 0 else 1) from error
    except KeyboardInterrupt as stop:
        if world()[0] == 0:
            begun = not options.dry_run and (options.output / CONFIG).exists()
            advice = "; go on with --resume" if begun else ""
            print(f"{str(stop) or 'stopped'}{advice}", file=sys.stderr)
        raise SystemExit(STOPPED) from stop


if __name__ == "__main__":
    main(sys.argv[1:])
