"""Standardised features, and the distance of two maps in that form: 1 - correlation."""

from __future__ import annotations

from torch import Tensor

from .._checks import require_choice, require_feature_map
from ._blocks import takes_closed_form
from ._closed_forms import OVER_POSITIONS, Dims
from ._correlation import centred, correlation_distance
from ._numerics import cast, compute_dtype
from ._options import OVER, Over

DIMS: dict[Over, Dims] = {"image": OVER_POSITIONS, "batch": (0, *OVER_POSITIONS)}


def standardize(features: Tensor, *, over: Over = "image") -> Tensor:
    r"""Each channel less its mean, over its standard deviation.

    .. math:: \hat A_{k,i,j} = \frac{A_{k,i,j} - \mu_k}{\sigma_k}, \qquad
              \sigma_k^2 = \operatorname{mean}_{i,j} (A_{k,i,j} - \mu_k)^2

    So scale and offset of a channel are gone: :math:`\widehat{c A + d} = \hat A` for c > 0. A
    channel whose deviation is but rounding counts as constant: it gives 0, with gradient 0.

    Args:
        features: feature maps, `(B, C, H, W)`, any floating dtype, of magnitude 1e-15 to 1e15.
        over: mean and deviation over the positions of each `"image"`, or of the whole `"batch"`.

    Returns:
        `(B, C, H, W)`, each channel of mean 0 and mean square 1, or 0; float32 or wider.

    Raises:
        TypeError: `features` is no floating-point tensor.
        ValueError: `features` is not of shape `(B, C, H, W)`, or `over` is unknown.

    Reference: beyond the paper; over the batch as in PKD (Cao et al., NeurIPS 2022), eq. (2).

    Example:
        >>> import torch
        >>> standardize(torch.tensor([[[[1.0, 3.0]], [[5.0, 5.0]]]]))
        tensor([[[[-1.,  1.]],
        <BLANKLINE>
                 [[ 0.,  0.]]]])
    """
    require_feature_map("features", features)
    require_choice("over", over, OVER)
    return standardized(cast(features, compute_dtype(features)), DIMS[over])


def standardized(x: Tensor, dims: Dims) -> Tensor:
    """`x` less its mean over `dims`, over its standard deviation; 0 where `x` is constant."""
    rest, (_, inverse) = centred(x, dims)
    return rest * inverse


def standardized_distance(
    student: Tensor,
    teacher: Tensor,
    spatial_mask: Tensor | None = None,
    channel_mask: Tensor | None = None,
) -> Tensor:
    """Half the mean of `M_s M_c (s - t)^2` per image, `(B,)`, with s and t standardised.

    Without masks that is 1 - correlation, the mean over the channels: from 0 to 2.
    """
    if takes_closed_form():
        return correlation_distance(student, teacher, spatial_mask, channel_mask)
    dtype = compute_dtype(student, teacher, spatial_mask, channel_mask)
    s, t = (standardized(cast(x, dtype), OVER_POSITIONS) for x in (student, teacher))
    square = (s - t).square()
    if spatial_mask is not None:
        square = square * spatial_mask[:, None]
    if channel_mask is not None:
        square = square * channel_mask[:, :, None, None]
    return square.mean((1, 2, 3)) / 2
