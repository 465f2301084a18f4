"""The table of cases of functions, which the generic tests read.

A `Case` is one call of a function of `featkd.functional`: which tensors it takes, with which
options, and the NumPy loops it must equal.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import featkd
from featkd.losses import _pairs
from tests.helpers import reference
from tests.helpers.tensors import normal

REDUCTIONS = ("none", "mean", "sum", "norm", "mean_square")
FUSIONS = ("logits", "probabilities")
KINDS = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
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


def both_joined(maps: Callable[..., tuple[Any, Any]], join: Callable[..., Any]) -> Callable:
    """A function of two maps as one of one array: the maps of each image, one behind the other."""

    @functools.wraps(maps)
    def joined(features: Any, **options: Any) -> Any:
        found = maps(features, **options)
        return join([x.reshape(len(x), math.prod(x.shape[1:])) for x in found], 1)

    return joined


def _both_maps(name: str, **options: Any) -> Case:
    ours = both_joined(featkd.functional.attention_maps, torch.cat)
    return Case(name, ours, both_joined(reference.attention_maps, np.concatenate), one_map, options)


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
    _both_maps("attention_maps"),
    _both_maps("attention_maps-signed", absolute=False),
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


def beyond_few_pairs(relation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`relation` as it computes a large map: not by the matrix of pairs."""

    @functools.wraps(relation)
    def beyond(*tensors: Tensor, **options: Any) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_pairs, "_FEW", 0)
            patch.setattr(_pairs, "_FEW_RECTIFIED", 0)
            return relation(*tensors, **options)

    return beyond


# As the functions above compute many pairs; under the compiler they do so for any number.
MANY_PAIRS = [
    replace(case, name=f"many_pairs-{case.name}", function=beyond_few_pairs(case.function))
    for case in RELATIONS
    if "dot_product" not in case.name
]


def gradients_of(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a fixed weighted sum of the output."""
    output = case(**tensors)
    weights = normal(*output.shape, seed=9, dtype=output.dtype)
    return dict(
        zip(tensors, torch.autograd.grad((weights * output).sum(), tensors.values()), strict=True)
    )
