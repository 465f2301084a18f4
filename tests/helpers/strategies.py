"""What hypothesis draws: features, arguments of relations, and the maps and masks of a pair."""

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from featkd import (
    attention_mask,
    channel_attention,
    concatenation_relation,
    dot_product_relation,
    embedded_gaussian_relation,
    gaussian_relation,
    spatial_attention,
    testing,
)
from tests.helpers.cases import FUSIONS, REDUCTIONS
from tests.helpers.tensors import normal

counts = st.integers(1, 4)
seeds = st.integers(0, 2**32)
magnitudes = st.sampled_from([1e-3, 1.0, 30.0])
sizes = st.tuples(st.integers(1, 5), st.integers(1, 5)).filter(lambda size: size[0] != size[1])
factors = st.floats(0.01, 100)
temperatures = st.floats(0.1, 10)
fusions = st.sampled_from(FUSIONS)
reductions = st.sampled_from(REDUCTIONS)
positions = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)
pairs = testing.feature_pairs(magnitudes=[1e-3, 1.0, 30.0])


@st.composite
def generic_pairs(draw):
    """Features of student and teacher without zeros and ties."""
    shape = (draw(counts), draw(counts), *draw(sizes))
    seed, magnitude = draw(seeds), draw(magnitudes)
    return magnitude * normal(*shape, seed=seed), magnitude * normal(*shape, seed=seed + 1)


@st.composite
def relation_arguments(draw, kind, query_positions=None, key_positions=None):
    """The arguments of a relation; theta has positions of its own where the kind allows it."""
    batch, channels, values, seed = draw(counts), draw(counts), draw(counts), draw(seeds)
    query_positions = query_positions or draw(sizes)
    key_positions = key_positions or query_positions
    g = normal(batch, values, *key_positions, seed=seed)
    if kind == "gaussian":
        return normal(batch, channels, *key_positions, seed=seed + 1), g
    channels = 1 if kind == "concatenation" else channels
    theta = normal(batch, channels, *query_positions, seed=seed + 1)
    return theta, normal(batch, channels, *key_positions, seed=seed + 2), g


RELATION = {
    "gaussian": gaussian_relation,
    "embedded_gaussian": embedded_gaussian_relation,
    "dot_product": dot_product_relation,
    "concatenation": concatenation_relation,
}


def maps_of(student: Tensor, teacher: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The two attention maps of both."""
    return {
        "spatial": (spatial_attention(student), spatial_attention(teacher)),
        "channel": (channel_attention(student), channel_attention(teacher)),
    }


def masks_of(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> dict[str, Tensor]:
    return {
        f"{name}_mask": attention_mask(*maps, temperature=temperature)
        for name, maps in maps_of(student, teacher).items()
    }


SYMMETRIES = {
    "flip": lambda x: x.flip(-1),
    "roll": lambda x: x.roll((1, 2), (-2, -1)),
    "transpose": lambda x: x.transpose(-1, -2),
}
each_symmetry = pytest.mark.parametrize("move", SYMMETRIES.values(), ids=SYMMETRIES)


def permutation(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
