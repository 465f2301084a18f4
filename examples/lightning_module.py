"""Distillation under Lightning's Trainer: python -m examples.lightning_module --steps 20"""

import argparse

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.detection import MeanAveragePrecision

import featkd
from examples.detection.detectors import build
from examples.detection.scenes import SIZE, Scenes


def build_distiller() -> featkd.Distiller:
    # Load your trained teacher here; random, its small features make the distillation loss large.
    teacher = build("faster_rcnn", "teacher", len(Scenes.classes), SIZE)
    student = build("faster_rcnn", "student", len(Scenes.classes), SIZE)
    layers = {"p2": "backbone[0]", "p3": "backbone[1]", "p4": "backbone[2]"}  # the FPN's outputs
    channels = dict.fromkeys(layers, 32), dict.fromkeys(layers, 64)
    loss = featkd.FeatureDistillationLoss(*channels)
    return featkd.Distiller(student, teacher, loss, layers, shared_input="backbone")


class DistilledDetector(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.distiller = build_distiller()
        self.metric = MeanAveragePrecision(backend="faster_coco_eval")

    def on_fit_start(self) -> None:
        # The teacher is no child, so Lightning leaves it; in `setup` there is no device yet.
        self.distiller.teacher.to(self.device)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.distiller.parameters(), lr=1e-3)

    def training_step(self, batch: tuple) -> Tensor:
        detector_losses, distillation_losses = self.distiller(*batch)
        losses = detector_losses | distillation_losses
        self.log_dict(losses, batch_size=len(batch[0]))
        self.print(f"step {self.global_step + 1}:", *(f"{k} {v:.4f}" for k, v in losses.items()))
        return sum(losses.values())

    def validation_step(self, batch: tuple) -> None:
        images, targets = batch
        self.metric.update(self.distiller.student(images), targets)

    def on_validation_epoch_end(self) -> None:
        self.print(f"map {self.metric.compute()['map']:.4f}")
        self.metric.reset()


def collate(samples: list) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    images = [image / 255 for image, _ in samples]
    return images, [{**target, "boxes": target["boxes"].float()} for _, target in samples]


def main(argv: list[str] | None = None) -> featkd.Distiller:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--checkpoint", help="write the trainer's checkpoint to this file")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    module = DistilledDetector()
    loader = DataLoader(Scenes(seed=0, length=2 * args.steps), batch_size=2, collate_fn=collate)
    held_out = DataLoader(Scenes(seed=1, length=4), batch_size=2, collate_fn=collate)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_steps=args.steps, **options)
    trainer.fit(module, loader, held_out)
    if args.checkpoint:  # student and adapters, and the optimizer's state
        trainer.save_checkpoint(args.checkpoint)
    return module.distiller


if __name__ == "__main__":
    main()
