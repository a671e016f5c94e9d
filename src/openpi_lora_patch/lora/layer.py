"""A Linear with a low-rank adapter beside it.

                 x (..., in)
                /           \\
    base_layer (out, in)     lora_A (r, in)          h = lora_A x          frozen | trained
                |                  |
                |            lora_B (out, r)         y = base x + scaling * lora_B h
                 \\           /
                 y (..., out)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import LoRAError
from .config import LoRAConfig


class LoRALinear(nn.Module):
    """`base_layer(x) + scaling * (x @ lora_A.T) @ lora_B.T` (Hu et al. 2021, arXiv:2106.09685).

    `lora_A` (r, in) and `lora_B` (out, r) stay float32 whatever the module is cast to, and are cast to x's dtype in the
    forward: an update of a bfloat16 adapter is mostly lost to rounding. `lora_B` starts at zero, so that a fresh
    adapter changes nothing; `lora_A` as PEFT's, uniform in +-1/sqrt(in). `weight`, `bias`, `in_features` and
    `out_features` read through to `base_layer`.

    Args:
        base_layer: any Linear, quantised ones too; it is frozen.
        config: rank, alpha, rslora and dropout.
    """

    def __init__(self, base_layer: nn.Module, config: LoRAConfig) -> None:
        super().__init__()
        self.base_layer: Any = base_layer.requires_grad_(False)
        self.config = config
        self.scaling = config.scaling
        self.lora_A = self._parameter(config.rank, self.in_features)
        self._make_rest()
        self._unmerged: Tensor | None = None
        self.reset_parameters()

    def _make_rest(self) -> None:
        self.lora_B = self._parameter(self.out_features, self.config.rank)

    def _parameter(self, *shape: int) -> nn.Parameter:
        device = self.weight.device
        # Beside a weight that has no memory yet: where one would have it.
        return nn.Parameter(torch.empty(*shape, dtype=torch.float32, device=None if device.type == "meta" else device))

    def reset_parameters(self) -> None:
        """Start afresh: an adapter that changes nothing."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def follow_base(self) -> None:
        """Start from the base weight as it is now, in a fresh adapter that depends on it."""

    def parameter_for(self, B: Tensor) -> Tensor:
        """What the parameter that `lora_B` is made of holds when `lora_B` is to be `B` (out, r)."""
        return B

    @property
    def weight(self) -> Tensor:
        """The base layer's weight (out, in)."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias (out) or None."""
        return self.base_layer.bias

    @property
    def in_features(self) -> int:
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        return self.base_layer.out_features

    @property
    def merged(self) -> bool:
        """Whether the base weight holds the adapter at present."""
        return self._unmerged is not None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in x's dtype.

        Raises:
            LoRAError: training while merged, which would leave the adapter without a gradient.
        """
        if self._unmerged is not None:
            if self.training and torch.is_grad_enabled():
                raise LoRAError("A merged adapter cannot be trained.", fix="call unmerge(), or eval() for inference")
            # Without a second `Module.__call__`, which one sample's small kernels do not hide.
            return self.base_layer.forward(x)
        return self.base_layer(x) + self._update(F.dropout(x, self.config.dropout, self.training))

    def _update(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.lora_A.to(x.dtype)), (self.lora_B * self.scaling).to(x.dtype))

    def delta_weight(self) -> Tensor:
        """What the adapter adds to the base weight, (out, in), float32."""
        return self.scaling * (self.lora_B @ self.lora_A)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the adapter to the base weight, in float32, rounded once. The weight before is kept for `unmerge()`."""
        if not self.merged:
            weight = self.base_layer.weight
            if not isinstance(weight, nn.Parameter):
                raise LoRAError(
                    "A base that makes its weight anew each time, as a quantised one does, takes no adapter into it.",
                    fix="merge the files: python -m openpi_lora_patch.merge",
                )
            before = weight.detach().clone()
            weight.copy_(weight.float() + self.delta_weight())
            self._unmerged = before

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the base weight, bit for bit."""
        if self._unmerged is not None:
            self.base_layer.weight.copy_(self._unmerged)
            self._unmerged = None

    def extra_repr(self) -> str:
        return f"rank={self.config.rank}, scaling={self.scaling:g}, merged={self.merged}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        adapters = {id(t) for p in self.parameters(recurse=False) for t in (p, p.grad) if t is not None}

        def move_only(tensor: Tensor) -> Tensor:
            if id(tensor) not in adapters:
                return fn(tensor)
            applied = fn(tensor)
            return applied if applied.dtype == tensor.dtype else tensor.to(applied.device)

        return super()._apply(move_only, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.merged:
            raise LoRAError(
                f"{prefix[:-1]} is merged: its checkpoint would apply the adapter twice.", fix="call unmerge() first"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)
