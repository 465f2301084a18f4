"""What a tap captures beside what plain hooks see."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.helpers.models import Net, plain_hooks


def captured(tap, call):
    with tap:
        call()
        return tap.pop()


def captures_what_plain_hooks_see(tap, model, call):
    expected = plain_hooks(model, tap.layers.values(), call)
    features = captured(tap, call)
    assert list(features) == list(tap.layers)
    for alias, path in tap.layers.items():
        assert torch.equal(features[alias], expected[path])
    return features


def doubled(feature):
    return 2 * feature


class HasModule(nn.Module):
    """A user's own attribute is called like a wrapper's."""

    def __init__(self):
        super().__init__()
        self.module = Net().backbone
        self.neck = nn.Conv2d(8, 3, 1).double()

    def forward(self, x):
        return self.neck(self.module(x))


class Checkpointed(Net):
    def __init__(self, use_reentrant):
        super().__init__()
        self.use_reentrant = use_reentrant

    def forward(self, images):
        images = images.requires_grad_()
        return self.head(checkpoint(self.backbone, images, use_reentrant=self.use_reentrant))


class LowRank(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.down = nn.Parameter(torch.randn(2, weight[0].numel(), dtype=weight.dtype))
        self.up = nn.Parameter(torch.randn(len(weight), 2, dtype=weight.dtype))

    def forward(self, weight):
        return weight + (self.up @ self.down).view_as(weight)
