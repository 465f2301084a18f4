"""Other layouts as feature maps `(B, C, H, W)`: for the `convert` of a tap or a distiller."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from torch import Tensor

from .._checks import require_callable, require_count, require_tensor

Convert = Callable[[Tensor], Tensor]


def from_channels_last(features: Tensor) -> Tensor:
    """Feature maps from channels-last ones, such as a Swin transformer's: `A[b, c, i, j]` is
    `features[b, i, j, c]`.

    Args:
        features: `(B, H, W, C)`, any floating dtype.

    Returns:
        `(B, C, H, W)`, a view.

    Raises:
        TypeError: `features` is no floating-point tensor.
        ValueError: `features` is not of shape `(B, H, W, C)`.

    Example:
        >>> import torch
        >>> from_channels_last(torch.zeros(2, 14, 20, 96)).shape
        torch.Size([2, 96, 14, 20])
    """
    require_tensor("features", features)
    if features.dim() != 4 or 0 in features.shape[1:]:
        raise ValueError(
            "`features` must have the shape (B, H, W, C) with H, W and C at least 1, "
            f"got {tuple(features.shape)}."
        )
    return features.permute(0, 3, 1, 2)


def from_tokens(
    tokens: Tensor, size: tuple[int, int], *, prefix: int = 0, suffix: int = 0
) -> Tensor:
    """Feature maps from the tokens of a vision transformer, row by row: `A[b, c, i, j]` is
    `tokens[b, prefix + i*W + j, c]`.

    Args:
        tokens: `(B, prefix + H*W + suffix, C)`, any floating dtype.
        size: `(H, W)`: the image's height and width over the patch's.
        prefix: how many tokens in front belong to no position (class, registers).
        suffix: how many behind (the detection tokens of YOLOS).

    Returns:
        `(B, C, H, W)`, a view.

    Raises:
        TypeError: `tokens` is no floating-point tensor, or another argument not of its kind.
        ValueError: `tokens` is not of shape `(B, prefix + H*W + suffix, C)`.

    Example:
        >>> import torch
        >>> from_tokens(torch.zeros(2, 1 + 14 * 20, 192), (14, 20), prefix=1).shape
        torch.Size([2, 192, 14, 20])
    """
    require_tensor("tokens", tokens)
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise TypeError(f"`size` must be a pair (H, W), got {size!r}.")
    height, width = size
    require_count("size[0]", height)
    require_count("size[1]", width)
    require_count("prefix", prefix, least=0)
    require_count("suffix", suffix, least=0)
    positions = height * width
    count = prefix + positions + suffix
    if tokens.dim() != 3 or tokens.shape[1] != count or tokens.shape[2] == 0:
        raise ValueError(
            f"`tokens` must have the shape (B, {count}, C), {prefix} + {height} x {width} + "
            f"{suffix} tokens (`prefix`, positions, `suffix`), got {tuple(tokens.shape)}."
        )
    images, _, channels = tokens.shape
    maps = tokens[:, prefix : prefix + positions]
    return maps.transpose(1, 2).reshape(images, channels, height, width)


def converts_by_side(convert: object, levels: Collection[str]) -> tuple[dict[str, Convert], ...]:
    """The student's and the teacher's functions by level."""
    if not isinstance(convert, Mapping | None):
        found = type(convert).__name__
        raise TypeError(f"`convert` must be a mapping from level to function, got {found}.")
    sides: tuple[dict[str, Convert], ...] = ({}, {})
    for level, functions in (convert or {}).items():
        if level not in levels:
            raise ValueError(f"`convert` must name levels of {list(levels)}, got {level!r}.")
        pair = (functions, functions) if callable(functions) else functions
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(
                f"`convert[{level!r}]` must be a function or a (student's, teacher's) pair of "
                f"functions or None, got {functions!r}."
            )
        for side, function in zip(sides, pair, strict=True):
            require_callable(f"convert[{level!r}]", function)
            if function is not None:
                side[level] = function
    return sides
