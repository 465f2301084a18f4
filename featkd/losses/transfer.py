"""Attention transfer, L_AT (eq. 1): the student mimics the teacher's attention maps."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .._checks import (
    require_callable,
    require_choice,
    require_feature_pair,
    require_flag,
    require_same_device,
    require_shape,
    require_tensor,
)
from ._adapters import Conv2d, Linear
from ._blocks import takes_closed_form
from ._closed_forms import OVER_CHANNELS, OVER_POSITIONS, row_norms
from ._level import LevelLoss
from ._numerics import full_precision, norm_per_image, reduced, relative_to
from ._options import ATTENTIONS, Attention, Reduction, require_form
from .attention import MAPS, Maps, maps_over
from .standardize import standardized, standardized_distance

Adapter = Callable[[Tensor], Tensor]


def attention_transfer_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    spatial_adapter: Adapter | None = None,
    channel_adapter: Adapter | None = None,
    absolute: bool = True,
    reduction: Reduction = "mean",
    standardize: bool = False,
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
        reduction: `"none"`, `"mean"` or `"sum"` over the images; `"norm"`, the L2 norm over the
            batch as well (the released code); `"mean_square"`, the mean of the images' squares
            (beyond the paper). Of no images each is 0.
        standardize: compare the standardised maps (beyond the paper). Per image the result is the
            sum of two halves of a mean squared difference, each 1 - correlation, from 0 to 2.

    Returns:
        `(B,)` for `"none"`, else a scalar; float32 or wider. At least 0, in the unit of the
        features. 0 with gradient 0 where the maps are equal.

    Raises:
        TypeError: features are no floating-point tensors, or an adapter is not callable.
        ValueError: the shapes or devices do not fit, or `reduction` is unknown, or a norm or square
            with `standardize`.

    Reference: Zhang & Ma (ICLR 2021), section 3.1, eq. (1); adapters: appendix B.

    Example:
        >>> import torch
        >>> student, teacher = torch.zeros(1, 2, 2, 2), torch.ones(1, 2, 2, 2)
        >>> attention_transfer_loss(student, teacher)  # sqrt(4) + sqrt(2)
        tensor(3.4142)
    """
    require_form(reduction, False, standardize)
    require_flag("absolute", absolute)
    require_callable("spatial_adapter", spatial_adapter)
    require_callable("channel_adapter", channel_adapter)
    same_channels, module = channel_adapter is None, "AttentionTransferLoss"
    require_feature_pair(student, teacher, same_channels=same_channels, module=module)
    ours, theirs = (maps_over(x, MAPS["both"], absolute) for x in (student, teacher))
    targets = theirs[OVER_CHANNELS][:, None], theirs[OVER_POSITIONS]
    spatial = _adapted("spatial_adapter", spatial_adapter, ours[OVER_CHANNELS][:, None], targets[0])
    channel = _adapted("channel_adapter", channel_adapter, ours[OVER_POSITIONS], targets[1])
    return reduced(_distance(spatial, targets[0], standardize), reduction) + reduced(
        _distance(channel, targets[1], standardize), reduction
    )


def _distance(ours: Tensor, theirs: Tensor, standardize: bool) -> Tensor:
    """Of spatial maps `(B, 1, H, W)` or channel maps `(B, C)`, over all that an image has."""
    if standardize:
        ours, theirs = (x.flatten(1).unsqueeze(1).unsqueeze(3) for x in (ours, theirs))
        return standardized_distance(ours, theirs)
    return _norm(ours - theirs)


def _norm(x: Tensor) -> Tensor:
    return row_norms(x.flatten(1)) if takes_closed_form() else norm_per_image(x)


def _adapted(name: str, adapter: Adapter | None, ours: Tensor, theirs: Tensor) -> Tensor:
    """The student's map through the caller's adapter, whose result is checked."""
    if adapter is None:
        return ours
    with full_precision(ours):
        adapted = adapter(ours)
    require_tensor(name, adapted, verb="return")
    require_shape(name, adapted, tuple(theirs.shape), "a result of the shape")
    require_same_device(name, adapted, "teacher", theirs)
    return adapted


class AttentionTransferLoss(LevelLoss):
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
        standardize: as in the function; the adapters too get standardised maps.

    Shape: student `(B, C_S, H, W)`, teacher `(B, C_T, H, W)`; result by `reduction`.

    Example:
        >>> import torch
        >>> loss = AttentionTransferLoss(16, 32)
        >>> loss(torch.randn(2, 16, 8, 12), torch.randn(2, 32, 8, 12)).shape
        torch.Size([])
    """

    _shown = ("attention", "absolute")

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
        standardize: bool = False,
    ) -> None:
        super().__init__(
            student_channels, teacher_channels, reduction, resize, normalize, standardize
        )
        require_choice("attention", attention, ATTENTIONS)
        require_flag("absolute", absolute)
        self.attention: Attention = attention
        self.absolute = absolute
        self.spatial_adapter = Conv2d(1, 1, 3) if attention != "channel" else None
        self.channel_adapter = (
            Linear(student_channels, teacher_channels) if attention != "spatial" else None
        )

    def _distances(
        self, student: Tensor, teacher: Tensor, maps: tuple[Maps, Maps] | None
    ) -> list[Tensor]:
        dims = MAPS[self.attention]
        ours, theirs = maps or (maps_over(x, dims, self.absolute) for x in (student, teacher))
        if self.standardize:  # in front of the adapters' biases, which have a scale
            ours = {over: standardized(x, tuple(range(1, x.dim()))) for over, x in ours.items()}
        pairs = []
        if self.spatial_adapter is not None:
            spatial = self.spatial_adapter(ours[OVER_CHANNELS].unsqueeze(1))
            pairs.append((spatial, theirs[OVER_CHANNELS][:, None]))
        if self.channel_adapter is not None:
            pairs.append((self.channel_adapter(ours[OVER_POSITIONS]), theirs[OVER_POSITIONS]))
        distances = [_distance(*pair, self.standardize) for pair in pairs]
        if not self.normalize:
            return distances
        norms = [_norm(target) for _, target in pairs]
        total = norms[0] if len(norms) == 1 else norms[0] + norms[1]
        return [relative_to(distance, total) for distance in distances]
