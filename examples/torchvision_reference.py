"""Distillation in a script like torchvision's references/detection: the lines marked `featkd`."""

import argparse
from pathlib import Path

import torch
from torch.utils.data import DataLoader

import featkd
from examples.detection.detectors import build
from examples.detection.scenes import SIZE, Scenes
from examples.plain_loop import collate, evaluate  # references/detection has its own


def build_distiller(device="cpu"):
    # Load your trained teacher here; random, its small features make the distillation loss large.
    teacher = build("retinanet", "teacher", len(Scenes.classes), SIZE).to(device)
    student = build("retinanet", "student", len(Scenes.classes), SIZE)
    student.detections_per_img = 100  # what COCO counts; RetinaNet's own default is 300
    layers = {"p2": "backbone[0]", "p3": "backbone[1]", "p4": "backbone[2]"}  # the FPN's outputs
    channels = dict.fromkeys(layers, 32), dict.fromkeys(layers, 64)
    loss = featkd.FeatureDistillationLoss(*channels)
    return featkd.Distiller(student, teacher, loss, layers, shared_input="backbone").to(device)


def train_one_epoch(model, optimizer, data_loader, device, epoch, scaler):
    model.train()
    warm_up = None
    if epoch == 0:
        iterations = min(1000, len(data_loader) - 1)
        warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 1000, total_iters=iterations)
    for images, targets in data_loader:
        images = [image.to(device) for image in images]
        targets = [{k: v.to(device) for k, v in t.items()} for t in targets]
        with torch.autocast(device.type, enabled=scaler.is_enabled()):
            loss_dict = {k: v for part in model(images, targets) for k, v in part.items()}  # featkd
            losses = sum(loss for loss in loss_dict.values())
        optimizer.zero_grad()
        scaler.scale(losses).backward()
        scaler.step(optimizer)
        scaler.update()
        if warm_up is not None:
            warm_up.step()
        print(f"epoch {epoch}:", *(f"{name} {value:.4f}" for name, value in loss_dict.items()))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20, help="of an epoch")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--amp", action="store_true")
    parser.add_argument("--output-dir", type=Path)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    data_loader = DataLoader(Scenes(0, 2 * args.steps), 2, collate_fn=collate)
    data_loader_test = DataLoader(Scenes(1, 4), 2, collate_fn=collate)
    model = build_distiller(args.device)  # featkd; DistributedDataParallel goes around it
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(params, lr=0.02, momentum=0.9, weight_decay=1e-4)
    lr_scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[16, 22], gamma=0.1)
    scaler = torch.amp.GradScaler(args.device.type, enabled=args.amp)
    for epoch in range(args.epochs):
        train_one_epoch(model, optimizer, data_loader, args.device, epoch, scaler)
        lr_scheduler.step()
        if args.output_dir:  # student and adapters
            checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            checkpoint |= {"lr_scheduler": lr_scheduler.state_dict(), "epoch": epoch}
            torch.save(checkpoint, args.output_dir / f"model_{epoch}.pth")
        evaluate(model.student, data_loader_test, args.device)  # featkd
    return model


if __name__ == "__main__":
    main()
