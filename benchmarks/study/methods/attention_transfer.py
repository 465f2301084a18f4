"""Attention transfer: Zagoruyko & Komodakis (ICLR 2017)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.study.methods.baseline import Baseline


class AttentionTransfer(Baseline):
    """`1/2 ||Q_S / ||Q_S|| - Q_T / ||Q_T|| ||` with the map `Q = sum_c A_c^2`, `(B, H * W)`.

    Zagoruyko & Komodakis (ICLR 2017), section 3.1; `weight` is the paper's beta. Paper: squares
    (p = 2 in the map), L2 norms, no adapter. (The released code has the mean of the squared
    difference in place of its norm.)
    """

    name = "at"
    adapter = nn.Identity  # which takes, and drops, any arguments

    def distance(self, level: str, student: Tensor, teacher: Tensor) -> Tensor:
        ours, theirs = (F.normalize(x.square().sum(1).flatten(1)) for x in (student, teacher))
        return torch.linalg.vector_norm(ours - theirs, dim=1).mean() / 2
