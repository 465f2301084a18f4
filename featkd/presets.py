"""Weights and settings of the overall loss, and the paper's and the released code's values."""

from __future__ import annotations

from dataclasses import dataclass

from ._checks import require_choice, require_flag, require_number
from .losses._options import (
    ATTENTIONS,
    FUSIONS,
    KINDS,
    TEACHER_RELATIONS,
    Attention,
    Fusion,
    Kind,
    Reduction,
    TeacherRelation,
    require_block,
    require_form,
    require_temperature,
)


@dataclass(frozen=True)
class Hyperparameters:
    """Weights and settings of the overall loss; the defaults of the settings are the paper's.

    Args:
        alpha: weight of L_AT, at least 0; 0 leaves the term out.
        beta: weight of L_AM, likewise.
        gamma: weight of L_NLD, likewise.
        temperature: T of the attention masks, above 0; `None` takes no masks.
        fusion: see :func:`featkd.functional.attention_mask`.
        absolute: attention of the absolute features in L_AT (the masks' always is).
        reduction: see :func:`featkd.functional.attention_masked_loss`.
        transfer_attention: the attention maps in L_AT: `"both"`, `"spatial"` or `"channel"`.
        masked_attention: the attention masks in L_AM, likewise.
        kind: of the relation in L_NLD. The formula of section 3.2 has the factor 1/N that the dot
            product and the concatenation carry; the released code takes the dot product.
        residual, batch_norm, teacher_relation: see :class:`featkd.NonLocalLoss`.
        normalize: see :class:`featkd.FeatureDistillationLoss`.
        standardize: every term compares standardised quantities and is 1 - correlation (beyond the
            paper). A weight then means the same for every model, level and resolution. The
            temperature is in units of the attention maps' standard deviation.

    Raises:
        TypeError, ValueError: a field is not of its kind or not in its range.

    Reference: Zhang & Ma (ICLR 2021), sections 3.3 and 4.1.

    Example:
        >>> Hyperparameters(alpha=0, beta=1, gamma=0, temperature=0.5, normalize=True).beta
        1
    """

    alpha: float
    beta: float
    gamma: float
    temperature: float | None
    fusion: Fusion = "logits"
    absolute: bool = True
    reduction: Reduction = "mean"
    transfer_attention: Attention = "both"
    masked_attention: Attention = "both"
    kind: Kind = "dot_product"
    residual: bool = False
    batch_norm: bool = False
    teacher_relation: TeacherRelation = "fixed"
    normalize: bool = False
    standardize: bool = False

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "gamma"):
            require_number(name, getattr(self, name), least=0)
        require_temperature(self.temperature)
        require_choice("fusion", self.fusion, FUSIONS)
        require_flag("absolute", self.absolute)
        require_choice("transfer_attention", self.transfer_attention, ATTENTIONS)
        require_choice("masked_attention", self.masked_attention, ATTENTIONS)
        require_choice("kind", self.kind, KINDS)
        require_choice("teacher_relation", self.teacher_relation, TEACHER_RELATIONS)
        require_block(self.residual, self.batch_norm, self.teacher_relation)
        require_form(self.reduction, self.normalize, self.standardize)


TWO_STAGE = Hyperparameters(alpha=7e-5, beta=4e-3, gamma=7e-5, temperature=0.1)
"""As printed in section 4.1 for two-stage detectors."""

ONE_STAGE = Hyperparameters(alpha=4e-4, beta=2e-2, gamma=4e-4, temperature=0.5)
"""As printed in section 4.1 for one-stage detectors."""

STANDARDIZED = Hyperparameters(alpha=0.0, beta=4.0, gamma=0.0, temperature=None, standardize=True)
"""L_AM alone, of standardised features and without masks; beyond the paper. The default."""

FPN_OUTPUTS = Hyperparameters(alpha=4e-4, beta=2e-2, gamma=4e-4, temperature=4.0)
"""The weights of :data:`ONE_STAGE` at T = 4, for taps at an FPN's outputs; beyond the paper.

T = 4 suits features whose root mean square is 1 to 5; the smaller they are, the more even the
masks. Chosen by `benchmarks/study` (table taps, Faster R-CNN, RetinaNet and FCOS, 2 seeds each)
on scenes that no other table uses.
"""

RELEASED_TWO_STAGE = Hyperparameters(
    alpha=4e-3,
    beta=7e-5,
    gamma=7e-5,
    temperature=0.5,
    fusion="probabilities",
    absolute=False,
    reduction="norm",
    masked_attention="spatial",
    residual=True,
    batch_norm=True,
    teacher_relation="trained",
)
"""As the authors' code runs two-stage detectors (5 FPN levels, subsample 8, 4, 2, 2, 2)."""

RELEASED_ONE_STAGE = Hyperparameters(
    alpha=2.4e-2,
    beta=4.2e-4,
    gamma=4.2e-4,
    temperature=0.1,
    fusion="probabilities",
    absolute=False,
    reduction="norm",
    residual=True,
    batch_norm=True,
    teacher_relation="trained",
)
"""As the authors' code runs one-stage detectors (5 FPN levels, subsample 8, 4, 2, 2, 2)."""
