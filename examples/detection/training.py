"""One training run: data order, loop, weight average and evaluation."""

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.detection import MeanAveragePrecision

from examples.detection.augmentation import augmented, drawn
from examples.detection.batches import batch_indices, collate, to_device
from examples.detection.checkpoints import Curve, load, save
from examples.detection.interrupts import interrupts, leave_interrupts_to_main
from examples.detection.processes import JobError, any_rank, of_all_ranks, world
from examples.detection.progress import Progress, expected

METRICS = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
MASK_METRICS = ("mask_map", "mask_map_50", "mask_map_75")
GRADIENT = "the gradient's norm"
FIRST = 10  # steps that tell the time of the others
CHECKPOINT_SECONDS = 600.0  # the most between two checkpoints, however few the steps
EVALUATED = 16  # pictures at once


@dataclass
class Settings:
    """What a run needs beside its model and data; `area_scale` see :func:`evaluate`.

    `flip` and `scale_jitter` see :func:`augmented`.
    """

    batch_size: int
    learning_rate: float
    seed: int
    device: torch.device
    amp: bool
    workers: int
    checkpoint_every: int
    evaluations: int
    area_scale: float
    flip: float = 0.0
    scale_jitter: tuple[float, float] | None = None


class Alone(nn.Module):
    """A detector with the call of a `featkd.Distiller`, and nothing to distil."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, *args: Any) -> tuple[Any, dict[str, Tensor]]:
        return self.student(*args), {}


def train(
    name: str,
    model: nn.Module,
    data: Dataset[Any],
    held_out: Dataset[Any],
    steps: int,
    settings: Settings,
    checkpoint: Path | None,
) -> Curve:
    """Trains `model` (an :class:`Alone` or a distiller); its student ends at the averaged weights.

    Goes on from `checkpoint` where there is one, to the same result as an unbroken run; `None`
    saves none.
    """
    rank, ranks = world()
    model.to(settings.device).train()
    student: nn.Module = model.student
    average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        settings.learning_rate,
        weight_decay=0.05,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=steps, pct_start=0.15
    )
    parts = {"model": model, "average": average, "optimizer": optimizer, "schedule": schedule}
    curve, done = load(checkpoint, parts)
    stepped = DistributedDataParallel(model) if ranks > 1 else model
    indices = batch_indices(len(data), settings.batch_size, settings.seed, done, steps)
    loader = DataLoader(
        data,
        batch_sampler=indices,
        collate_fn=collate,
        num_workers=settings.workers,
        worker_init_fn=leave_interrupts_to_main,
    )
    marks = {steps * (i + 1) // settings.evaluations for i in range(settings.evaluations)}
    begun = time.perf_counter()
    started = begun - curve.seconds
    saved, saved_at = done, begun
    with interrupts() as asked, Progress(name, steps, done, "step", silent=rank > 0) as progress:
        for step, batch in enumerate(loader, done + 1):
            batch = to_device(batch, settings.device)
            if settings.flip or settings.scale_jitter:
                draws = drawn(settings.seed, step, settings.batch_size)
                batch = augmented(batch, draws, settings.flip, settings.scale_jitter)
            # What a step draws (Faster R-CNN's samples) depends on seed, step and rank alone.
            torch.manual_seed((settings.seed * 1_000_003 + step) * ranks + rank)
            optimizer.zero_grad()
            losses, distillation = backward(stepped, batch, settings)
            norm = nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            terms = numbers(losses | distillation | {GRADIENT: norm})
            # Before the step: what the weights were is in the last checkpoint.
            broken = not all(map(math.isfinite, terms.values()))
            due = time.perf_counter() - saved_at > CHECKPOINT_SECONDS
            broken, stopping, due = any_rank([broken, bool(asked), due], settings.device)
            if broken:
                raise JobError(not_finite(name, of_all_ranks(terms), step, saved))
            optimizer.step()
            schedule.step()
            average.update_parameters(student)
            curve.losses.append(sum(terms[key] for key in losses))
            curve.distillation.append(sum(terms[key] for key in distillation))
            both = {"loss": curve.losses[-1], "distillation": curve.distillation[-1]}
            if step == done + FIRST and step < steps:
                spent = time.perf_counter() - begun
                progress.say(f"{name}: {expected(spent * (steps - step) / FIRST)} to go")
            progress.advance(", ".join(f"{k} {v:.2f}" for k, v in both.items() if v))
            if step in marks:
                if rank == 0:
                    metrics = evaluate(average.module, held_out, settings)
                    curve.evaluations.append((step, metrics))
                    progress.say(f"{name}: step {step}, held-out AP {metrics['map']:.3f}")
                if ranks > 1:
                    dist.barrier()
            curve.seconds = time.perf_counter() - started
            if due or stopping or step == steps or step % settings.checkpoint_every == 0:
                save(checkpoint, parts, curve, step)
                saved, saved_at = step, time.perf_counter()
            # The last evaluation may have taken long.
            if stopping or (step == steps and any_rank([bool(asked)], settings.device)[0]):
                raise KeyboardInterrupt(f"{name}: stopped at step {step}")
    if ranks > 1:
        # Each rank has averaged the batch statistics of its own images.
        for buffer in average.module.buffers():
            dist.broadcast(buffer, 0)
    student.load_state_dict(average.module.state_dict())
    return curve


def numbers(terms: dict[str, Tensor]) -> dict[str, float]:
    """All at once: on a GPU each is a wait."""
    values = torch.stack([term.detach() for term in terms.values()]).tolist()
    return dict(zip(terms, values, strict=True))


def not_finite(name: str, ranks: list[dict[str, float]], step: int, saved: int) -> str:
    """Which terms; the gradient, which every loss spoils, only where it is the first to go."""
    found = {
        term: value for terms in ranks for term, value in terms.items() if not math.isfinite(value)
    }
    if len(found) > 1:
        found.pop(GRADIENT, None)
    what = ", ".join(f"{term} is {value}" for term, value in found.items())
    kept = f"the checkpoint of step {saved} is kept" if saved else "no checkpoint was saved before"
    advice = "a lower learning rate or a weaker distillation may help"
    return f"{name}: {what} at step {step}; training has stopped, {kept}; {advice}"


def backward(
    model: nn.Module, batch: Any, settings: Settings
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """This rank's losses; the gradients are those of the mean over all ranks' images."""
    cast = torch.autocast(settings.device.type, torch.bfloat16) if settings.amp else nullcontext()
    with cast:
        losses, distillation = model(*batch)
    # DDP and FSDP take the mean over ranks, some of which may have an image less.
    share = len(batch[0]) * world()[1] / settings.batch_size
    (share * sum((losses | distillation).values())).backward()
    return losses, distillation


@torch.no_grad()
def evaluate(model: nn.Module, data: Dataset[Any], settings: Settings) -> dict[str, float]:
    """COCO metrics on `data`; sizes S, M, L as if images were `area_scale` times as wide.

    Those of masks too, where the targets have masks and the model finds them.
    """
    metric, mask_metric = average_precision("bbox"), average_precision("segm")
    with_masks = False
    for images, targets in batches(data, settings):
        found = model.eval()(images)
        truth = [with_crowds(target) for target in targets]
        metric.update(scaled(found, settings.area_scale), scaled(truth, settings.area_scale))
        with_masks = "masks" in found[0].keys() & targets[0].keys()
        if with_masks:
            mask_metric.update(binary_masks(found), binary_masks(targets))
    values = metric.compute()
    result = {name: float(values[name]) for name in METRICS}
    if with_masks:
        values = mask_metric.compute()
        # torchmetrics says -1 where no mask at all is found.
        result |= {name: max(0.0, float(values[name[len("mask_") :]])) for name in MASK_METRICS}
    return result


def average_precision(iou_type: Literal["bbox", "segm"]) -> MeanAveragePrecision:
    metric = MeanAveragePrecision(
        iou_type=iou_type, backend="faster_coco_eval", sync_on_compute=False
    )
    metric.warn_on_many_detections = False
    return metric


def batches(data: Dataset[Any], settings: Settings) -> Iterator[Any]:
    # Without gradients twice the pictures of a step fit, and hardly more.
    size = min(EVALUATED, 2 * settings.batch_size)
    loader = DataLoader(data, batch_size=size, collate_fn=collate, num_workers=settings.workers)
    for batch in loader:
        yield to_device(batch, settings.device)


def with_crowds(target: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the metric takes it: what is found in a crowd counts neither for nor against."""
    if "crowds" not in target:
        return target
    pairs = (("boxes", "crowds"), ("labels", "crowd_labels"), ("area", "crowd_area"))
    whole = {name: torch.cat([target[name], target[crowd]]) for name, crowd in pairs}
    parts = (target["labels"], 0), (target["crowd_labels"], 1)
    of_crowd = torch.cat([torch.full_like(labels, flag) for labels, flag in parts])
    return target | whole | {"iscrowd": of_crowd}


def scaled(results: list[dict[str, Tensor]], factor: float) -> list[dict[str, Tensor]]:
    factors = {"boxes": factor, "area": factor**2}
    return [{k: v * factors[k] if k in factors else v for k, v in r.items()} for r in results]


def binary_masks(results: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """`(N, H, W)` of 0 and 1; Mask R-CNN finds probabilities `(N, 1, H, W)`."""
    return [{**each, "masks": (each["masks"] > 0.5).flatten(0, -3)} for each in results]
