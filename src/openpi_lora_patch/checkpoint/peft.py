"""PEFT's format: what its `adapter_config.json` says about each adapter, and how it names tensors.

Source: PEFT 0.21, `LoraConfig`, `get_peft_model_state_dict` and `get_pattern_key` (the format; no code of it).
"""

from __future__ import annotations

import collections
import math
import operator
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import CheckpointError, LoRAError
from ..lora.config import LoRAConfig

PREFIX = "base_model.model."
_MATRICES = {"lora_A": ".lora_A.weight", "lora_B": ".lora_B.weight"}
# Options under which an adapter is more than `scaling * B A` on a Linear, with the values that leave it at that.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "use_bdlora": (False, None),
    "bias": ("none",),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, {}, []),
    "layer_replication": (None,),
    # The others start from a changed base weight, which the file does not hold.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica"),
}


def tensor_name(module: str, matrix: str) -> str:
    """PEFT's name of "lora_A" or "lora_B" of the Linear `module`."""
    return f"{PREFIX}{module}{_MATRICES[matrix]}"


def adapted_modules(names: Iterable[str]) -> list[str]:
    """The Linears, sorted, that the tensors `names` of a PEFT file are adapters of."""
    return sorted(
        {name.removeprefix(PREFIX).removesuffix(end) for name in names for end in _MATRICES.values() if end in name}
    )


def describe(configs: Mapping[str, LoRAConfig], modules_to_save: Iterable[str]) -> dict[str, Any]:
    """An `adapter_config.json`.

    Args:
        configs: the adapter of each Linear, by the Linear's full name.
        modules_to_save: full names of the modules that are saved whole.
    """
    # PEFT has rsLoRA for all adapters or for none; where they differ, alpha says the same.
    rslora = all(config.rslora for config in configs.values())
    sizes = {
        name: (config.rank, config.alpha if config.rslora == rslora else config.scaling * config.rank)
        for name, config in configs.items()
    }
    (rank, alpha), _ = collections.Counter(sizes.values()).most_common(1)[0]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "lora_dropout": max(config.dropout for config in configs.values()),
        "target_modules": sorted(configs),
        "modules_to_save": sorted(modules_to_save) or None,
        "rank_pattern": {re.escape(name): r for name, (r, _) in sorted(sizes.items()) if r != rank},
        "alpha_pattern": {re.escape(name): a for name, (_, a) in sorted(sizes.items()) if a != alpha},
    }


def lora_configs(config: Mapping[str, Any], modules: Iterable[str]) -> dict[str, LoRAConfig]:
    """What an `adapter_config.json` says of each of `modules`.

    Raises:
        CheckpointError: DoRA or another option that plain LoRA cannot express, or a value that has no meaning.
    """
    defaults = {"bias": "none", "init_lora_weights": True}
    odd = {
        name: config.get(name, defaults.get(name))
        for name, plain in _PLAIN.items()
        if config.get(name, defaults.get(name)) not in plain
    }
    if odd:
        raise CheckpointError(
            "The adapter is no plain LoRA.",
            found=", ".join(f"{name}={value!r}" for name, value in odd.items()),
            expected="what can be written as scaling * B A, on an unchanged base",
            fix="train it without these options, or merge it with PEFT and load the merged checkpoint",
        )
    try:
        rslora, dropout = bool(config.get("use_rslora")), float(config.get("lora_dropout") or 0.0)
        return {
            module: LoRAConfig(
                rank=operator.index(_pattern(config.get("rank_pattern"), module, config["r"])),
                alpha=float(_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])),
                rslora=rslora,
                dropout=dropout,
            )
            for module in modules
        }
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        OverflowError,
        RecursionError,
        re.error,
        LoRAError,
    ) as error:
        raise CheckpointError("An adapter_config.json has no meaning.", found=repr(error)) from None


def same_function(one: LoRAConfig, other: LoRAConfig) -> bool:
    """Whether two adapters with equal matrices compute the same."""
    return one.rank == other.rank and math.isclose(one.scaling, other.scaling)


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    # PEFT matches a pattern at the end of a name, from a dot on.
    matching = (value for key, value in (patterns or {}).items() if re.fullmatch(rf"(.*\.)?({key})", module))
    return next(matching, default)
