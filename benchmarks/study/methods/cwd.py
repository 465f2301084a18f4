"""Channel-wise distillation: Shu et al. (ICCV 2021)."""

import torch.nn.functional as F
from torch import Tensor

from benchmarks.study.methods.baseline import Baseline, Channels, regressor_where_needed


class ChannelWiseDistillation(Baseline):
    """`tau^2 / C_T sum_c KL(softmax_HW(T_c / tau) || softmax_HW(S_c / tau))`: CWD.

    Shu et al. (ICCV 2021), section 3.2. Paper: all of it, the 1x1 convolution only where channel
    counts differ included; `temperature` is tau, 4 in the released code.
    """

    name = "cwd"
    adapter = staticmethod(regressor_where_needed)

    def __init__(
        self,
        student_channels: Channels,
        teacher_channels: Channels,
        *,
        weight: float,
        temperature: float = 4.0,
    ) -> None:
        super().__init__(student_channels, teacher_channels, weight=weight)
        self.temperature = temperature

    def distance(self, level: str, student: Tensor, teacher: Tensor) -> Tensor:
        tau = self.temperature
        ours, theirs = (F.log_softmax(x.flatten(2) / tau, 2) for x in (student, teacher))
        divergence = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(2)
        return tau**2 * divergence.mean()
