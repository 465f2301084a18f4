"""A look at what a command would do: data, levels, one step's report, time and memory."""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, Subset

import featkd
from examples.detection.batches import batch_indices, collate, to_device
from examples.detection.data import load_data
from examples.detection.parts import budget, new_distiller, new_models, new_settings, steps_of
from examples.detection.processes import JobError, world
from examples.detection.progress import expected
from examples.detection.training import EVALUATED, Alone, Settings, evaluate, train

try:
    import resource
except ImportError:  # Windows has none.
    resource = None  # type: ignore[assignment]

LOOKED_AT = 200  # pictures, of a part of the data
TIMED = 4  # steps, after one that is not


def dry_run(options: argparse.Namespace, device: torch.device) -> None:
    if world()[1] > 1:
        raise JobError("--dry-run wants one process: start it without torchrun")
    data, held_out, classes = load_data(options)
    for name, part in (("training", data), ("held out", held_out)):
        print(describe(name, part, classes))
    models = new_models(options, len(classes))
    teacher, plain, student = models.values()
    print(f"\nlevels of one stride, in an image of {options.size} pixels:\n")
    print(featkd.match_layers(student, teacher, [torch.zeros(3, options.size, options.size)]))
    distiller = new_distiller(options, student, teacher)
    print(f"\ndistilled at {', '.join(distiller.loss.levels)} (--taps {options.taps})")
    steps = steps_of(options, len(data))
    print(budget(steps, options.batch_size, len(data)))
    teacher.to(device)
    distiller.to(device).train()
    settings = new_settings(options, device)
    (indices,) = batch_indices(len(data), options.batch_size, options.seed, 0, 1)
    batch = to_device(collate([data[i] for i in indices]), device)
    optimizer = torch.optim.AdamW(distiller.parameters())
    # Before it: a process that is killed for its memory says nothing.
    print(
        f"\ntrying a step of {len(indices)} pictures of {options.size} pixels; should memory not "
        "suffice, take a smaller --batch-size or --size",
        flush=True,
    )
    print(f"\none step of distillation:\n\n{distiller.report(*batch, optimizer=optimizer)}\n")
    stepped = {"teacher": Alone(teacher), "plain": Alone(plain), "distilled": distiller}
    total = 0.0
    timed = replace(settings, evaluations=0, checkpoint_every=sys.maxsize)
    for name, count in steps.items():
        for some in (1, TIMED):
            curve = train(name, stepped[name], data, held_out, some, timed, None)
        total += count * curve.seconds / TIMED
        print(f"{name}: {curve.seconds / TIMED:.3g} s a step")
    print(f"in all {expected(total)}, and {evaluations(plain, held_out, settings, len(steps))}")
    print(peak_memory(device))
    print("nothing has been written")


def describe(name: str, data: Dataset[Any], classes: Sequence[str]) -> str:
    """Counts and sizes, of some pictures where there are many."""
    generator = torch.Generator().manual_seed(0)
    looked_at = torch.randperm(len(data), generator=generator)[:LOOKED_AT].tolist()
    widths, heights, sides, counts = [], [], [], Counter[str]()
    empty = inside = 0
    for i in looked_at:
        image, target = data[i]
        heights.append(image.shape[-2])
        widths.append(image.shape[-1])
        boxes = target["boxes"].as_subclass(torch.Tensor)
        sides += (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt().tolist()
        covered = torch.zeros(image.shape[-2:], dtype=torch.bool)
        for left, top, right, bottom in boxes.round().long().tolist():
            covered[top:bottom, left:right] = True
        inside += int(covered.sum())
        counts.update(classes[label] for label in target["labels"].tolist())
        empty += not len(boxes)
    pixels = sum(width * height for width, height in zip(widths, heights, strict=True))
    lines = [
        f"{name}: {len(data):,} pictures; of {len(looked_at)} of them:",
        f"width {min(widths)} to {max(widths)}, height {min(heights)} to {max(heights)} pixels",
        f"{len(sides)} boxes with {100 * inside / pixels:.1f} % of the pixels, "
        f"and {empty} pictures without one",
        "boxes by class: " + ", ".join(f"{kind} {counts[kind]}" for kind in classes[1:]),
    ]
    if sides:
        half = sorted(sides)[len(sides) // 2]
        lines.append(
            f"root of the box's area {min(sides):.0f} to {max(sides):.0f} pixels, half below "
            f"{half:.0f}"
        )
    return "\n  ".join(lines)


def evaluations(model: nn.Module, held_out: Dataset[Any], settings: Settings, runs: int) -> str:
    part = Subset(held_out, range(min(EVALUATED, len(held_out))))
    started = time.perf_counter()
    evaluate(model, part, settings)
    each = (time.perf_counter() - started) / len(part) * len(held_out)
    return f"{settings.evaluations * runs} evaluations of about {each:.3g} s"


def peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"peak memory {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on the GPU"
    if resource is None:
        return "peak memory is not known here"
    # In bytes on macOS, in KiB elsewhere.
    unit = 1 if sys.platform == "darwin" else 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"peak memory {peak / 2**30:.2f} GiB of the process"
