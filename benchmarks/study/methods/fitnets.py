"""Hints: Romero et al. (ICLR 2015)."""

import torch.nn.functional as F
from torch import Tensor

from benchmarks.study.methods.baseline import Baseline


class FitNets(Baseline):
    """`1/2 mean (r(S) - T)^2`: hints.

    Romero et al. (ICLR 2015), section 2.2; the hint on the backbone of Chen et al. (NeurIPS 2017).
    Paper: a convolution `r` at any channel counts. Chosen: 1x1 (Chen et al.), the mean over
    elements in place of the sum, and one stage of training in place of two.
    """

    name = "fitnets"

    def distance(self, level: str, student: Tensor, teacher: Tensor) -> Tensor:
        return F.mse_loss(student, teacher) / 2
