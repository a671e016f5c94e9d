"""PEFT's format: what its `adapter_config.json` says about each adapter, and how it names tensors.

Source: PEFT 0.21, `LoraConfig`, `get_peft_model_state_dict` and `get_pattern_key` (the format; no code of it).
"""

from __future__ import annotations

import collections
import math
import operator
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from ..errors import CheckpointError, LoRAError
from ..lora.config import LoRAConfig

PREFIX = "base_model.model."
MAGNITUDE = "lora_magnitude_vector"
_ENDS = {"lora_A": ".lora_A.weight", "lora_B": ".lora_B.weight", MAGNITUDE: f".{MAGNITUDE}"}
# Options under which an adapter is more than `scaling * B A` on a Linear or DoRA, with the values that leave it so.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
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

# A file may come from a stranger: the longest pattern, or name to be matched with one, and for how long in all.
_LONGEST, _SECONDS = 256, 10.0


def tensor_name(module: str, parameter: str) -> str:
    """PEFT's name of "lora_A", "lora_B" or "lora_magnitude_vector" of the Linear `module`."""
    return f"{PREFIX}{module}{_ENDS[parameter]}"


def parameters(config: LoRAConfig) -> list[str]:
    """What an adapter is made of, in the order of the parameters of a `LoRALinear`."""
    return [name for name in _ENDS if name != MAGNITUDE or config.use_dora]


def tensor_names(module: str, config: LoRAConfig) -> list[str]:
    """PEFT's names of the same."""
    return [tensor_name(module, name) for name in parameters(config)]


def adapted_modules(names: Iterable[str]) -> list[str]:
    """The Linears, sorted, that the tensors `names` of a PEFT file are adapters of."""
    return sorted(
        {name.removeprefix(PREFIX).removesuffix(end) for name in names for end in _ENDS.values() if end in name}
    )


def describe(configs: Mapping[str, LoRAConfig], modules_to_save: Iterable[str]) -> dict[str, Any]:
    """An `adapter_config.json`.

    Args:
        configs: the adapter of each Linear, by the Linear's full name.
        modules_to_save: full names of the modules that are saved whole.

    Raises:
        CheckpointError: DoRA for some of them alone.
    """
    use_dora = {config.use_dora for config in configs.values()}
    if len(use_dora) > 1:
        raise CheckpointError("PEFT's format has DoRA for all adapters or for none.", found="some with, some without")
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
        "use_dora": use_dora.pop(),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "lora_dropout": max(config.dropout for config in configs.values()),
        "target_modules": sorted(configs),
        "modules_to_save": sorted(modules_to_save) or None,
        "rank_pattern": {re.escape(name): r for name, (r, _) in sorted(sizes.items()) if r != rank},
        "alpha_pattern": {re.escape(name): a for name, (_, a) in sorted(sizes.items()) if a != alpha},
    }


def lora_configs(config: Mapping[str, Any], modules: Collection[str]) -> dict[str, LoRAConfig]:
    """What an `adapter_config.json` says of each of `modules`.

    Raises:
        CheckpointError: an option that neither LoRA nor DoRA can express, or a value that has no meaning.
    """
    defaults = {"bias": "none", "init_lora_weights": True}
    odd = {
        name: config.get(name, defaults.get(name))
        for name, plain in _PLAIN.items()
        if config.get(name, defaults.get(name)) not in plain
    }
    if odd:
        raise CheckpointError(
            "The adapter is neither plain LoRA nor DoRA.",
            found=", ".join(f"{name}={value!r}" for name, value in odd.items()),
            expected="what can be written as scaling * B A, with DoRA or without, on an unchanged base",
            fix="train it without these options, or merge it with PEFT and load the merged checkpoint",
        )
    try:
        rslora, dropout = bool(config.get("use_rslora")), float(config.get("lora_dropout") or 0.0)
        use_dora = {None: False, False: False, True: True}[config.get("use_dora")]
        ranks = _by_pattern(config.get("rank_pattern"), modules, config["r"])
        alphas = _by_pattern(config.get("alpha_pattern"), modules, config["lora_alpha"])
        return {
            module: LoRAConfig(operator.index(rank), float(alphas[module]), rslora, dropout, use_dora=use_dora)
            for module, rank in ranks.items()
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
    return (one.rank, one.use_dora) == (other.rank, other.use_dora) and math.isclose(one.scaling, other.scaling)


def _by_pattern(patterns: Mapping[str, Any] | None, modules: Collection[str], default: Any) -> dict[str, Any]:
    """For each module the value of the first pattern that matches it; PEFT's match an end of its name, from a dot on.

    Raises:
        ValueError: matching takes too long, or could.
    """
    patterns, deadline = patterns or {}, time.monotonic() + _SECONDS
    if patterns and max(map(len, (*patterns, *modules))) > _LONGEST:
        raise ValueError(f"a pattern or a name has more than {_LONGEST} characters")

    def in_time(items: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
        for item in items:
            if time.monotonic() > deadline:
                raise ValueError(f"{len(patterns)} patterns take more than {_SECONDS} s")
            yield item

    compiled = [(_bounded(pattern), value) for pattern, value in in_time(patterns.items())]
    return {
        module: next((value for pattern, value in in_time(compiled) if pattern.fullmatch(module)), default)
        for module in modules
    }


def _bounded(pattern: str) -> re.Pattern[str]:
    """What matches as PEFT has `pattern` match, and cannot take exponential time, as `(a+)+` or `(a|a)(a|a)...` can.

    Raises:
        ValueError: more than two repeats, more than one group, or one that is repeated.
    """
    # What is escaped or in brackets stands for itself.
    syntax = re.sub(r"\\.|\[.*?\]", "", pattern.replace("(?:", "("), flags=re.DOTALL)
    if len(re.findall(r"[*+?{]", syntax)) > 2 or syntax.count("(") > 1 or re.search(r"\)[*+?{]", syntax):
        raise ValueError(f"{pattern!r:.100} has more than two repeats, more than one group, or one that is repeated")
    re.compile(pattern)  # One as `)|(` has a meaning only within ours.
    return re.compile(rf"(.*\.)?({pattern})")
