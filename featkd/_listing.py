"""Layers as text: the pairs of two models, and all of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ._table import table

if TYPE_CHECKING:
    from .matching import Layer


def pair_table(pairs: Mapping[str, tuple[Layer, Layer]]) -> str:
    rows = [("level", "stride", "student", "shape", "teacher", "shape")]
    notes = []
    for level, pair in pairs.items():
        ours, theirs = ((layer.path, layer._printed_shape) for layer in pair)
        rows.append((level, f"{pair[0].stride:g}", *ours, *theirs))
        notes += [
            f"{level}, the {model}'s {layer.path!r}: patch projection: tokens follow, "
            "see PatchTokens"
            for model, layer in zip(("student", "teacher"), pair, strict=True)
            if layer.patch_projection
        ]
    return "\n".join([table(rows), *notes])


def listing(name: str, layers: tuple[Layer, ...]) -> str:
    """The stages, the blocks that they are made of, and whatever lies no deeper."""
    deepest = max((_depth(layer) for layer in layers if layer.stage), default=2) + 1
    shown = [layer for layer in layers if _depth(layer) <= deepest]
    rows: list[tuple[str, ...]] = [(f"{name}'s path", "shape", "stride", "channels")]
    for layer in shown:
        rows.append((layer.path, layer._printed_shape, f"{layer.stride:g}", str(layer.channels)))
    hidden = len(layers) - len(shown)
    return table(rows) + (f"\n({hidden} deeper layers in `.{name}`)" if hidden else "")


def _depth(layer: Layer) -> int:
    return layer.path.count(".")
