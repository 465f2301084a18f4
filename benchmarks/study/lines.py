"""The results' file: a line of JSON for each finished run."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
import torchvision

from benchmarks.measure import provenance
from benchmarks.study.runs import Line, Run, identity, teacher_of

RESULTS = Path(__file__).parent / "results"
LINES = RESULTS / "lines.jsonl"
COLUMNS = ("ap", "ap50", "ap75", "ap_s", "ap_m", "ap_l")
MASK_COLUMNS = ("mask_ap", "mask_ap50", "mask_ap75")


def read_lines(file: Path) -> list[Line]:
    """The last of each identity. A half-written end, which a kill has left, is cut off."""
    if not file.exists():
        return []
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        write_whole(file, whole)
    lines = [json.loads(line) for line in whole.splitlines()]
    return list({identity(line): line for line in lines}.values())


def write_whole(file: Path, content: bytes) -> None:
    partial = file.with_suffix(".partial")
    partial.write_bytes(content)
    partial.replace(file)


def append_line(file: Path, line: Line) -> None:
    with file.open("ab") as stream:
        stream.write(json.dumps(line).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def lines_of(runs: Iterable[Run], lines: Iterable[Line]) -> list[Line]:
    """In the order of `runs`."""
    known = {identity(line): line for line in lines}
    return [known[run.identity] for run in runs if run.identity in known]


def pending(runs: Iterable[Run], lines: Iterable[Line]) -> list[Run]:
    """Each of `runs` that has no line, once."""
    done = {identity(line) for line in lines}
    return [run for name, run in {run.identity: run for run in runs}.items() if name not in done]


def teacher_ap(run: Run, lines: Iterable[Line]) -> float | None:
    if run.method in ("none", "teacher"):
        return None
    return lines_of([teacher_of(run)], lines)[-1]["ap"]


def circumstances(seconds: float, device: torch.device) -> Line:
    """What a line says of how it was made."""
    made = provenance(device)
    versions = {name: made[name] for name in ("commit", "featkd", "torch", "python")}
    return {
        "seconds": round(seconds, 1),
        "device": made["machine"],
        "versions": versions | {"torchvision": torchvision.__version__},
    }
