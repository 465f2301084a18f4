"""The error of every function's value and gradients against float64 of the same, rounded inputs.

python -m benchmarks.accuracy
"""

import argparse
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import record
from featkd import functional

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# As far as the features of the dtype reach: its subnormals and its largest numbers in float16.
MAGNITUDES = {
    torch.float32: tuple(10.0**exponent for exponent in range(-15, 16, 3)),
    torch.float16: (1e-6, 1e-4, 1.0, 1e3, 6e4),
    torch.bfloat16: tuple(10.0**exponent for exponent in range(-15, 16, 5)),
}
PATTERNS = ("normal", "nearly equal", "constant", "spike", "spike of squares")
# Beside a spike of 1, the rest, or its square, is just below half a unit in the last place.
BESIDE_SPIKE = {"spike": 0.99 * 2.0**-24, "spike of squares": 0.99 * 2.0**-12}
# (batch, channels, height, width), and for the softmax relations (channels, queries, keys).
SIZES = ((1, 1, 1, 1), (2, 256, 1, 1), (2, 64, 25, 38), (1, 4, 250, 400))
LARGE = ((1, 64, 250, 400), (1, 2048, 25, 38))
PAIRS = ((1, 1, 1), (256, 1, 1), (64, 300, 400))
LARGE_PAIRS = ((16, 64, 100_000), (64, 2048, 2048))


def pattern(name: str, shape: Sequence[int], magnitude: float, index: int) -> Tensor:
    """The `index`th tensor of a call, in float64, of the size of `magnitude`."""
    generator = torch.Generator().manual_seed(index)
    if name == "constant":
        x = torch.full(shape, 1 / (3 + index), dtype=torch.float64)
    elif name in BESIDE_SPIKE:
        x = torch.full(shape, BESIDE_SPIKE[name], dtype=torch.float64)
        x.view(-1)[index % x.numel()] = 1
    else:
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if name == "nearly equal" and index == 1:
        x = pattern("normal", shape, 1.0, 0) * (1 + 1e-3 * x)
    return x * magnitude


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype)


@dataclass(frozen=True)
class Call:
    """A function, the inputs of a call by pattern, size, magnitude and dtype, and its scales.

    `scales(inputs, value, cotangent, gradients)`, all float64, are the sizes that the errors are
    relative to, of value and gradients: those of the same sums of absolute values, mostly.
    """

    function: Callable[..., Tensor]
    inputs: Callable[[str, Any, float, torch.dtype], list[Tensor]]
    scales: Callable[[list[Tensor], Tensor, Tensor, list[Tensor]], tuple[Tensor, list[Tensor]]]
    pairs: bool = False  # quadratic


# --- inputs ---------------------------------------------------------------------------------------


def maps(count: int) -> Callable[..., list[Tensor]]:
    def inputs(name: str, size: Any, magnitude: float, dtype: torch.dtype) -> list[Tensor]:
        return [rounded(pattern(name, size, magnitude, i), dtype) for i in range(count)]

    return inputs


def maps_and_masks(name: str, size: Any, magnitude: float, dtype: torch.dtype) -> list[Tensor]:
    images, channels, *positions = size
    logits = (pattern("normal", (images, n), 1.0, n) for n in (math.prod(positions), channels))
    spatial, channel = (x.softmax(1) * x.shape[1] for x in logits)
    masks = [spatial.reshape(images, *positions).float(), channel.float()]
    return maps(2)(name, size, magnitude, dtype) + masks


def attentions(name: str, size: Any, magnitude: float, dtype: torch.dtype) -> list[Tensor]:
    images, _, *positions = size
    return [x.abs() for x in maps(2)(name, (images, *positions), magnitude, dtype)]


def embeddings(width: int | None = None, *, inverse: bool = False) -> Callable[..., list[Tensor]]:
    """theta, phi and g, with phi of the inverse magnitude where `inverse`: products of size 1."""

    def inputs(name: str, size: Any, magnitude: float, dtype: torch.dtype) -> list[Tensor]:
        images, channels, *positions = size
        shape = (images, width or channels, math.prod(positions))
        sizes = (magnitude, 1 / magnitude if inverse else magnitude)
        logits = [rounded(pattern(name, shape, m, i), dtype) for i, m in enumerate(sizes)]
        g = pattern(name, (images, min(channels, 16), shape[2]), 1.0, 2)
        return [*logits, rounded(g, dtype)]

    return inputs


def softmax_embeddings(name: str, size: Any, magnitude: float, dtype: torch.dtype) -> list[Tensor]:
    channels, queries, keys = size
    theta = pattern(name, (1, channels, queries), magnitude, 0)
    phi = pattern(name, (1, channels, keys), 1 / magnitude, 1)
    g = pattern(name, (1, 8, keys), 1.0, 2)
    return [rounded(x, dtype) for x in (theta, phi, g)]


def softmax_features(name: str, size: Any, magnitude: float, dtype: torch.dtype) -> list[Tensor]:
    channels, queries, keys = size
    x = pattern(name, (1, channels, min(queries, keys)), 1.0, 0)
    return [rounded(x, dtype), rounded(pattern(name, (1, 8, x.shape[2]), magnitude, 2), dtype)]


# --- scales ---------------------------------------------------------------------------------------


def of_mean(dims: tuple[int, ...]) -> Callable[..., tuple[Tensor, list[Tensor]]]:
    def scales(inputs, value, cotangent, gradients):
        return inputs[0].abs().mean(dims), [gradients[0].abs()]

    return scales


def of_both_means(inputs, value, cotangent, gradients):
    """A gradient is a sum of two slopes that may cancel."""
    positions = inputs[0][0, 0].numel()
    slopes = cotangent.abs().split([positions, inputs[0].shape[1]], 1)
    over_channels = slopes[0].reshape(inputs[0][:, :1].shape) / inputs[0].shape[1]
    slope = over_channels + slopes[1][:, :, None, None] / positions
    return value.abs(), [slope]


def of_mask(temperature: float) -> Callable[..., tuple[Tensor, list[Tensor]]]:
    def scales(inputs, value, cotangent, gradients):
        spreads = (x.flatten(1).amax(1) - x.flatten(1).amin(1) for x in inputs)
        factor = (1 + sum(spreads) / temperature)[:, None]
        mask, size = value.flatten(1), cotangent.flatten(1).abs()
        mask = mask.clamp_min(1.2e-38 * mask.shape[1])
        slope = mask * (size + (mask * size).mean(1, keepdim=True)) / temperature
        slope = (factor * slope).reshape(value.shape)
        return (factor * mask).reshape(value.shape), [slope, slope]

    return scales


def of_standardize(inputs, value, cotangent, gradients):
    """In units of 1 + |mean| / deviation, since the mean's rounding is the deviation's too."""
    (x,), dims = inputs, (2, 3)
    deviation = x.std(dims, correction=0, keepdim=True)
    factor = 1 + (x.mean(dims, keepdim=True).abs() / deviation).nan_to_num(0.0, 1e30)
    size = cotangent.abs()
    along = (size * value.abs()).mean(dims, keepdim=True)
    slope = (size + size.mean(dims, keepdim=True) + value.abs() * along) / deviation
    largest = 1 + value.abs().amax(dims, keepdim=True)
    return factor * largest, [(factor * slope).nan_to_num(0.0, 1e30)]


def of_norm(inputs, value, cotangent, gradients):
    return value, [x.abs().amax() for x in gradients]


def of_transfer(inputs, value, cotangent, gradients):
    """Relative to the maps' norms, with no bound where different features have equal maps."""
    norms, factor = torch.zeros(len(inputs[0]), dtype=torch.float64), 1.0
    for dims in ((1,), (2, 3)):
        ours, theirs = (x.abs().mean(dims).flatten(1) for x in inputs)
        both = ours.norm(dim=1) + theirs.norm(dim=1)
        norms = norms + both
        apart = (ours - theirs).norm(dim=1)
        factor = max(factor, (both / apart).nan_to_num(1.0, 1e30).max().item())
    return norms.mean(), [factor * x.abs().amax() for x in gradients]


def of_dot_product(inputs, value, cotangent, gradients):
    found, slopes = value_and_gradients(
        functional.dot_product_relation, [x.abs() for x in inputs], cotangent.abs()
    )
    return found, slopes


def of_concatenation(inputs, value, cotangent, gradients):
    theta, phi, g = (x.abs() for x in inputs)
    size, keys = cotangent.abs(), phi.shape[2]
    mean, total = g.mean(2, keepdim=True), size.sum(2, keepdim=True) / keys
    to_theta = (size * mean).sum(1, keepdim=True)
    to_phi = (g * total).sum(1, keepdim=True)
    to_g = (phi + theta.amax(2, keepdim=True)) * total
    return (theta + phi.amax(2, keepdim=True)) * mean, [to_theta, to_phi, to_g]


def of_softmax(inputs, value, cotangent, gradients):
    theta, phi, g = inputs if len(inputs) == 3 else (inputs[0], *inputs)
    factor = 1 + (theta.abs().mT @ phi.abs()).max()
    weights = (theta.mT @ phi).softmax(2)
    size, largest = cotangent.abs(), g.abs().amax(2, keepdim=True)
    terms = size.mT @ g.abs()
    terms = weights * (terms + (weights * terms).sum(2, keepdim=True))
    to_theta, to_phi = (terms @ phi.abs().mT).mT, theta.abs() @ terms
    slopes = [to_theta, to_phi] if len(inputs) == 3 else [to_theta + to_phi]
    return factor * largest, [factor * x for x in (*slopes, size @ weights)]


TEMPERATURE = 0.5


def mask_of_one_temperature(ours: Tensor, theirs: Tensor) -> Tensor:
    return functional.attention_mask(ours, theirs, temperature=TEMPERATURE)


def both_maps(features: Tensor) -> Tensor:
    return torch.cat([x.flatten(1) for x in functional.attention_maps(features)], 1)


CALLS = {
    "spatial_attention": Call(functional.spatial_attention, maps(1), of_mean((1,))),
    "attention_maps": Call(both_maps, maps(1), of_both_means),
    "channel_attention": Call(functional.channel_attention, maps(1), of_mean((2, 3))),
    "standardize": Call(functional.standardize, maps(1), of_standardize),
    "attention_mask": Call(mask_of_one_temperature, attentions, of_mask(TEMPERATURE)),
    "attention_transfer_loss": Call(functional.attention_transfer_loss, maps(2), of_transfer),
    "attention_masked_loss": Call(
        lambda *x: functional.attention_masked_loss(*x[:2], spatial_mask=x[2], channel_mask=x[3]),
        maps_and_masks,
        of_norm,
    ),
    "gaussian_relation": Call(functional.gaussian_relation, softmax_features, of_softmax, True),
    "embedded_gaussian_relation": Call(
        functional.embedded_gaussian_relation, softmax_embeddings, of_softmax, True
    ),
    "dot_product_relation": Call(
        functional.dot_product_relation, embeddings(inverse=True), of_dot_product
    ),
    "concatenation_relation": Call(
        functional.concatenation_relation, embeddings(1), of_concatenation
    ),
    "non_local_loss": Call(functional.non_local_loss, maps(2), of_norm),
}


# --- errors ---------------------------------------------------------------------------------------


def value_and_gradients(
    function: Callable[..., Tensor], inputs: list[Tensor], cotangent: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    value = function(*leaves)
    cotangent = torch.ones_like(value) if cotangent is None else cotangent.to(value)
    return value.detach(), list(torch.autograd.grad(value, leaves, cotangent))


def relative(found: Tensor, exact: Tensor, scale: Tensor) -> float:
    """The largest error, in units of `scale`, beyond the rounding of the result to its dtype."""
    info = torch.finfo(found.dtype)
    found, exact = (x.double().clamp(-info.max, info.max) for x in (found, exact))
    rounding = 0 if info.bits == 32 else info.eps / 2 * exact.abs()
    excess = ((found - exact).abs() - rounding - info.smallest_normal * info.eps).relu()
    return (excess / scale.clamp_min(1e-300)).nan_to_num(math.inf, math.inf).max().item()


def errors(
    name: str, kind: str, size: Any, magnitude: float, dtype: torch.dtype
) -> tuple[float, float]:
    """The errors of value and gradients of one call, in units of the call's scales."""
    call = CALLS[name]
    inputs = call.inputs(kind, size, magnitude, dtype)
    wide = [x.double() for x in inputs]
    shape = call.function(*inputs).shape
    cotangent = torch.randn(shape, generator=torch.Generator().manual_seed(9)).double()
    cotangent = cotangent if shape else torch.ones((), dtype=torch.float64)
    value, gradients = value_and_gradients(call.function, inputs, cotangent)
    exact, exact_gradients = value_and_gradients(call.function, wide, cotangent)
    of_value, of_gradients = call.scales(wide, exact, cotangent, exact_gradients)
    slopes = zip(gradients, exact_gradients, of_gradients, strict=True)
    return relative(value, exact, of_value), max(relative(*slope) for slope in slopes)


# --- the command ----------------------------------------------------------------------------------


def worst(
    name: str, dtype: torch.dtype, sizes: Sequence[Any], magnitudes: Sequence[float]
) -> dict[str, Any]:
    """The largest errors over patterns, sizes and magnitudes, and where they were found."""
    row: dict[str, Any] = {"calls": 0, "value": -1.0, "gradient": -1.0}
    for kind, size, magnitude in itertools.product(PATTERNS, sizes, magnitudes):
        row["calls"] += 1
        found = errors(name, kind, size, magnitude, dtype)
        for what, error in zip(("value", "gradient"), found, strict=True):
            if not error <= row[what]:
                place = f"{kind}, {' x '.join(map(str, size))}, {magnitude:g}"
                row |= {what: error, f"{what} at": place}
    return row


def measure() -> Iterator[dict[str, Any]]:
    for name, call in CALLS.items():
        for label, dtype in DTYPES.items():
            sizes = PAIRS if call.pairs else SIZES
            found = worst(name, dtype, sizes, MAGNITUDES[dtype])
            yield {"function": name, "dtype": label, **found}
        # The large maps at one magnitude.
        found = worst(name, torch.float32, LARGE_PAIRS if call.pairs else LARGE, (1.0,))
        yield {"function": name, "dtype": "float32, large", **found}


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    columns = {"function": "", "dtype": "", "calls": "", "value": ".1e", "gradient": ".1e"}
    columns |= {"value at": "", "gradient at": ""}
    record("accuracy", torch.device("cpu"), measure(), columns)


if __name__ == "__main__":
    main()
