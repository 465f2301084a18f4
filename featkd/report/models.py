"""What is wrong with a pair of models that shows in their parameters."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn


def same_weights(student: nn.Module, teacher: nn.Module) -> Iterator[str]:
    """Batch normalisation in two modes makes other features of the same weights.

    Modules of other kinds, as of quantisation-aware training, are to be taught by them.
    """
    ours, theirs = dict(student.named_parameters()), dict(teacher.named_parameters())
    kinds = [[type(module) for module in model.modules()] for model in (student, teacher)]
    if ours.keys() != theirs.keys() or kinds[0] != kinds[1]:
        return
    # An offloaded teacher's parameters are on the meta device between its calls.
    same = [
        value.shape == theirs[name].shape
        and not theirs[name].is_meta
        and torch.equal(value, theirs[name].to(value))
        for name, value in ours.items()
    ]
    if same and all(same):
        yield "the teacher's weights are the student's: it has nothing to teach."


def larger_student(student: nn.Module, teacher: nn.Module) -> Iterator[str]:
    """Of two kinds of model the teacher may be a part, such as a backbone: then it may be meant.

    A quantised or frozen teacher, or features from a disk, show no parameter: that says nothing.
    """
    ours, theirs = (sum(p.numel() for p in model.parameters()) for model in (student, teacher))
    if ours > theirs > 0:
        unless = "" if type(student) is type(teacher) else " if they are swapped"
        yield (
            f"the student has {ours:,} parameters, the teacher {theirs:,}: the student comes "
            f"first{unless}."
        )
