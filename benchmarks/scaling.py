"""What a distilled step communicates and holds on each rank: computed from the models, not timed.

python benchmarks/scaling.py [--student retinanet_resnet50_fpn --teacher resnet152 --ranks 4 16]
"""

import argparse
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

import featkd

PRESETS = ("NORMALIZED", "TWO_STAGE", "ONE_STAGE", "RELEASED_TWO_STAGE", "RELEASED_ONE_STAGE")
TITLES = ("ranks", "", "communicated", "parameters", "gradients", "AdamW", "teacher", "held")


def communicated(size: float, ranks: int) -> dict[str, float]:
    """Bytes that a rank sends (and receives) each step for `size` bytes of trained parameters."""
    share = size * (ranks - 1) / ranks
    return {
        "DDP": 2 * share,  # ring all-reduce: a reduce-scatter and an all-gather of the gradients
        "FSDP2": 3 * share,  # parameters gathered for forward and backward, gradients scattered
    }


def held(size: float, teacher: float, ranks: int) -> dict[str, dict[str, float]]:
    """Bytes on a rank, beside activations; the teacher is whole on each."""
    part = size / ranks
    return {
        # The gradients stand in DDP's buckets too, but for gradient_as_bucket_view=True.
        "DDP": {"parameters": size, "gradients": 2 * size, "AdamW": 2 * size, "teacher": teacher},
        "FSDP2": {"parameters": part, "gradients": part, "AdamW": 2 * part, "teacher": teacher},
    }


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def trained(*models: nn.Module) -> list[nn.Parameter]:
    return [p for model in models for p in model.parameters() if p.requires_grad]


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


def rows(size: float, teacher: float, world_sizes: Iterable[int]) -> list[tuple[str, ...]]:
    found = []
    for ranks in world_sizes:
        sent = communicated(size, ranks)
        for wrapper, parts in held(size, teacher, ranks).items():
            figures = (sent[wrapper], *parts.values(), sum(parts.values()))
            found.append((str(ranks), wrapper, *(f"{figure / 1e6:.0f}" for figure in figures)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--student", default="fasterrcnn_resnet50_fpn", help="a ResNet detector of torchvision")
    add("--teacher", default="resnet101", help="the ResNet under the teacher's FPN")
    add("--preset", choices=PRESETS, default="NORMALIZED")
    add("--ranks", type=int, nargs="+", default=[2, 8, 64, 512])
    add("--bf16-teacher", action="store_true")
    options = parser.parse_args()
    student, teacher, loss = build(options.student, options.teacher, options.preset)
    if options.bf16_teacher:
        teacher.bfloat16()
    for name, parameters in (
        (options.student, trained(student)),
        (f"adapters of {options.preset}", trained(loss)),
        (f"teacher's backbone {options.teacher}", list(teacher.parameters())),
    ):
        count = sum(p.numel() for p in parameters)
        print(f"{name}: {count / 1e6:.1f} M parameters, {nbytes(parameters) / 1e6:.0f} MB")
    print("\nMB on each rank and step:\n")
    size = nbytes(trained(student, loss))
    table = rows(size, nbytes(teacher.parameters()), options.ranks)
    for row in (TITLES, ("---",) * len(TITLES), *table):
        print("|", " | ".join(row), "|")


if __name__ == "__main__":
    main()
