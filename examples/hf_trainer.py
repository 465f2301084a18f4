"""Distillation of RT-DETR under Hugging Face's Trainer: python -m examples.hf_trainer --steps 20"""

import argparse
from typing import Any

import torch
import transformers
from torchvision.ops import box_convert
from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

import featkd
from examples.detection.scenes import CLASSES, SIZE, Scenes


def detector(width: int) -> RTDetrForObjectDetection:
    """With random weights; load yours by `from_pretrained`."""
    widths = [width, 2 * width, 4 * width, 8 * width]
    backbone = RTDetrResNetConfig(
        hidden_sizes=widths, depths=[1] * 4, out_features=["stage2", "stage3", "stage4"]
    )
    sizes = {"encoder_in_channels": widths[1:], "decoder_layers": 1, "num_queries": 50}
    config = RTDetrConfig(backbone_config=backbone, num_labels=len(CLASSES), **sizes)
    return RTDetrForObjectDetection(config)


class Distiller(featkd.Distiller):
    """With what the Trainer asks of a model beside its forward."""

    @property
    def _keys_to_ignore_on_save(self) -> list[str]:
        """The other names of tied weights, such as D-FINE's: safetensors takes each weight once."""
        once = dict(self.named_parameters()) | dict(self.named_buffers())
        return [name for name in self.state_dict() if name not in once]

    def tie_weights(self) -> None:
        self.student.tie_weights()

    def activation_checkpointing_enable(self, **options: Any) -> None:
        self.student.activation_checkpointing_enable(**options)

    def gradient_checkpointing_enable(self, **options: Any) -> None:  # its name before 5.24
        self.student.gradient_checkpointing_enable(**options)


def build_distiller() -> Distiller:
    teacher, student = detector(width=64), detector(width=16)
    layers = {f"stage{i}": f"model.backbone.model.encoder.stages.{i}" for i in (1, 2)}
    channels = {"stage1": 32, "stage2": 64}, {"stage1": 128, "stage2": 256}
    loss = featkd.FeatureDistillationLoss(*channels)
    # Of the teacher its CNN alone runs: no transformer, no matching of boxes.
    return Distiller(student, teacher, loss, layers, shared_input="model.backbone.model")


class DistillationTrainer(transformers.Trainer):
    """A Trainer whose model is a distiller; it evaluates the student."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model.training:
            output, distillation_losses = model(**inputs)
        else:
            output, distillation_losses = self.model.student(**inputs), {}
        losses = {"detector": output.loss} | distillation_losses
        print("train:" if model.training else "eval:", *(f"{k} {v:.4f}" for k, v in losses.items()))
        total = sum(losses.values())
        return (total, output) if return_outputs else total

    def _save(self, output_dir=None, state_dict=None):
        state, left_out = state_dict or self.model.state_dict(), self.model._keys_to_ignore_on_save
        super()._save(output_dir, {k: v for k, v in state.items() if k not in left_out})


def collate(samples: list) -> dict[str, Any]:
    boxes = [box_convert(target["boxes"] / SIZE, "xyxy", "cxcywh") for _, target in samples]
    classes = [target["labels"] - 1 for _, target in samples]
    labels = [{"boxes": b, "class_labels": c} for b, c in zip(boxes, classes, strict=True)]
    return {"pixel_values": torch.stack([image / 255 for image, _ in samples]), "labels": labels}


def main(argv: list[str] | None = None) -> Distiller:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", default="runs/hf_trainer")
    parser.add_argument("--resume", help="a checkpoint's folder")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    distiller = build_distiller()
    options = {"report_to": "none", "remove_unused_columns": False, "label_names": ["labels"]}
    settings = transformers.TrainingArguments(args.output, max_steps=args.steps, **options)
    distiller.teacher.to(settings.device)  # no child of the distiller: you place it
    data = {"train_dataset": Scenes(0, 8 * args.steps), "eval_dataset": Scenes(1, 8)}
    trainer = DistillationTrainer(distiller, settings, data_collator=collate, **data)
    # Some versions would take our loss for one divided by the accumulation steps already.
    trainer.model_accepts_loss_kwargs = False
    trainer.train(resume_from_checkpoint=args.resume)  # its checkpoints hold student and adapters
    trainer.evaluate()
    distiller.student.save_pretrained(f"{args.output}/student")
    return distiller


if __name__ == "__main__":
    main()
