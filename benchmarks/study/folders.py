"""The folders of pictures that a command is given."""

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks.study.runs import FOLDERS, Run

# By the option that names it.
Folders = Mapping[str, Path | None]


def add_folders(parser: argparse.ArgumentParser) -> None:
    for name, made in FOLDERS.items():
        parser.add_argument(f"--{name}", metavar="DIR", type=Path, help=made)


def folders_for(runs: Iterable[Run], options: argparse.Namespace) -> Folders:
    """`SystemExit` where one is missing that a run needs."""
    folders = {name: getattr(options, name) for name in FOLDERS}
    for name in {run.data.name for run in runs} & FOLDERS.keys():
        if folders[name] is None:
            raise SystemExit(f"{options.table} wants --{name} DIR, {FOLDERS[name]}")
    return folders
