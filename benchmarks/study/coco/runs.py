"""The study at full size: torchvision's stock detectors on COCO, every run over all processes.

torchrun --nproc-per-node 8 -m benchmarks.study.coco run --coco DIR    # goes on after a kill
python -m benchmarks.study.coco tables     # results/coco/lines.jsonl -> results/coco/tables.md

DIR holds train2017/, val2017/ and annotations/instances_{train,val}2017.json.
"""

import argparse
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as rle
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import tv_tensors
from torchvision.datasets import CocoDetection
from torchvision.models import detection, get_model_weights, list_models
from torchvision.ops import box_convert
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

import featkd
from benchmarks.measure import provenance
from benchmarks.study.methods.baseline import FineGrainedImitation
from benchmarks.study.runs import (
    CANDIDATES,
    COLUMNS,
    FPN,
    LOSES_AT_FPN,
    LOSSES,
    NEEDS_RELU,
    RESULTS,
    Line,
    Run,
    Teacher,
    ahead_of_last_relu,
    append_line,
    pending,
    read_lines,
    settings_of,
    teacher_ap,
    teacher_of,
)
from benchmarks.study.tables import report
from benchmarks.training_step import CHANNELS, LAYERS
from examples.coco import CocoError, has_area, read_annotations
from examples.detectors import fpn_outputs, levels_of
from examples.training import (
    Alone,
    Curve,
    Settings,
    backward,
    batch_indices,
    collate,
    join_processes,
    load,
    save,
    to_device,
    world,
    write_atomically,
)

LINES = RESULTS / "coco" / "lines.jsonl"
TRAIN, HELD_OUT = "train2017", "val2017"
BACKBONE_WEIGHTS = "IMAGENET1K_V1"
WEIGHTS_HELP = "torch.hub's folder, where missing files are downloaded to, or none: random weights"
EPOCHS, DECAYS, WARM_UP = 24, (16, 22), 500
# RetinaNet's, of the three levels.
ANCHOR_SIZES = {
    level: tuple(4 * stride * 2 ** (octave / 3) for octave in range(3))
    for level, stride in zip(LAYERS, (8, 16, 32), strict=True)
}
# A builder of torchvision's, and its weights' name or None.
Shape = tuple[str, str | None]


# --- the runs -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Detector:
    """A student; the learning rate is that of 16 images a step and goes with their number."""

    learning_rate: float
    teacher: str
    printed: featkd.Hyperparameters


DETECTORS = {
    "fasterrcnn_resnet50_fpn": Detector(0.02, "fasterrcnn_resnet50_fpn_v2", featkd.TWO_STAGE),
    "retinanet_resnet50_fpn": Detector(0.01, "retinanet_resnet50_fpn_v2", featkd.ONE_STAGE),
    # Released FCOS weights, 39.2 AP, are behind RetinaNet's 41.5; features know no families.
    "fcos_resnet50_fpn": Detector(0.01, "retinanet_resnet50_fpn_v2", featkd.ONE_STAGE),
    "maskrcnn_resnet50_fpn": Detector(0.02, "maskrcnn_resnet50_fpn_v2", featkd.TWO_STAGE),
}
TEACHERS = [name for name in list_models(module=detection) if "resnet50_fpn" in name]
# The baselines' weights lie within the range of the small study, and the taps are its own: nothing
# here is tuned on COCO.
METHODS = {
    "none": {},
    "printed": {},
    **{
        method: candidates[1] | ({} if method in LOSES_AT_FPN | NEEDS_RELU else FPN)
        for method, candidates in CANDIDATES.items()
    },
    "featkd": settings_of(featkd.FPN_OUTPUTS) | FPN,
}


@dataclass(frozen=True)
class Data:
    """`size` is that of the shorter side inside the detectors."""

    train_images: int
    held_out_images: int
    batch_size: int
    size: int
    name: str = f"COCO {TRAIN}, {HELD_OUT}"


def planned(options: argparse.Namespace, data: Data) -> list[Run]:
    """Teachers, to be evaluated alone, then seed by seed every method of every detector."""
    steps = options.steps or math.ceil(options.epochs * data.train_images / data.batch_size)
    students = []
    for seed in options.seeds:
        for name in options.detector:
            shape = (name, options.weights and BACKBONE_WEIGHTS)
            plain = Run(name, shape, None, "none", seed, steps, data)
            for method in options.method:
                students.append(plain if method == "none" else distilled(plain, method, options))
    return [*(teacher_of(run) for run in students if run.teacher), *students]


def distilled(plain: Run, method: str, options: argparse.Namespace) -> Run:
    builder = options.teacher or DETECTORS[plain.detector].teacher
    weights = options.weights and get_model_weights(builder).DEFAULT.name
    settings = METHODS[method]
    if method == "printed":
        method, settings = "featkd", settings_of(DETECTORS[plain.detector].printed)
    teacher = Teacher((builder, weights), seed=0, steps=0)
    return replace(plain, teacher=teacher, method=method, hyperparameters=settings)


def file_name(run: Run) -> str:
    mark = sha256(run.identity.encode()).hexdigest()[:12]
    return f"{run.detector}-{run.method}-{run.seed}-{mark}"


# --- data -----------------------------------------------------------------------------------------


class CocoSplit(Dataset[tuple[Tensor, dict[str, Any]]]):
    """Labels are the file's category ids, as torchvision's released weights count them."""

    def __init__(self, folder: Path, split: str, masks: bool = False) -> None:
        self.annotations = folder / "annotations" / f"instances_{split}.json"
        self.files = CocoDetection(folder / split, self.annotations)
        self.classes = max(self.files.coco.getCatIds()) + 1
        self.masks = masks

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        picture, annotations = self.files[index]
        image = F.to_image(picture.convert("RGB"))
        objects = [each for each in annotations if is_object(each)]
        boxes = torch.tensor([each["bbox"] for each in objects]).reshape(-1, 4)
        size = tuple(image.shape[-2:])
        target = {
            "image_id": torch.tensor(self.files.ids[index]),
            "boxes": tv_tensors.BoundingBoxes(
                box_convert(boxes.float(), "xywh", "xyxy"), format="XYXY", canvas_size=size
            ),
            "labels": torch.tensor([each["category_id"] for each in objects]).long(),
        }
        if self.masks:
            shapes = [rle.decode(self.files.coco.annToRLE(each)) for each in objects]
            stacked = np.stack(shapes) if shapes else np.zeros((0, *size), np.uint8)
            target["masks"] = tv_tensors.Mask(torch.from_numpy(stacked))
        return image, target

    def with_objects(self) -> list[int]:
        found = self.files.coco.imgToAnns
        return [i for i, name in enumerate(self.files.ids) if any(map(is_object, found[name]))]


coco_split = cache(CocoSplit)


def is_object(annotation: dict[str, Any]) -> bool:
    """A crowd is no object: nothing is trained on it, and the evaluation passes over it."""
    return has_area(annotation) and not annotation.get("iscrowd", 0)


class WithMirrorImages(Dataset[tuple[Tensor, dict[str, Any]]]):
    """`data` and then the same mirrored, so that a flip is a matter of the index alone."""

    def __init__(self, data: Dataset[Any]) -> None:
        self.data = data

    def __len__(self) -> int:
        return 2 * len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        mirrored, place = divmod(index, len(self.data))
        image, target = self.data[place]
        if not mirrored:
            return image, target
        visual = {k: F.horizontal_flip(v) for k, v in target.items() if k in ("boxes", "masks")}
        return F.horizontal_flip(image), target | visual


# --- one run --------------------------------------------------------------------------------------


def new_detector(shape: Shape, seed: int, classes: int, size: int) -> nn.Module:
    """Of released weights, the backbone's alone or all, or of random ones."""
    name, weights = shape
    torch.manual_seed(seed)
    build = partial(getattr(detection, name), min_size=size, max_size=size * 1333 // 800)
    if weights in (None, BACKBONE_WEIGHTS):
        return build(weights=None, weights_backbone=weights, num_classes=classes)
    return build(weights=weights)


def new_model(run: Run, classes: int, device: torch.device) -> nn.Module:
    """A distiller, or the detector alone."""
    size = run.data.size
    if run.method == "teacher":
        return Alone(new_detector(run.teacher.shape, run.teacher.seed, classes, size))
    student = new_detector(run.student, run.seed, classes, size)
    if run.method == "none":
        return Alone(student)
    teacher = new_detector(run.teacher.shape, run.teacher.seed, classes, size).to(device)
    layers, channels = LAYERS, CHANNELS
    if run.hyperparameters.get("taps") == "fpn":
        layers = at_fpn(student)
        channels = dict.fromkeys(layers, student.backbone.out_channels)
    loss = new_loss(run, student, channels)
    pairs = {level: (path, path) for level, path in layers.items()}
    if run.method == "overhaul":
        pairs = {
            level: tuple(ahead_of_last_relu(model, path) for model in (student, teacher))
            for level, path in layers.items()
        }
    return featkd.Distiller(student, teacher, loss, pairs, shared_input="backbone")


def at_fpn(model: nn.Module) -> dict[str, str]:
    """The outputs of the strides of `LAYERS`; an R-CNN's FPN has a finer one."""
    outputs = dict(zip(levels_of(model), fpn_outputs(model).values(), strict=True))
    return {level: outputs[path] for level, path in LAYERS.items()}


def new_loss(run: Run, student: nn.Module, channels: dict[str, int]) -> nn.Module:
    settings = dict(run.hyperparameters)
    if run.method == "featkd":
        return LOSSES["featkd"](channels, channels, steps=run.steps, **settings)
    settings.pop("taps", None)
    if run.method == "fgfi":
        loss = FineGrainedImitation(channels, channels, anchor_sizes=ANCHOR_SIZES, **settings)
        loss.watch(student)
        return loss
    return LOSSES[run.method](channels, channels, **settings)


def rate(step: int, steps: int) -> float:
    """Share of the learning rate: a warm-up, and a tenth from each of `DECAYS` of `EPOCHS` on."""
    warm_up = min(1.0, 0.001 + 0.999 * step / WARM_UP)
    return warm_up * 0.1 ** sum(step * EPOCHS >= epoch * steps for epoch in DECAYS)


def train(
    run: Run, model: nn.Module, data: Dataset[Any], settings: Settings, checkpoint: Path
) -> Curve:
    """As `training.train`, but by mmdetection's 2x schedule and without averaged weights."""
    rank, ranks = world()
    model.to(settings.device).train()
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad],
        settings.learning_rate,
        momentum=0.9,
        weight_decay=1e-4,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, run.steps))
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    curve, done = load(checkpoint, parts)
    stepped = DistributedDataParallel(model) if ranks > 1 else model
    indices = batch_indices(len(data), settings.batch_size, settings.seed, done, run.steps)
    loader = DataLoader(
        data, batch_sampler=indices, collate_fn=collate, num_workers=settings.workers
    )
    started = time.perf_counter() - curve.seconds
    bar = tqdm(loader, file_name(run), run.steps, initial=done, unit="step", disable=rank > 0)
    for step, batch in enumerate(bar, done + 1):
        torch.manual_seed((settings.seed * 1_000_003 + step) * ranks + rank)
        optimizer.zero_grad()
        losses, distillation = backward(stepped, to_device(batch, settings.device), settings)
        optimizer.step()
        schedule.step()
        curve.losses.append(sum(loss.item() for loss in losses.values()))
        curve.distillation.append(sum(loss.item() for loss in distillation.values()))
        total = curve.losses[-1] + curve.distillation[-1]
        if not math.isfinite(total):
            raise FloatingPointError(f"{file_name(run)}: the loss of step {step} is {total}")
        bar.set_postfix(loss=f"{curve.losses[-1]:.2f}", distil=f"{curve.distillation[-1]:.2f}")
        curve.seconds = time.perf_counter() - started
        if step % settings.checkpoint_every == 0 or step == run.steps:
            save(checkpoint, parts, curve, step)
    return curve


# --- evaluation -----------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model: nn.Module, data: CocoSplit, settings: Settings) -> dict[str, float | None]:
    """COCO's own metrics; those of masks, `mask_ap` and so on, where the model finds masks.

    Every rank detects in its share of the images, and the first alone has the metrics.
    """
    rank, ranks = world()
    model.to(settings.device).eval()
    share = Subset(data, range(rank, len(data), ranks))
    loader = DataLoader(share, batch_size=2, collate_fn=collate, num_workers=settings.workers)
    found: list[Line] = []
    for images, targets in tqdm(loader, "evaluation", unit="batch", disable=rank > 0):
        results = model([image.to(settings.device) for image in images])
        for target, result in zip(targets, results, strict=True):
            found += detections(int(target["image_id"]), result)
    if ranks > 1:
        gathered: list[Any] = [None] * ranks
        dist.gather_object(found, gathered if rank == 0 else None)
        if rank > 0:
            return {}
        found = [each for part in gathered for each in part]
    metrics = coco_metrics(data.annotations, without("segmentation", found), "bbox")
    if found and "segmentation" in found[0]:
        # Beside a box, the evaluator would take a mask's size from it.
        values = coco_metrics(data.annotations, without("bbox", found), "segm")
        metrics |= {f"mask_{name}": value for name, value in values.items()}
    return metrics


def detections(image: int, result: dict[str, Tensor]) -> list[Line]:
    """In COCO's form."""
    result = {name: value.cpu() for name, value in result.items()}
    boxes = box_convert(result["boxes"], "xyxy", "xywh").tolist()
    columns = {"category_id": result["labels"].tolist(), "score": result["scores"].tolist()}
    columns["bbox"] = boxes
    if "masks" in result:
        planes = (result["masks"] > 0.5).squeeze(1).permute(1, 2, 0)
        columns["segmentation"] = rle.encode(np.asfortranarray(planes.numpy().astype(np.uint8)))
    rows = zip(*columns.values(), strict=True)
    return [{"image_id": image, **dict(zip(columns, row, strict=True))} for row in rows]


def without(name: str, rows: Iterable[Line]) -> list[Line]:
    return [{key: value for key, value in row.items() if key != name} for row in rows]


def coco_metrics(annotations: Path, found: list[Line], kind: str) -> dict[str, float | None]:
    if not found:
        # Of which old evaluators make an error.
        return dict.fromkeys(COLUMNS, 0.0)
    truth = COCO(annotations)
    evaluation = COCOeval_faster(truth, truth.loadRes(found), kind)
    evaluation.run()
    # The evaluator says -1 where no held-out object has the size.
    values = [float(value) if value >= 0 else None for value in evaluation.stats]
    return dict(zip(COLUMNS, values, strict=False))


# --- commands -------------------------------------------------------------------------------------


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
    made = provenance(device)
    return {
        **asdict(run),
        **metrics,
        "seconds": round(curve.seconds, 1),
        "device": f"{world()[1]} x {made['machine']}",
        "versions": {
            **{name: made[name] for name in ("commit", "featkd", "torch", "python")},
            "torchvision": torchvision.__version__,
        },
    }


def learning_rate(run: Run) -> float:
    return DETECTORS[run.detector].learning_rate * run.data.batch_size / 16


def agreed(value: Any) -> Any:
    """The first rank's."""
    held = [value]
    if world()[1] > 1:
        dist.broadcast_object_list(held)
    return held[0]


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
        except CocoError as error:
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


def weights_folder(value: str) -> str | None:
    return None if value == "none" else value


def write_tables(options: argparse.Namespace) -> None:
    parts = ["# Study on COCO", "`python -m benchmarks.study.coco tables` writes this file."]
    parts.append(report(read_lines(options.lines)))
    file = options.lines.with_name("tables.md")
    file.write_text("\n\n".join(parts) + "\n")
    print(file)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="perform the runs that are not there yet")
    add = run.add_argument
    add("--coco", type=Path, required=True, help="folder of COCO's images and annotations")
    add("--detector", nargs="+", choices=DETECTORS, default=list(DETECTORS))
    add("--method", nargs="+", choices=METHODS, default=["none", "featkd"])
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
