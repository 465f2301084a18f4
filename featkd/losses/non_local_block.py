"""The non-local block: a relation of a map's positions with its theta, phi and g."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import require_channels, require_choice, require_count, require_same_device
from ._adapters import BatchNorm2d, Conv2d
from ._numerics import savable
from ._options import KINDS, Kind, require_block
from .relation import concatenation, dot_product, embedded_gaussian

_OF_EMBEDDINGS = {
    "gaussian": embedded_gaussian,
    "embedded_gaussian": embedded_gaussian,
    "dot_product": dot_product,
    "concatenation": concatenation,
}


class NonLocalRelation(nn.Module):
    r"""Non-local block: a relation of a map's positions, with theta, phi, g by 1x1 convolutions.

    Args:
        in_channels: C.
        kind: `"gaussian"`, `"embedded_gaussian"`, `"dot_product"` or `"concatenation"`: see
            :func:`featkd.functional.gaussian_relation` and its three neighbours. The last folds
            :math:`w \cdot [\theta(x_i), \phi(x_j)]` into one output channel each for theta and phi.
        inter_channels: D, the width of theta, phi and g; default C // 2, at least 1.
        subsample: keys and values are max-pooled by this factor (a smaller map, to one key).
        residual: return W(r) + x with a 1x1 convolution W (the released code) in place of r alone.
        batch_norm: W ends with a batch normalisation whose weight and bias start at 0 (the released
            code). So the block, which needs `residual`, starts as the identity. While it trains,
            the images of a batch share its statistics.

    Shape: `(B, C, H, W) -> (B, D, H, W)`, with `residual` `-> (B, C, H, W)`; float32 or wider.

    Reference: Zhang & Ma (ICLR 2021), section 3.2 and figure 2c; Wang et al. (CVPR 2018).

    Example:
        >>> import torch
        >>> NonLocalRelation(16, kind="dot_product")(torch.randn(2, 16, 8, 12)).shape
        torch.Size([2, 8, 8, 12])
    """

    def __init__(
        self,
        in_channels: int,
        *,
        kind: Kind,
        inter_channels: int | None = None,
        subsample: int = 1,
        residual: bool = False,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        require_count("in_channels", in_channels)
        require_choice("kind", kind, KINDS)
        if inter_channels is not None:
            require_count("inter_channels", inter_channels)
        require_count("subsample", subsample)
        require_block(residual, batch_norm)
        self.in_channels = in_channels
        self.kind: Kind = kind
        self.inter_channels = inter_channels or max(in_channels // 2, 1)
        self.subsample = subsample
        self.residual = residual
        self.batch_norm = batch_norm
        width = 1 if kind == "concatenation" else self.inter_channels
        self.theta = _embedding(in_channels, width) if kind != "gaussian" else None
        self.phi = _embedding(in_channels, width) if kind != "gaussian" else None
        self.g = _embedding(in_channels, self.inter_channels)
        self.conv_out = _embedding(self.inter_channels, in_channels) if residual else None
        self.norm_out = BatchNorm2d(in_channels) if batch_norm else None

    @property
    def out_channels(self) -> int:
        return self.in_channels if self.residual else self.inter_channels

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, kind={self.kind!r}, inter_channels={self.inter_channels}, "
            f"subsample={self.subsample}, residual={self.residual}, batch_norm={self.batch_norm}"
        )

    def forward(self, features: Tensor) -> Tensor:
        require_channels("features", features, self.in_channels)
        require_same_device("features", features, "NonLocalRelation", self.g.weight)
        features = savable(features)
        theta = features if self.theta is None else self.theta(features)
        phi = self._pool(features if self.phi is None else self.phi(features))
        g = self._pool(self.g(features))
        relation = _OF_EMBEDDINGS[self.kind](theta, phi, g)
        if self.conv_out is None:
            return relation
        out: Tensor = self.conv_out(relation)
        return (out if self.norm_out is None else self.norm_out(out)) + features

    def _pool(self, x: Tensor) -> Tensor:
        if self.subsample == 1:
            return x
        return F.max_pool2d(x, [min(self.subsample, size) for size in x.shape[2:]])


def _embedding(in_channels: int, out_channels: int) -> Conv2d:
    """A 1x1 convolution from a random start: an adapter's identity would tie theta, phi and g."""
    layer = Conv2d(in_channels, out_channels, 1)
    layer.reset_parameters()
    return layer
