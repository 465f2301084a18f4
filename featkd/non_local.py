"""The non-local block as a module, and the loss between a student's relation and a teacher's."""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from ._checks import require_choice, require_count, require_flag, require_same_device
from ._precision import savable
from ._reduction import Reduction, norm_per_image, reduce_distances, relative_to, require_reduction
from .adapters import (
    BatchNorm2d,
    Conv2d,
    prepare_pair,
    require_channel_counts,
    require_channels,
    require_resize,
)
from .relation import (
    concatenation_relation,
    dot_product_relation,
    embedded_gaussian_relation,
    non_local_loss,
)

Kind = Literal["gaussian", "embedded_gaussian", "dot_product", "concatenation"]
TeacherRelation = Literal["fixed", "trained"]


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
            code), so that the block starts as the identity; needs `residual`. While it trains, the
            images of a batch share its statistics.

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
        require_choice("kind", kind, get_args(Kind))
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
        if self.kind == "dot_product":
            relation = dot_product_relation(theta, phi, g)
        elif self.kind == "concatenation":
            relation = concatenation_relation(theta, phi, g)
        else:
            relation = embedded_gaussian_relation(theta, phi, g)
        if self.conv_out is None:
            return relation
        update = self.conv_out(relation)
        result: Tensor = features + (update if self.norm_out is None else self.norm_out(update))
        return result

    def _pool(self, x: Tensor) -> Tensor:
        if self.subsample == 1:
            return x
        return F.max_pool2d(x, [min(self.subsample, size) for size in x.shape[2:]])


def require_block(
    residual: object, batch_norm: object, teacher_relation: TeacherRelation = "trained"
) -> None:
    require_flag("residual", residual)
    require_flag("batch_norm", batch_norm)
    if batch_norm and not residual:
        raise ValueError("`batch_norm` must be False without `residual`, got True.")
    if batch_norm and teacher_relation == "fixed":
        raise ValueError(
            "`batch_norm` must be False with `teacher_relation` 'fixed', as that block would stay "
            "the identity it starts as, got True."
        )


def _embedding(in_channels: int, out_channels: int) -> Conv2d:
    """A 1x1 convolution from a random start: an adapter's identity would tie theta, phi and g."""
    layer = Conv2d(in_channels, out_channels, 1)
    layer.reset_parameters()
    return layer


class NonLocalLoss(nn.Module):
    """See :func:`featkd.functional.non_local_loss`; a relation a side and an adapter are its own.

    The paper does not say how the teacher's theta, phi and g come about. By default they stay as
    drawn: random projections keep the distances of what they project, and a fixed target cannot
    collapse. `teacher_relation="trained"` (the released code) trains them too; without `residual`
    both relations can then shrink to zero. Teacher features are constants.

    Args:
        student_channels: C_S.
        teacher_channels: C_T. Where it equals C_S the student's relation starts as a copy of the
            teacher's and the adapter as the identity, so that equal features start at loss 0.
        kind, inter_channels, subsample, residual, batch_norm: as in :class:`NonLocalRelation`, for
            both sides.
        teacher_relation: `"fixed"` or `"trained"`, which `batch_norm` needs.
        reduction: as in the function.
        resize: `None`: different H x W is an error; `"nearest"`, `"area"`, `"bilinear"` or
            `"bicubic"`: the student's features are resized to the teacher's H x W.
        normalize: divide by the norm of the teacher's relation, the loss of an all-zero student's,
            image by image (beyond the paper).

    Shape: student `(B, C_S, H, W)`, teacher `(B, C_T, H, W)`; result by `reduction`.

    Example:
        >>> import torch
        >>> loss = NonLocalLoss(16, 32, kind="concatenation")
        >>> loss(torch.randn(2, 16, 8, 12), torch.randn(2, 32, 8, 12)).shape
        torch.Size([])
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        kind: Kind,
        inter_channels: int | None = None,
        subsample: int = 1,
        residual: bool = False,
        batch_norm: bool = False,
        teacher_relation: TeacherRelation = "fixed",
        reduction: Reduction = "mean",
        resize: str | None = None,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        require_channel_counts(student_channels, teacher_channels)
        require_choice("teacher_relation", teacher_relation, get_args(TeacherRelation))
        require_block(residual, batch_norm, teacher_relation)
        require_reduction(reduction)
        require_resize(resize)
        require_flag("normalize", normalize)
        self.student_channels = student_channels
        self.teacher_channels = teacher_channels
        self.trained = teacher_relation == "trained"
        self.reduction: Reduction = reduction
        self.resize = resize
        self.normalize = normalize

        def relation(channels: int) -> NonLocalRelation:
            return NonLocalRelation(
                channels,
                kind=kind,
                inter_channels=inter_channels,
                subsample=subsample,
                residual=residual,
                batch_norm=batch_norm,
            )

        self.student_relation = relation(student_channels)
        self.teacher_relation = relation(teacher_channels)
        if student_channels == teacher_channels:
            self.student_relation.load_state_dict(self.teacher_relation.state_dict())
        self.teacher_relation.requires_grad_(self.trained)
        self.adapter = Conv2d(
            self.student_relation.out_channels, self.teacher_relation.out_channels, 1
        )

    def extra_repr(self) -> str:
        return (
            f"{self.student_channels}, {self.teacher_channels}, "
            f"teacher_relation={'trained' if self.trained else 'fixed'!r}, "
            f"reduction={self.reduction!r}, resize={self.resize!r}, normalize={self.normalize}"
        )

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        channels = self.student_channels, self.teacher_channels
        student, teacher = prepare_pair(student, teacher, channels, self.resize)
        ours = self.adapter(self.student_relation(student))
        theirs = self.teacher_relation(teacher)
        if not self.trained:  # even where its parameters are unfrozen from outside
            theirs = theirs.detach()
        if not self.normalize:
            return non_local_loss(ours, theirs, reduction=self.reduction)
        distances = non_local_loss(ours, theirs, reduction="none")
        return reduce_distances(relative_to(distances, norm_per_image(theirs)), self.reduction)
