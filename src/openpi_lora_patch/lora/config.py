"""How strong and how large the adapters are."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ..errors import LoRAError

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN = ("gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """One kind of adapter (Hu et al. 2021, arXiv:2106.09685).

    Attributes:
        rank: r, the inner size of an adapter.
        alpha: numerator of the scaling.
        rslora: divide by sqrt(rank) in place of rank (Kalajdzievski 2023, arXiv:2312.03732).
        dropout: probability with which an element of the adapter's input is zeroed in training.

    Raises:
        LoRAError: a rank below 1, an alpha that is not finite, or a dropout outside [0, 1).
    """

    rank: int
    alpha: float
    rslora: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise LoRAError("A LoRA rank has to be positive.", found=str(self.rank))
        if not math.isfinite(self.scaling):
            raise LoRAError("A LoRA alpha has to be finite.", found=str(self.alpha))
        if not 0.0 <= self.dropout < 1.0:
            raise LoRAError("A LoRA dropout has to be in [0, 1).", found=str(self.dropout))

    @property
    def scaling(self) -> float:
        """What the product of the two matrices is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def from_openpi(lora_configs: Mapping[str, Any], dropout: float = 0.0) -> dict[str, LoRAConfig]:
    """Adapters by Linear name, for one tower, from the `lora_configs` of an openpi variant (`openpi/models/gemma.py`).

    Args:
        lora_configs: openpi's own `LoRAConfig` (`openpi/models/lora.py`) under "attn", "ffn" or both; empty where the
            variant has no LoRA.
        dropout: see `LoRAConfig`; openpi's has none.

    Raises:
        LoRAError: a key other than these two.
    """
    names = {"attn": ATTENTION, "ffn": FFN}
    if unknown := sorted(set(lora_configs) - set(names)):
        raise LoRAError("Unknown LoRA kind in an openpi variant.", found=str(unknown), expected=str(sorted(names)))
    return {
        name: LoRAConfig(rank=theirs.rank, alpha=theirs.alpha, rslora=theirs.rslora, dropout=dropout)
        for kind, theirs in lora_configs.items()
        for name in names[kind]
    }
