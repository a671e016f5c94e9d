"""Adapters with the parameters that openpi's JAX code trains, so that a run in PyTorch is the same model.

Source: openpi, `models/lora.py` (commit 15a9616). Everything outside this file sees `lora_A` (r, in) and `lora_B`
(out, r) as of any `LoRALinear`; of what they are made, and where they start, is JAX's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import LoRAError
from .layer import LoRALinear

_STD = 0.01


class JaxLoRALinear(LoRALinear):
    """A `LoRALinear` both of whose matrices start as N(0, 0.01)."""

    def reset_parameters(self) -> None:
        """Start afresh, which changes the base's output a little."""
        for parameter in self.parameters(recurse=False):
            nn.init.normal_(parameter, std=_STD)


class PerHeadLoRALinear(JaxLoRALinear):
    """An adapter for each head's part of the output: `lora_A` holds their As, `lora_B_heads` (heads, out / heads,
    r / heads) their Bs, the blocks of the diagonal of `lora_B`.
    """

    def _make_rest(self) -> None:
        heads = self.config.heads
        self.lora_B_heads = self._parameter(heads, self.out_features // heads, self.config.rank // heads)

    @property
    def lora_B(self) -> Tensor:  # type: ignore[override]
        """(out, r), block-diagonal."""
        return torch.block_diag(*self.lora_B_heads)

    def parameter_for(self, B: Tensor) -> Tensor:
        """See `LoRALinear`.

        Raises:
            LoRAError: `B` is not block-diagonal.
        """
        return diagonal_blocks(B, self.config.heads)


class HeadSumLoRALinear(JaxLoRALinear):
    """An adapter whose `lora_B` is the sum of `lora_B_heads` (heads, out, r).

    All of these have the gradient of the sum, so an optimizer that scales steps, as AdamW does, moves the sum `heads`
    times as far as one B. How the sum is split over the heads changes neither.
    """

    def _make_rest(self) -> None:
        self.lora_B_heads = self._parameter(self.config.heads, self.out_features, self.config.rank)

    @property
    def lora_B(self) -> Tensor:  # type: ignore[override]
        """(out, r)."""
        return self.lora_B_heads.sum(0)

    def parameter_for(self, B: Tensor) -> Tensor:
        """See `LoRALinear`: all of it in the first head, so that the sum has its bits."""
        return first_of(B, self.config.heads)


def diagonal_blocks(B: Tensor, heads: int) -> Tensor:
    """The blocks (heads, out / heads, r / heads) of a block-diagonal matrix (out, r).

    Raises:
        LoRAError: another matrix.
    """
    blocks = B.unflatten(1, (heads, -1)).unflatten(0, (heads, -1)).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    if blocks.count_nonzero() != B.count_nonzero():
        raise LoRAError("An adapter is not one for each head.", expected="a block-diagonal B", found="another")
    return blocks


def first_of(B: Tensor, heads: int) -> Tensor:
    """`B` and zeros, (heads, *), whose sum is `B`."""
    return F.pad(B[None], (0, 0) * B.ndim + (0, heads - 1))


FORMS = {
    "plain": LoRALinear,
    "jax": JaxLoRALinear,
    "per_head": PerHeadLoRALinear,
    "head_sum": HeadSumLoRALinear,
}
