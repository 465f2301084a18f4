"""The four non-local relations of the positions of a feature map."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import require_number, require_same_device, require_tensor
from ._numerics import cast, compute_dtype, full_precision, savable, widened
from ._pairs import attend, rectified_sum

# So many products at most are summed at a time: some processors add them one by one.
_SUMMED = 1 << 13


def gaussian_relation(features: Tensor, g: Tensor) -> Tensor:
    r"""Gaussian relation: every position's mean of g, weighted by its likeness to the others.

    .. math:: r_i = \sum_j \mathrm{softmax}_j(x_i \cdot x_j) \, g_j

    Args:
        features: x, `(B, C, *positions)`.
        g: `(B, D, *positions)`, the same positions.

    Returns:
        `(B, D, *positions)`, in the unit of g; float32 or wider. Memory is linear in the positions
        beyond 2^21 pairs a batch (forward mode and a second derivative build their matrix).

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: the shapes or devices do not fit.

    Reference: Zhang & Ma (ICLR 2021), section 3.2; Wang et al. (CVPR 2018), eq. (2).

    Example:
        >>> import torch
        >>> gaussian_relation(torch.zeros(1, 3, 2, 2), torch.arange(4.0).reshape(1, 1, 2, 2))
        tensor([[[[1.5000, 1.5000],
                  [1.5000, 1.5000]]]])
    """
    _require_relation(features, features, g, query="features", key="features")
    # Here, so that its gradient is rounded once.
    wide = cast(savable(features), compute_dtype(features))
    return embedded_gaussian(wide, wide, g)


def embedded_gaussian_relation(
    theta: Tensor, phi: Tensor, g: Tensor, *, scale: float = 1.0
) -> Tensor:
    r"""Embedded Gaussian relation: softmax attention of queries theta to keys phi with values g.

    .. math:: r_i = \sum_j \mathrm{softmax}_j(s \, \theta_i \cdot \phi_j) \, g_j

    Args:
        theta: queries, `(B, C, *positions)`.
        phi: keys, `(B, C, *key_positions)`; they may be sub-sampled.
        g: values, `(B, D, *key_positions)`.
        scale: s; 1 in the paper, :math:`C^{-1/2}` in transformers.

    Returns:
        `(B, D, *positions of theta)`, in the unit of g; float32 or wider. Memory is linear in the
        positions beyond 2^21 pairs a batch (a second derivative builds their matrix).

    Raises:
        TypeError: an argument is no floating-point tensor, or `scale` no number.
        ValueError: the shapes or devices do not fit.

    Reference: Zhang & Ma (ICLR 2021), section 3.2; Wang et al. (CVPR 2018), eq. (3).

    Example:
        >>> import torch
        >>> theta = torch.tensor([[[0.0, 100.0]]])
        >>> phi, g = torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[2.0, 4.0]]])
        >>> embedded_gaussian_relation(theta, phi, g)
        tensor([[[3., 4.]]])
    """
    _require_relation(theta, phi, g)
    require_number("scale", scale)
    return embedded_gaussian(theta, phi, g, float(scale))


def dot_product_relation(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
    r"""Dot-product relation, in time and memory linear in the positions.

    .. math:: r_i = \frac{1}{N} \sum_j (\theta_i \cdot \phi_j) \, g_j
                  = \Bigl( \frac{1}{N} \sum_j g_j \phi_j^\top \Bigr) \theta_i

    Args:
        theta: `(B, C, *positions)`.
        phi: `(B, C, *key_positions)`; they may be sub-sampled. N is the number of keys.
        g: `(B, D, *key_positions)`.

    Returns:
        `(B, D, *positions of theta)`, in the unit of theta * phi * g; float32 or wider.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: the shapes or devices do not fit.

    Reference: Zhang & Ma (ICLR 2021), section 3.2; Wang et al. (CVPR 2018), eq. (4).

    Example:
        >>> import torch
        >>> theta = torch.tensor([[[1.0, 2.0]]])
        >>> phi, g = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[1.0, 1.0]]])
        >>> dot_product_relation(theta, phi, g)
        tensor([[[3.5000, 7.0000]]])
    """
    _require_relation(theta, phi, g)
    return dot_product(theta, phi, g)


def concatenation_relation(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
    r"""Concatenation relation, exact, in O(N log N) time and memory linear in the positions.

    .. math:: r_i = \frac{1}{N} \sum_j \mathrm{relu}(\theta_i + \phi_j) \, g_j

    The logit of a pair, :math:`w \cdot [\theta(x_i), \phi(x_j)]`, is a sum of one number a side.
    In the order of falling :math:`\phi` the keys that a query sees are the first few. So prefix
    sums over the sorted keys hold the result. Few pairs are summed one by one.

    Args:
        theta: the queries' logits, `(B, 1, *positions)`.
        phi: the keys' logits, `(B, 1, *key_positions)`; they may be sub-sampled. N is the number of
            keys.
        g: `(B, D, *key_positions)`.

    Returns:
        `(B, D, *positions of theta)`, in the unit of theta * g; float32 or wider.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: the shapes or devices do not fit.

    Reference: Zhang & Ma (ICLR 2021), section 3.2; Wang et al. (CVPR 2018), eq. (5).

    Example:
        >>> import torch
        >>> theta = torch.tensor([[[0.0, 2.0]]])
        >>> phi, g = torch.tensor([[[1.0, -1.0]]]), torch.tensor([[[1.0, 10.0]]])
        >>> concatenation_relation(theta, phi, g)  # (1 * 1) / 2, (3 * 1 + 1 * 10) / 2
        tensor([[[0.5000, 6.5000]]])
    """
    _require_relation(theta, phi, g)
    if theta.shape[1] != 1:
        raise ValueError(
            f"`theta` must have the shape (B, 1, *positions), got {tuple(theta.shape)}."
        )
    return concatenation(theta, phi, g)


def embedded_gaussian(theta: Tensor, phi: Tensor, g: Tensor, scale: float = 1.0) -> Tensor:
    query, key, value = _flat(theta, phi, g)
    return _at_positions(attend(query, key, value, scale), theta)


def dot_product(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
    query, key, value = _flat(theta, phi, g)
    keys = key.shape[2]
    with full_precision(query):
        if torch.compiler.is_compiling():  # the other forms would bind the shapes
            relation = (value @ key.mT / keys) @ query
        elif _pairs_are_fewer(query, key, value):
            relation = value @ (key.mT @ query / keys)
        else:
            relation = _product(_sum_of_products(value, key) / keys, query)
    return _at_positions(relation, theta)


def _pairs_are_fewer(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `value (key^T query)` takes fewer multiplications than `(value key^T) query`."""
    (width, queries), keys, width_of_value = query.shape[1:], key.shape[2], value.shape[1]
    if max(queries, keys) > _SUMMED:
        return False
    return queries * keys * (width + width_of_value) < width * width_of_value * (queries + keys)


def _sum_of_products(value: Tensor, key: Tensor) -> Tensor:
    """`(B, D, M), (B, C, M) -> (B, D, C)`."""
    if key.shape[2] <= _SUMMED:
        return value @ key.mT
    parts = zip(*(torch.split(x, _SUMMED, 2) for x in (value, key)), strict=True)
    return torch.stack([v @ k.mT for v, k in parts]).sum(0)


def _product(context: Tensor, query: Tensor) -> Tensor:
    """`(B, D, C), (B, C, N) -> (B, D, N)`; the gradient of `context` is a sum of products too."""
    if query.shape[2] <= _SUMMED:
        return context @ query
    return torch.cat([context @ q for q in torch.split(query, _SUMMED, 2)], 2)


def concatenation(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
    query, key, value = _flat(theta, phi, g)
    return _at_positions(rectified_sum(query[:, 0], key[:, 0], value / key.shape[2]), theta)


def _flat(*tensors: Tensor) -> list[Tensor]:
    """Each as `(B, width, positions)`, in the widest dtype."""
    return [savable(x).flatten(2) for x in widened(*tensors)]


def _at_positions(flat: Tensor, like: Tensor) -> Tensor:
    return flat.reshape(flat.shape[:2] + like.shape[2:])


def require_positions(name: str, value: Tensor) -> None:
    require_tensor(name, value)
    if value.dim() < 3 or 0 in value.shape[1:]:
        raise ValueError(
            f"`{name}` must have the shape (B, D, *positions) with at least one position, "
            f"got {tuple(value.shape)}."
        )


def _require_relation(
    theta: Tensor, phi: Tensor, g: Tensor, query: str = "theta", key: str = "phi"
) -> None:
    """`query` and `key` are the caller's names of theta and phi."""
    for name, value in ((query, theta), (key, phi), ("g", g)):
        require_positions(name, value)
        require_same_device(name, value, query, theta)
    if phi.shape[:2] != theta.shape[:2]:
        raise ValueError(
            f"`{key}` must have the batch and width of `{query}` {tuple(theta.shape)}, "
            f"got {tuple(phi.shape)}."
        )
    if g.shape[0] != phi.shape[0] or g.shape[2:] != phi.shape[2:]:
        raise ValueError(
            f"`g` must have the batch and positions of `{key}` {tuple(phi.shape)}, "
            f"got {tuple(g.shape)}."
        )
