"""Distillers to be reported."""

import random

import torch
from torch import nn

from featkd import Distiller, Hyperparameters
from tests.helpers.models import LEVELS, NORMALIZED, Net, distillation_loss

MASKED = Hyperparameters(0.0, 1.0, 0.0, 0.5, normalize=True)


class Student(Net):
    """A `Net` with losses of its own, that draws random numbers and counts its steps."""

    def __init__(self, width=4, scale=1.0):
        super().__init__(width, inplace=False)
        self.scale = scale
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, batch):
        self.steps = self.steps + 1
        noise = torch.rand(1).to(batch) + random.random()
        output = super().forward(batch).square().mean()
        return {"classes": self.scale * output, "boxes": 0.5 * self.scale * output + 0 * noise}


def make(student=None, hyperparameters=NORMALIZED, **options):
    loss = distillation_loss(hyperparameters=hyperparameters)
    return Distiller(student or Student(), Net(6), loss, LEVELS, **options)


class Ratio(nn.Module):
    """A loss whose gradient is `ratio` times the detector's, whatever its value."""

    def __init__(self, ratio, value=0.0):
        super().__init__()
        self.ratio, self.value = ratio, value

    def forward(self, student, teacher):
        loss = self.ratio * student["c1"].sum()
        return {"term": loss - loss.detach() + self.value}


class Summed(Net):
    """A detector whose loss is the sum of the tapped level."""

    def forward(self, batch):
        return {"loss": self.backbone.c1(batch).sum()}


class Term(nn.Module):
    """A loss that is this function of the student's features."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, student, teacher):
        return self.function(student["c1"])
