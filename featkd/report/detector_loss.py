"""The detector's own loss among what the student puts out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def detector_loss(output: object) -> Tensor | None:
    """The sum of the losses in the first of these that `output` is; `None` if it is none.

    - an object with a `.loss`, or a mapping with a scalar `"loss"`, which is the whole;
    - a mapping of scalars (or lists of them);
    - a tuple of the loss, a scalar or a vector of its parts, and of items without a gradient;
    - a scalar.
    """
    loss = getattr(output, "loss", output)
    if isinstance(loss, Mapping) and isinstance(whole := loss.get("loss"), Tensor):
        loss = whole
    if isinstance(loss, tuple):
        return _first_alone(loss)
    found: list[object] = [loss]
    if isinstance(loss, Mapping):
        found = []
        for value in loss.values():
            found += value if isinstance(value, list | tuple) else [value]
    scalars = [value for value in found if isinstance(value, Tensor) and value.numel() == 1]
    if len(scalars) < len(found):
        return None
    # An accuracy beside the losses has no gradient.
    trained = [value.sum() for value in scalars if value.requires_grad]
    return torch.stack(trained).sum() if trained else None


def _first_alone(parts: tuple[object, ...]) -> Tensor | None:
    """`(loss, items)` or `(loss, logits)`; not where a second part may be a loss as well."""
    loss, others = (parts or (None,))[0], parts[1:]
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        return None
    trained = [value for value in others if isinstance(value, Tensor) and value.requires_grad]
    if loss.dim() == 0:
        alone = all(value.numel() > 1 for value in trained)
    else:
        items = len(others) == 1 and isinstance(others[0], Mapping | Tensor)
        alone = loss.dim() == 1 and items and not trained
    return loss.sum() if alone else None
