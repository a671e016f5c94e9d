"""DoRA: an adapter that also trains the norm of each row of the adapted weight.

    weight' = lora_magnitude_vector * V / ||V||        V = weight + scaling * B A        ||V|| of each row

Source: Liu et al. 2024 (arXiv:2402.09353); ||V|| counts as a constant in the backward pass (its section 4.3).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layer import LoRALinear


class DoRALinear(LoRALinear):
    """A `LoRALinear` whose weight has rows of the norms `lora_magnitude_vector` (out), float32.

    These start as the norms of the base's rows, so that a fresh adapter changes nothing. Dropout is PEFT's: what the
    base gives keeps its input whole, and what is added to that sees the input with zeros.

    What it costs: V is never formed. Every forward reads the base weight twice more, for its norms and for its product
    with `lora_A`; a quantised base is made dense once more for these, and let go. The backward pass keeps two
    tensors of the output's size that LoRA's does not. Merged, it costs nothing.
    """

    lora_magnitude_vector: nn.Parameter

    def _make_rest(self) -> None:
        super()._make_rest()
        self.lora_magnitude_vector = self._parameter(self.out_features)

    def reset_parameters(self) -> None:
        """Start afresh: an adapter that changes nothing."""
        super().reset_parameters()
        self.follow_base()

    @torch.no_grad()
    def follow_base(self) -> None:
        """See `LoRALinear`; an adapter that has been trained keeps its magnitudes."""
        if self.weight.is_meta:  # A checkpoint follows.
            nn.init.zeros_(self.lora_magnitude_vector)
        elif not self.lora_B.any():
            self.lora_magnitude_vector.copy_(_norm(self.weight))

    @torch.no_grad()
    def weight_norm(self) -> Tensor:
        """||V|| (out), float32, from ||W + B A||^2 = ||W||^2 + <2 W A^T + B A A^T, B>, row by row."""
        weight, A, B = self.weight, self.lora_A, self.lora_B * self.scaling
        products = 2 * F.linear(weight, A.to(weight.dtype)).float() + B @ (A @ A.T)
        return _positive(_norm(weight).square() + (products * B).sum(1)).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in x's dtype; the factors of rows apply in float32, rounded once.

        Raises:
            LoRAError: see `LoRALinear`.
        """
        if self.merged:
            return super().forward(x)
        result = inner = self.base_layer(x)
        if self.training and self.config.dropout > 0:
            x = F.dropout(x, self.config.dropout)
            inner = self.base_layer(x)
        if self.bias is not None:
            inner = inner - self.bias
        factor = self.lora_magnitude_vector / self.weight_norm()
        return (result + (factor - 1) * inner + factor * self._update(x)).to(x.dtype)

    def delta_weight(self) -> Tensor:
        """What the adapter adds to the base weight, (out, in), float32."""
        return with_magnitude(self.weight.float(), super().delta_weight(), self.lora_magnitude_vector)


def with_magnitude(weight: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """What to add to `weight`, where LoRA adds `delta` (both (out, in)), for rows of the norms `magnitude` (out)."""
    directed = weight + delta
    return directed * (magnitude / _positive(_norm(directed)))[:, None] - weight


def _norm(weight: Tensor) -> Tensor:
    """Of each row, (out), float32."""
    return torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)


def _positive(x: Tensor) -> Tensor:
    # A row of zeros has no direction: it stays one.
    return x.clamp(min=torch.finfo(x.dtype).tiny)
