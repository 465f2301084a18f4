"""The sums over all pairs of positions, without the matrix of many pairs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._blocks import Part, in_forward_mode, map_blocks
from ._numerics import dtype_for_few, full_precision

_PAIRS = 1 << 22  # held at a time where no kernel does without their matrix
# Square maps of so many pairs a batch are computed as the formula is written: faster, in 8 MiB a
# matrix. Longer sums would lose digits.
_FEW = 1 << 21
# Up to so much work the matrix of rectified sums is faster in float64 than sorted keys: its pairs,
# each multiplied with the values' width, and rectified at the cost of 16 products.
_FEW_RECTIFIED = 3 << 20


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """`softmax(scale * query^T key) value`; `(B, D, N), (B, D, M), (B, E, M) -> (B, E, N)`."""
    if torch.compiler.is_compiling():  # a choice would bind the shapes
        return _fused_attention(query.mT, key.mT, value.mT, scale).mT
    few = query.shape[0] * max(query.shape[2], key.shape[2]) ** 2 <= _FEW
    if few or in_forward_mode():  # the kernels have no such derivative
        with full_precision(query):
            logits = query.mT @ key
            weights = (logits if scale == 1 else scale * logits).softmax(2)
            return (weights @ value.mT).mT
    result: Tensor = _Attend.apply(query.mT, key.mT, value.mT, scale)
    return result.mT


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    # The kernels want one width for all, a multiple of 8, and a dense last dimension. Else they
    # make the matrix of pairs. Zeros add nothing.
    width = -(-max(query.shape[-1], value.shape[-1]) // 8) * 8
    q, k, v = (
        F.pad(x, (0, width - x.shape[-1])).contiguous().unsqueeze(1) for x in (query, key, value)
    )
    with full_precision(query):
        result = F.scaled_dot_product_attention(q, k, v, scale=scale)
    # With few keys some kernels pass over a NaN. Where all logits of a query overflow to -inf they
    # give 0. 0 * NaN or 0 * inf shows both to the queries that they concern.
    largest = query.detach().abs().amax(-1, keepdim=True)
    largest = largest * key.detach().abs().amax((1, 2), keepdim=True)
    return result.squeeze(1)[..., : value.shape[-1]] + 0 * (largest * (scale * query.shape[-1]))


def _query_blocks(query: Tensor, key: Tensor) -> list[slice]:
    """All queries at once, but for float64 on a GPU: torch has no fused kernel of it there."""
    count = width = query.shape[1]
    if query.dtype == torch.float64 and query.device.type != "cpu":
        width = max(1, _PAIRS // max(1, query.shape[0] * key.shape[1]))
    return [slice(start, start + width) for start in range(0, count, width)]


class _Attend(torch.autograd.Function):
    """The fused kernels, whose backward cannot be differentiated, with one that can where asked."""

    generate_vmap_rule = True

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        blocks = _query_blocks(query, key)
        parts = [_fused_attention(query[:, block], key, value, scale) for block in blocks]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.scale = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        if not torch.is_grad_enabled():
            blocks = _query_blocks(query, key)
            if len(blocks) == 1:  # `is_grads_batched` takes no slices
                return *_gradients(query, key, value, ctx.scale, grad), None
            parts, to_key, to_value = [], torch.zeros_like(key), torch.zeros_like(value)
            for block in blocks:
                part = _gradients(query[:, block], key, value, ctx.scale, grad[:, block])
                parts.append(part[0])
                to_key += part[1]
                to_value += part[2]
            return torch.cat(parts, 1), to_key, to_value, None
        with full_precision(query):
            weights = (ctx.scale * query @ key.mT).softmax(-1)
            to_weights = grad @ value.mT
            to_logits = weights * (to_weights - (weights * to_weights).sum(-1, keepdim=True))
            to_query = ctx.scale * to_logits @ key
            to_key = ctx.scale * to_logits.mT @ query
            return to_query, to_key, weights.mT @ grad, None


def _gradients(
    query: Tensor, key: Tensor, value: Tensor, scale: float, grad: Tensor
) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (query, key, value))
        output = _fused_attention(q, k, v, scale)
    return torch.autograd.grad(output, (q, k, v), grad)


def rectified_sum(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
    """`sum_j relu(theta_i + phi_j) g_j`; `(B, N), (B, M), (B, D, M) -> (B, D, N)`.

    In O(N log N), beyond few pairs.
    """
    compiling = torch.compiler.is_compiling()  # a choice would bind the shapes
    if not compiling and theta.numel() * phi.shape[1] * (g.shape[1] + 16) <= _FEW_RECTIFIED:
        theta, phi, value = (x.to(dtype_for_few(g)) for x in (theta, phi, g))
        # `relu` would hide a -inf: 0 * -inf.
        hidden = 0 * (theta.detach().clamp(max=0) + phi.detach().amin(1, keepdim=True))
        with full_precision(g):
            weights = (phi[:, :, None] + theta[:, None]).relu()
            return (value @ weights + hidden[:, None]).to(g.dtype)
    if compiling or in_forward_mode():
        return _prefix_sums(theta, phi, g)[1]
    result: Tensor = _RectifiedSums.apply(theta, phi, g)[1]
    return result


def _prefix_sums(theta: Tensor, phi: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The sums over the keys with `theta_i + phi_j > 0` of `g_j` and of `(theta_i + phi_j) g_j`.

    For each query these keys are the first few in the order of falling `phi`.
    """
    least = phi.detach().amin(1, keepdim=True)
    # A key that no query sees is as well at the border, where its size costs the others no digits.
    border = -torch.where(theta.isnan(), -torch.inf, theta).detach().amax(1, keepdim=True)
    falling, order = (-torch.maximum(phi, border)).sort(dim=1)
    count = torch.searchsorted(falling.detach().contiguous(), theta.detach().contiguous())
    # The sum theta + phi bears any shift; with centred keys the two terms below cancel least, by
    # the median however far a few lie off.
    # An index of it would bind the shape when compiled.
    centre = falling.detach().narrow(1, falling.shape[1] // 2, 1)
    theta, falling = theta - centre, falling - centre

    def sums(part: Part) -> tuple[Tensor, Tensor]:
        keys = part(g)
        keys = keys.gather(2, order[:, None].expand_as(keys))
        prefixes = F.pad(keys.cumsum(2), (1, 0))
        moments = F.pad((keys * -falling[:, None]).cumsum(2), (1, 0))
        index = count[:, None].expand(-1, keys.shape[1], -1)
        step = prefixes.gather(2, index)
        # A NaN or inf in a key that a query does not take is not hidden: 0 * NaN.
        hidden = 0 * (prefixes[..., -1:] + least[..., None])
        return step, theta[:, None] * step + moments.gather(2, index) + hidden

    step, rectified = map_blocks(g, sums)
    return step, rectified


class _RectifiedSums(torch.autograd.Function):
    """Both sums; their gradients are the same sums with queries and keys in each other's place."""

    generate_vmap_rule = True

    @staticmethod
    def forward(theta: Tensor, phi: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return _prefix_sums(theta, phi, g)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs, output[0])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        theta, phi, g, step = ctx.saved_tensors
        from_step, from_rectified = grads
        to_theta = to_phi = to_g = None
        batched = torch._C._functorch.is_legacy_batchedtensor
        # In `is_grads_batched` a function of ours leaves no graph.
        plain = any(grad is not None and batched(grad) for grad in grads)
        sums = _prefix_sums if plain else _RectifiedSums.apply
        if from_rectified is not None:
            swapped_step, to_g = sums(phi, theta, from_rectified)
            to_theta = (from_rectified * step).sum(1)
            to_phi = (g * swapped_step).sum(1)
        if from_step is not None:
            to_g_too = sums(phi, theta, from_step)[0]
            to_g = to_g_too if to_g is None else to_g + to_g_too
        return to_theta, to_phi, to_g
