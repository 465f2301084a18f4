"""Other layouts as feature maps `(B, C, H, W)`: for the `convert` of a tap or a distiller."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import KW_ONLY, dataclass

from torch import Tensor

from .._checks import require_callable, require_count, require_tensor


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

    For images of one size; :class:`PatchTokens` follows the size of each batch's image.

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
    height, width = _pair("size", size)
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


@dataclass(frozen=True)
class PatchTokens:
    """Tokens of a vision transformer as feature maps of each batch's own height and width.

    Given as the `convert` of a tap or a distiller, it takes them from the image that enters the
    model: `convert={"c4": (None, PatchTokens(14, prefix=5))}`. Where a part around the tapped
    module gets the image resized, it takes them from that. For an image of `h` x `w` and patches of
    `p` x `q` the map is that of :func:`from_tokens` with `H = h/p` and `W = w/q`. These may be
    no whole numbers. The count of tokens then tells whether the model cuts the image (DINOv2, both
    are rounded down) or pads it (timm's `dynamic_img_pad`, both are rounded up).

    Args:
        patch_size: height and width of a patch, or a pair `(height, width)`; where patches overlap,
            their stride.
        prefix: how many tokens in front belong to no position (class, registers).
        suffix: how many behind.

    Shape:
        Called with `tokens` `(B, prefix + H*W + suffix, C)` and `image_size` `(h, w)`, it returns
        `(B, C, H, W)`, a view.

    Raises:
        TypeError: an argument is not of its kind.
        ValueError: an argument is too small, or the count of tokens is not that of the image.
        RuntimeError: in a tap's `pop`, no call was seen with an image `(B, C, h, w)`.

    Example:
        >>> import torch
        >>> maps = PatchTokens(14, prefix=5)
        >>> maps(torch.zeros(2, 5 + 20 * 30, 384), (280, 420)).shape
        torch.Size([2, 384, 20, 30])
        >>> maps(torch.zeros(2, 5 + 30 * 20, 384), (420, 280)).shape
        torch.Size([2, 384, 30, 20])
    """

    patch_size: int | tuple[int, int]
    _: KW_ONLY
    prefix: int = 0
    suffix: int = 0

    def __post_init__(self) -> None:
        self._patch()
        require_count("prefix", self.prefix, least=0)
        require_count("suffix", self.suffix, least=0)

    def _patch(self) -> tuple[int, int]:
        if isinstance(self.patch_size, (tuple, list)):
            return _pair("patch_size", self.patch_size)
        require_count("patch_size", self.patch_size)
        return self.patch_size, self.patch_size

    def __call__(self, tokens: Tensor, image_size: tuple[int, int]) -> Tensor:
        require_tensor("tokens", tokens)
        patch_height, patch_width = self._patch()
        height, width = _pair("image_size", image_size)
        cut = height // patch_height, width // patch_width
        padded = -(-height // patch_height), -(-width // patch_width)
        around = self.prefix + self.suffix
        if tokens.dim() == 3:
            for size in (cut, padded):
                if 0 < size[0] * size[1] == tokens.shape[1] - around:
                    return from_tokens(tokens, size, prefix=self.prefix, suffix=self.suffix)
        counts = " or ".join(
            f"{self.prefix} + {rows} x {columns} + {self.suffix}"
            for rows, columns in dict.fromkeys((cut, padded))
        )
        raise ValueError(
            f"`tokens` must have the shape (B, {counts}, C) (`prefix`, positions, `suffix`) for an "
            f"image of {height} x {width} in patches of {patch_height} x {patch_width}, "
            f"got {tuple(tokens.shape)}."
        )


Convert = Callable[[Tensor], Tensor] | PatchTokens


def converted(
    function: Convert | None, feature: Tensor, image_size: tuple[int, int] | None, alias: str
) -> Tensor:
    """What a tap hands on of a capture."""
    if function is None:
        return feature
    if isinstance(function, PatchTokens):
        if image_size is None:
            raise RuntimeError(
                f"`convert[{alias!r}]` must know the image's size, got no image (B, C, H, W) in a "
                "call of the model or of a part around the tapped module: call these and not "
                "their methods, or take `featkd.from_tokens` with a size."
            )
        return function(feature, image_size)
    found: object = function(feature)
    if not isinstance(found, Tensor):
        raise TypeError(f"`convert[{alias!r}]` must return a tensor, got {type(found).__name__}.")
    return found


def _pair(name: str, value: object) -> tuple[int, int]:
    """Of height and width."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"`{name}` must be a pair (H, W), got {value!r}.")
    require_count(f"{name}[0]", value[0])
    require_count(f"{name}[1]", value[1])
    return value[0], value[1]


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
