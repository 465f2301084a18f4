"""The calls of a model's modules in one forward, and the feature maps in and out of each."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._preserve import preserved

Shape = tuple[int, int, int, int]


@dataclass
class FeatureMap:
    """A feature map or image among what a module takes in or puts out."""

    shape: Shape
    keys: tuple[str, ...]
    """Where it lies: `("feature_maps", "0")`; empty for a tensor by itself."""
    serial: int
    """Two of one number are one tensor."""
    channels_last: bool = False

    @property
    def selector(self) -> str:
        """As a tap's path spells it."""
        return "".join(f"[{key}]" for key in self.keys)

    @property
    def can_be_selected(self) -> bool:
        return all(key and not set("[]'\"") & set(key) for key in self.keys)


@dataclass(eq=False)
class Call:
    """One run of a module, and the calls inside it."""

    path: str
    began: int
    ended: int = 0
    taken_in: list[FeatureMap] = field(default_factory=list)
    put_out: list[FeatureMap] = field(default_factory=list)
    inner: list[Call] = field(default_factory=list)
    tokens_in: set[tuple[int, ...]] = field(default_factory=set)
    """The shapes `(B, N, C)` that go in."""
    tokens_out: set[tuple[int, ...]] = field(default_factory=set)
    trained: bool = True
    """Whether it has parameters."""

    def within(self) -> Iterator[Call]:
        """The call and those inside it, outermost first."""
        yield self
        for call in self.inner:
            yield from call.within()

    @property
    def leaves(self) -> int:
        """How many calls it is made of."""
        return sum(not call.inner for call in self.within())


class _Numbers:
    """One number for each tensor, however often it is met."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self.numbers = itertools.count()

    def of(self, tensor: Tensor) -> int:
        known = self.known.get(id(tensor))
        if known is None or known[0]() is not tensor:
            known = self.known[id(tensor)] = weakref.ref(tensor), next(self.numbers)
        return known[1]


def trace(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], ended: list[Call]
) -> Call:
    """The calls, nested; `ended` takes them in the order of ending."""
    root = Call("", -1)
    stack = [root]
    handles = []
    numbers = _Numbers()
    began = 0
    in_eager: Any = torch.compiler.disable
    for path, module in model.named_modules():

        def before(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            nonlocal began
            call = Call(path, began, trained=any(True for _ in module.parameters()))
            began += 1
            call.taken_in, more = _sorted((args, kwargs), numbers)
            call.tokens_in = {shape for shape in more if len(shape) == 3}
            stack[-1].inner.append(call)
            stack.append(call)

        def after(_: nn.Module, __: Any, output: Any) -> None:
            call = stack.pop()
            call.put_out, more = _sorted(output, numbers)
            call.tokens_out = {shape for shape in more if len(shape) == 3}
            call.ended = began
            ended.append(call)

        handles.append(module.register_forward_pre_hook(in_eager(before), with_kwargs=True))
        handles.append(module.register_forward_hook(in_eager(after)))
    try:
        with preserved(model), torch.no_grad():
            model.eval()(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    root.ended = began
    return root


def _sorted(value: Any, numbers: _Numbers) -> tuple[list[FeatureMap], list[tuple[int, ...]]]:
    """The feature maps in a structure, and the shapes of its other tensors."""
    maps, others = [], []
    for keys, tensor in tensors_in(value):
        if _may_be_map(tensor):
            images, channels, height, width = tensor.shape
            shape = images, channels, height, width
            maps.append(FeatureMap(shape, keys, numbers.of(tensor)))
        else:
            others.append(tuple(tensor.shape))
    return maps, others


def _may_be_map(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and tensor.is_floating_point() and 0 not in tensor.shape


def tensors_in(value: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """A structure's tensors, and where each lies."""
    if isinstance(value, Tensor):
        yield keys, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors_in(item, (*keys, str(key)))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from tensors_in(item, (*keys, str(index)))


def maps_in(value: Any) -> Iterator[Shape]:
    """The shapes of the feature maps and images in a structure."""
    for _, tensor in tensors_in(value):
        if _may_be_map(tensor):
            images, channels, height, width = tensor.shape
            yield images, channels, height, width


def stride_of(shape: Shape, pixels: Shape) -> float:
    """A power of 2 that rounds up both ways, as strided convolutions do, else by the heights."""
    ratio = pixels[2] / shape[2]
    power = 2.0 ** math.ceil(math.log2(ratio))
    if all(math.ceil(pixels[side] / power) == shape[side] for side in (2, 3)):
        return power
    power = 2.0 ** round(math.log2(ratio))
    return power if abs(pixels[2] - power * shape[2]) < power else round(ratio, 2)


def passes_on(call: Call, inner: Call) -> bool:
    """Whether all that it takes in and puts out are the maps of the call inside."""
    pairs = (call.taken_in, inner.taken_in), (call.put_out, inner.put_out)
    return all([m.serial for m in ours] == [m.serial for m in theirs] for ours, theirs in pairs)


def pools_all(call: Call) -> bool:
    """To a single position, from more than a stride of 2 takes together or without parameters."""
    to_one = [item.shape[2:] for item in call.put_out] == [(1, 1)]
    sides = [max(item.shape[2:]) for item in call.taken_in]
    return to_one and any(side > 2 or (side > 1 and not call.trained) for side in sides)


def first_image(root: Call) -> Shape:
    """The largest map that the first module with any takes in."""
    entering = next((call.taken_in for call in root.within() if call.taken_in), [])
    return largest([found.shape for found in entering]) or (0, 0, 0, 0)


def largest(shapes: list[Shape]) -> Shape | None:
    """Beside an image, a mask or a template is no larger."""
    return max(shapes, key=lambda shape: shape[2] * shape[3], default=None)


def read_maps(ended: list[Call], pixels: Shape) -> None:
    """Leaves the calls what are maps of the image, with the channels in front."""
    for call in ended:
        call.taken_in = [found for found in call.taken_in if _read(found, pixels)]
        read = [item for item in call.put_out if item.can_be_selected and _read(item, pixels)]
        call.put_out = read


def _read(found: FeatureMap, pixels: Shape) -> bool:
    """As `(B, C, H, W)`; as `(B, H, W, C)` only if nothing else."""
    images, height, width, channels = found.shape
    if _is_map_of(pixels, found.shape):
        return True
    turned = images, channels, height, width
    if _is_map_of(pixels, turned):
        found.shape, found.channels_last = turned, True
        return True
    return False


def _is_map_of(pixels: Shape, shape: Shape) -> bool:
    """Of the same batch, and shrunk by one stride both ways.

    Strided layers with and without padding leave from H/stride - 2 to H/stride + 1 positions.
    """
    least = max(pixels[side] / (shape[side] + 2) for side in (2, 3))
    most = min(pixels[side] / max(shape[side] - 1, 1e-9) for side in (2, 3))
    return shape[0] == pixels[0] and least < most
