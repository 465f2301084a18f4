"""The study at full size: torchvision's stock detectors on COCO, every run over all processes.

torchrun --nproc-per-node 8 -m benchmarks.study.coco run --coco DIR    # goes on after a kill
python -m benchmarks.study.coco tables     # results/coco/lines.jsonl -> results/coco/tables.md

DIR holds train2017/, val2017/ and annotations/instances_{train,val}2017.json.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Subset

from benchmarks.study.coco.data import HELD_OUT, TRAIN, WithMirrorImages, coco_split
from benchmarks.study.coco.evaluation import evaluate
from benchmarks.study.coco.runs import (
    DETECTORS,
    SETTINGS,
    TEACHERS,
    Data,
    file_name,
    learning_rate,
    planned,
)
from benchmarks.study.coco.train import EPOCHS, new_model, train
from benchmarks.study.lines import (
    RESULTS,
    append_line,
    circumstances,
    pending,
    read_lines,
    teacher_ap,
)
from benchmarks.study.runs import Line, Run
from benchmarks.study.tables import report
from examples.detection.checkpoints import write_atomically
from examples.detection.coco import read_annotations
from examples.detection.findings import DataError
from examples.detection.processes import join_processes, world
from examples.detection.training import Settings

LINES = RESULTS / "coco" / "lines.jsonl"
WEIGHTS_HELP = "torch.hub's folder, where missing files are downloaded to, or none: random weights"


def run_all(options: argparse.Namespace) -> None:
    device = join_processes(torch.device(options.device))
    rank, ranks = world()
    if options.batch_size < ranks:
        raise SystemExit(f"--batch-size must be at least the {ranks} processes")
    if options.weights:
        torch.hub.set_dir(options.weights)
    lines: list[Line] = []
    if rank == 0:
        options.output.mkdir(parents=True, exist_ok=True)
        options.lines.parent.mkdir(parents=True, exist_ok=True)
        lines = read_lines(options.lines)
        try:
            for split in (TRAIN, HELD_OUT):
                file = options.coco / "annotations" / f"instances_{split}.json"
                read_annotations(options.coco / split, file)
        except DataError as error:
            raise SystemExit(f"--coco {options.coco}: {error}") from error
    # One reader: the others may look a moment later.
    lines = agreed(lines)
    data, held_out = (coco_split(options.coco, split, False) for split in (TRAIN, HELD_OUT))
    images = len(data.with_objects()), len(held_out)
    runs = planned(options, Data(*images, options.batch_size, options.size))
    for run in pending(runs, lines):
        line = perform(run, options, device)
        line["teacher_ap"] = teacher_ap(run, lines)
        line = agreed(line)
        lines.append(line)
        if rank == 0:
            append_line(options.lines, line)
            (options.output / f"{file_name(run)}.checkpoint.pt").unlink(missing_ok=True)
            print(f"{file_name(run)}: AP {line['ap']:.3f}, {line['seconds']:.0f} s", flush=True)
    if ranks > 1:
        dist.destroy_process_group()


def perform(run: Run, options: argparse.Namespace, device: torch.device) -> Line:
    """Trains and evaluates; goes on from the run's checkpoint. Its weights stay in the output."""
    data = coco_split(options.coco, TRAIN, "mask" in run.detector)
    held_out = coco_split(options.coco, HELD_OUT, False)
    settings = Settings(
        batch_size=run.data.batch_size,
        learning_rate=learning_rate(run),
        seed=run.seed,
        device=device,
        amp=False,
        workers=options.workers,
        checkpoint_every=options.checkpoint_every,
        evaluations=0,
        area_scale=1.0,
    )
    model = new_model(run, data.classes, device)
    checkpoint = options.output / f"{file_name(run)}.checkpoint.pt"
    images = WithMirrorImages(Subset(data, data.with_objects()))
    curve = train(run, model, images, settings, checkpoint)
    metrics = evaluate(model.student, held_out, settings)
    if world()[0] == 0 and run.method != "teacher":
        write_atomically(options.output / f"{file_name(run)}.pt", model.student.state_dict())
    made = circumstances(curve.seconds, device)
    return {**asdict(run), **metrics, **made, "device": f"{world()[1]} x {made['device']}"}


def agreed(value: Any) -> Any:
    """The first rank's."""
    held = [value]
    if world()[1] > 1:
        dist.broadcast_object_list(held)
    return held[0]


def write_tables(options: argparse.Namespace) -> None:
    lines = read_lines(options.lines)
    if not lines:
        raise SystemExit(f"no line of a run in {options.lines}")
    parts = ["# Study on COCO", "`python -m benchmarks.study.coco tables` writes this file."]
    parts.append(report(lines))
    file = options.lines.with_name("tables.md")
    file.write_text("\n\n".join(parts) + "\n")
    print(file)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study.coco",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="perform the runs that are not there yet")
    add = run.add_argument
    add("--coco", type=Path, required=True, help="folder of COCO's images and annotations")
    add("--detector", nargs="+", choices=DETECTORS, default=list(DETECTORS))
    add("--method", nargs="+", choices=SETTINGS, default=["none", "featkd"])
    add("--teacher", choices=TEACHERS, help="default: by detector")
    add("--seeds", nargs="+", type=int, default=[0])
    add("--weights", type=weights_folder, default=torch.hub.get_dir(), help=WEIGHTS_HELP)
    add("--epochs", type=float, default=EPOCHS, help="the rate falls at the same shares of them")
    add("--steps", type=int, help="in place of epochs")
    add("--batch-size", type=int, default=16, help="over all processes")
    add("--size", type=int, default=800, help="shorter side inside the detectors")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--workers", type=int, default=4, help="of the data loader of each process")
    add("--checkpoint-every", type=int, default=1000, help="steps")
    add("--output", type=Path, default=Path("runs/study_coco"), help="checkpoints and weights")
    run.set_defaults(command=run_all)
    tables = commands.add_parser("tables", help="write the table")
    tables.set_defaults(command=write_tables)
    for command in (run, tables):
        command.add_argument("--lines", type=Path, default=LINES, help="the results' file")
    options = parser.parse_args(arguments)
    options.command(options)


def weights_folder(value: str) -> str | None:
    return None if value == "none" else value


if __name__ == "__main__":
    main()
