"""What distillation adds to a training step of torchvision's R50 detectors.

python -m benchmarks.training_step [--device cuda --size 800 --batch-size 4]
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import detection

import featkd
from benchmarks.measure import arguments, now, record, spread

DETECTORS = ("fcos_resnet50_fpn", "retinanet_resnet50_fpn", "fasterrcnn_resnet50_fpn")
REST = "taps and the rest"
LAYERS = {"c3": "backbone.body.layer2", "c4": "backbone.body.layer3", "c5": "backbone.body.layer4"}
CHANNELS = {"c3": 512, "c4": 1024, "c5": 2048}
ALL_TERMS = featkd.Hyperparameters(1.0, 1.0, 1.0, 0.5, normalize=True)
# The three finest, of strides 4 to 16 in an R-CNN and 8 to 32 in the others.
OUTPUTS = {f"p{i}": f"backbone[{i}]" for i in range(3)}
# What is distilled: weights, taps and their channels.
DISTILLED = {
    "STANDARDIZED": (featkd.STANDARDIZED, OUTPUTS, dict.fromkeys(OUTPUTS, 256)),
    "FPN_OUTPUTS": (featkd.FPN_OUTPUTS, OUTPUTS, dict.fromkeys(OUTPUTS, 256)),
    "all terms, stages": (ALL_TERMS, LAYERS, CHANNELS),
}


def batch(size: int, count: int, device: torch.device) -> tuple[list[Tensor], list[Any]]:
    boxes = torch.tensor([[0.1, 0.1, 0.5, 0.6], [0.4, 0.3, 0.9, 0.9]], device=device) * size
    labels = torch.tensor([1, 2], device=device)
    images = [torch.rand(3, size, size * 4 // 3, device=device) for _ in range(count)]
    return images, [{"boxes": boxes, "labels": labels} for _ in images]


class Clock:
    """Seconds of a step's phases: of each from the mark before it to its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start()

    def start(self) -> None:
        self.phases: dict[str, float] = {}
        self.before = now(self.device)

    def mark(self, phase: str) -> None:
        time = now(self.device)
        self.phases[phase] = self.phases.get(phase, 0.0) + time - self.before
        self.before = time

    def watch(self, module: nn.Module, phase: str, outside: str) -> None:
        """The calls of `module` are `phase`; what was run up to them is `outside`."""
        module.register_forward_pre_hook(lambda *_: self.mark(outside))
        module.register_forward_hook(lambda *_: self.mark(phase))


def step(
    clock: Clock, model: Callable[..., Any], parameters: list[nn.Parameter], *data: Any
) -> dict[str, float]:
    for parameter in parameters:
        parameter.grad = None
    clock.start()
    losses = model(*data)
    if isinstance(losses, tuple):
        losses = losses[0] | losses[1]
    total = sum(losses.values())
    clock.mark(REST)
    total.backward()
    clock.mark("backward")
    return clock.phases


def measure(
    name: str,
    distilled: Sequence[str],
    size: int,
    count: int,
    rounds: int,
    device: torch.device,
    teacher_dtype: torch.dtype,
) -> Iterator[dict[str, Any]]:
    build = partial(
        getattr(detection, name),
        weights=None,
        weights_backbone=None,
        min_size=size,
        max_size=2 * size,
    )
    student = build().to(device).train()
    teacher = build().to(device, teacher_dtype).eval()
    whole = build().to(device).eval()
    images, targets = batch(size, count, device)
    clock = Clock(device)
    clock.watch(student, "student, forward", REST)
    clock.watch(teacher.backbone, "teacher", REST)
    for label in distilled:
        settings, layers, channels = DISTILLED[label]
        loss = featkd.FeatureDistillationLoss(channels, channels, hyperparameters=settings)
        distiller = featkd.Distiller(
            student, teacher, loss.to(device), layers, shared_input="backbone"
        )
        clock.watch(loss, "loss, forward", REST)
        with featkd.FeatureTap(student, layers) as tap:
            student(images, targets)
            ours = {level: x.detach().requires_grad_() for level, x in tap.pop().items()}
        theirs = {level: x.detach() for level, x in ours.items()}

        @torch.no_grad()
        def whole_teacher() -> dict[str, float]:
            clock.start()
            whole(images)
            clock.mark(REST)
            return clock.phases

        runs = {
            "plain step": partial(step, clock, student, [*student.parameters()], images, targets),
            "distilled step": partial(
                step, clock, distiller, [*distiller.parameters()], images, targets
            ),
            "loss alone": partial(
                step, clock, loss, [*loss.parameters(), *ours.values()], ours, theirs
            ),
            "teacher, whole": whole_teacher,
        }
        found = phases_in_turn(runs, rounds)
        plain = statistics.median(sum(phases.values()) for phases in found["plain step"])
        for part, phases in found.items():
            shown = {"": [sum(of.values()) for of in phases]}
            if part.endswith("step"):
                shown |= {phase: [of[phase] for of in phases] for phase in phases[0]}
            for phase, values in shown.items():
                time = spread(values)
                yield {
                    "detector": name,
                    "distilled": label,
                    "part": part,
                    "phase": phase,
                    "ms": 1e3 * time["median"],
                    "ms_p25": 1e3 * time["p25"],
                    "ms_p75": 1e3 * time["p75"],
                    "of plain step": time["median"] / plain,
                    "size": size,
                    "batch_size": count,
                    "teacher_dtype": str(teacher_dtype),
                }


def phases_in_turn(
    runs: dict[str, Callable[[], dict[str, float]]], rounds: int
) -> dict[str, list[dict[str, float]]]:
    """Of each run, in turn, after one to warm up."""
    found: dict[str, list[dict[str, float]]] = {part: [] for part in runs}
    for index in range(rounds + 1):
        for part, run in runs.items():
            phases = run()
            if index:
                found[part].append(phases)
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--size", type=int, default=320, help="shorter side of the images")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--bf16-teacher", action="store_true")
    options = parser.parse_args()
    dtype = torch.bfloat16 if options.bf16_teacher else torch.float32
    size, count, rounds = (64, 1, 1) if options.quick else (options.size, options.batch_size, 5)
    end = 1 if options.quick else None
    detectors, distilled = DETECTORS[:end], tuple(DISTILLED)[:end]
    rows = (
        row
        for name in detectors
        for row in measure(name, distilled, size, count, rounds, options.device, dtype)
    )
    columns = {"detector": "", "distilled": "", "part": "", "phase": "", "ms": ".1f"}
    columns |= {"of plain step": ".1%"}
    name = "training_step-bf16" if options.bf16_teacher else "training_step"
    record(name, options.device, rows, columns, options.results)


if __name__ == "__main__":
    main()
