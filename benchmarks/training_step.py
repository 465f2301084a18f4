"""What distillation adds to a training step of torchvision's R50 detectors.

python -m benchmarks.training_step [--device cuda --size 800 --batch-size 4]
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import detection

import featkd
from benchmarks.measure import interleaved, spread, table, write

DETECTORS = ("fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "fcos_resnet50_fpn")
LAYERS = {"c3": "backbone.body.layer2", "c4": "backbone.body.layer3", "c5": "backbone.body.layer4"}
CHANNELS = {"c3": 512, "c4": 1024, "c5": 2048}
ALL_TERMS = featkd.Hyperparameters(1.0, 1.0, 1.0, 0.5, normalize=True)
# The three finest, of strides 4 to 16 in an R-CNN and 8 to 32 in the others.
OUTPUTS = {f"p{i}": f"backbone[{i}]" for i in range(3)}
# What is distilled: weights, taps and their channels.
DISTILLED = {
    "FPN_OUTPUTS": (featkd.FPN_OUTPUTS, OUTPUTS, dict.fromkeys(OUTPUTS, 256)),
    "NORMALIZED, stages": (featkd.NORMALIZED, LAYERS, CHANNELS),
    "all terms, stages": (ALL_TERMS, LAYERS, CHANNELS),
}


def batch(size: int, count: int, device: torch.device) -> tuple[list[Tensor], list[Any]]:
    boxes = torch.tensor([[0.1, 0.1, 0.5, 0.6], [0.4, 0.3, 0.9, 0.9]], device=device) * size
    labels = torch.tensor([1, 2], device=device)
    images = [torch.rand(3, size, size * 4 // 3, device=device) for _ in range(count)]
    return images, [{"boxes": boxes, "labels": labels} for _ in images]


def step(model: Callable[..., Any], parameters: list[nn.Parameter], *data: Any) -> None:
    for parameter in parameters:
        parameter.grad = None
    losses = model(*data)
    if isinstance(losses, tuple):
        losses = losses[0] | losses[1]
    sum(losses.values()).backward()


def measure(
    name: str, size: int, count: int, device: torch.device, teacher_dtype: torch.dtype
) -> list[dict[str, Any]]:
    build = partial(
        getattr(detection, name),
        weights=None,
        weights_backbone=None,
        min_size=size,
        max_size=2 * size,
    )
    student = build().to(device).train()
    teacher = build().to(device).eval()
    images, targets = batch(size, count, device)
    rows = []
    for label, (settings, layers, channels) in DISTILLED.items():
        loss = featkd.FeatureDistillationLoss(channels, channels, hyperparameters=settings)
        distiller = featkd.Distiller(
            student, teacher, loss.to(device), layers, shared_input="backbone"
        )
        with featkd.FeatureTap(student, layers) as tap:
            student(images, targets)
            ours = {level: x.detach().requires_grad_() for level, x in tap.pop().items()}
        theirs = {level: x.detach() for level, x in ours.items()}
        pixels = torch.rand(count, 3, size, size * 4 // 3, device=device, dtype=teacher_dtype)

        @torch.no_grad()
        def whole_teacher() -> None:
            teacher.float()(images)

        @torch.no_grad()
        def teachers_backbone(pixels: Tensor = pixels) -> None:
            teacher.to(teacher_dtype).backbone(pixels)

        def distilled(distiller: featkd.Distiller = distiller) -> None:
            teacher.to(teacher_dtype)
            step(distiller, list(distiller.parameters()), images, targets)

        times = interleaved(
            {
                "plain step": partial(step, student, list(student.parameters()), images, targets),
                "distilled step": distilled,
                "teacher, whole": whole_teacher,
                "teacher, backbone": teachers_backbone,
                "loss": partial(step, loss, [*loss.parameters(), *ours.values()], ours, theirs),
            },
            device,
            rounds=5,
        )
        plain = spread(times["plain step"])["median"]
        for part, values in times.items():
            time = spread(values)
            rows.append(
                {
                    "detector": name,
                    "distilled": label,
                    "part": part,
                    "ms": 1e3 * time["median"],
                    "ms_p25": 1e3 * time["p25"],
                    "ms_p75": 1e3 * time["p75"],
                    "of plain step": time["median"] / plain,
                    "size": size,
                    "batch_size": count,
                    "teacher_dtype": str(teacher_dtype),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=320, help="shorter side of the images")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--bf16-teacher", action="store_true")
    options = parser.parse_args()
    device = torch.device(options.device)
    dtype = torch.bfloat16 if options.bf16_teacher else torch.float32
    rows: list[dict[str, Any]] = []
    for name in DETECTORS:
        rows += measure(name, options.size, options.batch_size, device, dtype)
    columns = {"detector": "", "distilled": "", "part": "", "ms": ".1f", "of plain step": ".1%"}
    print(table(rows, columns))
    name = "training_step-bf16" if options.bf16_teacher else "training_step"
    print(write(name, device, rows))


if __name__ == "__main__":
    main()
