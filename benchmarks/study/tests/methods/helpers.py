"""Each method's loss at two levels, and what a step shows it."""

import torch
from torch import nn

from benchmarks.study.methods import METHODS, FineGrainedImitation

SIZES = {"a": (8.0,), "b": (16.0, 24.0)}
STUDENT, TEACHER = {"a": 3, "b": 4}, {"a": 5, "b": 4}
IMAGE = (32, 48)


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def close(actual, expected, tolerance=1e-10):
    """Equal up to `tolerance` times the larger of 1 and the largest expected value."""
    expected = torch.as_tensor(expected, dtype=torch.float64).detach()
    size = max([1.0, *expected.abs().flatten().tolist()])
    torch.testing.assert_close(actual.detach().double(), expected, rtol=0, atol=tolerance * size)


def make(name, student=STUDENT, teacher=TEACHER, weight=1.0, dtype=torch.float64):
    options = {
        "fgfi": {"anchor_sizes": {level: SIZES[level] for level in student}},
        "cwd": {"temperature": 2.0},
    }.get(name, {})
    return METHODS[name](student, teacher, weight=weight, **options).to(dtype)


def see_boxes(loss, *boxes, image_size=IMAGE):
    """As if a step of the student had shown them; other losses need none."""
    if isinstance(loss, FineGrainedImitation):
        loss.seen.boxes = [torch.as_tensor(each).view(-1, 4) for each in boxes]
        loss.seen.image_size = image_size
    return loss


def features(channels, seed=0, strides=(8, 16)):
    return {
        level: normal(2, count, IMAGE[0] // stride, IMAGE[1] // stride, seed=seed)
        for (level, count), stride in zip(channels.items(), strides, strict=True)
    }


def value(loss, student, teacher, *boxes, name=None):
    boxes = boxes or ([4.0, 4.0, 30.0, 20.0], [0.0, 8.0, 20.0, 24.0])
    ((entry, total),) = see_boxes(loss, *boxes)(student, teacher).items()
    assert name in (None, entry)
    return total


def at_one_level(loss, student, teacher):
    """The loss of two maps, given as nested lists, without the adapter."""
    loss.adapters["a"] = nn.Identity()
    return value(
        loss,
        {"a": torch.tensor(student, dtype=torch.float64)},
        {"a": torch.tensor(teacher, dtype=torch.float64)},
    )
