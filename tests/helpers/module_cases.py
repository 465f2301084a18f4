"""The table of cases of modules: each one, and the functions it must equal."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import featkd
from tests.helpers.cases import KINDS, REDUCTIONS
from tests.helpers.tensors import normal


@dataclass(frozen=True)
class ModuleCase:
    """A loss of a student with 4 channels and a teacher with `teacher_channels`."""

    name: str
    build: Callable[[], nn.Module]
    by_functions: Callable[[nn.Module, Tensor, Tensor], Tensor]
    teacher_channels: int = 4
    images_apart: bool = True  # else torch.func.vmap takes no module

    def __str__(self) -> str:
        return self.name

    def features(
        self,
        batch: int = 2,
        positions: tuple[int, int] = (4, 6),
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
    ) -> tuple[Tensor, Tensor]:
        student = normal(batch, 4, *positions, seed=seed, dtype=dtype)
        return student, normal(batch, self.teacher_channels, *positions, seed=seed + 1, dtype=dtype)

    def module(self, seed: int | None = 0) -> nn.Module:
        """The module in float64 with random weights, or as it starts where `seed` is None."""
        module = self.build().double()
        if seed is not None:
            randomize(module, seed)
        return module


def randomize(module: nn.Module, seed: int = 0) -> None:
    with torch.no_grad():
        for index, (name, value) in enumerate(module.state_dict().items()):
            number = normal(*value.shape, seed=1000 * seed + index)
            value.copy_(number.exp() if name.endswith("running_var") else number)


def l2(student: Tensor, teacher: Tensor) -> Tensor:
    return torch.stack([(s - t).square().sum().sqrt() for s, t in zip(student, teacher)])  # noqa: B905


def transfer_by_functions(**options: Any) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    def loss(module: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
        adapters = {
            "spatial_adapter": module.spatial_adapter,
            "channel_adapter": module.channel_adapter,
        }
        return featkd.attention_transfer_loss(student, teacher, **adapters, **options)

    return loss


def standardized_transfer_by_functions(
    module: nn.Module, student: Tensor, teacher: Tensor
) -> Tensor:
    def standardized(attention: Tensor) -> Tensor:
        return featkd.standardize(attention.flatten(1)[:, None, :, None]).reshape(attention.shape)

    return featkd.attention_transfer_loss(
        student,
        teacher,
        spatial_adapter=lambda a: module.spatial_adapter(standardized(a)),
        channel_adapter=lambda a: module.channel_adapter(standardized(a)),
        standardize=True,
    )


def spatial_transfer_by_functions(module: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
    ours = module.spatial_adapter(featkd.spatial_attention(student)[:, None])[:, 0]
    return l2(ours, featkd.spatial_attention(teacher)).mean()


def channel_transfer_by_functions(module: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
    ours = module.channel_adapter(featkd.channel_attention(student))
    return l2(ours, featkd.channel_attention(teacher)).mean()


def normalized_transfer_by_functions(module: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
    def loss(spatial: Callable, channel: Callable) -> Tensor:
        return featkd.attention_transfer_loss(
            student, teacher, spatial_adapter=spatial, channel_adapter=channel, reduction="none"
        )

    zeros = loss(torch.zeros_like, lambda a: a.new_zeros(len(a), teacher.shape[1]))
    return (loss(module.spatial_adapter, module.channel_adapter) / zeros).mean()


def masks_by_functions(
    student: Tensor, adapted: Tensor, teacher: Tensor, attention: str = "both", **options: Any
) -> dict[str, Tensor]:
    masks = {}
    if attention != "channel":
        maps = featkd.spatial_attention(student), featkd.spatial_attention(teacher)
        masks["spatial_mask"] = featkd.attention_mask(*maps, temperature=0.5, **options).detach()
    if attention != "spatial":
        ours = student if student.shape[1] == teacher.shape[1] else adapted
        maps = featkd.channel_attention(ours), featkd.channel_attention(teacher)
        masks["channel_mask"] = featkd.attention_mask(*maps, temperature=0.5, **options).detach()
    return masks


def masked_by_functions(
    reduction: str = "mean", **options: Any
) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    def loss(module: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
        adapted = module.adapter(student)
        masks = masks_by_functions(student, adapted, teacher, **options)
        return featkd.attention_masked_loss(adapted, teacher, **masks, reduction=reduction)

    return loss


def standardized_masked_by_functions(module: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
    adapted = module.adapter(student)
    masks = {}
    if module.temperature is not None:
        maps = [featkd.spatial_attention(x).detach()[:, None] for x in (student, teacher)]
        maps = [featkd.standardize(x)[:, 0] for x in maps]
        masks["spatial_mask"] = featkd.attention_mask(*maps, temperature=module.temperature)
        unbiased = adapted - module.adapter.bias[:, None, None]
        maps = [featkd.channel_attention(x).detach() for x in (unbiased, teacher)]
        maps = [featkd.standardize(x[:, None, :, None])[:, 0, :, 0] for x in maps]
        masks["channel_mask"] = featkd.attention_mask(*maps, temperature=module.temperature)
    return featkd.attention_masked_loss(adapted, teacher, **masks, standardize=True)


def standardized_non_local_by_functions(
    module: nn.Module, student: Tensor, teacher: Tensor
) -> Tensor:
    student, teacher = featkd.standardize(student), featkd.standardize(teacher)
    ours = module.adapter(relation_by_functions(module.student_relation, student))
    theirs = relation_by_functions(module.teacher_relation, teacher).detach()
    return featkd.non_local_loss(ours, theirs, standardize=True)


def normalized_masked_by_functions(module: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
    adapted = module.adapter(student)
    masks = masks_by_functions(student, adapted, teacher)
    ours, zeros = (
        featkd.attention_masked_loss(features, teacher, **masks, reduction="none")
        for features in (adapted, torch.zeros_like(teacher))
    )
    return (ours / zeros).mean()


def relation_by_functions(block: nn.Module, features: Tensor) -> Tensor:
    def keys(values: Tensor) -> Tensor:
        return F.max_pool2d(values, block.subsample) if block.subsample > 1 else values

    g = keys(block.g(features))
    if block.kind == "gaussian":
        relation = featkd.embedded_gaussian_relation(features, keys(features), g)
    else:
        function = getattr(featkd, f"{block.kind}_relation")
        relation = function(block.theta(features), keys(block.phi(features)), g)
    if not block.residual:
        return relation
    update = block.conv_out(relation)
    return features + (normalized(block.norm_out, update) if block.batch_norm else update)


def normalized(layer: nn.Module, features: Tensor) -> Tensor:
    """A batch normalisation word for word: by the batch's statistics in training, else the kept."""
    mean, variance = layer.running_mean, layer.running_var
    if layer.training:
        mean, variance = features.mean((0, 2, 3)), features.var((0, 2, 3), correction=0)
    scale = layer.weight / (variance + layer.eps).sqrt()
    return (features - mean[:, None, None]) * scale[:, None, None] + layer.bias[:, None, None]


def released_block(training: bool) -> nn.Module:
    options = {"kind": "dot_product", "residual": True, "batch_norm": True}
    return NON_LOCAL(4, 3, teacher_relation="trained", **options).train(training)


def non_local_by_functions(module: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
    ours = module.adapter(relation_by_functions(module.student_relation, student))
    theirs = relation_by_functions(module.teacher_relation, teacher)
    if not any(p.requires_grad for p in module.teacher_relation.parameters()):
        theirs = theirs.detach()
    return featkd.non_local_loss(ours, theirs)


def normalized_non_local_by_functions(
    module: nn.Module, student: Tensor, teacher: Tensor
) -> Tensor:
    ours = module.adapter(relation_by_functions(module.student_relation, student))
    theirs = relation_by_functions(module.teacher_relation, teacher).detach()
    return (l2(ours, theirs) / l2(torch.zeros_like(theirs), theirs)).mean()


def total_by_functions(module: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
    h = module.hyperparameters
    terms = [
        (h.alpha, module.attention_transfer, transfer_by_functions()),
        (h.beta, module.attention_masked, masked_by_functions()),
        (h.gamma, module.non_local, non_local_by_functions),
    ]
    return sum(w * loss(modules["features"], student, teacher) for w, modules, loss in terms)


class SumOfTerms(nn.Module):
    """A FeatureDistillationLoss as one number."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return sum(self.loss(student, teacher).values())


def _module_case(
    name: str, module: Callable, by_functions: Callable, channels: int = 4, **options: Any
) -> ModuleCase:
    return ModuleCase(name, lambda: module(4, channels, **options), by_functions, channels)


TRANSFER, MASKED = featkd.AttentionTransferLoss, featkd.AttentionMaskedLoss
NON_LOCAL = featkd.NonLocalLoss
ALL_TERMS = featkd.Hyperparameters(0.5, 2.0, 3.0, 0.5)
MODULE_CASES = [
    _module_case("transfer", TRANSFER, transfer_by_functions()),
    _module_case("transfer-channels", TRANSFER, transfer_by_functions(), 3),
    _module_case(
        "transfer-spatial", TRANSFER, spatial_transfer_by_functions, 3, attention="spatial"
    ),
    _module_case(
        "transfer-channel", TRANSFER, channel_transfer_by_functions, 3, attention="channel"
    ),
    _module_case(
        "transfer-signed", TRANSFER, transfer_by_functions(absolute=False), absolute=False
    ),
    _module_case(
        "transfer-normalize", TRANSFER, normalized_transfer_by_functions, 3, normalize=True
    ),
    *(
        _module_case(
            f"transfer-{reduction}",
            TRANSFER,
            transfer_by_functions(reduction=reduction),
            3,
            reduction=reduction,
        )
        for reduction in REDUCTIONS
    ),
    _module_case(
        "transfer-standardize",
        TRANSFER,
        standardized_transfer_by_functions,
        3,
        standardize=True,
    ),
    *(
        _module_case(
            f"masked-standardize-{temperature}",
            MASKED,
            standardized_masked_by_functions,
            3,
            temperature=temperature,
            standardize=True,
        )
        for temperature in (None, 2.0)
    ),
    _module_case(
        "masked-even",
        MASKED,
        lambda module, *pair: featkd.attention_masked_loss(module.adapter(pair[0]), pair[1]),
        3,
        temperature=None,
    ),
    _module_case(
        "non_local-standardize",
        NON_LOCAL,
        standardized_non_local_by_functions,
        3,
        kind="dot_product",
        standardize=True,
    ),
    _module_case("masked", MASKED, masked_by_functions(), temperature=0.5),
    _module_case("masked-channels", MASKED, masked_by_functions(), 3, temperature=0.5),
    _module_case(
        "masked-normalize",
        MASKED,
        normalized_masked_by_functions,
        3,
        temperature=0.5,
        normalize=True,
    ),
    *(
        _module_case(
            f"masked-{value}",
            MASKED,
            masked_by_functions(**{name: value}),
            3,
            temperature=0.5,
            **{name: value},
        )
        for name, values in [
            ("attention", ("spatial", "channel")),
            ("fusion", ("probabilities",)),
            ("reduction", REDUCTIONS),
        ]
        for value in values
    ),
    *(
        _module_case(
            f"non_local-{kind}{'-keys' * (subsample - 1)}{'-residual' * residual}",
            NON_LOCAL,
            non_local_by_functions,
            3,
            kind=kind,
            subsample=subsample,
            residual=residual,
        )
        for kind in KINDS
        for subsample, residual in [(1, False), (2, True)]
    ),
    _module_case(
        "non_local-trained",
        NON_LOCAL,
        non_local_by_functions,
        3,
        kind="dot_product",
        teacher_relation="trained",
    ),
    ModuleCase(
        "non_local-batch_norm", lambda: released_block(training=False), non_local_by_functions, 3
    ),
    ModuleCase(
        "non_local-batch_norm-training",
        lambda: released_block(training=True),
        non_local_by_functions,
        3,
        images_apart=False,
    ),
    _module_case(
        "non_local-normalize",
        NON_LOCAL,
        normalized_non_local_by_functions,
        3,
        kind="concatenation",
        normalize=True,
    ),
    ModuleCase(
        "total",
        lambda: SumOfTerms(featkd.FeatureDistillationLoss(4, 3, hyperparameters=ALL_TERMS)),
        lambda module, student, teacher: total_by_functions(module.loss, student, teacher),
        3,
    ),
]
APART = [case for case in MODULE_CASES if case.images_apart]
