"""Time, peak memory and provenance, the same way for every benchmark here."""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import featkd

DRIVER = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
RESULTS = Path(__file__).parent / "results"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def interleaved(
    functions: dict[str, Callable[[], object]], device: torch.device, rounds: int = 9
) -> dict[str, list[float]]:
    """Times of several functions in turn, so that a drift of the machine hits them alike."""
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
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
        "featkd": featkd.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": gpu or processor(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if gpu else None,
        "driver": output_of(*DRIVER) if gpu else None,
    }


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write(name: str, device: torch.device, rows: list[dict[str, Any]]) -> Path:
    file = RESULTS / f"{name}-{device.type}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"provenance": provenance(device), "rows": rows}, indent=1) + "\n")
    return file


def table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """`columns`: key of the row -> format."""
    lines = [list(columns)]
    lines += [
        [format(row[key], spec) if key in row else "" for key, spec in columns.items()]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)
