"""Time, peak memory and provenance, the same way for every benchmark here."""

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import featkd

DRIVER = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
RESULTS = Path(__file__).parent / "results"


def arguments(description: str) -> argparse.ArgumentParser:
    """What every benchmark is asked."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    return parser


def seconds(
    function: Callable[[], object], device: torch.device, budget: float = 2.0
) -> list[float]:
    """Times of single calls, after two to warm up: at least 5, and for about `budget` seconds."""
    for _ in range(2):
        function()
    times: list[float] = []
    while len(times) < 5 or (sum(times) < budget and len(times) < 100):
        times.append(once(function, device))
    return times


def once(function: Callable[[], object], device: torch.device) -> float:
    start = now(device)
    function()
    return now(device) - start


def now(device: torch.device) -> float:
    """Seconds, when all work that was given to `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.process_time() if clock(device) == "processor" else time.perf_counter()


def clock(device: torch.device) -> str:
    """On one thread the processor's own time, which other work on the machine disturbs less."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return "processor" if alone else "wall"


@contextmanager
def busy() -> Iterator[None]:
    """A machine on which another process computes on every core."""
    spin = (sys.executable, "-c", "while True: pass")
    others = [subprocess.Popen(spin) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def interleaved(
    functions: dict[str, Callable[[], object]],
    device: torch.device,
    rounds: int = 9,
    budget: float = 30.0,
) -> dict[str, list[float]]:
    """Times of several functions in turn, so that a drift of the machine hits them alike.

    After `budget` seconds no further round begins.
    """
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    start = time.perf_counter()
    for index in range(rounds):
        if index and time.perf_counter() - start > budget:
            break
        for name, function in functions.items():
            times[name].append(once(function, device))
    return times


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """The most that `function` holds at one time beyond what is allocated before."""
    if device.type == "cuda":
        function()  # the libraries' workspaces stay
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def spread(times: Sequence[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return {"median": median, "p25": low, "p75": high}


def provenance(device: torch.device) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": output_of("git", "rev-parse", "HEAD"),
        "source": tree_id(Path(featkd.__file__).parent),
        "featkd": featkd.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": gpu or processor(),
        "threads": torch.get_num_threads(),
        "clock": clock(device),
        "cuda": torch.version.cuda if gpu else None,
        "driver": output_of(*DRIVER) if gpu else None,
    }


def output_of(*command: str) -> str | None:
    """What a command prints; `None` where it fails or is not installed."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def tree_id(folder: Path) -> str:
    """git's name of a folder as it lies on disk, without git: `git rev-parse COMMIT:featkd`."""
    content = b""
    for path in sorted(folder.iterdir(), key=lambda p: p.name + "/" * p.is_dir()):
        if path.name != "__pycache__":
            mode, name = (b"40000", tree_id(path)) if path.is_dir() else (b"100644", blob_id(path))
            content += mode + b" " + path.name.encode() + b"\0" + bytes.fromhex(name)
    return git_id(b"tree", content)


def blob_id(file: Path) -> str:
    return git_id(b"blob", file.read_bytes())


def git_id(kind: bytes, content: bytes) -> str:
    header = kind + b" " + str(len(content)).encode() + b"\0"
    return hashlib.sha1(header + content, usedforsecurity=False).hexdigest()


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def record(
    name: str,
    device: torch.device,
    rows: Iterable[dict[str, Any]],
    columns: dict[str, str],
    results: Path = RESULTS,
) -> list[dict[str, Any]]:
    """Writes the rows after each of them, so that a run which is stopped keeps its figures.

    Prints them as a table in the end, whatever the end.
    """
    results.mkdir(parents=True, exist_ok=True)
    file = results / f"{name}-{device.type}.json"
    made, found = provenance(device), []
    try:
        for row in rows:
            found.append(row)
            file.write_text(json.dumps({"provenance": made, "rows": found}, indent=1) + "\n")
    finally:
        print(table(found, columns), file, sep="\n")
    return found


def table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """`columns`: key of the row -> format."""
    lines = [list(columns)]
    lines += [
        [format(row[key], spec) if key in row else "" for key, spec in columns.items()]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)
