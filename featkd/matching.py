"""What can be tapped in two models, and which of their stages belong together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ._table import table, times
from .taps.layouts import Convert, from_channels_last
from .taps.trace import Call, Shape, first_maps, read_maps, stride_of, trace, trunk


@dataclass(frozen=True)
class Layer:
    """A module whose output is one feature map, `(B, C, H, W)` in `shape`."""

    path: str
    shape: Shape
    stride: float
    stage: bool
    """The last and outermost module at its stride within the backbone."""
    channels_last: bool = False
    """Whether the module puts the map out as `(B, H, W, C)`."""

    @property
    def channels(self) -> int:
        return self.shape[1]

    @property
    def convert(self) -> Convert | None:
        return from_channels_last if self.channels_last else None

    @property
    def _printed_shape(self) -> str:
        images, channels, height, width = self.shape
        if self.channels_last:
            return f"{times((images, height, width, channels))} (B, H, W, C)"
        return times(self.shape)


@dataclass(frozen=True)
class LayerMatch:
    """Both models' tappable layers, in the order they run, and the stages paired by stride.

    Printed, it is a table. `layers`, `convert`, `student_channels` and `teacher_channels` are what
    :class:`featkd.Distiller` and :class:`featkd.FeatureDistillationLoss` take.
    """

    student: tuple[Layer, ...]
    teacher: tuple[Layer, ...]
    pairs: Mapping[str, tuple[Layer, Layer]]

    @property
    def layers(self) -> dict[str, tuple[str, str]]:
        return {level: (ours.path, theirs.path) for level, (ours, theirs) in self.pairs.items()}

    @property
    def convert(self) -> dict[str, tuple[Convert | None, Convert | None]]:
        """The levels that a model puts out channels-last; empty where there are none."""
        functions = {
            level: (ours.convert, theirs.convert) for level, (ours, theirs) in self.pairs.items()
        }
        return {level: pair for level, pair in functions.items() if any(pair)}

    @property
    def student_channels(self) -> dict[str, int]:
        return {level: ours.channels for level, (ours, _) in self.pairs.items()}

    @property
    def teacher_channels(self) -> dict[str, int]:
        return {level: theirs.channels for level, (_, theirs) in self.pairs.items()}

    def select(self, *levels: str) -> LayerMatch:
        """The same with these levels alone."""
        for level in levels:
            if not isinstance(level, str):
                raise TypeError(f"`levels` must be strings, got {type(level).__name__}.")
            if level not in self.pairs:
                raise ValueError(f"`levels` must be among {list(self.pairs)}, got {level!r}.")
        if not levels or len(set(levels)) < len(levels):
            raise ValueError(f"`levels` must be at least one, each once, got {list(levels)}.")
        return replace(self, pairs={level: self.pairs[level] for level in levels})

    def __str__(self) -> str:
        rows = [("level", "stride", "student", "shape", "teacher", "shape")]
        for level, (ours, theirs) in self.pairs.items():
            stride = f"{ours.stride:g}"
            shapes = ours._printed_shape, theirs._printed_shape
            rows.append((level, stride, ours.path, shapes[0], theirs.path, shapes[1]))
        paired = table(rows) if self.pairs else "No stages of one stride: choose pairs from these."
        student = _listing("student", self.student)
        return "\n\n".join((paired, student, _listing("teacher", self.teacher)))


def _listing(name: str, layers: tuple[Layer, ...]) -> str:
    """The stages, the blocks that they are made of, and whatever lies no deeper."""
    deepest = max((_depth(layer) for layer in layers if layer.stage), default=2) + 1
    shown = [layer for layer in layers if _depth(layer) <= deepest]
    rows: list[tuple[str, ...]] = [(f"{name}'s path", "shape", "stride", "channels")]
    for layer in shown:
        rows.append((layer.path, layer._printed_shape, f"{layer.stride:g}", str(layer.channels)))
    hidden = len(layers) - len(shown)
    return table(rows) + (f"\n({hidden} deeper layers in `.{name}`)" if hidden else "")


def match_layers(
    student: nn.Module, teacher: nn.Module, *example_inputs: Any, **example_kwargs: Any
) -> LayerMatch:
    """Lists the layers of two models that can be tapped and pairs their stages by stride.

    Both models are called once with the example, in `eval` mode without gradients, and left as
    they were. A layer is listed if its module runs once and puts out one feature map; its stride is
    the height of the first map that enters a module over its own. A map is what shrinks alike in
    height and width: read as `(B, C, H, W)`, or as `(B, H, W, C)` where only that fits (height and
    width that differ in the example tell the two apart); see `.convert` of the result. Tokens
    `(B, N, C)` are not listed, as their H x W is not known: see :func:`featkd.from_tokens`.

    The backbone is the sequence of modules that keep or halve their map, each one step whatever is
    inside; it ends where the stride falls, where several maps go in or come out, and where all
    positions are pooled into one. A stage is the last step at its stride, the outermost module of
    those that end with it. Only strides that both models have are paired; nothing is paired by
    index.

    Args:
        student, teacher: the models.
        example_inputs, example_kwargs: arguments for both; a batch of the size to be trained on.

    Returns:
        :class:`LayerMatch`; levels are named by their stride, `"c3"` for 8 = 2^3 (the field's name)
        and `"stride14"` where it is no power of 2.

    Raises:
        TypeError: a model is no module.
        ValueError: no module of a model puts out a feature map.

    Example:
        >>> import torch
        >>> small = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 2, 1), torch.nn.ReLU())
        >>> large = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, 2, 1), torch.nn.ReLU())
        >>> match_layers(small, large, torch.zeros(1, 3, 8, 8)).layers
        {'c1': ('1', '1')}
    """
    ours = _tappable("student", student, example_inputs, example_kwargs)
    theirs = _tappable("teacher", teacher, example_inputs, example_kwargs)
    stages = {layer.stride: layer for layer in theirs if layer.stage}
    pairs = {
        _level_name(layer.stride): (layer, stages[layer.stride])
        for layer in ours
        if layer.stage and layer.stride in stages
    }
    return LayerMatch(ours, theirs, pairs)


def _level_name(stride: float) -> str:
    exponent = math.log2(stride)
    return f"c{exponent:g}" if exponent == int(exponent) else f"stride{stride:g}"


def _tappable(
    name: str, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Layer, ...]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"`{name}` must be an nn.Module, got {type(model).__name__}.")
    ended: list[Call] = []
    root = trace(model, args, kwargs, ended)
    pixels = next(first_maps(root), (0, 0, 0, 0))
    read_maps(ended, pixels)
    runs = Counter(call.path for call in ended)
    stages = {}
    for call in trunk(root, pixels):
        if call.path and len(call.put_out) == 1 and runs[call.path] == 1:
            stages[stride_of(call.put_out[0], pixels)] = call.path
    layers = []
    for call in ended:
        if call.path and len(call.put_out) == 1 and runs[call.path] == 1:
            stride = stride_of(call.put_out[0], pixels)
            stage = stride > 1 and stages.get(stride) == call.path
            layers.append(Layer(call.path, call.put_out[0], stride, stage, call.channels_last))
    if not layers:
        raise ValueError(f"`{name}` must have a module that puts out a feature map, got none.")
    return tuple(layers)


def _depth(layer: Layer) -> int:
    return layer.path.count(".")
