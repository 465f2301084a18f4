"""YOLOs: python -m examples.ultralytics_yolo teacher=yolo11s.pt model=yolo11n.pt data=coco8.yaml"""

import argparse
from contextlib import ExitStack

import torch
from ultralytics import YOLO
from ultralytics.cfg import parse_key_value_pair
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils.torch_utils import strip_optimizer, unwrap_model

import featkd


def levels(model):
    """Layers and channels of what enters the detection head."""
    head = model.model[-1]
    layers = {f"level{n}": f"model.{index}" for n, index in enumerate(head.f)}
    return layers, {f"level{n}": branch[0].conv.in_channels for n, branch in enumerate(head.cv2)}


class Criterion:
    """Takes the place of the student's criterion, and adds the distillation loss."""

    def __init__(self, trainer, teacher):
        self.student, self.teacher = unwrap_model(trainer.model), teacher.to(trainer.device).eval()
        self.own = getattr(self.student, "criterion", None) or self.student.init_criterion()
        self.taps = [featkd.FeatureTap(m, levels(m)[0]) for m in (self.student, self.teacher)]
        self.student.criterion, self.listening = self, ExitStack()
        trainer.add_callback("on_train_batch_start", self.listen)

    def listen(self, trainer):
        self.listening.close()  # Ultralytics tries a batch that ran out of memory again, smaller
        self.listening.enter_context(self.taps[0])

    def __call__(self, predictions, batch):
        total, items = self.own(predictions, batch)  # summed over the images; means, to be logged
        with torch.no_grad(), self.taps[1]:  # `embed`: the teacher stops at these layers
            self.teacher.predict(batch["img"], embed=self.teacher.model[-1].f)
        kd_loss = sum(self.student.distillation(*(tap.pop() for tap in self.taps)).values())
        return total.sum() + len(batch["img"]) * kd_loss, items | {"kd_loss": kd_loss.detach()}

    def __getattr__(self, name):  # such as `update`, where the student's own has it
        return getattr(self.own, name)

    def __reduce__(self):  # what copies of the student have, such as its EMA: None
        return type(None), ()


class DistillingTrainer(DetectionTrainer):
    def get_model(self, cfg=None, weights=None, verbose=True):
        student, teacher = super().get_model(cfg, weights, verbose), YOLO(self.teacher).model
        channels = levels(student)[1], levels(teacher)[1]
        loss = featkd.FeatureDistillationLoss(*channels)
        student.distillation = loss  # now, to be in the optimizer, the EMA and the checkpoints
        if self.resume:
            loss.load_state_dict(weights.distillation.state_dict())
        self.add_callback("on_train_start", lambda trainer: Criterion(trainer, teacher))
        self.add_callback("on_train_end", lambda trainer: strip(trainer.last, trainer.best))
        return student


def strip(*files):
    """Leaves the student alone in checkpoints, which then load where featkd is not installed."""
    for file in files:
        checkpoint = strip_optimizer(file)
        del checkpoint["model"].distillation
        for module in checkpoint["model"].modules():  # inert hooks, after a recovery from NaN
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        torch.save(checkpoint, file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", nargs="+", type=parse_key_value_pair, help="of `yolo train`")
    settings = dict(parser.parse_args().settings)
    DistillingTrainer.teacher = settings.pop("teacher")
    DistillingTrainer(overrides=settings).train()
