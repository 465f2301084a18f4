"""The non-local distillation loss, L_NLD: the distance of a student's and a teacher's relation."""

from __future__ import annotations

from torch import Tensor

from .._checks import require_choice, require_same_device
from ._adapters import Conv2d
from ._level import LevelLoss
from ._numerics import norm_per_image, reduced, relative_to, savable
from ._options import (
    TEACHER_RELATIONS,
    Kind,
    Reduction,
    TeacherRelation,
    require_block,
    require_form,
)
from .attention import Maps
from .masked import masked_distance
from .non_local_block import NonLocalRelation
from .relation import require_positions
from .standardize import standardize, standardized_distance


def non_local_loss(
    student_relation: Tensor,
    teacher_relation: Tensor,
    *,
    reduction: Reduction = "mean",
    standardize: bool = False,
) -> Tensor:
    r"""Non-local distillation loss: the L2 distance of the relations.

    .. math:: L_{NLD} = \lVert r^S - r^T \rVert_2

    Args:
        student_relation: `(B, D, *positions)`.
        teacher_relation: the same shape.
        reduction: `"none"`, `"mean"` or `"sum"` over the images; `"norm"`, the L2 norm over the
            batch as well (the released code); `"mean_square"`, the mean of the images' squares
            (beyond the paper). Of no images each is 0.
        standardize: compare the standardised relations (beyond the paper). Per image the result is
            half the mean squared difference, 1 - correlation, from 0 to 2.

    Returns:
        `(B,)` for `"none"`, else a scalar; float32 or wider. At least 0, in the unit of the
        relations. 0 with gradient 0 where they are equal.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: the shapes or devices differ, or `reduction` is unknown, or a norm or square
            with `standardize`.

    Reference: Zhang & Ma (ICLR 2021), section 3.2.

    Example:
        >>> import torch
        >>> non_local_loss(torch.zeros(1, 2, 2, 2), torch.full((1, 2, 2, 2), 0.5))
        tensor(1.4142)
    """
    require_form(reduction, False, standardize)
    require_positions("student_relation", student_relation)
    require_positions("teacher_relation", teacher_relation)
    if student_relation.shape != teacher_relation.shape:
        raise ValueError(
            f"`student_relation` must have the shape of `teacher_relation` "
            f"{tuple(teacher_relation.shape)}, got {tuple(student_relation.shape)}: "
            "`featkd.NonLocalLoss` has an adapter, and `resize`."
        )
    require_same_device("student_relation", student_relation, "teacher_relation", teacher_relation)
    relations = savable(student_relation), savable(teacher_relation)
    return reduced(_distance(*relations, standardize), reduction)


def _distance(ours: Tensor, theirs: Tensor, standardize: bool) -> Tensor:
    """Of two relations for each image, `(B,)`."""
    distance = standardized_distance if standardize else masked_distance
    return distance(ours.flatten(2)[..., None], theirs.flatten(2)[..., None])


class NonLocalLoss(LevelLoss):
    """See :func:`featkd.functional.non_local_loss`; a relation a side and an adapter are its own.

    The paper does not say how the teacher's theta, phi and g come about. By default they stay as
    drawn: random projections keep the distances of what they project, and a fixed target cannot
    collapse. `teacher_relation="trained"` (the released code) trains them too; without `residual`
    both relations can then shrink to zero. Teacher features are constants.

    Args:
        student_channels: C_S.
        teacher_channels: C_T. Where it equals C_S, equal features start at loss 0. The student's
            relation is then a copy of the teacher's and the adapter the identity.
        kind, inter_channels, subsample, residual, batch_norm: as in :class:`NonLocalRelation`, for
            both sides.
        teacher_relation: `"fixed"` or `"trained"`, which `batch_norm` needs.
        reduction: as in the function.
        resize: `None`: different H x W is an error; `"nearest"`, `"area"`, `"bilinear"` or
            `"bicubic"`: the student's features are resized to the teacher's H x W.
        normalize: divide by the norm of the teacher's relation, the loss of an all-zero student's,
            image by image (beyond the paper).
        standardize: compare the standardised relations of standardised features (beyond the paper).

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
        standardize: bool = False,
    ) -> None:
        super().__init__(
            student_channels, teacher_channels, reduction, resize, normalize, standardize
        )
        require_choice("teacher_relation", teacher_relation, TEACHER_RELATIONS)
        require_block(residual, batch_norm, teacher_relation)
        self.trained = teacher_relation == "trained"

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
        teacher_relation = "trained" if self.trained else "fixed"
        channels = f"{self.student_channels}, {self.teacher_channels}"
        rest = super().extra_repr().removeprefix(channels)
        return f"{channels}, teacher_relation={teacher_relation!r}{rest}"

    def _distances(
        self, student: Tensor, teacher: Tensor, maps: tuple[Maps, Maps] | None
    ) -> list[Tensor]:
        if self.standardize:  # in front of the biases of theta, phi and g, which have a scale
            student, teacher = standardize(student), standardize(teacher)
        ours = self.adapter(self.student_relation(student))
        theirs = self.teacher_relation(teacher)
        if not self.trained:  # even where its parameters are unfrozen from outside
            theirs = theirs.detach()
        distance = _distance(ours, theirs, self.standardize)
        if self.normalize:
            distance = relative_to(distance, norm_per_image(theirs))
        return [distance]
