"""LoRA on a whole pi0 or pi0.5: adapters in, the rest frozen, checkpoints of every layout accepted."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from .checkpoint.layout import accept_base_checkpoints
from .distributed import reach_every_parameter
from .lora.config import LoRAConfig
from .lora.freeze import freeze
from .lora.inject import inject, lora_layers
from .lora.quantized import HeldLinear

logger = logging.getLogger("openpi_lora_patch")


@dataclasses.dataclass(frozen=True)
class Counts:
    """Numbers of weights, parameters or held apart from them; a tensor shared by two modules counts once."""

    lora_tensors: int
    trainable: int
    total: int

    @classmethod
    def of(cls, model: nn.Module) -> Counts:
        sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
        sizes += [(math.prod(m.shape), False) for m in model.modules() if isinstance(m, HeldLinear)]
        trainable = sum(size for size, trains in sizes if trains)
        lora_tensors = sum(len(list(layer.parameters(recurse=False))) for layer in lora_layers(model).values())
        return cls(lora_tensors, trainable, sum(size for size, _ in sizes))


def apply_lora(
    model: Any,
    *,
    paligemma: Mapping[str, LoRAConfig] | None = None,
    action_expert: Mapping[str, LoRAConfig] | None = None,
    preset: str = "default",
) -> Counts:
    """Turn a pi0 or pi0.5 into one that LoRA-trains, in place, and log what trains.

    Args:
        model: openpi's `PI0Pytorch` or one of its shape: `paligemma_with_expert` holds `paligemma` and `gemma_expert`.
        paligemma: adapters of the PaliGemma tower by Linear name; None or empty leaves it whole.
        action_expert: the same for the action expert.
        preset: see `freeze.trainable_parameters`. What was frozen before stays frozen.

    Raises:
        LoRAError: a target that matches nothing, adapters that are there already, an unknown preset.
    """
    towers = model.paligemma_with_expert
    frozen = [p for p in model.parameters() if not p.requires_grad]
    if paligemma:
        inject(towers.paligemma.model.language_model.layers, paligemma)
    if action_expert:
        inject(towers.gemma_expert.model.layers, action_expert)
    freeze(model, preset, keep_frozen=frozen)
    model.lora_preset = preset
    model.register_forward_hook(reach_every_parameter)
    accept_base_checkpoints(model)
    counts = Counts.of(model)
    logger.info("Found %d LoRA parameters after model creation", counts.lora_tensors)
    logger.info("Freeze paligemma: %s, freeze action expert: %s", bool(paligemma), bool(action_expert))
    logger.info(
        "LoRA fine-tuning: %s trainable / %s total (%.2f%%)",
        f"{counts.trainable:,}",
        f"{counts.total:,}",
        100 * counts.trainable / counts.total,
    )
    return counts
