"""All runs of a table, each in one of several processes; teachers first."""

import multiprocessing
import os
import threading
import traceback
from collections.abc import Iterable
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.study.folders import Folders
from benchmarks.study.lines import append_line, pending, read_lines, teacher_ap
from benchmarks.study.runs import Line, Run, identity, teacher_of
from benchmarks.study.train import perform


def execute(
    runs: list[Run],
    file: Path,
    folder: Path,
    workers: int,
    device_type: str,
    pictures: Folders | None = None,
) -> int:
    """Performs the runs that have no line, teachers first; the number of those that failed."""
    lines = read_lines(file)
    students = pending(runs, lines)
    teachers = teachers_to_train(students, lines, folder)
    if not students:
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    failed = 0
    pool = worker_pool(workers, device_type)
    try:
        with tqdm(total=len(teachers) + len(students), unit="run") as bar:
            for phase in (teachers, students):
                futures = {
                    pool.submit(perform, run, folder, device_type, pictures): run for run in phase
                }
                for future in as_completed(futures):
                    run, error = futures[future], future.exception()
                    if isinstance(error, BrokenExecutor):
                        raise error
                    if error is not None:
                        failed += 1
                        text = "".join(traceback.format_exception(error))
                        bar.write(f"{run.name} failed:\n{text}")
                    else:
                        line = future.result() | {"teacher_ap": teacher_ap(run, lines)}
                        append_line(file, line)
                        lines.append(line)
                        remove_traces(run, folder)
                        bar.write(f"{run.name}: AP {line['ap']:.3f}, {line['seconds']:.0f} s")
                    bar.update()
    finally:
        pool.shutdown(cancel_futures=True)
    return failed


def teachers_to_train(runs: Iterable[Run], lines: Iterable[Line], folder: Path) -> list[Run]:
    """Without a line, or without the weights, which are no part of the results."""
    teachers = [teacher_of(run) for run in runs if run.teacher is not None]
    kept = [line for line in lines if line["method"] == "teacher"]
    trained = {run.identity for run in teachers if (folder / f"{run.name}.pt").exists()}
    return pending(teachers, [line for line in kept if identity(line) in trained])


def remove_traces(run: Run, folder: Path) -> None:
    """What a finished run needs no more; a teacher is evaluated on other scenes too."""
    (folder / f"{run.name}.log").unlink(missing_ok=True)
    if run.method != "teacher":
        (folder / f"{run.name}.checkpoint.pt").unlink(missing_ok=True)


def worker_pool(workers: int, device_type: str) -> ProcessPoolExecutor:
    """Shares out the threads, and the GPUs in turn."""
    context = multiprocessing.get_context("spawn")
    gpus = context.SimpleQueue()
    for i in range(workers):
        gpus.put(i % torch.cuda.device_count() if device_type == "cuda" else None)
    threads = max(1, torch.get_num_threads() // workers)
    return ProcessPoolExecutor(workers, context, start_worker, (gpus, threads))


def start_worker(gpus: Any, threads: int) -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    gpu = gpus.get()
    if gpu is not None:
        torch.cuda.set_device(gpu)


def end_with_parent() -> None:
    """Or the workers of a killed command would train beside those of the next."""
    multiprocessing.parent_process().join()
    os._exit(1)
