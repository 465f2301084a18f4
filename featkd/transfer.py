"""Attention transfer, L_AT (eq. 1): the student mimics the teacher's attention maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

from torch import Tensor, nn

from ._checks import (
    require_callable,
    require_choice,
    require_feature_pair,
    require_flag,
    require_same_device,
    require_shape,
    require_tensor,
)
from ._means import MAPS, OVER_CHANNELS, Attention, Dims, Maps, attention_maps
from ._precision import full_precision
from ._reduction import (
    Reduction,
    norm_per_image,
    reduce_distances,
    relative_to,
    require_reduction,
)
from .adapters import (
    Conv2d,
    Linear,
    prepare_pair,
    require_channel_counts,
    require_resize,
)

Adapter = Callable[[Tensor], Tensor]


def attention_transfer_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    spatial_adapter: Adapter | None = None,
    channel_adapter: Adapter | None = None,
    absolute: bool = True,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Attention transfer loss: the L2 distances of the two attention maps.

    .. math::
        L_{AT} = \lVert G^s(A^S) - G^s(A^T) \rVert_2 + \lVert G^c(A^S) - G^c(A^T) \rVert_2

    The norms are taken per image; each of the two distances is reduced before they are added.

    Args:
        student: the student's features, `(B, C_S, H, W)`.
        teacher: the teacher's features, `(B, C_T, H, W)`; C_T = C_S without a `channel_adapter`.
        spatial_adapter: applied to the student's spatial map, `(B, 1, H, W) -> (B, 1, H, W)`.
        channel_adapter: applied to the student's channel map, `(B, C_S) -> (B, C_T)`.
        absolute: attention of \|A\| (the paper) or of A (the authors' released code).
        reduction: `"none"`, `"mean"` or `"sum"` over the images, or `"norm"`, the L2 norm over the
            batch as well (the released code), or `"mean_square"`, the mean of the images' squares
            (beyond the paper).

    Returns:
        `(B,)` for `"none"`, else a scalar; at least 0, in the unit of the features; float32 or
        wider. 0 with gradient 0 where the maps are equal.

    Accuracy:
        Value within 4e-6, gradients within 4e-6, relative to n, the sum of the norms of all four
        maps, and to n / d times the largest element, with d the smaller of the two distances: a
        distance is a difference of means, and where different features have equal maps its
        gradient's direction is left to rounding. inf with gradient 0 where a distance passes
        1.8e19; distances below 1e-19 times the root of the map's size lose digits and end at 0.

    Raises:
        TypeError: features are no floating-point tensors, or an adapter is not callable.
        ValueError: the shapes or devices do not fit, or `reduction` is unknown.

    Reference: Zhang & Ma (ICLR 2021), section 3.1, eq. (1); adapters: appendix B.

    Example:
        >>> import torch
        >>> student, teacher = torch.zeros(1, 2, 2, 2), torch.ones(1, 2, 2, 2)
        >>> attention_transfer_loss(student, teacher)  # sqrt(4) + sqrt(2)
        tensor(3.4142)
    """
    require_reduction(reduction)
    require_flag("absolute", absolute)
    require_callable("spatial_adapter", spatial_adapter)
    require_callable("channel_adapter", channel_adapter)
    require_feature_pair(student, teacher, same_channels=channel_adapter is None)
    ours, theirs = (attention_maps(x, MAPS["both"], absolute) for x in (student, teacher))
    return _sum_reduced(
        _distances(MAPS["both"], ours, theirs, spatial_adapter, channel_adapter), reduction
    )


def _distances(
    dims: tuple[Dims, ...],
    ours: Maps,
    theirs: Maps,
    spatial_adapter: Adapter | None,
    channel_adapter: Adapter | None,
    normalize: bool = False,
) -> list[Tensor]:
    """The distances per image, `(B,)` each, of the maps over `dims`."""
    pairs = []
    for over in dims:
        mine, target = ours[over], theirs[over]
        if over == OVER_CHANNELS:
            mine, target = mine[:, None], target[:, None]
            mine = _adapt("spatial_adapter", spatial_adapter, mine, target)
        else:
            mine = _adapt("channel_adapter", channel_adapter, mine, target)
        pairs.append((mine, target))
    distances = [norm_per_image(mine - target) for mine, target in pairs]
    if not normalize:
        return distances
    norms = [norm_per_image(target) for _, target in pairs]
    total = norms[0] if len(norms) == 1 else norms[0] + norms[1]
    return [relative_to(distance, total) for distance in distances]


def _adapt(name: str, adapter: Adapter | None, student_map: Tensor, teacher_map: Tensor) -> Tensor:
    if adapter is None:
        return student_map
    with full_precision(student_map):
        adapted = adapter(student_map)
    require_tensor(name, adapted, verb="return")
    require_shape(name, adapted, tuple(teacher_map.shape), "a result of the shape")
    require_same_device(name, adapted, "teacher", teacher_map)
    return adapted


def _sum_reduced(distances: list[Tensor], reduction: Reduction) -> Tensor:
    reduced = [reduce_distances(distance, reduction) for distance in distances]
    return reduced[0] if len(reduced) == 1 else reduced[0] + reduced[1]


class AttentionTransferLoss(nn.Module):
    """See :func:`featkd.functional.attention_transfer_loss`; appendix B's adapters are its own.

    A 3x3 convolution adapts the student's spatial map, a linear layer its channel map. Teacher
    features are constants.

    Args:
        student_channels: C_S.
        teacher_channels: C_T.
        attention: `"both"` maps (the paper), `"spatial"` or `"channel"` alone (its table 6).
        absolute, reduction: as in the function.
        resize: `None`: different H x W is an error; `"nearest"`, `"area"`, `"bilinear"` or
            `"bicubic"`: the student's features are resized to the teacher's H x W.
        normalize: divide by the loss of an all-zero student, image by image (beyond the paper).

    Shape: student `(B, C_S, H, W)`, teacher `(B, C_T, H, W)`; result by `reduction`.

    Example:
        >>> import torch
        >>> loss = AttentionTransferLoss(16, 32)
        >>> loss(torch.randn(2, 16, 8, 12), torch.randn(2, 32, 8, 12)).shape
        torch.Size([])
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        attention: Attention = "both",
        absolute: bool = True,
        reduction: Reduction = "mean",
        resize: str | None = None,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        require_channel_counts(student_channels, teacher_channels)
        require_choice("attention", attention, get_args(Attention))
        require_flag("absolute", absolute)
        require_reduction(reduction)
        require_resize(resize)
        require_flag("normalize", normalize)
        self.student_channels = student_channels
        self.teacher_channels = teacher_channels
        self.attention: Attention = attention
        self.absolute = absolute
        self.reduction: Reduction = reduction
        self.resize = resize
        self.normalize = normalize
        self.spatial_adapter = Conv2d(1, 1, 3) if attention != "channel" else None
        self.channel_adapter = (
            Linear(student_channels, teacher_channels) if attention != "spatial" else None
        )

    def extra_repr(self) -> str:
        return (
            f"{self.student_channels}, {self.teacher_channels}, attention={self.attention!r}, "
            f"absolute={self.absolute}, reduction={self.reduction!r}, resize={self.resize!r}, "
            f"normalize={self.normalize}"
        )

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        channels = self.student_channels, self.teacher_channels
        return self._of_pair(*prepare_pair(student, teacher, channels, self.resize))

    def _of_pair(
        self, student: Tensor, teacher: Tensor, maps: tuple[Maps, Maps] | None = None
    ) -> Tensor:
        """The loss of a prepared pair; `maps` where the caller has the attention maps of both."""
        dims = MAPS[self.attention]
        ours, theirs = maps or (attention_maps(x, dims, self.absolute) for x in (student, teacher))
        adapters = self.spatial_adapter, self.channel_adapter
        distances = _distances(dims, ours, theirs, *adapters, self.normalize)
        return _sum_reduced(distances, self.reduction)
