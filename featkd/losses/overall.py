"""The overall loss, alpha L_AT + beta L_AM + gamma L_NLD, over the levels of a backbone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .._checks import require_count, require_tensor
from ..presets import STANDARDIZED, Hyperparameters
from ._level import admit
from ._levels import SINGLE_LEVEL, level_names, module_name, per_level, require_levels
from ._numerics import compute_dtype
from ._options import require_form, require_resize
from .attention import MAPS, Maps, maps_over
from .masked import AttentionMaskedLoss
from .non_local import NonLocalLoss
from .transfer import AttentionTransferLoss

Features = Tensor | Mapping[str, Tensor]


def _require_hyperparameters(value: object) -> None:
    if not isinstance(value, Hyperparameters):
        found = type(value).__name__
        raise TypeError(
            "`hyperparameters` must be a Hyperparameters, such as `featkd.STANDARDIZED`, "
            f"got {found}."
        )


class FeatureDistillationLoss(nn.Module):
    r"""The overall distillation loss, summed over the levels.

    .. math:: L = \alpha \, L_{AT} + \beta \, L_{AM} + \gamma \, L_{NLD}

    A weight of 0 skips that term's work and builds no parameters for it.

    Args:
        student_channels: C_S for one level, or a mapping from level name to C_S.
        teacher_channels: C_T likewise, with the same levels.
        hyperparameters: a preset (:data:`.STANDARDIZED`, :data:`.ONE_STAGE`, ...) or one's own
            :class:`Hyperparameters`.
        inter_channels, subsample: of the relations, see :class:`featkd.NonLocalRelation`; one value
            or a mapping from level name to value.
        resize: `None`: different H x W is an error; `"nearest"`, `"area"`, `"bilinear"` or
            `"bicubic"`: the student's features are resized to the teacher's H x W.
        normalize: divide each term, per image and level, by its value for an all-zero student
            (beyond the paper). That is the teacher's own norm under the same masks. `None` takes
            the hyperparameters' field.

    Shape: tensors, student `(B, C_S, H, W)` and teacher `(B, C_T, H, W)`, or mappings from level
    names to such tensors.

    Returns:
        `"loss_attention_transfer"`, `"loss_attention_masked"` and `"loss_non_local"`, each weighted
        and summed over the levels. The training loss is then
        `sum((detector_losses | distillation_losses).values())`.

    Raises:
        TypeError: a mapping stands where a tensor belongs or the other way round, or a tensor is
            not floating-point.
        ValueError: levels, channels or shapes do not fit, or `normalize` stands beside
            hyperparameters that standardise.

    Reference: Zhang & Ma (ICLR 2021), section 3.3.

    Example:
        >>> import torch
        >>> from featkd import ONE_STAGE
        >>> channels = {"c3": 16, "c4": 32}
        >>> loss = FeatureDistillationLoss(channels, channels, hyperparameters=ONE_STAGE)
        >>> maps = {"c3": torch.randn(2, 16, 8, 12), "c4": torch.randn(2, 32, 4, 6)}
        >>> sorted(loss(maps, maps))
        ['loss_attention_masked', 'loss_attention_transfer', 'loss_non_local']
    """

    def __init__(
        self,
        student_channels: int | Mapping[str, int],
        teacher_channels: int | Mapping[str, int],
        hyperparameters: Hyperparameters = STANDARDIZED,
        *,
        inter_channels: int | Mapping[str, int | None] | None = None,
        subsample: int | Mapping[str, int] = 1,
        resize: str | None = None,
        normalize: bool | None = None,
    ) -> None:
        super().__init__()
        _require_hyperparameters(hyperparameters)
        require_resize(resize)
        if normalize is None:
            normalize = hyperparameters.normalize
        require_form(hyperparameters.reduction, normalize, hyperparameters.standardize)
        self._hyperparameters = hyperparameters
        self.resize = resize
        self.normalize = normalize
        self.single = not isinstance(student_channels, Mapping)
        self.levels = level_names(student_channels)
        if isinstance(teacher_channels, Mapping) == self.single:
            rule = "an integer" if self.single else "a mapping"
            found = type(teacher_channels).__name__
            raise TypeError(
                f"`teacher_channels` must be {rule}, as `student_channels` is, got {found}."
            )
        ours = per_level("student_channels", student_channels, self.levels)
        theirs = per_level("teacher_channels", teacher_channels, self.levels)
        self.channels = {level: (ours[level], theirs[level]) for level in self.levels}
        widths = per_level("inter_channels", inter_channels, self.levels)
        factors = per_level("subsample", subsample, self.levels)
        # Here for all terms: one without weight builds nothing that would check them.
        for level in self.levels:
            at_level = "" if self.single else f"[{level!r}]"
            require_count(f"student_channels{at_level}", ours[level])
            require_count(f"teacher_channels{at_level}", theirs[level])
            if widths[level] is not None:
                require_count(f"inter_channels{at_level}", widths[level])
            require_count(f"subsample{at_level}", factors[level])

        self.attention_transfer = nn.ModuleDict()
        self.attention_masked = nn.ModuleDict()
        self.non_local = nn.ModuleDict()
        settings = hyperparameters
        for level, channels in self.channels.items():
            if settings.alpha:
                self.attention_transfer[module_name(level)] = AttentionTransferLoss(
                    *channels,
                    attention=settings.transfer_attention,
                    absolute=settings.absolute,
                    reduction=settings.reduction,
                    normalize=normalize,
                    standardize=settings.standardize,
                )
            if settings.beta:
                self.attention_masked[module_name(level)] = AttentionMaskedLoss(
                    *channels,
                    temperature=settings.temperature,
                    fusion=settings.fusion,
                    attention=settings.masked_attention,
                    reduction=settings.reduction,
                    normalize=normalize,
                    standardize=settings.standardize,
                )
            if settings.gamma:
                self.non_local[module_name(level)] = NonLocalLoss(
                    *channels,
                    kind=settings.kind,
                    inter_channels=widths[level],
                    subsample=factors[level],
                    residual=settings.residual,
                    batch_norm=settings.batch_norm,
                    teacher_relation=settings.teacher_relation,
                    reduction=settings.reduction,
                    normalize=normalize,
                    standardize=settings.standardize,
                )

    @property
    def hyperparameters(self) -> Hyperparameters:
        """As given. One with other weights may take its place, in the middle of a training too.

        All else, and which weights are 0, says what the loss is built of, and stays.
        """
        return self._hyperparameters

    @hyperparameters.setter
    def hyperparameters(self, hyperparameters: Hyperparameters) -> None:
        _require_hyperparameters(hyperparameters)
        for name, built in vars(self._hyperparameters).items():
            found = getattr(hyperparameters, name)
            both_weights = name in ("alpha", "beta", "gamma") and built and found
            if found != built and not both_weights:
                raise ValueError(
                    "`hyperparameters` must differ from those that the loss was built with in "
                    f"weights above 0 alone, got {name}={found!r} in place of {built!r}: build "
                    "another loss, and a distiller and an optimizer with its adapters."
                )
        self._hyperparameters = hyperparameters

    def extra_repr(self) -> str:
        return f"{self.hyperparameters}, resize={self.resize!r}, normalize={self.normalize}"

    def forward(self, student_features: Features, teacher_features: Features) -> dict[str, Tensor]:
        ours = self._levels_of("student_features", student_features)
        theirs = self._levels_of("teacher_features", teacher_features)
        pairs = {}
        for level, channels in self.channels.items():
            at_level = "" if self.single else f"[{level!r}]"
            pairs[level] = admit(
                ours[level],
                theirs[level],
                channels,
                self.resize,
                self,
                (f"student_features{at_level}", f"teacher_features{at_level}"),
            )
        settings = self.hyperparameters
        maps: dict[str, tuple[Maps, Maps]] = {}
        masked = self.attention_masked and settings.temperature is not None
        if masked and self.attention_transfer and settings.absolute:
            # One reading of the features serves the attention transfer and the masks.
            for level, (student, teacher) in pairs.items():
                dims = MAPS["both"]
                maps[level] = maps_over(student, dims), maps_over(teacher, dims)
        return {
            "loss_attention_transfer": self._term(
                settings.alpha, self.attention_transfer, pairs, maps
            ),
            "loss_attention_masked": self._term(settings.beta, self.attention_masked, pairs, maps),
            "loss_non_local": self._term(settings.gamma, self.non_local, pairs, maps),
        }

    def _term(
        self,
        weight: float,
        losses: nn.ModuleDict,
        pairs: dict[str, tuple[Tensor, Tensor]],
        maps: dict[str, tuple[Maps, Maps]],
    ) -> Tensor:
        if not losses:
            student, _ = pairs[self.levels[0]]
            return torch.zeros((), dtype=compute_dtype(student), device=student.device)
        values = [
            losses[module_name(level)]._of_pair(*pair, maps.get(level))  # type: ignore[operator]
            for level, pair in pairs.items()
        ]
        total = torch.stack(values).sum(0) if len(values) > 1 else values[0]
        return float(weight) * total

    def _levels_of(self, name: str, features: Features) -> Mapping[str, Tensor]:
        if self.single:
            require_tensor(name, features)
            return {SINGLE_LEVEL: features}  # type: ignore[dict-item]
        if not isinstance(features, Mapping):
            found = type(features).__name__
            raise TypeError(f"`{name}` must be a mapping from level to tensor, got {found}.")
        return require_levels(name, features, self.levels)
