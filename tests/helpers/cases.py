"""The table of cases that the generic tests read.

A `Case` is one call of a function of `featkd.functional`: which tensors it takes, with which
options, and the NumPy loops it must equal. A `ModuleCase` is one module and the functions it must
equal.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import featkd
from tests.helpers import reference

REDUCTIONS = ("none", "mean", "sum", "norm", "mean_square")
FUSIONS = ("logits", "probabilities")
KINDS = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Reproducible normal numbers, the same in every dtype up to rounding."""
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def close(actual: Tensor, expected: Any, tolerance: float = 1e-10) -> None:
    """Equal up to `tolerance` times the larger of 1 and the largest expected value."""
    expected = torch.as_tensor(
        np.asarray(expected.detach() if isinstance(expected, Tensor) else expected)
    )
    size = max([1.0, *expected.double().abs().flatten().tolist()])
    torch.testing.assert_close(
        actual.detach().double(), expected.double(), rtol=0, atol=tolerance * size, equal_nan=True
    )


# --- functions ------------------------------------------------------------------------------------

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Case:
    name: str
    function: Callable[..., Tensor]
    reference: Callable[..., Any]
    shapes: Callable[..., Shapes]  # (batch, *positions) -> the shape of each tensor
    options: Mapping[str, Any] = field(default_factory=dict)
    adapters: Mapping[str, tuple[Callable, Callable]] = field(default_factory=dict)  # torch, loops
    loss: bool = False

    def __str__(self) -> str:
        return self.name

    def __call__(self, **tensors: Tensor) -> Tensor:
        adapters = {name: pair[0] for name, pair in self.adapters.items()}
        return self.function(**tensors, **adapters, **self.options)

    def expected(self, **tensors: Tensor) -> Any:
        arrays = {name: tensor.detach().double().numpy() for name, tensor in tensors.items()}
        adapters = {name: pair[1] for name, pair in self.adapters.items()}
        return self.reference(**arrays, **adapters, **self.options)

    def inputs(
        self,
        batch: int = 2,
        positions: tuple[int, ...] = (3, 4),
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
    ) -> dict[str, Tensor]:
        """Normal numbers for every tensor; masks are positive."""
        tensors = {}
        for index, (name, shape) in enumerate(self.shapes(batch, *positions).items()):
            tensor = normal(*shape, seed=100 * seed + index)
            tensors[name] = (tensor.exp() if name.endswith("mask") else tensor).to(dtype)
        return tensors

    def of_one(self, *tensors: Tensor) -> Tensor:
        """The call with the tensors by position, in the order of `shapes`."""
        return self(**dict(zip(self.shapes(1, 1, 1), tensors, strict=True)))


def one_map(batch: int, *positions: int) -> Shapes:
    return {"features": (batch, 3, *positions)}


def two_maps(batch: int, *positions: int) -> Shapes:
    return {"student": (batch, 3, *positions), "teacher": (batch, 3, *positions)}


def maps_of_other_channels(batch: int, *positions: int) -> Shapes:
    return {"student": (batch, 2, *positions), "teacher": (batch, 3, *positions)}


def two_spatial_attentions(batch: int, *positions: int) -> Shapes:
    return {"student_attention": (batch, *positions), "teacher_attention": (batch, *positions)}


def two_channel_attentions(batch: int, *positions: int) -> Shapes:
    return {"student_attention": (batch, 5), "teacher_attention": (batch, 5)}


def spatially_masked(batch: int, *positions: int) -> Shapes:
    return two_maps(batch, *positions) | {"spatial_mask": (batch, *positions)}


def channel_masked(batch: int, *positions: int) -> Shapes:
    return two_maps(batch, *positions) | {"channel_mask": (batch, 3)}


def masked(batch: int, *positions: int) -> Shapes:
    return spatially_masked(batch, *positions) | {"channel_mask": (batch, 3)}


def features_and_g(batch: int, *positions: int) -> Shapes:
    return {"features": (batch, 3, *positions), "g": (batch, 2, *positions)}


def theta_phi_g(batch: int, *positions: int) -> Shapes:
    return {
        "theta": (batch, 3, *positions),
        "phi": (batch, 3, *positions),
        "g": (batch, 2, *positions),
    }


def one_logit_a_side(batch: int, *positions: int) -> Shapes:
    return {
        "theta": (batch, 1, *positions),
        "phi": (batch, 1, *positions),
        "g": (batch, 2, *positions),
    }


def fewer_keys(shapes: Callable[..., Shapes]) -> Callable[..., Shapes]:
    """phi and g keep half of the positions of theta."""

    def halved(batch: int, *positions: int) -> Shapes:
        keys = [(count + 1) // 2 for count in positions]
        full, few = shapes(batch, *positions), shapes(batch, *keys)
        return {"theta": full["theta"], "phi": few["phi"], "g": few["g"]}

    return halved


def two_relations(batch: int, *positions: int) -> Shapes:
    return dict.fromkeys(("student_relation", "teacher_relation"), (batch, 3, *positions))


SPATIAL_WEIGHT, SPATIAL_BIAS = normal(1, 1, 3, 3, seed=1), normal(1, seed=2)
CHANNEL_WEIGHT, CHANNEL_BIAS = normal(3, 2, seed=3), normal(3, seed=4)
ADAPTERS = {
    "spatial_adapter": (
        lambda a: F.conv2d(a, SPATIAL_WEIGHT.to(a.dtype), SPATIAL_BIAS.to(a.dtype), padding=1),
        lambda a: reference.convolution(a, SPATIAL_WEIGHT.numpy(), SPATIAL_BIAS.numpy()),
    ),
    "channel_adapter": (
        lambda a: F.linear(a, CHANNEL_WEIGHT.to(a.dtype), CHANNEL_BIAS.to(a.dtype)),
        lambda a: reference.linear(a, CHANNEL_WEIGHT.numpy(), CHANNEL_BIAS.numpy()),
    ),
}


def _case(
    name: str, function: str, shapes: Callable[..., Shapes], adapters: Any = None, **options: Any
) -> Case:
    return Case(
        name,
        getattr(featkd.functional, function),
        getattr(reference, function),
        shapes,
        options,
        adapters or {},
        loss=function.endswith("_loss"),
    )


CASES = [
    _case("spatial_attention", "spatial_attention", one_map),
    _case("spatial_attention-signed", "spatial_attention", one_map, absolute=False),
    _case("channel_attention", "channel_attention", one_map),
    _case("channel_attention-signed", "channel_attention", one_map, absolute=False),
    *(
        _case(f"{side}_mask-{fusion}", "attention_mask", shapes, temperature=0.5, fusion=fusion)
        for side, shapes in [
            ("spatial", two_spatial_attentions),
            ("channel", two_channel_attentions),
        ]
        for fusion in FUSIONS
    ),
    _case("spatial_mask-default_fusion", "attention_mask", two_spatial_attentions, temperature=2),
    _case("standardize", "standardize", one_map),
    _case("standardize-batch", "standardize", one_map, over="batch"),
    _case("transfer", "attention_transfer_loss", two_maps),
    _case("transfer-signed", "attention_transfer_loss", two_maps, absolute=False),
    _case("transfer-adapters", "attention_transfer_loss", maps_of_other_channels, ADAPTERS),
    _case("masked-no_mask", "attention_masked_loss", two_maps),
    _case("masked-spatial", "attention_masked_loss", spatially_masked),
    _case("masked-channel", "attention_masked_loss", channel_masked),
    _case("masked-both", "attention_masked_loss", masked),
    _case("non_local", "non_local_loss", two_relations),
    *(
        _case(f"{name}-{reduction}", function, shapes, reduction=reduction)
        for name, function, shapes in [
            ("transfer", "attention_transfer_loss", two_maps),
            ("masked-both", "attention_masked_loss", masked),
            ("non_local", "non_local_loss", two_relations),
        ]
        for reduction in REDUCTIONS
    ),
    *(
        _case(f"{name}-standardize", function, shapes, standardize=True, reduction=reduction)
        for name, function, shapes, reduction in [
            ("transfer", "attention_transfer_loss", two_maps, "mean"),
            ("masked", "attention_masked_loss", two_maps, "mean"),
            ("masked-spatial", "attention_masked_loss", spatially_masked, "none"),
            ("masked-both", "attention_masked_loss", masked, "sum"),
            ("non_local", "non_local_loss", two_relations, "none"),
        ]
    ),
    _case("gaussian", "gaussian_relation", features_and_g),
    _case("embedded_gaussian", "embedded_gaussian_relation", theta_phi_g),
    _case("embedded_gaussian-scale", "embedded_gaussian_relation", theta_phi_g, scale=0.3),
    _case("embedded_gaussian-keys", "embedded_gaussian_relation", fewer_keys(theta_phi_g)),
    _case("dot_product", "dot_product_relation", theta_phi_g),
    _case("dot_product-keys", "dot_product_relation", fewer_keys(theta_phi_g)),
    _case("concatenation", "concatenation_relation", one_logit_a_side),
    _case("concatenation-keys", "concatenation_relation", fewer_keys(one_logit_a_side)),
]
LOSSES = [case for case in CASES if case.loss]
RELATIONS = [case for case in CASES if "relation" in case.function.__name__]


# --- modules --------------------------------------------------------------------------------------


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
