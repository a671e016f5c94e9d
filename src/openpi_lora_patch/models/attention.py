"""Attention of both towers' tokens to each other, in the three ways that a plan can choose.

Each takes packed projections, (batch, length, (heads + 2 * kv_heads) * head_dim), one a tower, to what the tokens of
that tower attended to, (batch, length, heads * head_dim).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.gemma import modeling_gemma

from ..lora import kernels
from .shared_attention import SharedAttention

# cuDNN's attention is fastest where the number of tokens is a multiple of this.
_ALIGNMENT = 128
_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# Before 2.6 torch takes the first that it can of an order of its own.
_IN_ORDER = {"set_priority": True} if "set_priority" in inspect.signature(sdpa_kernel).parameters else {}


class Prefix(NamedTuple):
    """A prefix that attends to all of itself and to nothing else, but for tokens that are not there.

    Attributes:
        there: (batch, length), bool.
        whole: whether all are there.
    """

    there: Tensor
    whole: bool


class Eager:
    """transformers' eager attention on openpi's mask."""

    def __init__(self, mask: Tensor, rotary: tuple[Tensor, Tensor]) -> None:
        self.mask, self.rotary = mask, rotary

    def __call__(self, attentions: Sequence[Any], packed: Sequence[Tensor], *, prune: bool) -> Sequence[Tensor | None]:
        """With `prune`, None for the prefix."""
        first = attentions[0]
        joint = torch.cat(tuple(packed), dim=1).unflatten(-1, (-1, first.head_dim)).transpose(1, 2)
        query, key, value = joint.split(_heads(first, joint.shape[1]), dim=1)
        query, key = modeling_gemma.apply_rotary_pos_emb(query, key, *self.rotary)
        output, _ = modeling_gemma.eager_attention_forward(first, query, key, value, self.mask, first.scaling)
        prefix, suffix = output.flatten(2).split([part.shape[1] for part in packed], dim=1)
        return None if prune else prefix, suffix


class Fused:
    """torch's attention kernels, on openpi's mask. Tokens that nothing attends to make them a multiple of 128."""

    def __init__(self, mask: Tensor, rotary: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
        self.rotary, self.added = rotary, -mask.shape[-1] % _ALIGNMENT
        self.mask = F.pad(_padded(mask, self.added, dtype), (0, 0, 0, self.added))

    def __call__(self, attentions: Sequence[Any], packed: Sequence[Tensor], *, prune: bool) -> Sequence[Tensor | None]:
        """See `Eager`."""
        query, key, value = _rotated(attentions[0], packed, self.rotary, self.added, apart=False)
        lengths = [part.shape[1] for part in packed]
        start = lengths[0] if prune else 0
        output = _scaled_dot_product(query[:, start:], key, value, self.mask[:, :, start:])
        prefix, suffix, _ = output.split([lengths[0] - start, lengths[1], self.added], dim=1)
        return None if prune else prefix, suffix


class Shared:
    """The prefix apart from the suffix, for heads that share their keys and values: heads are so many more queries.

    The prefix then needs no mask of tokens times tokens.
    """

    def __init__(
        self, mask: Tensor, rotary: tuple[Tensor, Tensor], dtype: torch.dtype, heads: int, prefix: Prefix, *, own: bool
    ) -> None:
        """`own`: the prefix by `SharedAttention`, else by torch's kernels, which want it whole."""
        self.rotary, self.prefix, self.own = rotary, prefix, own
        self.length, self.added = prefix.there.shape[1], -mask.shape[-1] % _ALIGNMENT
        self.mask = _padded(mask[:, :, self.length :], self.added, dtype).repeat_interleave(heads, dim=2)

    def __call__(self, attentions: Sequence[Any], packed: Sequence[Tensor], *, prune: bool) -> Sequence[Tensor | None]:
        """See `Eager`."""
        first, second, key, value = _rotated(attentions[0], packed, self.rotary, self.added, apart=True)
        suffix = _scaled_dot_product(second.flatten(1, 2).unsqueeze(2), key, value, self.mask)
        suffix = suffix.unflatten(1, second.shape[1:3]).flatten(2)
        return None if prune else self._prefix(first, key, value), suffix

    def _prefix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # Split, not sliced: the gradient of a split is one copy.
        lengths = [self.length, key.shape[1] - self.length]
        key, value = (tensor.split(lengths, dim=1)[0] for tensor in (key, value))
        if not self.own:
            return _scaled_dot_product(query, key, value)
        there = None if self.prefix.whole else self.prefix.there
        output = SharedAttention.apply(query.flatten(1, 2), key.squeeze(2), value.squeeze(2), there)
        return cast(Tensor, output.view(*query.shape[:2], -1))


def _rotated(
    first: Any, packed: Sequence[Tensor], rotary: tuple[Tensor, Tensor], added: int, *, apart: bool
) -> Sequence[Tensor]:
    heads = _heads(first, packed[0].shape[-1] // first.head_dim)[0]
    parts = [part.unflatten(-1, (-1, first.head_dim)) for part in packed]
    return cast(Sequence[Tensor], kernels.JoinRotated.apply(*rotary, heads, added, apart, *parts))


def _padded(mask: Tensor, added: int, dtype: torch.dtype) -> Tensor:
    # openpi's blocked score is finite, so a row that blocks everything is no division by zero; it stays so here.
    return F.pad(mask.to(dtype), (0, added), value=float("-inf"))


def _scaled_dot_product(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """`query` (batch, queries, heads, head_dim), keys and values with as many heads or fewer; the result's are flat."""
    groups = query.shape[2] // key.shape[2]
    # Heads that share keys and values read the same memory.
    key, value = (tensor.unsqueeze(3).expand(-1, -1, -1, groups, -1).flatten(2, 3) for tensor in (key, value))
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    with sdpa_kernel(_BACKENDS, **_IN_ORDER):
        output = F.scaled_dot_product_attention(query, key, value, mask)
    return output.transpose(1, 2).flatten(2)


def _heads(attention: Any, packed: int) -> list[int]:
    """How many heads of queries, keys and values there are among `packed`."""
    kv_heads = packed // (attention.num_key_value_groups + 2)
    return [packed - 2 * kv_heads, kv_heads, kv_heads]
