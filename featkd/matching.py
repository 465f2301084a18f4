"""What can be tapped in two models, and which of their stages belong together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ._listing import listing, pair_table
from ._placement import home, placed
from ._table import times
from .taps.layouts import Convert, from_channels_last
from .taps.stages import Forward, Spot
from .taps.trace import Call, Shape, first_image, read_maps, trace

__all__ = ["Layer", "LayerMatch", "match_layers"]

OTHER_SIZES = (
    "Height and width differ, as the models resize their images: with `shared_input` they do not."
)


@dataclass(frozen=True)
class Layer:
    """A module's output, or an item of it: one feature map, `(B, C, H, W)` in `shape`."""

    path: str
    shape: Shape
    stride: float
    stage: bool
    """The last and outermost module at its stride within the backbone, or an item of its list."""
    channels_last: bool = False
    """Whether the module puts the map out as `(B, H, W, C)`."""
    pyramid: bool = False
    """One of the maps of an FPN, as they enter the detector's head."""
    patch_projection: bool = False
    """A stage that is no deep feature, as blocks work on its positions as tokens."""

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
    """Both models' tappable layers, in the order they run, and those paired by stride.

    Printed, it is a table; `print(match.all)` lists every layer. `layers`, `convert`,
    `student_channels` and `teacher_channels` are what :class:`featkd.Distiller` and
    :class:`featkd.FeatureDistillationLoss` take.
    """

    student: tuple[Layer, ...]
    teacher: tuple[Layer, ...]
    pairs: Mapping[str, tuple[Layer, Layer]]
    others: Mapping[str, tuple[Layer, Layer]] = field(default_factory=dict)
    """What `select` takes beside `pairs`."""

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
        """The same with these levels, of `pairs` or `others`, for its pairs."""
        found = {**self.pairs, **self.others}
        for level in levels:
            if not isinstance(level, str):
                kind = type(level).__name__
                raise TypeError(f"`levels` must be strings, each an argument, got {kind}.")
            if level not in found:
                no_fpn = level[:1] == "p" and not any(name[0] == "p" for name in found)
                hint = " No outputs of FPNs are paired: take stages." if no_fpn else ""
                hint = hint if found else f" {self._without_pairs()}"
                raise ValueError(f"`levels` must be among {list(found)}, got {level!r}.{hint}")
        if not levels or len(set(levels)) < len(levels):
            raise ValueError(f"`levels` must be at least one, each once, got {list(levels)}.")
        pairs = {level: found.pop(level) for level in levels}
        return replace(self, pairs=pairs, others=found)

    @property
    def all(self) -> str:
        """What can be tapped, a table a model, with stages, blocks and what lies no deeper."""
        return "\n\n".join((listing("student", self.student), listing("teacher", self.teacher)))

    def _without_pairs(self) -> str:
        found = [
            ", ".join(f"{layer.stride:g}" for layer in layers if layer.stage) or "none"
            for layers in (self.student, self.teacher)
        ]
        return (
            f"No layers of one stride: the student's stages have {found[0]}, the teacher's "
            f"{found[1]}. Where a model resizes its images, match the parts behind that, such as "
            "`teacher.backbone`, and write their paths in front of the layers'."
        )

    def __str__(self) -> str:
        parts = [pair_table(self.pairs) if self.pairs else self._without_pairs()]
        if any(ours.shape[2:] != theirs.shape[2:] for ours, theirs in self.pairs.values()):
            parts.append(OTHER_SIZES)
        if self.others:
            parts += ["`select` takes these as well:", pair_table(self.others)]
        return "\n\n".join([*parts, "`print(match.all)` lists each model's layers."])


def match_layers(
    student: nn.Module, teacher: nn.Module, *example_inputs: Any, **example_kwargs: Any
) -> LayerMatch:
    """Lists the layers of two models that can be tapped and pairs them by stride.

    Each model is called once with the example, on its device and in its dtype, in `eval` mode
    without gradients, and left as it was. A layer is listed if its module runs once and puts out
    one feature map. Its stride is the image's height over its own. The image is the largest map
    that the model takes in. A map is what shrinks alike in height and width: read as
    `(B, C, H, W)`, or as `(B, H, W, C)` where only that fits. Height and width that differ in the
    example tell the two apart; see `.convert` of the result. Tokens `(B, N, C)` are not listed, as
    their H x W is not known. A patch projection in front of tokens is marked in the table, as it is
    no deep feature.

    The pairs are those of the feature pyramids where both models have one. A pyramid is what an FPN
    puts out at one width (`"p3"`), or what enters a head that takes several maps, or what a model
    without a head puts out. Else they are those of the backbones' stages (`"c3"`).
    :meth:`featkd.matching.LayerMatch.select` takes either.

    The backbone is the sequence of modules that keep or halve their map, each one step with what is
    inside. A block on tokens is passed over. The backbone ends where the stride falls, where
    several maps go in or come out, where positions are pooled into one, and at a head. A head takes
    the last map and puts out none, or follows the module that the image enters and that holds most
    of the backbone. A stage is the last step at its stride, the outermost module of those that end
    with it and hold no other stage. A list that a backbone puts out has the stages that no module
    does. Only strides that both models have are paired; nothing is paired by index.

    Args:
        student, teacher: the models.
        example_inputs, example_kwargs: arguments for both; a batch of the size to be trained on.

    Returns:
        :class:`featkd.matching.LayerMatch`. Levels are named by their stride, as in the field:
        `"c3"` or `"p3"` for 8 = 2^3. Where it is no power of 2 the name is `"stride14"`.

    Raises:
        TypeError: a model is no module.
        ValueError: a model does not run on the example, or no module of it puts out a feature map.

    Example:
        >>> import torch
        >>> small = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 2, 1), torch.nn.ReLU())
        >>> large = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, 2, 1), torch.nn.ReLU())
        >>> match_layers(small, large, torch.zeros(1, 3, 8, 8)).layers
        {'c1': ('1', '1')}
    """
    ours = _tappable("student", student, example_inputs, example_kwargs)
    theirs = _tappable("teacher", teacher, example_inputs, example_kwargs)
    pyramids, stages = _paired(ours, theirs, "p"), _paired(ours, theirs, "c")
    return LayerMatch(ours, theirs, pyramids or stages, stages if pyramids else {})


def _paired(
    student: tuple[Layer, ...], teacher: tuple[Layer, ...], kind: str
) -> dict[str, tuple[Layer, Layer]]:
    ours, theirs = _levels(student, kind), _levels(teacher, kind)
    return {level: (layer, theirs[level]) for level, layer in ours.items() if level in theirs}


def _levels(layers: tuple[Layer, ...], kind: str) -> dict[str, Layer]:
    found = [layer for layer in layers if (layer.pyramid if kind == "p" else layer.stage)]
    found.sort(key=lambda layer: layer.stride)
    return {_level_name(layer.stride, kind): layer for layer in found}


def _level_name(stride: float, kind: str) -> str:
    exponent = math.log2(stride)
    return f"{kind}{exponent:g}" if exponent.is_integer() else f"stride{stride:g}"


def _tappable(
    name: str, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Layer, ...]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"`{name}` must be an nn.Module, got {type(model).__name__}.")
    ended: list[Call] = []
    try:
        args, kwargs = placed((args, kwargs), *home(model))
        root = trace(model, args, kwargs, ended)
    except Exception as error:
        raise ValueError(
            f"`{name}` must run on the example inputs, got {type(error).__name__}: {error}. Both "
            "models get the same ones, each as an argument of its own (`*batch`): where they take "
            "others, match parts that take the same images, such as `teacher.backbone`."
        ) from error
    pixels = first_image(root)
    read_maps(ended, pixels)
    forward = Forward(root, ended, pixels)
    steps = forward.steps()
    stages = {spot.key for spot in forward.stages(steps).values()}
    pyramid = {spot.key for spot in forward.pyramid(steps).values()}
    layers = []
    for call in ended:
        for found in call.put_out:
            spot = Spot(call, found)
            alone = len(call.put_out) == 1 and (call.path or found.keys)
            if not forward.can_be_tapped(call) or not (alone or spot.key in stages | pyramid):
                continue
            layers.append(
                Layer(
                    path=call.path + found.selector,
                    shape=found.shape,
                    stride=forward.stride(found),
                    stage=spot.key in stages,
                    pyramid=spot.key in pyramid,
                    channels_last=found.channels_last,
                    patch_projection=spot.key in stages and forward.is_patch_projection(spot),
                )
            )
    if not layers:
        raise ValueError(
            f"`{name}` must have a module that puts out a feature map (B, C, H, W) of at least one "
            "image, got none."
        )
    return tuple(layers)
