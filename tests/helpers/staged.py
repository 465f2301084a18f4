"""Small models with stages, and the levels that are found in them."""

import itertools

import torch
from torch import nn

from featkd import FeatureTap, match_layers
from tests.helpers.models import watch
from tests.helpers.tensors import normal

PIXELS = normal(1, 3, 64, 96, dtype=torch.float32)


def stages(pattern, names, first=2):
    return {f"c{first + index}": pattern.format(name) for index, name in enumerate(names)}


def check(match, ours, theirs):
    """Equal strides by name, by value and by size, and the layers that are expected."""
    proposed = {**match.pairs, **match.others}
    match = match.select(*proposed)
    for level, (student, teacher) in proposed.items():
        assert student.stride == teacher.stride == 2 ** int(level[1:])
        assert student.shape[1] == student.channels == match.student_channels[level]
        assert teacher.shape[1] == teacher.channels == match.teacher_channels[level]
        assert match.layers[level] == (student.path, teacher.path)
    found = {level: match.layers[level] for level in ours if level in match.layers}
    assert found == {level: (ours[level], theirs[level]) for level in ours if level in theirs}


def convolutions(*strides):
    return nn.Sequential(*(nn.Conv2d(3, 3, stride, stride) for stride in strides))


class Pyramid(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.lateral = nn.Conv2d(width, 3, 1)

    def forward(self, maps):
        return self.lateral(maps[1])


class CallsItsStages(nn.Module):
    def __init__(self):
        super().__init__()
        self.c1, self.c2 = convolutions(2, 2)
        self.neck = Pyramid()

    def forward(self, x):
        first = self.c1(x)
        return self.neck([first, self.c2(first)])


def convolution(ours, theirs, stride=1):
    return nn.Conv2d(ours, theirs, 3, stride, 1)


class Stages(nn.Module):
    """Strides 2, 4, 8, each as wide as it says; puts out the last two in a list."""

    def __init__(self, *widths):
        super().__init__()
        pairs = itertools.pairwise((3, *widths))
        self.stages = nn.ModuleList(convolution(*pair, 2) for pair in pairs)

    def forward(self, x):
        maps = []
        for stage in self.stages:
            maps.append(x := stage(x))
        return maps[1:]


def equals_plain_hooks(model, match, *inputs):
    """A tap of all that is proposed captures what plain hooks see."""
    layers = {level: ours.path for level, (ours, _) in {**match.pairs, **match.others}.items()}
    model = model.eval()
    tap = FeatureTap(model, layers)
    with watch(model, layers.values()) as expected, torch.no_grad(), tap:
        model(*inputs)
        captured = tap.pop()
    for level, path in layers.items():
        assert torch.equal(captured[level], expected[path])


def levels_of(model, image=PIXELS):
    """The level's path in the model itself."""
    return {level: ours for level, (ours, _) in match_layers(model, model, image).layers.items()}
