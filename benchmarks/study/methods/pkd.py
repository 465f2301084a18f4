"""Distillation by Pearson's correlation: Cao et al. (NeurIPS 2022)."""

import torch.nn.functional as F
from torch import Tensor

from benchmarks.study.methods.baseline import Baseline, regressor_where_needed


class PearsonDistillation(Baseline):
    """`1/2 mean (n(S) - n(T))^2 = 1 - mean_c r_c`, r Pearson's correlation by channel: PKD.

    Cao et al. (NeurIPS 2022), section 3: `n` gives each channel the mean 0 and the standard
    deviation 1 over batch and positions. Paper: equal channel counts without an adapter. Chosen: a
    1x1 convolution where they differ; 1e-8 is added to the variance (the released code adds 1e-6 to
    the standard deviation), so that a constant channel becomes 0.
    """

    name = "pkd"
    adapter = staticmethod(regressor_where_needed)

    def distance(self, level: str, student: Tensor, teacher: Tensor) -> Tensor:
        ours, theirs = (
            F.batch_norm(x, None, None, training=True, eps=1e-8) for x in (student, teacher)
        )
        return F.mse_loss(ours, theirs) / 2
