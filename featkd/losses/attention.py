"""Attention maps of a feature map, and the masks made of a student's and a teacher's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._checks import (
    require_choice,
    require_feature_map,
    require_flag,
    require_number,
    require_same_device,
    require_shape,
    require_tensor,
)
from ._blocks import pays, takes_closed_form
from ._closed_forms import OVER_CHANNELS, OVER_POSITIONS, Dims, means
from ._numerics import cast, compute_dtype, dtype_for_few
from ._options import FUSIONS, Attention, Fusion

Maps = dict[Dims, Tensor]

MAPS: dict[Attention, tuple[Dims, ...]] = {
    "both": (OVER_CHANNELS, OVER_POSITIONS),
    "spatial": (OVER_CHANNELS,),
    "channel": (OVER_POSITIONS,),
}


def maps_over(features: Tensor, dims: tuple[Dims, ...], absolute: bool = True) -> Maps:
    """Attention over each of `dims` of checked features: the mean of their absolute values."""
    if takes_closed_form() and pays(features):
        return dict(zip(dims, means(features, dims, absolute), strict=True))
    wide = cast(features, compute_dtype(features))
    wide = wide.abs() if absolute else wide
    return {over: wide.mean(over) for over in dims}


def attention_maps(features: Tensor, *, absolute: bool = True) -> tuple[Tensor, Tensor]:
    r"""Both attention maps, :math:`G^s(A)` and :math:`G^c(A)`, in one reading of the features.

    The same values as of :func:`spatial_attention` and :func:`channel_attention`, at less cost.

    Args:
        features, absolute: as there.

    Returns:
        `(B, H, W)` and `(B, C)`, in float32 or wider, in the unit of the features.

    Raises:
        TypeError, ValueError: `features` is no floating-point tensor of shape `(B, C, H, W)`.

    Reference: Zhang & Ma (ICLR 2021), section 3.1.

    Example:
        >>> import torch
        >>> attention_maps(torch.tensor([[[[1.0, -2.0]], [[-3.0, 0.0]]]]))
        (tensor([[[2., 1.]]]), tensor([[1.5000, 1.5000]]))
    """
    require_feature_map("features", features)
    require_flag("absolute", absolute)
    maps = maps_over(features, MAPS["both"], absolute)
    return maps[OVER_CHANNELS], maps[OVER_POSITIONS]


def spatial_attention(features: Tensor, *, absolute: bool = True) -> Tensor:
    r"""Spatial attention map: the mean over the channels of the absolute features.

    .. math:: G^s(A)_{i,j} = \frac{1}{C} \sum_{k=1}^{C} |A_{k,i,j}|

    Args:
        features: feature maps, `(B, C, H, W)`, any floating dtype.
        absolute: take \|A\| (the paper) or A itself (the authors' released code).

    Returns:
        `(B, H, W)`, at least 0 where `absolute`, in float32 or wider, in the unit of the features.

    Raises:
        TypeError: `features` is no floating-point tensor.
        ValueError: `features` is not of shape `(B, C, H, W)`.

    Reference: Zhang & Ma (ICLR 2021), section 3.1.

    Example:
        >>> import torch
        >>> spatial_attention(torch.tensor([[[[1.0, -2.0]], [[-3.0, 0.0]]]]))
        tensor([[[2., 1.]]])
    """
    require_feature_map("features", features)
    require_flag("absolute", absolute)
    return maps_over(features, (OVER_CHANNELS,), absolute)[OVER_CHANNELS]


def channel_attention(features: Tensor, *, absolute: bool = True) -> Tensor:
    r"""Channel attention map: the mean over the positions of the absolute features.

    .. math:: G^c(A)_k = \frac{1}{HW} \sum_{i=1}^{H} \sum_{j=1}^{W} |A_{k,i,j}|

    Args:
        features: feature maps, `(B, C, H, W)`, any floating dtype.
        absolute: take \|A\| (the paper) or A itself (the authors' released code).

    Returns:
        `(B, C)`, at least 0 where `absolute`, in float32 or wider, in the unit of the features.

    Raises:
        TypeError: `features` is no floating-point tensor.
        ValueError: `features` is not of shape `(B, C, H, W)`.

    Reference: Zhang & Ma (ICLR 2021), section 3.1.

    Example:
        >>> import torch
        >>> channel_attention(torch.tensor([[[[1.0, -2.0]], [[-3.0, 0.0]]]]))
        tensor([[1.5000, 1.5000]])
    """
    require_feature_map("features", features)
    require_flag("absolute", absolute)
    return maps_over(features, (OVER_POSITIONS,), absolute)[OVER_POSITIONS]


def attention_mask(
    student_attention: Tensor,
    teacher_attention: Tensor,
    *,
    temperature: float,
    fusion: Fusion = "logits",
) -> Tensor:
    r"""Attention mask: a softmax of both attention maps, of mean 1 over each image.

    .. math:: M = n \cdot \mathrm{softmax}\left((a^S + a^T) / T\right)

    over all dimensions but the batch's, with n the elements per image. So spatial maps give
    :math:`M^s` (n = HW) and channel maps give :math:`M^c` (n = C). `fusion="probabilities"` is the
    authors' released code: the mean of the two separate softmaxes.

    Nothing is detached here: detach the maps where masks are to be constants (the modules do;
    `torch.no_grad()` alone lets forward mode through).

    Args:
        student_attention: `(B, H, W)`, `(B, C)` or any `(B, ...)`; -inf leaves an element out.
        teacher_attention: the same shape.
        temperature: T, above 0, in the unit of the maps; the smaller, the sharper the mask.
        fusion: `"logits"` (the paper) or `"probabilities"` (the released code).

    Returns:
        The shape of the inputs, at least 0, each image's elements summing to n; float32 or wider.

    Raises:
        TypeError: a map is no floating-point tensor, or `temperature` no number.
        ValueError: the shapes or devices differ, `temperature` is not above 0, `fusion` is unknown.

    Reference: Zhang & Ma (ICLR 2021), section 3.1.

    Example:
        >>> import torch
        >>> maps = torch.tensor([[0.0, 0.0, 1.0]])
        >>> attention_mask(maps, maps, temperature=0.5)
        tensor([[0.0530, 0.0530, 2.8940]])
    """
    require_tensor("student_attention", student_attention)
    require_tensor("teacher_attention", teacher_attention)
    if student_attention.dim() < 2 or 0 in student_attention.shape[1:]:
        raise ValueError(
            "`student_attention` must have the shape (B, ...) with at least one element per image, "
            f"got {tuple(student_attention.shape)}."
        )
    rule = "the shape of `student_attention`"
    require_shape("teacher_attention", teacher_attention, tuple(student_attention.shape), rule)
    require_same_device(
        "teacher_attention", teacher_attention, "student_attention", student_attention
    )
    require_number("temperature", temperature, above=0)
    require_choice("fusion", fusion, FUSIONS)
    return fused_mask(student_attention, teacher_attention, temperature, fusion)


def fused_mask(
    student_attention: Tensor, teacher_attention: Tensor, temperature: float, fusion: Fusion
) -> Tensor:
    """The mask of checked maps."""
    dtype = compute_dtype(student_attention, teacher_attention)
    temperature = max(float(temperature), torch.finfo(dtype).tiny)  # torch takes no large integers
    wide = dtype_for_few(student_attention)
    ours, theirs = student_attention.flatten(1), teacher_attention.flatten(1)
    if wide == dtype:  # no digits to spare: what the maps share, and their size, would take some
        ours, theirs = _less_largest(ours.to(wide)), _less_largest(theirs.to(wide))
    if fusion == "logits":
        mask = ((ours.to(wide) + theirs) / temperature).softmax(1)
    else:
        student_mask, teacher_mask = ((x.to(wide) / temperature).softmax(1) for x in (ours, theirs))
        mask = (student_mask + teacher_mask) / 2
    return (mask * mask.shape[1]).to(dtype).reshape(student_attention.shape)


def _less_largest(x: Tensor) -> Tensor:
    return x - x.detach().amax(1, keepdim=True)


class SpatialAttention(nn.Module):
    """See :func:`featkd.functional.spatial_attention`."""

    def __init__(self, *, absolute: bool = True) -> None:
        super().__init__()
        require_flag("absolute", absolute)
        self.absolute = absolute

    def extra_repr(self) -> str:
        return f"absolute={self.absolute}"

    def forward(self, features: Tensor) -> Tensor:
        return spatial_attention(features, absolute=self.absolute)


class ChannelAttention(nn.Module):
    """See :func:`featkd.functional.channel_attention`."""

    def __init__(self, *, absolute: bool = True) -> None:
        super().__init__()
        require_flag("absolute", absolute)
        self.absolute = absolute

    def extra_repr(self) -> str:
        return f"absolute={self.absolute}"

    def forward(self, features: Tensor) -> Tensor:
        return channel_attention(features, absolute=self.absolute)


class AttentionMask(nn.Module):
    """See :func:`featkd.functional.attention_mask`."""

    def __init__(self, temperature: float, fusion: Fusion = "logits") -> None:
        super().__init__()
        require_number("temperature", temperature, above=0)
        require_choice("fusion", fusion, FUSIONS)
        self.temperature = temperature
        self.fusion: Fusion = fusion

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, fusion={self.fusion!r}"

    def forward(self, student_attention: Tensor, teacher_attention: Tensor) -> Tensor:
        return attention_mask(
            student_attention, teacher_attention, temperature=self.temperature, fusion=self.fusion
        )
