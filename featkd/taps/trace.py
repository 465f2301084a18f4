"""The calls of a model's modules in one forward, and the trunk of its backbone among them."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Shape = tuple[int, int, int, int]


@dataclass
class Call:
    """One run of a module: the maps that it takes in and puts out, and the calls inside it."""

    path: str
    taken_in: list[Shape]
    put_out: list[Shape] = field(default_factory=list)
    channels_last: bool = False
    inner: list[Call] = field(default_factory=list)


def trace(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], ended: list[Call]
) -> Call:
    """The calls, nested; `ended` takes them in the order of ending."""
    root = Call("", [])
    stack = [root]
    handles = []
    for path, module in model.named_modules():

        def before(_: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            call = Call(path, list(maps_in((args, kwargs))))
            stack[-1].inner.append(call)
            stack.append(call)

        def after(_: nn.Module, __: Any, output: Any) -> None:
            call = stack.pop()
            call.put_out = list(maps_in(output))
            ended.append(call)

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    training = [module for module in model.modules() if module.training]
    try:
        with torch.no_grad():
            model.eval()(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    return root


def maps_in(value: Any) -> Iterator[Shape]:
    """The shapes of the feature maps and images in a structure."""
    if isinstance(value, Tensor):
        if value.dim() == 4 and value.is_floating_point() and 0 not in value.shape:
            images, channels, height, width = value.shape
            yield images, channels, height, width
    elif isinstance(value, Mapping):
        yield from maps_in(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from maps_in(item)


def stride_of(shape: Shape, pixels: Shape) -> float:
    """By the heights; a strided convolution rounds up: 13 positions of 100 are stride 8."""
    ratio = pixels[2] / shape[2]
    power = 2.0 ** round(math.log2(ratio))
    return power if abs(pixels[2] - power * shape[2]) < power else round(ratio, 2)


def trunk(root: Call, pixels: Shape) -> Iterator[Call]:
    """The backbone's steps in order, each followed by the calls that end with it."""
    deepest = 0.0

    def walk(call: Call) -> Generator[Call, None, bool]:
        """Whether the backbone goes on after this call."""
        nonlocal deepest
        if len(call.taken_in) > 1 or _pools_all(call):
            return False
        if call.path and len(call.put_out) == 1:
            after = stride_of(call.put_out[0], pixels)
            before = stride_of(call.taken_in[0], pixels) if call.taken_in else 1.0
            # What keeps or halves its map is one step, whatever is inside.
            if not call.inner or 1 < after <= 2 * before:
                if after < deepest:
                    return False
                deepest = after
                yield call
                return True
        for inner in call.inner:
            if not (yield from walk(inner)):
                return False
        if call.inner and call.put_out == call.inner[-1].put_out and len(call.put_out) == 1:
            yield call
        return len(call.put_out) < 2

    for call in root.inner:
        if not (yield from walk(call)):
            return


def _pools_all(call: Call) -> bool:
    """From more positions than a stride of 2 takes together to a single one."""
    to_one = [shape[2:] for shape in call.put_out] == [(1, 1)]
    return to_one and any(max(shape[2:]) > 2 for shape in call.taken_in)


def first_maps(call: Call) -> Iterator[Shape]:
    """The maps that enter modules, in the order of the calls: the first is the image."""
    yield from call.taken_in
    for inner in call.inner:
        yield from first_maps(inner)


def read_maps(ended: list[Call], pixels: Shape) -> None:
    """Leaves the calls what are maps of the image, with the channels in front."""
    for call in ended:
        call.taken_in = [shape for shape, _ in _readings(call.taken_in, pixels)]
        put_out = list(_readings(call.put_out, pixels))
        call.put_out = [shape for shape, _ in put_out]
        call.channels_last = any(channels_last for _, channels_last in put_out)


def _readings(shapes: list[Shape], pixels: Shape) -> Iterator[tuple[Shape, bool]]:
    """The shapes as `(B, C, H, W)`, and whether they were `(B, H, W, C)`: only if nothing else."""
    for shape in shapes:
        images, height, width, channels = shape
        if _is_map_of(pixels, shape):
            yield shape, False
        elif _is_map_of(pixels, (images, channels, height, width)):
            yield (images, channels, height, width), True


def _is_map_of(pixels: Shape, shape: Shape) -> bool:
    """Of the same batch, and shrunk by one stride both ways.

    Strided layers with and without padding leave from H/stride - 2 to H/stride + 1 positions.
    """
    least = max(pixels[side] / (shape[side] + 2) for side in (2, 3))
    most = min(pixels[side] / max(shape[side] - 1, 1e-9) for side in (2, 3))
    return shape[0] == pixels[0] and least < most
