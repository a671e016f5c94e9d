"""A `dummy_lora` variant beside openpi's `gemma_2b_lora` and `gemma_300m_lora`, for runs of seconds on a CPU.

Source: openpi, `models/gemma.py` (commit 15a9616).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from types import ModuleType
from typing import Any

from ..replace import replace
from ..settings import Settings

DUMMY_LORA = "dummy_lora"


def is_dummy(variant: str) -> bool:
    """Whether `variant` is one of the tiny towers."""
    return variant in ("dummy", DUMMY_LORA)


def patch(module: ModuleType, settings: Settings, undo: contextlib.ExitStack) -> None:
    """Teach `get_config` the variant; openpi calls it through its module everywhere."""
    original = module.get_config
    lora = module.lora.LoRAConfig(rank=4, alpha=4.0)

    @functools.wraps(original)
    def get_config(variant: str) -> Any:
        if variant != DUMMY_LORA:
            return original(variant)
        return dataclasses.replace(original("dummy"), lora_configs={"attn": lora, "ffn": lora})

    replace(undo, module, "get_config", get_config)
