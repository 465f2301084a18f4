"""Distillation in a plain loop, with checkpoint and evaluation: python -m examples.plain_loop"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.detection import MeanAveragePrecision

import featkd
from examples.detection.detectors import build
from examples.detection.scenes import SIZE, Scenes


def build_distiller() -> featkd.Distiller:
    # Load your trained teacher here; random, its small features make the distillation loss large.
    teacher = build("fcos", "teacher", len(Scenes.classes), SIZE)
    student = build("fcos", "student", len(Scenes.classes), SIZE)
    layers = {"p2": "backbone[0]", "p3": "backbone[1]", "p4": "backbone[2]"}  # the FPN's outputs
    channels = dict.fromkeys(layers, 32), dict.fromkeys(layers, 64)
    loss = featkd.FeatureDistillationLoss(*channels)
    # torchvision's detectors resize inside: the teacher's backbone gets what entered the student's.
    return featkd.Distiller(student, teacher, loss, layers, shared_input="backbone")


def collate(samples: list) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    images = [image / 255 for image, _ in samples]
    return images, [{**target, "boxes": target["boxes"].float()} for _, target in samples]


@torch.no_grad()
def evaluate(student: nn.Module, loader: DataLoader, device: torch.device) -> None:
    metric = MeanAveragePrecision(backend="faster_coco_eval")
    student.eval()
    for images, targets in loader:
        outputs = student([image.to(device) for image in images])
        metric.update([{k: v.cpu() for k, v in output.items()} for output in outputs], targets)
    print(f"map {metric.compute()['map']:.4f}")


def main(argv: list[str] | None = None) -> featkd.Distiller:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--checkpoint", type=Path, help="go on from this file, and write it")
    args = parser.parse_args(argv)
    torch.manual_seed(0)

    distiller = build_distiller().to(args.device)
    distiller.teacher.to(args.device)  # no child of the distiller: you place it
    # The student's parameters and the adapters', none of the teacher's.
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-3)
    if args.checkpoint and args.checkpoint.exists():
        state = torch.load(args.checkpoint, map_location=args.device, weights_only=True)
        distiller.load_state_dict(state["distiller"])
        optimizer.load_state_dict(state["optimizer"])
    distiller.train()
    loader = DataLoader(Scenes(seed=0, length=2 * args.steps), batch_size=2, collate_fn=collate)
    for step, (images, targets) in enumerate(loader, 1):
        images = [image.to(args.device) for image in images]
        targets = [{k: v.to(args.device) for k, v in target.items()} for target in targets]
        detector_losses, distillation_losses = distiller(images, targets)
        losses = detector_losses | distillation_losses
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        print(f"step {step}:", *(f"{name} {value:.4f}" for name, value in losses.items()))
    if args.checkpoint:  # student and adapters
        state = {"distiller": distiller.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, args.checkpoint)
    held_out = DataLoader(Scenes(seed=1, length=4), batch_size=2, collate_fn=collate)
    evaluate(distiller.student, held_out, args.device)
    return distiller


if __name__ == "__main__":
    main()
