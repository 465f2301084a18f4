"""A vision transformer teaches a detector at several image sizes: python -m examples.vit_teacher"""

import argparse
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

import featkd
from examples.detection.detectors import build
from examples.detection.scenes import SIZE, Scenes
from examples.plain_loop import collate, evaluate

PATCH, REGISTERS, WIDTH = 14, 4, 64


def build_distiller() -> featkd.Distiller:
    # Random and small; take Dinov2WithRegistersModel.from_pretrained(...), which wants ImageNet's
    # mean and deviation as the student does.
    config = Dinov2WithRegistersConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        patch_size=PATCH,
        num_register_tokens=REGISTERS,
    )
    teacher = Dinov2WithRegistersModel(config)
    student = build("fcos", "student", len(Scenes.classes), SIZE)
    student.transform.min_size = (SIZE, SIZE + 16, SIZE + 32)  # drawn for each batch
    student.transform.max_size = 2 * SIZE
    # One level: the FPN's output of stride 16, next to the patches' 14.
    layers = {"p4": ("backbone[2]", "layernorm")}
    loss = featkd.FeatureDistillationLoss({"p4": 32}, {"p4": WIDTH}, resize="bilinear")
    # The class token and the registers stand before the patches' tokens.
    tokens = featkd.PatchTokens(PATCH, prefix=1 + REGISTERS)
    # What enters the student's backbone, resized and padded, goes through the whole teacher ("").
    return featkd.Distiller(
        student,
        teacher,
        loss,
        layers,
        shared_input=("backbone", ""),
        convert={"p4": (None, tokens)},
    )


def main(argv: list[str] | None = None) -> featkd.Distiller:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--checkpoint", type=Path, help="write student and adapters here")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    distiller = build_distiller().to(args.device).train()
    distiller.teacher.to(args.device)  # no child of the distiller: you place it
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-3)
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
    if args.checkpoint:
        torch.save({"distiller": distiller.state_dict()}, args.checkpoint)
    held_out = DataLoader(Scenes(seed=1, length=4), batch_size=2, collate_fn=collate)
    evaluate(distiller.student, held_out, args.device)
    return distiller


if __name__ == "__main__":
    main()
