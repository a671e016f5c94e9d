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
        form: which parameters the two matrices are made of, see `lora.jax`.
        heads: number of them, for the forms that have parameters for each.
        use_dora: rows of the adapted weight have norms of their own that train, see `lora.dora`.

    Raises:
        LoRAError: a rank below 1, an alpha that is not finite, a dropout outside [0, 1), or DoRA of JAX's.
    """

    rank: int
    alpha: float
    rslora: bool = False
    dropout: float = 0.0
    form: str = "plain"
    heads: int = 1
    use_dora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise LoRAError("A LoRA rank has to be positive.", found=str(self.rank))
        if not math.isfinite(self.scaling):
            raise LoRAError("A LoRA alpha has to be finite.", found=str(self.alpha))
        if not 0.0 <= self.dropout < 1.0:
            raise LoRAError("A LoRA dropout has to be in [0, 1).", found=str(self.dropout))
        if self.use_dora and self.form != "plain":
            raise LoRAError("openpi's JAX code has no DoRA.", fix="leave out OPENPI_LORA_DORA, or _PARAMETRISATION=jax")

    @property
    def scaling(self) -> float:
        """What the product of the two matrices is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def from_openpi(
    lora_configs: Mapping[str, Any], dropout: float = 0.0, *, use_dora: bool = False
) -> dict[str, LoRAConfig]:
    """Adapters by Linear name, for one tower, from the `lora_configs` of an openpi variant (`openpi/models/gemma.py`).

    Args:
        lora_configs: openpi's own `LoRAConfig` (`openpi/models/lora.py`) under "attn", "ffn" or both; empty where the
            variant has no LoRA.
        dropout, use_dora: see `LoRAConfig`; openpi's has neither.

    Raises:
        LoRAError: a key other than these two.
    """
    names = {"attn": ATTENTION, "ffn": FFN}
    if unknown := sorted(set(lora_configs) - set(names)):
        raise LoRAError("Unknown LoRA kind in an openpi variant.", found=str(unknown), expected=str(sorted(names)))
    return {
        name: LoRAConfig(theirs.rank, theirs.alpha, theirs.rslora, dropout, use_dora=use_dora)
        for kind, theirs in lora_configs.items()
        for name in names[kind]
    }


def as_jax(adapters: Mapping[str, LoRAConfig], heads: int) -> dict[str, LoRAConfig]:
    """The same adapters as openpi's JAX code parametrises them (`openpi/models/{gemma,lora}.py`), see `lora.jax`.

    Each query head has an A and a B of its own, which is an adapter of `heads` times the rank; each head has a B for
    o_proj, and the Bs are added up; the FFN applies no scaling.

    Args:
        adapters: by Linear name, for one tower.
        heads: of the tower's attention.
    """
    forms = {"q_proj": "per_head", "o_proj": "head_sum"}
    jax = {}
    for name, config in adapters.items():
        rank = config.rank * (heads if name == "q_proj" else 1)
        scaling = 1.0 if name in FFN else config.scaling
        jax[name] = dataclasses.replace(
            config, rank=rank, alpha=scaling * rank, rslora=False, form=forms.get(name, "jax"), heads=heads
        )
    return jax
