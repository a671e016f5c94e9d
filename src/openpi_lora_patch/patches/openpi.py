"""`PI0Pytorch` with a `*_lora` variant: built with adapters, frozen, and taking base checkpoints.

Source: openpi, `models_pytorch/pi0_pytorch.py` (commit 15a9616), whose code runs unchanged.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from types import ModuleType
from typing import Any

from ..apply import apply_lora
from ..build import complete, follows, initialising
from ..checkpoint.training import load_adapters_through, save_adapters_only, whole
from ..lora import LoRAConfig, as_jax, from_openpi, lora_layers
from ..lora.quantized import UnusedLinear, quantize, require
from ..replace import replace
from ..settings import Settings
from . import openpi_fast, openpi_sample, openpi_training, paligemma
from .openpi_variants import is_dummy

logger = logging.getLogger("openpi_lora_patch")

# Beside openpi's `dummy` towers a full SigLIP would take 8 s a step on two cores.
_SMALL_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def patch(module: ModuleType, settings: Settings, undo: contextlib.ExitStack) -> None:
    """Give `PI0Pytorch` adapters where its variants ask for them, and images the way its convolution takes them."""
    cls = module.PI0Pytorch
    script = undo.enter_context(contextlib.ExitStack())
    replace(undo, cls, "__init__", _building(cls.__init__, module, settings, script))
    replace(undo, cls, "load_state_dict", _loading(cls.load_state_dict))
    if settings.compile != "0":
        openpi_sample.patch(module, undo)
    replace(undo, cls, "_preprocess_observation", _channels_first(cls._preprocess_observation))
    openpi_fast.patch(module, settings, undo)


def _building(original: Any, module: ModuleType, settings: Settings, script: contextlib.ExitStack) -> Any:
    @functools.wraps(original)
    def __init__(self: Any, config: Any) -> None:
        if settings.base != "bf16":
            require(settings.base)
        small = is_dummy(config.paligemma_variant)
        with paligemma.vision_config(**_SMALL_VISION) if small else contextlib.nullcontext(), initialising():
            original(self, config)
        openpi_sample.use_eager_attention(self.paligemma_with_expert)
        adapters = {
            tower: _adapters(module._gemma.get_config(variant), settings)
            for tower, variant in (
                ("paligemma", config.paligemma_variant),
                ("action_expert", config.action_expert_variant),
            )
        }
        if any(adapters.values()):
            apply_lora(self, **adapters, preset=settings.freeze)
            if settings.base != "bf16":
                quantize(lora_layers(self).values(), settings.base)
            expert = self.paligemma_with_expert.gemma_expert
            expert.lm_head = UnusedLinear(expert.lm_head)
            openpi_fast.enable(self)
            if settings.dora:
                logger.info("DoRA: Linears with adapters run one by one; OPENPI_LORA_FUSED does not apply to them")
            load_adapters_through(self, settings.base_weights)
            openpi_training.patch(script, settings)
            if settings.save == "adapter":
                save_adapters_only(self)
        if follows():
            complete(self)

    return __init__


def _loading(original: Any) -> Any:
    @functools.wraps(original)
    def load_state_dict(self: Any, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        with whole(self) if strict and lora_layers(self) else contextlib.nullcontext():
            return original(self, state_dict, strict, assign)

    return load_state_dict


def _adapters(variant: Any, settings: Settings) -> dict[str, LoRAConfig]:
    adapters = from_openpi(variant.lora_configs, settings.dropout, use_dora=settings.dora)
    return as_jax(adapters, variant.num_heads) if settings.parametrisation == "jax" else adapters


def _channels_first(original: Any) -> Any:
    @functools.wraps(original)
    def _preprocess_observation(self: Any, observation: Any, *, train: bool = True) -> Any:
        images, *rest = original(self, observation, train=train)
        # openpi hands on images as they come; its fake data are (batch, height, width, 3).
        return ([x if x.shape[1] == 3 else x.permute(0, 3, 1, 2) for x in images], *rest)

    return _preprocess_observation
