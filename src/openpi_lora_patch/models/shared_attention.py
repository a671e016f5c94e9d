"""Attention of many rows to keys and values that all of them share, as one autograd function.

With Gemma's one key and value for all heads, heads are so many more rows. Triton on a GPU, else plain torch.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from ..lora import pointwise


def fits(device: torch.device) -> bool:
    """Whether the kernels can run: their tiles are made for the 227 KB of shared memory of a Hopper GPU."""
    if device.type != "cuda" or not pointwise.has_triton():
        return False
    properties: Any = torch.cuda.get_device_properties(device)
    return bool(properties.shared_memory_per_block_optin >= 200 * 1024)


class SharedAttention(torch.autograd.Function):
    """`softmax(query @ key.T / sqrt(dim)) @ value`.

    Inputs: query (batch, rows, dim); key and value (batch, keys, dim); there (batch, keys), bool: which keys there are,
    or None for all. A row without any gets a mean of all values.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, there: Tensor | None) -> Tensor:
        query, scale = query.contiguous(), query.shape[-1] ** -0.5
        output, level = (_triton().forward if query.is_cuda else _forward)(query, key, value, there, scale)
        ctx.save_for_backward(query, key, value, there, output, level)
        return cast(Tensor, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, there, output, level = ctx.saved_tensors
        function, scale = _triton().backward if query.is_cuda else _backward, query.shape[-1] ** -0.5
        return *function(grad.contiguous(), query, key, value, there, scale, output, level), None


def _forward(query: Tensor, key: Tensor, value: Tensor, there: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    scores = _scores(query, key, there, scale)
    return (scores.softmax(-1).to(value.dtype) @ value), scores.logsumexp(-1)


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    there: Tensor | None,
    scale: float,
    output: Tensor,
    level: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    weights = torch.exp(_scores(query, key, there, scale) - level[..., None])
    change = grad @ value.transpose(1, 2) - (grad * output).sum(-1, keepdim=True)
    slopes = (weights * change * scale).to(query.dtype)
    return slopes @ key, slopes.transpose(1, 2) @ query, weights.to(grad.dtype).transpose(1, 2) @ grad


def _scores(query: Tensor, key: Tensor, there: Tensor | None, scale: float) -> Tensor:
    scores = pointwise.widened(query) @ pointwise.widened(key).transpose(1, 2) * scale
    return scores if there is None else scores.masked_fill(~there[:, None], -1e30)


def _triton() -> Any:
    from . import triton_attention

    return triton_attention
