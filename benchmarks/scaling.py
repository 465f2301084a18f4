"""What a distilled step communicates and holds on each rank: computed from the models, not timed.

python -m benchmarks.scaling [--student retinanet_resnet50_fpn --teacher resnet152 --ranks 4 16]
"""

import argparse
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

import featkd

PRESETS = ("STANDARDIZED", "TWO_STAGE", "ONE_STAGE", "RELEASED_TWO_STAGE", "RELEASED_ONE_STAGE")
TITLES = ("ranks", "", "communicated", "parameters", "gradients", "AdamW", "teacher", "held")


def communicated(trained: float, frozen: float, ranks: int) -> dict[str, float]:
    """Bytes that a rank sends (and receives) each step for so many bytes of parameters."""
    others = (ranks - 1) / ranks
    return {
        # A ring all-reduce of the gradients: a reduce-scatter and an all-gather.
        "DDP": 2 * trained * others,
        # All parameters gathered for forward and backward, gradients scattered.
        "FSDP2": (2 * (trained + frozen) + trained) * others,
    }


def held(trained: float, frozen: float, teacher: float, ranks: int) -> dict[str, dict[str, float]]:
    """Bytes on a rank, beside activations; the teacher is whole on each."""

    def parts(copies: int, ranks: int) -> dict[str, float]:
        return {
            "parameters": (trained + frozen) / ranks,
            "gradients": copies * trained / ranks,
            "AdamW": 2 * trained / ranks,
            "teacher": teacher,
        }

    # The gradients stand in DDP's buckets too, but for gradient_as_bucket_view=True.
    return {"DDP": parts(2, 1), "FSDP2": parts(1, ranks)}


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def sizes(*models: nn.Module) -> tuple[int, int]:
    """Bytes of the trained and of the frozen parameters."""
    parameters = [p for model in models for p in model.parameters()]
    return tuple(nbytes(p for p in parameters if p.requires_grad is want) for want in (True, False))


def build(student: str, teacher: str, preset: str) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Student, the teacher's backbone and the loss between their last three stages, on `meta`."""
    with torch.device("meta"):
        detector = getattr(detection, student)(weights=None, weights_backbone=None)
        backbone = resnet_fpn_backbone(backbone_name=teacher, weights=None)
        channels = [
            {
                level: block[0].in_channels
                for level, block in zip(("c3", "c4", "c5"), blocks[-3:], strict=True)
            }
            for blocks in (detector.backbone.fpn.inner_blocks, backbone.fpn.inner_blocks)
        ]
        loss = featkd.FeatureDistillationLoss(*channels, hyperparameters=getattr(featkd, preset))
    return detector, backbone, loss


def row(ranks: int, wrapper: str, trained: int, frozen: int, teacher: int) -> tuple[str, ...]:
    parts = held(trained, frozen, teacher, ranks)[wrapper]
    sent = communicated(trained, frozen, ranks)[wrapper]
    figures = (sent, *parts.values(), sum(parts.values()))
    return (str(ranks), wrapper, *(f"{figure / 1e6:.0f}" for figure in figures))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--student", default="fasterrcnn_resnet50_fpn", help="a ResNet detector of torchvision")
    add("--teacher", default="resnet101", help="the ResNet under the teacher's FPN")
    add("--preset", choices=PRESETS, default="STANDARDIZED")
    add("--ranks", type=int, nargs="+", default=[2, 8, 64, 512])
    add("--bf16-teacher", action="store_true")
    options = parser.parse_args()
    student, teacher, loss = build(options.student, options.teacher, options.preset)
    if options.bf16_teacher:
        teacher.bfloat16()
    parts = {
        f"student {options.student}": student,
        f"adapters of {options.preset}": loss,
        f"teacher's backbone {options.teacher}": teacher,
    }
    for name, model in parts.items():
        count = sum(p.numel() for p in model.parameters())
        print(f"{name}: {count / 1e6:.1f} M parameters, {nbytes(model.parameters()) / 1e6:.0f} MB")
    print("\nMB on each rank, for a step:\n")
    figures = (*sizes(student, loss), nbytes(teacher.parameters()))
    table = [
        row(ranks, wrapper, *figures) for wrapper in ("DDP", "FSDP2") for ranks in options.ranks
    ]
    for line in (TITLES, ("---",) * len(TITLES), *table):
        print("|", " | ".join(line), "|")


if __name__ == "__main__":
    main()
