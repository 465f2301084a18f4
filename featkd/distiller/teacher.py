"""The teacher's forward: in eval mode, without gradients, and no further than asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..taps.early_stop import stopped_after_last_capture
from ..taps.tap import FeatureTap


@torch.no_grad()
def teacher_features(
    tap: FeatureTap, call: Callable[[], object], early_stop: bool, ours: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What `call` leaves in the teacher's tap, on the devices of the student's features."""
    if any(module.training for module in tap.model.modules()):
        tap.model.eval()
    with tap:
        # Raising inside a compiled graph would break it.
        if early_stop and not torch.compiler.is_compiling():
            with stopped_after_last_capture(tap):
                call()
        else:
            call()
    theirs = tap.pop()
    for level, features in theirs.items():
        if features.is_meta and not ours[level].is_meta:
            raise ValueError(
                f"`layers[{level!r}]` must have values in the teacher, got the meta device."
            )
        theirs[level] = features.to(ours[level].device)
    return theirs
