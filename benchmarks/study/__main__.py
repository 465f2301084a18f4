"""What distillation gains, by detector and method: the runs, one line each, and their tables.

python -m benchmarks.study run tune        # chooses each method's weight
python -m benchmarks.study run main        # goes on where a killed command has stopped
python -m benchmarks.study tables          # results/lines.jsonl -> results/tables.md and plots

The same seed gives the same student start, scenes and data order for every method: paired runs.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.study import attention, document, errors, gradients
from benchmarks.study.folders import add_folders, folders_for
from benchmarks.study.lines import LINES, read_lines
from benchmarks.study.plan import TABLES
from benchmarks.study.workers import execute


def run_table(options: argparse.Namespace) -> None:
    workers = options.workers
    if workers is None:
        gpus = torch.cuda.device_count() if options.device == "cuda" else 0
        workers = gpus or torch.get_num_threads()
    # The lines of a mere test of the path stay out of the results.
    file = options.output / "quick.jsonl" if options.table == "quick" else options.lines
    try:
        runs = TABLES[options.table](read_lines(file))
    except LookupError as error:
        raise SystemExit(f"{options.table} {error.args[0]}") from error
    folders = folders_for(runs, options)
    failed = execute(runs, file, options.output, workers, options.device, folders)
    if failed:
        raise SystemExit(f"failed runs: {failed}; the same command tries them again")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="perform a table's runs that are not there yet")
    run.add_argument("table", choices=TABLES)
    run.add_argument("--workers", type=int, help="default: one a GPU, else one a thread")
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run.add_argument("--output", type=Path, default=Path("runs/study"), help="weights")
    add_folders(run)
    run.set_defaults(command=run_table)
    tables = commands.add_parser("tables", help="write the tables and their plots")
    tables.set_defaults(command=lambda options: document.write(options.lines))
    for command in (run, tables):
        command.add_argument("--lines", type=Path, default=LINES, help="the results' file")
    errors.add_command(commands)
    attention.add_command(commands)
    gradients.add_command(commands)
    options = parser.parse_args(arguments)
    options.command(options)


if __name__ == "__main__":
    main()
