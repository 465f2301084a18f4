"""Small distillers and what they are made of."""

from functools import partial

import torch
from torch import nn

from featkd import Distiller, Hyperparameters, from_tokens
from tests.helpers.models import LEVELS, Net, distillation_loss, images


def make(student=4, teacher=6, **options):
    return Distiller(
        Net(student), Net(teacher), distillation_loss(student, teacher), LEVELS, **options
    )


# One term alone, in figures that are near 1.
TERM = Hyperparameters(alpha=0.0, beta=1.0, gamma=0.0, temperature=1.0, normalize=True)


class Seen(nn.Module):
    """A loss that keeps what it was given; its gradient reaches every student feature."""

    def forward(self, student, teacher):
        self.student, self.teacher = student, teacher
        return {"seen": sum(feature.square().mean() for feature in student.values())}


class Inputs(list):
    """What enters a module, call by call."""

    def __init__(self, module):
        super().__init__()
        module.register_forward_pre_hook(lambda module, args: self.append(args[0].clone()))


class HasTrunk(nn.Module):
    """A `Net` whose backbone has another name."""

    def __init__(self, width):
        super().__init__()
        self.trunk = Net(width).backbone
        self.calls = 0

    def forward(self, images, scale=1):
        self.calls += 1
        return self.trunk(scale * images)


from_stage = partial(from_tokens, size=(8, 12), prefix=1)
FLOAT, COUNTS = images().float(), torch.tensor([3, 4])


def call_teacher(teacher, batch):
    return teacher(batch)


def values(distiller, batch):
    """The losses and their gradients."""
    _, losses = distiller(batch)
    trained = [value for value in distiller.parameters() if value.requires_grad]
    total = sum(losses.values())
    found = torch.autograd.grad(total, trained, allow_unused=True)
    return [*losses.values(), *(value for value in found if value is not None)]


class RunsTwice(Net):
    def forward(self, batch):
        self.backbone.c1(batch)
        return super().forward(batch)


HF_STAGES = {
    "c3": "model.backbone.model.encoder.stages.1",
    "c4": "model.backbone.model.encoder.stages.2",
}
pixels = (images().float().repeat(1, 1, 4, 4),)


def build(student=None, teacher=None, loss=None, layers=LEVELS, **options):
    return Distiller(student or Net(4), teacher or Net(6), loss or Seen(), layers, **options)
