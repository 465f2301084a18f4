"""The attention-masked feature loss, L_AM (eq. 2): the student mimics the teacher's features."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import (
    require_channels,
    require_choice,
    require_feature_pair,
    require_same_device,
    require_shape,
    require_tensor,
)
from ._adapters import Conv2d
from ._blocks import takes_closed_form
from ._closed_forms import OVER_CHANNELS, OVER_POSITIONS, weighted_distance
from ._level import LevelLoss
from ._numerics import cast, compute_dtype, reduced, relative_to, root, savable
from ._options import (
    ATTENTIONS,
    FUSIONS,
    Attention,
    Fusion,
    Reduction,
    require_form,
    require_temperature,
)
from .attention import MAPS, Maps, fused_mask, maps_over
from .standardize import standardized, standardized_distance


def attention_masked_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    spatial_mask: Tensor | None = None,
    channel_mask: Tensor | None = None,
    reduction: Reduction = "mean",
    standardize: bool = False,
) -> Tensor:
    r"""Attention-masked feature loss: the L2 distance of the features, weighted by both masks.

    .. math::
        L_{AM} = \left( \sum_{k=1}^{C} \sum_{i=1}^{H} \sum_{j=1}^{W}
                 (A^T_{k,i,j} - A^S_{k,i,j})^2 \, M^s_{i,j} \, M^c_k \right)^{1/2}

    The norm is taken per image. Nothing is detached: pass detached masks where they are constants.

    Args:
        student: the student's features, adapted to the teacher's channels, `(B, C, H, W)`.
        teacher: the teacher's features, `(B, C, H, W)`.
        spatial_mask: M_s, `(B, H, W)`, at least 0; `None` is all ones.
        channel_mask: M_c, `(B, C)`, at least 0; `None` is all ones.
        reduction: `"none"`, `"mean"` or `"sum"` over the images; `"norm"`, the L2 norm over the
            batch as well (the released code); `"mean_square"`, the mean of the images' squares
            (beyond the paper). Of no images each is 0.
        standardize: compare the standardised features s and t (beyond the paper): per image
            :math:`\frac{1}{2CHW} \sum (s - t)^2 M^s M^c`, which has no unit. Without masks it is
            1 - correlation, the mean over the channels, from 0 to 2.

    Returns:
        `(B,)` for `"none"`, else a scalar; float32 or wider. At least 0, in the unit of the
        features. 0 with gradient 0 where the features are equal.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: the shapes or devices do not fit, or `reduction` is unknown, or a norm or square
            with `standardize`.

    Reference: Zhang & Ma (ICLR 2021), section 3.1, eq. (2).

    Example:
        >>> import torch
        >>> student, teacher = torch.zeros(1, 2, 1, 2), torch.ones(1, 2, 1, 2)
        >>> attention_masked_loss(student, teacher, spatial_mask=torch.tensor([[[0.5, 1.5]]]))
        tensor(2.)
    """
    require_form(reduction, False, standardize)
    require_feature_pair(student, teacher, same_channels=True, module="AttentionMaskedLoss")
    images, channels, *size = student.shape
    if spatial_mask is not None:
        _require_mask("spatial_mask", spatial_mask, (images, *size), student)
    if channel_mask is not None:
        _require_mask("channel_mask", channel_mask, (images, channels), student)
    masks = (None if mask is None else savable(mask) for mask in (spatial_mask, channel_mask))
    distance = standardized_distance if standardize else masked_distance
    return reduced(distance(savable(student), savable(teacher), *masks), reduction)


def masked_distance(
    student: Tensor,
    teacher: Tensor,
    spatial_mask: Tensor | None = None,
    channel_mask: Tensor | None = None,
) -> Tensor:
    """Eq. (2) for each image, `(B,)`."""
    if takes_closed_form():
        return weighted_distance(student, teacher, spatial_mask, channel_mask)
    dtype = compute_dtype(student, teacher, spatial_mask, channel_mask)
    square = (cast(student, dtype) - teacher).square()
    if spatial_mask is not None:
        square = square * spatial_mask[:, None]
    if channel_mask is not None:
        square = square * channel_mask[:, :, None, None]
    return root(square.sum((1, 2, 3)))


def _require_mask(name: str, mask: Tensor, shape: tuple[int, ...], student: Tensor) -> None:
    require_tensor(name, mask)
    require_shape(name, mask, shape, "the shape")
    require_same_device(name, mask, "student", student)


class AttentionMaskedLoss(LevelLoss):
    """See :func:`featkd.functional.attention_masked_loss`; masks and 1x1 adapter are its own.

    The masks are made of the student's own features and the teacher's, as constants. Where C_S
    differs from C_T a channel index means nothing across them: the channel mask then takes the
    adapted student's. Teacher features are constants.

    Args:
        student_channels, teacher_channels: C_S and C_T.
        temperature, fusion: as in :func:`featkd.functional.attention_mask`; `None` takes no masks,
            which are then even, at no cost.
        attention: mask by `"both"` (the paper), `"spatial"` or `"channel"` alone (its table 6).
        reduction: as in the function.
        resize: as in :class:`featkd.AttentionTransferLoss`.
        normalize: divide by an all-zero student's loss under the same masks, image by image.
        standardize: as in the function. The attention maps are standardised too before they make
            masks: the temperature is in units of their standard deviation.

    Shape: student `(B, C_S, H, W)`, teacher `(B, C_T, H, W)`; result by `reduction`.

    Example:
        >>> import torch
        >>> loss = AttentionMaskedLoss(16, 32, temperature=0.5)
        >>> loss(torch.randn(2, 16, 8, 12), torch.randn(2, 32, 8, 12)).shape
        torch.Size([])
    """

    _shown = ("temperature", "fusion", "attention")

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        temperature: float | None,
        fusion: Fusion = "logits",
        attention: Attention = "both",
        reduction: Reduction = "mean",
        resize: str | None = None,
        normalize: bool = False,
        standardize: bool = False,
    ) -> None:
        super().__init__(
            student_channels, teacher_channels, reduction, resize, normalize, standardize
        )
        require_temperature(temperature)
        require_choice("fusion", fusion, FUSIONS)
        require_choice("attention", attention, ATTENTIONS)
        self.temperature = temperature
        self.fusion: Fusion = fusion
        self.attention: Attention = attention
        self.adapter = Conv2d(student_channels, teacher_channels, 1)

    def _distances(
        self, student: Tensor, teacher: Tensor, maps: tuple[Maps, Maps] | None
    ) -> list[Tensor]:
        adapted = self.adapter(student)
        masks = self._masks(student, adapted, teacher, maps)
        if self.standardize:
            return [standardized_distance(adapted, teacher, *masks)]
        distance = masked_distance(adapted, teacher, *masks)
        if self.normalize:
            zeros = torch.zeros_like(teacher)
            distance = relative_to(distance, masked_distance(zeros, teacher, *masks))
        return [distance]

    def masks(
        self, student: Tensor, adapted: Tensor, teacher: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """M_s `(B, H, W)` and M_c `(B, C_T)`; `None` for those that are not used."""
        require_channels("student", student, self.student_channels)
        require_feature_pair(adapted, teacher, same_channels=True, names=("adapted", "teacher"))
        require_feature_pair(student, teacher, same_channels=False)
        return self._masks(student, adapted, teacher, None)

    def _masks(
        self, student: Tensor, adapted: Tensor, teacher: Tensor, maps: tuple[Maps, Maps] | None
    ) -> tuple[Tensor | None, Tensor | None]:
        if self.temperature is None:
            return None, None
        # Detached, not `no_grad`: forward mode goes on through that.
        student, adapted, teacher = student.detach(), adapted.detach(), teacher.detach()
        dims = MAPS[self.attention]
        one_channel_index = self.student_channels == self.teacher_channels
        if maps is None:
            of_student = dims if one_channel_index else tuple(d for d in dims if d == OVER_CHANNELS)
            maps = maps_over(student, of_student), maps_over(teacher, dims)
        ours, theirs = maps
        if not one_channel_index and OVER_POSITIONS in dims:
            bias = self.adapter.bias
            if self.standardize and bias is not None:  # it has a scale, and standardised maps none
                adapted = adapted - bias.detach()[:, None, None]
            ours = {**ours, **maps_over(adapted, (OVER_POSITIONS,))}
        masks = {}
        for d in dims:
            mine, its = ours[d].detach(), theirs[d].detach()
            if self.standardize:
                mine, its = (standardized(x, tuple(range(1, x.dim()))) for x in (mine, its))
            masks[d] = fused_mask(mine, its, self.temperature, self.fusion)
        return masks.get(OVER_CHANNELS), masks.get(OVER_POSITIONS)
