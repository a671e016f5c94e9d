"""lerobot's pi0 and pi0.5 with openpi's LoRA variants: `--policy.paligemma_variant=gemma_2b_lora`, and so on.

The variant is part of the policy's config, so that a saved policy says by itself which adapters it has.

Source: lerobot 0.4.0 to 0.4.4, `policies/{pi0,pi05}/modeling_*.py`, whose code runs unchanged; the variants are from
openpi, `models/gemma.py` (commit 15a9616).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from ..apply import apply_lora
from ..errors import CheckpointError, LoRAError
from ..lora import LoRAConfig, as_jax, lora_layers
from ..lora.config import ATTENTION, FFN
from ..lora.freeze import check_frozen
from ..lora.quantized import quantize, require
from ..replace import replace
from ..settings import Settings

# Adapters on all seven Linears of a layer, by variant; the tower is the variant without its suffix.
_SUFFIX = "_lora"
_VARIANTS = {"gemma_2b_lora": LoRAConfig(rank=16, alpha=16.0), "gemma_300m_lora": LoRAConfig(rank=32, alpha=32.0)}
_HEADS = 8


def patch(module: ModuleType, settings: Settings, undo: contextlib.ExitStack) -> str | None:
    """Teach a `modeling_pi0` or `modeling_pi05` the variants, and make it say so when a LoRA policy fails to load.

    Other releases of lerobot are left alone: they build their pi0 from classes of their own, and need nothing of us.

    Returns:
        None, or why the module was left alone.
    """
    if not hasattr(module, "GemmaForCausalLM"):
        return "this lerobot builds its pi0 from classes of its own"
    name = module.__name__.rpartition("_")[2].upper()
    config, model, policy = (getattr(module, name + part) for part in ("Config", "Pytorch", "Policy"))
    replace(undo, config, "__post_init__", _validating_the_tower(config.__post_init__))
    replace(undo, module, "get_gemma_config", _without_suffix(module.get_gemma_config))
    replace(undo, model, "__init__", _building(model.__init__, settings))
    replace(undo, policy, "forward", _holding_the_freeze(policy.forward))
    replace(undo, policy, "load_state_dict", _loading(policy.load_state_dict))
    replace(undo, policy, "from_pretrained", classmethod(_loading_loudly(policy.from_pretrained.__func__)))
    return None


def _tower(variant: str) -> str:
    return variant.removesuffix(_SUFFIX) if variant in _VARIANTS else variant


def _validating_the_tower(original: Any) -> Any:
    @functools.wraps(original)
    def __post_init__(self: Any) -> None:
        asked = self.paligemma_variant, self.action_expert_variant
        self.paligemma_variant, self.action_expert_variant = map(_tower, asked)
        original(self)
        self.paligemma_variant, self.action_expert_variant = asked

    return __post_init__


def _without_suffix(original: Any) -> Any:
    @functools.wraps(original)
    def get_gemma_config(variant: str) -> Any:
        return original(_tower(variant))

    return get_gemma_config


def _building(original: Any, settings: Settings) -> Any:
    @functools.wraps(original)
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        if settings.base != "bf16":
            require(settings.base)
        # Up to 0.4.2 the config has no such switch.
        if config.paligemma_variant in _VARIANTS and getattr(config, "train_expert_only", False):
            raise LoRAError(
                "The policy is to train its expert only, and to have adapters in PaliGemma.",
                found=f"train_expert_only=True and paligemma_variant={config.paligemma_variant!r}",
                fix=f"leave out train_expert_only, or use paligemma_variant={_tower(config.paligemma_variant)!r}",
            )
        original(self, config, *args, **kwargs)
        adapters = {
            "paligemma": _adapters(config.paligemma_variant, settings),
            "action_expert": _adapters(config.action_expert_variant, settings),
        }
        if any(adapters.values()):
            apply_lora(self, **adapters, preset=settings.freeze)
            if settings.base != "bf16":
                quantize(lora_layers(self).values(), settings.base)

    return __init__


def _adapters(variant: str, settings: Settings) -> dict[str, LoRAConfig]:
    if variant not in _VARIANTS:
        return {}
    config = dataclasses.replace(_VARIANTS[variant], dropout=settings.dropout, use_dora=settings.dora)
    adapters = dict.fromkeys(ATTENTION + FFN, config)
    return as_jax(adapters, _HEADS) if settings.parametrisation == "jax" else adapters


def _holding_the_freeze(original: Any) -> Any:
    # lerobot calls `policy.forward` and `model.forward`, neither of which runs the model's forward hooks.
    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if lora_layers(self):
            check_frozen(self.model)
        return original(self, *args, **kwargs)

    return forward


def _loading(original: Any) -> Any:
    @functools.wraps(original)
    def load_state_dict(self: Any, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        if not lora_layers(self):
            return original(self, state_dict, strict, assign)
        try:
            result = original(self, _with_tied_names(self, state_dict) if strict else state_dict, strict, assign)
        except Exception as error:
            self._load_problem = str(error)
            raise
        self._load_problem = None
        return result

    return load_state_dict


def _with_tied_names(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state_dict` with tied tensors under all of their names; a safetensors file holds each tensor once."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    filled = dict(state_dict)
    for tied in names.values():
        held = [name for name in tied if name in state_dict]
        filled.update({name: state_dict[held[0]] for name in tied if held and name not in state_dict})
    return filled


def _loading_loudly(original: Any) -> Any:
    @functools.wraps(original)
    def from_pretrained(cls: Any, pretrained_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As lerobot's, which prints what went wrong and goes on with random weights; with adapters it raises.

        Raises:
            CheckpointError: nothing was loaded into a policy with adapters, or not all of it.
        """
        policy = original(cls, pretrained_name_or_path, *args, **kwargs)
        problem = vars(policy).pop("_load_problem", "no weights were found there")
        if lora_layers(policy) and problem is not None:
            raise CheckpointError(
                f"lerobot could not load {pretrained_name_or_path} into a policy with adapters.",
                found=problem,
                expected="a checkpoint of this policy, with its adapters or without any",
            )
        return policy

    return from_pretrained
